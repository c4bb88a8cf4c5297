"""Unrolled solvers for sparse recovery: ISTA, LISTA and its kin, HyperLISTA."""

from effnb.solvers.unrolled_solvers.classic import fista, ista, lasso_objective
from effnb.solvers.unrolled_solvers.conjugate import FrozenSupport
from effnb.solvers.unrolled_solvers.greedy import omp, support_least_squares
from effnb.solvers.unrolled_solvers.hyperlista import HyperLISTA
from effnb.solvers.unrolled_solvers.images import image_patches, merge_patches, overcomplete_dct, psnr_db
from effnb.solvers.unrolled_solvers.layerwise import train_layerwise
from effnb.solvers.unrolled_solvers.nets import ALISTA, LISTA, LISTACP, LISTACPSS, LISTASS, TiLISTA
from effnb.solvers.unrolled_solvers.problem import SparseProblem, nmse_db, normalize_columns
from effnb.solvers.unrolled_solvers.single import SingleSolver
from effnb.solvers.unrolled_solvers.thresholds import soft_threshold, support_select
from effnb.solvers.unrolled_solvers.tune import TuneResult, recovery_score, tune_hyperlista
from effnb.solvers.unrolled_solvers.weights import analytic_weights, mutual_coherence

__all__ = [
    "ALISTA",
    "LISTA",
    "LISTACP",
    "LISTACPSS",
    "LISTASS",
    "FrozenSupport",
    "HyperLISTA",
    "SingleSolver",
    "SparseProblem",
    "TiLISTA",
    "TuneResult",
    "analytic_weights",
    "fista",
    "image_patches",
    "ista",
    "lasso_objective",
    "merge_patches",
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
