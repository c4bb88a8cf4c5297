"""Architecture search without training: cell spaces, zero-cost proxies, search under a budget, rank statistics."""

from . import nanobench, nb201, proxies, search, stats, zico
from .proxies import available_proxies, score_all
from .search import CellSpace, SearchResult, evolve, random_search
from .stats import Correlation, rank_correlation, rank_table, spearman_brown
from .zico import GradientMoments, gradient_moments, zico_floor, zico_per_layer, zico_terms

__all__ = [
    "CellSpace",
    "Correlation",
    "GradientMoments",
    "SearchResult",
    "available_proxies",
    "evolve",
    "gradient_moments",
    "nanobench",
    "nb201",
    "proxies",
    "random_search",
    "rank_correlation",
    "rank_table",
    "score_all",
    "search",
    "spearman_brown",
    "stats",
    "zico",
    "zico_floor",
    "zico_per_layer",
    "zico_terms",
]
