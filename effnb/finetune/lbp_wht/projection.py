"""Tokens to Walsh coefficients and back, and the autograd function whose two products run on the coefficients.

All operators write coefficients as a matrix ``(rows * batch, channels)``, so that both products of the backward pass
are one GEMM each. A tile's tokens lie in few rows of the grid, and grid rows are contiguous runs of tokens: the
operator is block diagonal over tile rows, and each block works on a slice (a view) of the tokens.
"""

import math
from contextlib import nullcontext
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnb.finetune.lbp_wht.walsh import Axis, Positions, WalshBasis, tiles_along, walsh_axis

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


def build(grid: Grid, basis: WalshBasis, separable: bool) -> Operator:
    """Make an operator in float64 on the CPU; ``separable`` is a wish, granted where the basis is a product."""
    order, positions = basis.order, basis.positions
    svd = basis.padding == "orthonormal" and not basis.is_nested
    axes = [walsh_axis(size, order, "zero" if svd else basis.padding) for size in grid]
    if basis.padding != "orthonormal":  # 1/o on each side instead of 1/o^2 on one: a power of two, no bit changes
        down = axes[0]
        axes[0] = Axis(down.analysis / order, down.synthesis / order, down.reads, down.writes)
    if separable and not svd and tiles_along(grid[1], order) > 1:
        alive = [axis.analysis.any(2).any(0).tolist() for axis in axes]
        return SeparableOperator(*axes, tuple((i, j) for i, j in positions if alive[0][i] and alive[1][j]))
    blocks = [_block_matrices(*axes, positions, r, svd) for r in range(tiles_along(grid[0], order))]
    return BlockOperator([analysis for analysis, _ in blocks], [synthesis for _, synthesis in blocks])


@lru_cache(maxsize=512)
def cached_operator(
    grid: Grid, basis: WalshBasis, separable: bool, dtype: torch.dtype, device: torch.device
) -> Operator:
    """The operator with its matrices in ``dtype`` on ``device``, built once."""
    with torch.device("cpu"):
        operator = build(grid, basis, separable)
    for name, value in vars(operator).items():
        if isinstance(value, list):
            moved = [(v[0], v[1].to(device, dtype)) if isinstance(v, tuple) else v.to(device, dtype) for v in value]
            setattr(operator, name, moved)
    return operator


# --- the backward pass


class WalshBackward(torch.autograd.Function):
    """``F.linear`` on tokens, or a 1x1 ``F.conv2d`` on an image, that keeps only the coefficients of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, operator: Operator, extra: int) -> Tensor:
        needs_x, needs_weight, _, _, _ = ctx.needs_input_grad
        rows = project(operator, as_tokens(x), extra)[0] if needs_weight else None
        ctx.save_for_backward(rows, weight if needs_x else None)
        ctx.operator, ctx.extra, ctx.x_shape, ctx.weight_shape = operator, extra, x.shape, weight.shape
        ctx.layout = torch.channels_last if is_token_major(as_tokens(x)) else torch.contiguous_format
        return F.linear(x, weight, bias) if x.dim() == 3 else F.conv2d(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kind = grad.device.type
        with torch.autocast(kind, enabled=False) if _autocasts(kind) else nullcontext():
            tokens = as_tokens(grad)
            constant = tokens.stride(1) == 0 and not ctx.extra and tokens.shape[1] > 1
            grads = _from_constant(ctx, tokens[:, 0]) if constant else _from_tokens(ctx, tokens)
        return *grads, None, None


def _from_tokens(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    if not (needs_x or needs_weight):
        return None, None, grad.sum((0, 1))
    x_rows, weight = ctx.saved_tensors
    rows, total = project(ctx.operator, grad, ctx.extra, total=needs_bias)
    grad_x = _restore(ctx, rows @ weight.flatten(1)) if needs_x else None
    grad_weight = (rows.T @ x_rows).view(ctx.weight_shape) if needs_weight else None
    return grad_x, grad_weight, total


def _from_constant(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same for a gradient ``(batch, channels)`` that all tokens share: sum pooling expands it, without a copy.

    The coefficients are an outer product, so both products are of the size of the batch. (torch's own ``mean`` divides
    after it has expanded, hence writes the whole gradient: that takes the other way.)
    """
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    x_rows, weight = ctx.saved_tensors
    operator, grad_x, grad_weight = ctx.operator, None, None
    ones = project(operator, grad.new_ones(1, operator.tokens, 1), 0)[0].view(operator.rows, operator.inner)
    if needs_x:
        response = grad.new_empty(1, operator.tokens, 1)
        operator.reconstruct(ones.unsqueeze(2), response)
        tokens, out = _empty_like_x(ctx, grad)
        torch.mul(response, (grad @ weight.flatten(1)).unsqueeze(1), out=tokens)
        grad_x = out
    if needs_weight:
        coefficients = x_rows.view(operator.rows, len(grad), operator.inner, x_rows.shape[1])
        grad_weight = (grad.T @ torch.einsum("rp,rbpc->bc", ones, coefficients)).view(ctx.weight_shape)
    return grad_x, grad_weight, operator.tokens * grad.sum(0) if needs_bias else None


def project(operator: Operator, tokens: Tensor, extra: int, total: bool = False) -> tuple[Tensor, Tensor | None]:
    """Coefficients ``(rows, channels)`` with the extra tokens in front, and the sum over batch and tokens."""
    batch, _, channels = tokens.shape
    front, rows = extra * batch, operator.rows * operator.inner * batch
    scratch = int(total and isinstance(operator, BlockOperator))
    buffer = tokens.new_empty(front + rows + scratch * batch, channels)
    room = buffer[front:].view(operator.rows + scratch, batch * operator.inner, channels)
    found = operator.project(tokens[:, extra:], room, total)
    if extra:
        first = buffer[:front].view(extra, batch, channels)
        first.copy_(tokens[:, :extra].transpose(0, 1))
        found = found + first.sum((0, 1)) if total else None
    return buffer[: front + rows], found


def _restore(ctx: Any, rows: Tensor) -> Tensor:
    tokens, out = _empty_like_x(ctx, rows)
    (batch, _, channels), extra, operator = tokens.shape, ctx.extra, ctx.operator
    front, rest = rows[: extra * batch], rows[extra * batch :]
    if extra:
        tokens[:, :extra].copy_(front.view(extra, batch, channels).transpose(0, 1))
    operator.reconstruct(rest.view(operator.rows, batch * operator.inner, channels), tokens[:, extra:])
    return out


def _empty_like_x(ctx: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the gradient of ``x`` in the layout of ``x``: as tokens, and as autograd wants it."""
    layout = ctx.layout if len(ctx.x_shape) == 4 else torch.contiguous_format
    out = torch.empty(ctx.x_shape, dtype=like.dtype, device=like.device, memory_format=layout)
    return as_tokens(out), out


def as_tokens(x: Tensor) -> Tensor:
    """``(batch, tokens, channels)`` as it is, or a view of an image ``(batch, channels, height, width)``."""
    return x if x.dim() == 3 else x.permute(0, 2, 3, 1).flatten(1, 2)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast outside the function as autocast does for ``F.linear``, so that gradients come back in their own dtype."""
    kind = x.device.type
    if not _autocasts(kind) or x.dtype == torch.float64:
        return x, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


def backprop_tokens(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid | None, basis: WalshBasis, extra: int
) -> Tensor:
    """``lowrank_backprop_linear`` once its settings have been checked."""
    grid = token_grid(x, grid, extra)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have {weight.shape[1]} channels as weight has, got {x.shape[-1]}")
    x, weight, bias = _autocast(x, weight, bias)
    if not _needs_grad(x, weight, bias):
        return F.linear(x, weight, bias)
    tokens = x.flatten(1, 2) if x.dim() == 4 else x
    operator = cached_operator(grid, basis, is_token_major(tokens), x.dtype, x.device)
    y = WalshBackward.apply(tokens, weight, bias, operator, extra)
    return y.unflatten(1, grid) if x.dim() == 4 else y


def backprop_image(x: Tensor, weight: Tensor, bias: Tensor | None, basis: WalshBasis) -> Tensor:
    """``lowrank_backprop_conv1x1`` once its settings have been checked."""
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (batch, in, height, width), got shape {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[2:] != (1, 1) or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must have shape (out, {x.shape[1]}, 1, 1), got {tuple(weight.shape)}")
    x, weight, bias = _autocast(x, weight, bias)
    if not _needs_grad(x, weight, bias):
        return F.conv2d(x, weight, bias)
    grid = check_grid(x.shape[2:])
    operator = cached_operator(grid, basis, is_token_major(as_tokens(x)), x.dtype, x.device)
    return WalshBackward.apply(x, weight, bias, operator, 0)


def token_grid(x: Tensor, grid: Grid | None, extra: int) -> Grid:
    """The grid of these tokens, from their shape where it is not given; never remembered from an earlier batch."""
    if x.dim() not in (3, 4):
        raise ValueError(f"x must have 3 or 4 dimensions, got shape {tuple(x.shape)}")
    if extra < 0:
        raise ValueError(f"num_extra_tokens must be >= 0, got {extra}")
    if x.dim() == 4:
        return _image_grid(x, grid, extra)
    length = x.shape[1] - extra
    if grid is None:
        side = math.isqrt(max(length, 0))
        if side < 1 or side * side != length:
            raise ValueError(f"grid must be given where the number of tokens is not a square, got {length}")
        return side, side
    height, width = check_grid(grid)
    if height * width != length:
        raise ValueError(f"grid {height} x {width} with {extra} extra tokens must match x, got {x.shape[1]} tokens")
    return height, width


def _image_grid(x: Tensor, grid: Grid | None, extra: int) -> Grid:
    found = check_grid(x.shape[1:3])
    if extra:
        raise ValueError(f"num_extra_tokens must be 0 for an image (batch, height, width, in), got {extra}")
    if grid is not None and check_grid(grid) != found:
        raise ValueError(f"grid must be the shape of the image {found}, got {tuple(grid)}")
    return found


def check_grid(grid: Grid) -> Grid:
    """``(height, width)`` as a plain tuple, for a key."""
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be (height, width), both >= 1, got {tuple(grid)}")
    return int(grid[0]), int(grid[1])
