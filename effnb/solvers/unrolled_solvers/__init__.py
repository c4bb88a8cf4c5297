"""Unrolled solvers for sparse recovery: ISTA, LISTA and its kin, HyperLISTA."""

from effnb.solvers.unrolled_solvers.classic import (
    fista,
    ista,
    omp,
    soft_threshold,
    support_least_squares,
    support_select,
)
from effnb.solvers.unrolled_solvers.hyperlista import HyperLISTA, SingleSolver
from effnb.solvers.unrolled_solvers.lista import ALISTA, LISTA, LISTACP, LISTACPSS, TiLISTA, train_layerwise
from effnb.solvers.unrolled_solvers.problem import (
    SparseProblem,
    analytic_weights,
    image_patches,
    mutual_coherence,
    nmse_db,
    normalize_columns,
    overcomplete_dct,
    psnr_db,
)
from effnb.solvers.unrolled_solvers.tune import TuneResult, recovery_score, tune_hyperlista

__all__ = [
    "ALISTA",
    "LISTA",
    "LISTACP",
    "LISTACPSS",
    "HyperLISTA",
    "SingleSolver",
    "SparseProblem",
    "TiLISTA",
    "TuneResult",
    "analytic_weights",
    "fista",
    "image_patches",
    "ista",
    "mutual_coherence",
    "nmse_db",
    "normalize_columns",
    "omp",
    "overcomplete_dct",
    "psnr_db",
    "recovery_score",
    "soft_threshold",
    "support_least_squares",
    "support_select",
    "train_layerwise",
    "tune_hyperlista",
]
