"""Which weights share a limit: every weight its own, or one per filter, input channel, block or layer."""

import math

import torch
from torch import Tensor

Granularity = str | tuple[str, int]


class Groups:
    """How the weights of one tensor are divided into groups that share a limit.

    Args:
        shape: of the weight, output channel first.
        granularity: ``"weight"``, ``"filter"`` (first dimension), ``"input"`` (second dimension), ``"layer"``, or
            ``("block", g)`` for ``g`` consecutive weights.
        strict: refuse a block size that does not divide the number of weights; else the last block is shorter.

    Raises:
        ValueError: unknown granularity, block size below 1 or (``strict``) not a divisor, too few dimensions.

    Reference: zhou2023sysmol

    >>> groups = Groups((2, 3), "input")
    >>> groups.shape, groups.reduce(torch.ones(2, 3))
    ((1, 3), tensor([[2., 2., 2.]]))
    """

    def __init__(self, shape: torch.Size | tuple[int, ...], granularity: Granularity = "weight", strict: bool = False):
        self.full, self.numel = tuple(shape), math.prod(shape)
        self.block = _block_size(granularity)
        self.granularity = granularity if self.block is None else ("block", self.block)
        if self.block and strict and self.numel % self.block:
            raise ValueError(f"granularity: block size {self.block} must divide the {self.numel} weights (strict)")
        self.shape = self._shared_shape()
        self.each = self.shape == self.full

    def _shared_shape(self) -> tuple[int, ...]:
        if self.block:
            return (-(-self.numel // self.block),)
        axis = {"weight": None, "layer": -1, "filter": 0, "input": 1}[self.granularity]
        if axis is None:
            return self.full
        if axis >= len(self.full):
            raise ValueError(f"granularity {self.granularity!r} must name a dimension of the weight, got {self.full}")
        return tuple(size if i == axis else 1 for i, size in enumerate(self.full))

    def expand(self, values: Tensor) -> Tensor:
        """Values per group ``shape`` to something that broadcasts to the weight."""
        if not self.block:
            return values
        return values.unsqueeze(1).expand(-1, self.block).reshape(-1)[: self.numel].view(self.full)

    def reduce(self, full: Tensor) -> Tensor:
        """Sum over each group: the weight's shape to ``shape``."""
        if not self.block:
            return full if self.each else full.sum_to_size(self.shape)
        flat = full.reshape(-1)
        if missing := len(flat) and -len(flat) % self.block:
            flat = torch.nn.functional.pad(flat, (0, missing))
        return flat.view(-1, self.block).sum(1)

    def sizes(self, like: Tensor) -> Tensor | float:
        """Weights in each group: a number where all are equal, else a tensor ``shape`` like ``like``."""
        count = math.prod(self.shape)
        if self.block and self.numel % self.block:
            sizes = torch.full(self.shape, float(self.block), dtype=like.dtype, device=like.device)
            sizes[-1] = self.numel % self.block
            return sizes
        return self.numel / count if count else 0.0


def _block_size(granularity: Granularity) -> int | None:
    if granularity in ("weight", "filter", "input", "layer"):
        return None
    if isinstance(granularity, tuple | list) and len(granularity) == 2 and granularity[0] == "block":
        size = granularity[1]
        if isinstance(size, int) and not isinstance(size, bool) and size >= 1:
            return size
        raise ValueError(f"granularity: block size must be an integer >= 1, got {size!r}")
    names = "'weight', 'filter', 'input', 'layer' or ('block', g)"
    raise ValueError(f"granularity must be {names}, got {granularity!r}")
