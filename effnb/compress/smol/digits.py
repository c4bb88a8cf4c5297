"""The number format: p digits of +-1, its codes, the map between learned limits and bits, and the quantiser."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LN2 = math.log(2.0)
MAX_BITS = 16
# 2^(p-2), exact: one over the distance of two codes. torch.exp2 may be an ulp off.
_STEPS_PER_UNIT = [2.0 ** (p - 2) for p in range(MAX_BITS + 1)]


def bits_from_s(s: Tensor | float) -> Tensor | float:
    r"""Real number of bits that a limit stands for, ``p(s) = 1 + log2(1 + exp(-s))``.

    A weight that tolerates noise of size ``sigma(s)`` needs ``p`` bits, since ``sigma(s) = 2^(1 - p)`` is the largest
    rounding error at ``p`` bits.

    Args:
        s: limits, any shape, or a number.

    Returns:
        Bits, > 1, of the shape and type of ``s``.

    Reference: savarese2022bits

    >>> round(bits_from_s(0.0), 6), bits_from_s(torch.tensor([0.0]))
    (2.0, tensor([2.]))
    """
    if isinstance(s, Tensor):
        return 1 - torch.nn.functional.logsigmoid(s) / LN2
    return 1 + (math.log1p(math.exp(-s)) if s > 0 else math.log1p(math.exp(s)) - s) / LN2


def s_from_bits(p: Tensor | float) -> Tensor | float:
    r"""The limit that stands for ``p`` bits, ``s = -ln(2^(p-1) - 1)``; inverse of :func:`bits_from_s`.

    Args:
        p: bits, > 1 (one bit would be ``s = inf``), any shape, or a number.

    Returns:
        Limits, of the shape and type of ``p``.

    Raises:
        ValueError: ``p`` is not above 1, or not finite.

    Reference: savarese2022bits

    >>> s_from_bits(2), round(bits_from_s(s_from_bits(8.0)), 9)
    (0.0, 8.0)
    """
    if isinstance(p, Tensor):
        if not bool(((p > 1) & p.isfinite()).all()):
            raise ValueError("p must be above 1 and finite everywhere: one bit would be s = inf")
        return -torch.log(torch.expm1((p - 1) * LN2))
    if not 1 < p < math.inf:
        raise ValueError(f"p must be above 1 and finite, got {p}: one bit would be s = inf")
    return -(p - 1) * LN2 - math.log(-math.expm1(-(p - 1) * LN2))


def codebook(p: int) -> Tensor:
    r"""All ``2^p`` codes in ascending order: the odd multiples of ``2^(1-p)`` up to ``2 - 2^(1-p)``.

    Each is a sum ``b_0 + b_1 / 2 + ... + b_(p-1) / 2^(p-1)`` of digits ``b_i`` in {-1, +1}; 0 is not among them.

    Args:
        p: bits, 1 to 16.

    Returns:
        Float32 tensor ``(2^p,)``.

    Raises:
        ValueError: ``p`` is not an integer from 1 to 16.

    Reference: savarese2022bits

    >>> codebook(2)
    tensor([-1.5000, -0.5000,  0.5000,  1.5000])
    """
    check_bits(p)
    return (2 * torch.arange(2**p, dtype=torch.float32) + 1) * 2.0 ** (1 - p) - 2


def check_bits(p: Tensor | float, highest: int = MAX_BITS, name: str = "p") -> None:
    """Raise unless all numbers of bits are integers from 1 to ``highest``.

    Args:
        p: a number or a tensor of any type.
        highest: largest number allowed.
        name: of the argument, for the message.

    Raises:
        ValueError: a fraction, or out of range.

    Reference: savarese2022bits

    >>> check_bits(torch.tensor([1, 8]), highest=8)
    """
    if isinstance(p, Tensor):
        whole = not p.is_floating_point() or bool((p == p.round()).all())
        low, high = (float(v) for v in p.aminmax()) if p.numel() else (1, 1)
    else:
        whole, low, high = p == int(p) if math.isfinite(p) else False, p, p
    if not (whole and low >= 1 and high <= highest):
        found = f"{p}" if not isinstance(p, Tensor) else f"values from {low:g} to {high:g}"
        raise ValueError(f"{name} must hold whole numbers of bits from 1 to {highest}, got {found}")


def steps_per_unit(p: Tensor | int, like: Tensor) -> Tensor | float:
    """``2^(p-2)``, one over the distance of neighbouring codes: a float for one ``p``, else a tensor like ``like``."""
    if not isinstance(p, Tensor):
        return _STEPS_PER_UNIT[int(p)]
    return torch.tensor(_STEPS_PER_UNIT, dtype=like.dtype, device=like.device)[p.long()]


def below_two(dtype: torch.dtype) -> float:
    """The largest number below 2 of a type: clipping there instead of at 2 keeps the upper end in the last cell."""
    return 2.0 - torch.finfo(dtype).eps


class _Quantize(torch.autograd.Function):
    """``scale * Q(w / scale, p)``, straight-through for ``|w| <= 2 scale``, zero outside."""

    @staticmethod
    def forward(ctx, w: Tensor, density: Tensor | float, scale: Tensor | None) -> Tensor:
        # One scale for all: the parameter itself tells what was outside, and nothing more is kept.
        one = scale is not None and scale.ndim == 0
        u = w if scale is None else w / scale
        ctx.save_for_backward(w if one else u)
        ctx.bound = 2.0 * (1 + torch.finfo(w.dtype).eps) * (float(scale) if one else 1.0)
        # In place where u is ours: at these sizes fresh memory costs more than arithmetic.
        code = torch.clamp(u, -2.0, below_two(u.dtype), out=u if one else None)
        code.mul_(density).floor_().add_(0.5).div_(density)
        return code if scale is None else code.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (w,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, w, -ctx.bound, ctx.bound), None, None


def quantize_pm1(u: Tensor, p: Tensor | int) -> Tensor:
    r"""Nearest code of ``p`` digits of +-1, ``Q(u, p) = clamp((2 floor(u / 2h) + 1) h, -(2-h), 2-h)``, ``h = 2^(1-p)``.

    Halfway between two codes (``u = 0`` is such a tie) the upper one is taken. The error is at most ``h`` for
    ``|u| <= 2``. The gradient goes straight through where ``|u| <= 2`` and is zero outside.

    Args:
        u: normalised weights, any shape, floating.
        p: bits, 1 to 16: one number, or a tensor that broadcasts to ``u``.

    Returns:
        Codes, shape and type of ``u``.

    Raises:
        ValueError: bits out of range, not whole, or of a shape that does not broadcast to ``u``.

    Reference: savarese2022bits

    >>> quantize_pm1(torch.tensor([-3.0, -0.1, 0.0, 0.3]), torch.tensor([1, 1, 1, 2]))
    tensor([-1.0000, -1.0000,  1.0000,  0.5000])
    """
    check_bits(p)
    if isinstance(p, Tensor):
        _check_broadcast("p", p.shape, u.shape)
    return _Quantize.apply(u, steps_per_unit(p, u), None)


def quantize_weight(w: Tensor, density: Tensor | float, scale: Tensor) -> Tensor:
    """``scale * Q(w / scale, p)`` for ``density = 2^(p-2)``, with the straight-through gradient."""
    return _Quantize.apply(w, density, scale)


def _check_broadcast(name: str, shape: Iterable[int], to: Iterable[int]) -> None:
    try:
        fits = torch.broadcast_shapes(tuple(shape), tuple(to)) == tuple(to)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to shape {tuple(to)}, got {tuple(shape)}")
