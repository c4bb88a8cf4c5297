"""One axis of the token grid: tiles of ``order`` cells, padding, and the Walsh functions folded onto real tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .walsh import walsh_matrix

PADDINGS = ("reflect", "zero", "orthonormal")


def check_padding(padding: str) -> None:
    """Raise unless ``padding`` is one of :data:`PADDINGS`."""
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(map(repr, PADDINGS))}; got {padding!r}")


def tiles_along(size: int, order: int) -> int:
    """Tiles of ``order`` cells that cover ``size`` tokens."""
    return -(-size // order)


@dataclass(frozen=True)
class Axis:
    """Walsh functions of every tile, as rows over the real tokens of the axis.

    ``analysis`` reads coefficients off a signal, with the padding folded in; ``synthesis`` puts them back, with the
    margin cropped. Both are ``(tiles, order, size)`` in float64. ``reads`` and ``writes`` are the tokens that a tile
    touches: the writes of all tiles are a partition, the reads overlap where a reflection reaches into the next tile.
    """

    analysis: Tensor
    synthesis: Tensor
    reads: tuple[tuple[int, int], ...]
    writes: tuple[tuple[int, int], ...]


def walsh_axis(size: int, order: int, padding: str) -> Axis:
    """Fold the Walsh functions onto an axis of ``size`` tokens.

    The margin is split as in the official code: the larger half in front.
    """
    tiles = tiles_along(size, order)
    front = -(-(tiles * order - size) // 2)
    if padding == "reflect" and front >= size:
        raise ValueError(
            f"padding must be 'zero' or 'orthonormal' for this grid: 'reflect' needs more than {front} tokens along "
            f"each side to fill tiles of order {order}, got {size}"
        )
    source = torch.arange(tiles * order) - front
    real = (source >= 0) & (source < size)
    mirrored = (size - 1 - (size - 1 - source.abs()).abs()).clamp_min(0)
    cells = torch.nn.functional.one_hot(mirrored, size).double().view(tiles, order, size)
    cropped = cells * real.view(tiles, order, 1)
    walsh = walsh_matrix(order, torch.float64)
    synthesis = walsh @ cropped
    analysis = walsh @ cells if padding == "reflect" else synthesis
    if padding == "orthonormal":
        analysis = synthesis = torch.stack([_gram_schmidt(rows) for rows in synthesis])
    reads = tuple(map(_extent, cells if padding == "reflect" else cropped))
    return Axis(analysis, synthesis, reads, tuple(map(_extent, cropped)))


def _extent(cells: Tensor) -> tuple[int, int]:
    used = cells.any(0).nonzero()
    return int(used[0]), int(used[-1]) + 1


def _gram_schmidt(rows: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Orthonormal rows with the same nested spans, zero where a row adds nothing to those before it."""
    basis = torch.zeros_like(rows)
    for i, row in enumerate(rows / rows.norm(dim=1, keepdim=True)):
        for _ in range(2):  # the second pass takes away what rounding left
            row = row - basis.T @ (basis @ row)
        if row.norm() > tolerance:
            basis[i] = row / row.norm()
    return basis
