"""Continuous sparsification: learned deterministic gates, ticket search, and the baselines at equal density."""

from effnb.compress._gated import check_optimizer, select_layers
from effnb.compress.continuous_sparsification.cs import (
    Annealer,
    BetaSchedule,
    CSHandle,
    FitResult,
    Ticket,
    apply_cs,
    fit_s0,
    magnitude_ticket_search,
    ticket_search,
)
from effnb.compress.continuous_sparsification.gates import (
    ContinuousGate,
    HardConcreteGate,
    L0Handle,
    apply_l0,
    hard_gate,
    soft_gate,
)
from effnb.compress.continuous_sparsification.masks import (
    GradualPruner,
    MaskHandle,
    apply_masks,
    full_masks,
    global_magnitude_mask,
    gmp_sparsity,
    random_masks,
    shuffled_masks,
    top_k_masks,
)
from effnb.compress.continuous_sparsification.storage import SparseLinear, load_sparse, save_sparse, sparsify_linears

__all__ = [
    "Annealer",
    "BetaSchedule",
    "CSHandle",
    "ContinuousGate",
    "FitResult",
    "GradualPruner",
    "HardConcreteGate",
    "L0Handle",
    "MaskHandle",
    "SparseLinear",
    "Ticket",
    "apply_cs",
    "apply_l0",
    "apply_masks",
    "check_optimizer",
    "fit_s0",
    "full_masks",
    "global_magnitude_mask",
    "gmp_sparsity",
    "hard_gate",
    "load_sparse",
    "magnitude_ticket_search",
    "random_masks",
    "save_sparse",
    "select_layers",
    "shuffled_masks",
    "soft_gate",
    "sparsify_linears",
    "ticket_search",
    "top_k_masks",
]
