"""Architecture search without training: cell spaces, zero-cost proxies, search under a budget, rank statistics."""

from effnb.nas import nanobench, nb201, proxies, search, stats, zico
from effnb.nas.proxies import *
from effnb.nas.search import *
from effnb.nas.stats import *
from effnb.nas.zico import *

__all__ = [
    "nanobench", "nb201", "proxies", "search", "stats", "zico",
    *proxies.__all__, *search.__all__, *stats.__all__, *zico.__all__,
]  # fmt: skip
