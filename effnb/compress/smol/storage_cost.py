"""What a map of bits costs: payload, and the entropy of the map itself, without which nobody can decode it."""

from typing import NamedTuple

import torch
from torch import Tensor


class BitCost(NamedTuple):
    """Bits per weight: ``payload`` (the digits) and ``index`` (the map of how many digits each weight has).

    Reference: shannon1948mathematical

    >>> BitCost(1.5, 0.25).total
    1.75
    """

    payload: float
    index: float

    @property
    def total(self) -> float:
        """Payload and index."""
        return self.payload + self.index


def map_entropy(bits: Tensor) -> float:
    r"""Entropy ``-sum(q log2 q)`` of the frequencies ``q`` of the values, in bits per entry.

    Args:
        bits: whole numbers, any shape.

    Returns:
        0 for an empty or constant tensor.

    Reference: shannon1948mathematical

    >>> map_entropy(torch.tensor([1, 1, 2, 8]))
    1.5
    """
    counts = torch.bincount(bits.reshape(-1).long()).double()
    share = counts[counts > 0] / max(1, bits.numel())
    return float(-(share * share.log2()).sum()) + 0.0
