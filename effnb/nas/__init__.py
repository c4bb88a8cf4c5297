"""Architecture search without training: cell spaces, zero-cost proxies, search under a budget, rank statistics."""

from . import nanobench, nb201

__all__ = ["nanobench", "nb201"]
