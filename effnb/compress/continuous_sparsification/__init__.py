"""Continuous sparsification: learned deterministic gates, ticket search, and the baselines at equal density."""

from .annealer import Annealer
from .functional import gate_scale, hard_gate, soft_gate, soft_gates
from .gate import ContinuousGate, FixedMask
from .gradual import GradualPruner, gmp_sparsity, magnitude_masks
from .guard import check_optimizer
from .handle import CSHandle, apply_cs
from .hard_concrete import HardConcreteGate, L0Handle, apply_l0
from .layers import GatedLayers, select_layers
from .masks import (
    MaskHandle,
    apply_masks,
    global_magnitude_mask,
    random_masks,
    shuffled_masks,
    top_k_masks,
)
from .schedule import BetaSchedule, FitResult, fit_s0
from .sparse import SparseLinear, sparsify_linears
from .storage import encodings, load_sparse, save_sparse
from .ticket import Ticket, full_masks, magnitude_ticket_search, ticket_search

__all__ = [
    "Annealer",
    "BetaSchedule",
    "CSHandle",
    "ContinuousGate",
    "FitResult",
    "FixedMask",
    "GatedLayers",
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
    "encodings",
    "fit_s0",
    "full_masks",
    "gate_scale",
    "global_magnitude_mask",
    "gmp_sparsity",
    "hard_gate",
    "load_sparse",
    "magnitude_masks",
    "magnitude_ticket_search",
    "random_masks",
    "save_sparse",
    "select_layers",
    "shuffled_masks",
    "soft_gate",
    "soft_gates",
    "sparsify_linears",
    "ticket_search",
    "top_k_masks",
]
