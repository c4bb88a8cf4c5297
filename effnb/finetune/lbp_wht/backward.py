"""The autograd function behind the layers: what is stored, and the two small products of the backward pass."""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .operators import BlockOperator, Grid, Operator, cached_operator, is_token_major
from .walsh import Positions


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
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Grid | None,
    order: int,
    positions: Positions,
    padding: str,
    extra: int,
) -> Tensor:
    """``lowrank_backprop_linear`` once its settings have been checked."""
    grid = token_grid(x, grid, extra)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have {weight.shape[1]} channels as weight has, got {x.shape[-1]}")
    x, weight, bias = _autocast(x, weight, bias)
    if not _needs_grad(x, weight, bias):
        return F.linear(x, weight, bias)
    tokens = x.flatten(1, 2) if x.dim() == 4 else x
    operator = cached_operator(grid, order, positions, padding, is_token_major(tokens), x.dtype, x.device)
    y = WalshBackward.apply(tokens, weight, bias, operator, extra)
    return y.unflatten(1, grid) if x.dim() == 4 else y


def backprop_image(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: int, positions: Positions, padding: str
) -> Tensor:
    """``lowrank_backprop_conv1x1`` once its settings have been checked."""
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (batch, in, height, width), got shape {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[2:] != (1, 1) or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must have shape (out, {x.shape[1]}, 1, 1), got {tuple(weight.shape)}")
    x, weight, bias = _autocast(x, weight, bias)
    if not _needs_grad(x, weight, bias):
        return F.conv2d(x, weight, bias)
    grid = check_grid(x.shape[2:])
    operator = cached_operator(grid, order, positions, padding, is_token_major(as_tokens(x)), x.dtype, x.device)
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
