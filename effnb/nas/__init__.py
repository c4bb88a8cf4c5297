"""Architecture search without training: cell spaces, zero-cost proxies, search under a budget, rank statistics."""

from . import nanobench, nb201, proxies
from .proxies import available_proxies, score_all

__all__ = ["available_proxies", "nanobench", "nb201", "proxies", "score_all"]
