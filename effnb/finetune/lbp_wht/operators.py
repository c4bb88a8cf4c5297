"""Projection of tokens onto Walsh coefficients and back, as batched matrix products that never copy the tokens.

All operators write coefficients as a matrix ``(rows * batch, channels)``, so that both products of the backward pass
are one GEMM each. A tile's tokens lie in few rows of the grid, and grid rows are contiguous runs of tokens: the
operator is block diagonal over tile rows, and each block works on a slice (a view) of the tokens.
"""

from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from .axis import Axis, tiles_along, walsh_axis
from .walsh import Positions

Grid = tuple[int, int]
Slice = tuple[int, int]


class BlockOperator:
    """One dense block for each row of tiles: any padding, any set of positions, any strides of the tokens.

    Args:
        analysis: for each tile row the slice of tokens that it reads and its matrix ``(rows, tokens read)``.
        synthesis: for each tile row the slice that it writes and its matrix ``(rows, tokens written)``.
    """

    inner = 1

    def __init__(self, analysis: list[tuple[Slice, Tensor]], synthesis: list[tuple[Slice, Tensor]]) -> None:
        self.rows = sum(len(matrix) for _, matrix in analysis)
        self.tokens = synthesis[-1][0][1]
        # A row of ones below each block: the sum over the tokens (the bias' gradient) comes out of the same product.
        self.analysis = [
            (cut, torch.cat([matrix, _ones(cut, own, matrix)]))
            for (cut, matrix), (own, _) in zip(analysis, synthesis, strict=True)
        ]
        self.synthesis = [(cut, matrix.T.contiguous()) for cut, matrix in synthesis]

    def project(self, x: Tensor, out: Tensor, total: bool = False) -> Tensor | None:
        """Write the coefficients of ``x`` ``(batch, tokens, channels)`` into ``out`` ``(rows, batch, channels)``.

        With ``total`` it needs one row more: each block leaves its sum there, for the next one to write over.
        """
        sums, start = [], 0
        for (first, last), matrix in self.analysis:
            matrix = matrix if total else matrix[:-1]
            stop = start + len(matrix)
            torch.bmm(_each(matrix, x), x[:, first:last], out=out[start:stop].transpose(0, 1))
            if total:
                stop -= 1
                sums.append(out[stop].sum(0))
            start = stop
        return sum(sums) if total else None

    def reconstruct(self, rows: Tensor, out: Tensor) -> None:
        """Write the tokens of coefficients ``(rows, batch, channels)`` into ``out`` ``(batch, tokens, channels)``."""
        start = 0
        for (first, last), matrix in self.synthesis:
            stop = start + matrix.shape[1]
            torch.bmm(_each(matrix, out), rows[start:stop].transpose(0, 1), out=out[:, first:last])
            start = stop

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Dense analysis and synthesis matrices ``(rows, tokens)``."""
        dense = torch.zeros(2, self.rows, self.tokens, dtype=self.analysis[0][1].dtype)
        start = 0
        for ((a, b), reads), ((c, d), writes) in zip(self.analysis, self.synthesis, strict=True):
            stop = start + writes.shape[1]
            dense[0, start:stop, a:b], dense[1, start:stop, c:d] = reads[:-1], writes.T
            start = stop
        return dense[0], dense[1]


class SeparableOperator:
    """First down the grid, then along it: fewer operations where a row of the grid holds several tiles.

    It needs tokens whose channels are contiguous, row after row. Coefficients are kept for each tile row apart, so
    ``inner`` (the tile rows) goes with the batch: ``(rows, batch * inner, channels)``.

    Args:
        down: the axis down the grid, its matrices scaled.
        along: the axis along the grid.
        positions: pairs ``(i, j)``, grouped by ``i``.
    """

    def __init__(self, down: Axis, along: Axis, positions: Positions) -> None:
        self.inner = len(down.reads)
        self.height, self.width = down.analysis.shape[2], along.analysis.shape[2]
        groups = [(i, [j for _, j in pairs]) for i, pairs in groupby(sorted(positions), key=lambda p: p[0])]
        used = [i for i, _ in groups]
        self.down = [
            ((a, b), torch.cat([matrix[used, a:b], _ones((a, b), own, matrix)]))
            for matrix, (a, b), own in zip(down.analysis, down.reads, down.writes, strict=True)
        ]
        self.up = [
            (own, m[used, slice(*own)].T.contiguous()) for m, own in zip(down.synthesis, down.writes, strict=True)
        ]
        self.along = [along.analysis[:, js].flatten(0, 1) for _, js in groups]
        self.across = [along.synthesis[:, js].flatten(0, 1).T.contiguous() for _, js in groups]
        self.rows = sum(len(matrix) for matrix in self.along)
        self.tokens = self.height * self.width

    def project(self, x: Tensor, out: Tensor, total: bool = False) -> Tensor | None:
        """Write the coefficients of ``x`` into ``out`` ``(rows, batch * inner, channels)``; the sum with ``total``."""
        batch, _, channels = x.shape
        lines = _lines(x, self.height, self.width)
        used = len(self.along)
        middle = x.new_empty(batch, self.inner, used + total, self.width * channels)
        for r, ((first, last), matrix) in enumerate(self.down):
            torch.bmm(_each(matrix[: used + total], x), lines[:, first:last], out=middle[:, r])
        middle = middle.view(batch * self.inner, used + total, self.width, channels)
        start = 0
        for i, matrix in enumerate(self.along):
            stop = start + len(matrix)
            torch.bmm(_each(matrix, middle), middle[:, i], out=out[start:stop].transpose(0, 1))
            start = stop
        if not total:
            return None
        return torch.bmm(middle.new_ones(len(middle), 1, self.width), middle[:, -1]).sum((0, 1))

    def reconstruct(self, rows: Tensor, out: Tensor) -> None:
        """Write the tokens of the coefficients ``(rows, batch * inner, channels)`` into ``out``."""
        batch, _, channels = out.shape
        middle = out.new_empty(batch * self.inner, len(self.across), self.width, channels)
        start = 0
        for i, matrix in enumerate(self.across):
            stop = start + matrix.shape[1]
            torch.bmm(_each(matrix, middle), rows[start:stop].transpose(0, 1), out=middle[:, i])
            start = stop
        middle = middle.view(batch, self.inner, len(self.across), self.width * channels)
        lines = out.view(batch, self.height, self.width * channels)
        for r, ((first, last), matrix) in enumerate(self.up):
            torch.bmm(_each(matrix, out), middle[:, r], out=lines[:, first:last])


Operator = BlockOperator | SeparableOperator


def _ones(cut: Slice, own: Slice, like: Tensor) -> Tensor:
    """A row over the tokens in ``cut`` that sums those in ``own``: the reads of blocks overlap, the writes do not."""
    row = torch.zeros(1, cut[1] - cut[0], dtype=like.dtype)
    row[:, own[0] - cut[0] : own[1] - cut[0]] = 1
    return row


def _each(matrix: Tensor, batch: Tensor) -> Tensor:
    return matrix.expand(len(batch), -1, -1)


def _lines(x: Tensor, height: int, width: int) -> Tensor:
    """``(batch, height, width * channels)``; copies only tokens that are not contiguous."""
    batch, _, channels = x.shape
    if not is_token_major(x):
        x = x.contiguous()
    return x.view(batch, height, width * channels)


def is_token_major(x: Tensor) -> bool:
    """Whether the channels of a token are contiguous and the next token's follow: a grid row is one run of memory."""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def _block_matrices(down: Axis, along: Axis, pairs: Positions, r: int, svd: bool) -> list[tuple[Slice, Tensor]]:
    """Analysis and synthesis of tile row ``r`` with the slices of tokens that they touch."""
    i, j = (torch.tensor(axis) for axis in zip(*pairs, strict=True))
    width = along.analysis.shape[2]
    found = []
    for d, a, (first, last) in (
        (down.analysis[r], along.analysis, down.reads[r]),
        (down.synthesis[r], along.synthesis, down.writes[r]),
    ):
        rows = torch.einsum("mh,tmw->tmhw", d[i, first:last], a[:, j]).flatten(2)
        if svd:
            rows = torch.cat([_orthonormal_rows(tile) for tile in rows])
        rows = rows.reshape(-1, (last - first) * width)
        found.append(((first * width, last * width), rows))
    # Functions that vanish on all real tokens (dropped by the orthonormal basis) need no coefficient.
    keep = found[1][1].abs().amax(1) > 0
    return [(cut, rows[keep]) for cut, rows in found]


def _orthonormal_rows(rows: Tensor, tolerance: float = 1e-4) -> Tensor:
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[values > tolerance * values[0]]


def _is_nested(positions: Positions) -> bool:
    """Whether with ``(i, j)`` all pairs of lower frequencies are chosen: then Gram-Schmidt on each axis is enough."""
    chosen = set(positions)
    return all((i == 0 or (i - 1, j) in chosen) and (j == 0 or (i, j - 1) in chosen) for i, j in chosen)


def build(
    grid: Grid, order: int, positions: Positions, padding: str, separable: bool
) -> BlockOperator | SeparableOperator:
    """Make an operator in float64 on the CPU; ``separable`` is a wish, granted where the basis is a product."""
    svd = padding == "orthonormal" and not _is_nested(positions)
    axes = [walsh_axis(size, order, "zero" if svd else padding) for size in grid]
    if padding != "orthonormal":  # 1/o on each side instead of 1/o^2 on one: a power of two, so no bit changes
        down = axes[0]
        axes[0] = Axis(down.analysis / order, down.synthesis / order, down.reads, down.writes)
    if separable and not svd and tiles_along(grid[1], order) > 1:
        alive = [axis.analysis.any(2).any(0).tolist() for axis in axes]
        return SeparableOperator(*axes, tuple((i, j) for i, j in positions if alive[0][i] and alive[1][j]))
    blocks = [_block_matrices(*axes, positions, r, svd) for r in range(tiles_along(grid[0], order))]
    return BlockOperator([analysis for analysis, _ in blocks], [synthesis for _, synthesis in blocks])


@lru_cache(maxsize=512)
def cached_operator(
    grid: Grid,
    order: int,
    positions: Positions,
    padding: str,
    separable: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Operator:
    """The operator with its matrices in ``dtype`` on ``device``, built once."""
    with torch.device("cpu"):
        operator = build(grid, order, positions, padding, separable)
    for name, value in vars(operator).items():
        if isinstance(value, list):
            moved = [(v[0], v[1].to(device, dtype)) if isinstance(v, tuple) else v.to(device, dtype) for v in value]
            setattr(operator, name, moved)
    return operator
