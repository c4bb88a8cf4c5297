"""What one weight is made of: the +-1 number format, the group that shares its limit, and trainable noise."""

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnb.common import check_choice, check_count, check_number

__all__ = ["bits_from_s", "codebook", "draw_noise", "perturb", "quantize_pm1", "s_from_bits"]

LN2 = math.log(2.0)
MAX_BITS = 16
Granularity = str | tuple[str, int]

# --- the number format -----------------------------------------------------------------------------------------------


def bits_from_s(s: Tensor | float) -> Tensor | float:
    r"""Return the real number of bits that a limit stands for, ``p(s) = 1 + log2(1 + exp(-s))``.

    A weight that tolerates noise of size ``sigma(s)`` needs ``p`` bits, since ``sigma(s) = 2^(1 - p)`` is the largest
    rounding error at ``p`` bits.

    Args:
        s: limits, any shape, or a number; the result has its shape and type.

    Reference: savarese2022bits

    >>> round(bits_from_s(0.0), 6), bits_from_s(torch.tensor([0.0]))
    (2.0, tensor([2.]))
    """
    if isinstance(s, Tensor):
        return 1 - torch.nn.functional.logsigmoid(s) / LN2
    return 1 + (math.log1p(math.exp(-s)) if s > 0 else math.log1p(math.exp(s)) - s) / LN2


def s_from_bits(p: Tensor | float) -> Tensor | float:
    r"""Return the limit that stands for ``p`` bits, ``s = -ln(2^(p-1) - 1)``; inverse of :func:`bits_from_s`.

    Args:
        p: bits, any shape, or a number; the result has its shape and type.

    Raises:
        ValueError: ``p`` is not above 1 (one bit would be ``s = inf``), or not finite.

    Reference: savarese2022bits

    >>> s_from_bits(2), round(bits_from_s(s_from_bits(8.0)), 9)
    (0.0, 8.0)
    """
    check_number("p", p, gt=1)
    if isinstance(p, Tensor):
        return -torch.log(torch.expm1((p - 1) * LN2))
    return -(p - 1) * LN2 - math.log(-math.expm1(-(p - 1) * LN2))


def codebook(p: int) -> Tensor:
    r"""Return all codes, float32 ``(2^p,)``, ascending: the odd multiples of ``2^(1-p)`` up to ``2 - 2^(1-p)``.

    Each is a sum ``b_0 + b_1 / 2 + ... + b_(p-1) / 2^(p-1)`` of digits ``b_i`` in {-1, +1}; 0 is not among them.

    Args:
        p: bits, 1 to 16; ValueError for anything else.

    Reference: savarese2022bits

    >>> codebook(2)
    tensor([-1.5000, -0.5000,  0.5000,  1.5000])
    """
    check_bits(p)
    return (2 * torch.arange(2**p, dtype=torch.float32) + 1) * 2.0 ** (1 - p) - 2


def check_bits(p: Tensor | float, highest: int = MAX_BITS, name: str = "p") -> None:
    """Raise ValueError unless ``p``, a number or a tensor of any type, holds whole numbers from 1 to ``highest``."""
    if isinstance(p, Tensor):
        whole = not p.is_floating_point() or bool((p == p.round()).all())
        low, high = (float(v) for v in p.aminmax()) if p.numel() else (1, 1)
    else:
        whole, low, high = p == int(p) if math.isfinite(p) else False, p, p
    if not (whole and low >= 1 and high <= highest):
        found = f"{p}" if not isinstance(p, Tensor) else f"values from {low:g} to {high:g}"
        raise ValueError(f"{name} must hold whole numbers of bits from 1 to {highest}, got {found}")


def check_broadcast(name: str, shape: Iterable[int], to: Iterable[int]) -> None:
    """Raise ValueError unless ``shape`` broadcasts to the shape ``to`` itself."""
    try:
        fits = torch.broadcast_shapes(tuple(shape), tuple(to)) == tuple(to)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to shape {tuple(to)}, got {tuple(shape)}")


# From a table, since torch.exp2 may be an ulp off and the quantiser must be exact.
_CODES_PER_UNIT = [2.0 ** (p - 2) for p in range(MAX_BITS + 1)]


def codes_per_unit(p: Tensor | int, like: Tensor) -> Tensor | float:
    """Return ``2^(p-2)``, one over the distance of two codes: a float for one ``p``, else a tensor like ``like``."""
    if not isinstance(p, Tensor):
        return _CODES_PER_UNIT[int(p)]
    return torch.tensor(_CODES_PER_UNIT, dtype=like.dtype, device=like.device)[p.long()]


def below_two(dtype: torch.dtype) -> float:
    """Return the largest number below 2 of a type: clipped there, not at 2, the upper end stays in the last cell."""
    return 2.0 - torch.finfo(dtype).eps


class _Quantize(torch.autograd.Function):
    """``scale * Q(w / scale, p)``, straight-through for ``|w| <= 2 scale``, zero outside."""

    @staticmethod
    def forward(ctx, w: Tensor, per_unit: Tensor | float, scale: Tensor | None) -> Tensor:
        # With one scale for all the parameter itself tells what was outside; then u is nobody else's, and is reused:
        # at these sizes fresh memory costs more than arithmetic.
        one = scale is not None and scale.ndim == 0
        u = w if scale is None else w / scale
        ctx.save_for_backward(w if one else u)
        # clip_ leaves weights at 2 * scale, up to a rounding; they are inside.
        ctx.bound = 2.0 * (1 + torch.finfo(w.dtype).eps) * (float(scale) if one else 1.0)
        code = torch.clamp(u, -2.0, below_two(u.dtype), out=u if one else None)
        code.mul_(per_unit).floor_().add_(0.5).div_(per_unit)
        return code if scale is None else code.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (w,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, w, -ctx.bound, ctx.bound), None, None


def quantize_pm1(u: Tensor, p: Tensor | int) -> Tensor:
    r"""Return the nearest codes, ``Q(u, p) = clamp((2 floor(u / 2h) + 1) h, -(2-h), 2-h)`` with ``h = 2^(1-p)``.

    Halfway between two codes (``u = 0`` is such a tie) the upper one is taken. The error is at most ``h`` for
    ``|u| <= 2``. The gradient goes straight through where ``|u| <= 2`` and is zero outside.

    Args:
        u: normalised weights, any shape, floating; the result has its shape and type.
        p: bits, 1 to 16: one number, or a tensor that broadcasts to ``u``.

    Raises:
        ValueError: bits out of range, not whole, or of a shape that does not broadcast to ``u``.

    Reference: savarese2022bits

    >>> quantize_pm1(torch.tensor([-3.0, -0.1, 0.0, 0.3]), torch.tensor([1, 1, 1, 2]))
    tensor([-1.0000, -1.0000,  1.0000,  0.5000])
    """
    check_bits(p)
    if isinstance(p, Tensor):
        check_broadcast("p", p.shape, u.shape)
    return _Quantize.apply(u, codes_per_unit(p, u), None)


def quantize_weight(w: Tensor, per_unit: Tensor | float, scale: Tensor) -> Tensor:
    """Return ``scale * Q(w / scale, p)`` for ``per_unit = 2^(p-2)``, with the straight-through gradient."""
    return _Quantize.apply(w, per_unit, scale)


# --- weights that share a limit --------------------------------------------------------------------------------------


class Groups:
    """How the weights of a tensor (``full``) are divided into groups that share a limit, see :class:`SmolGate`.

    ``shape`` is that of the limits. A block size that does not divide the weights leaves a shorter block at the end.

    Reference: zhou2023sysmol
    """

    def __init__(self, shape: Iterable[int], granularity: Granularity = "weight", strict: bool = False) -> None:
        self.full, self.block = tuple(shape), None
        self.numel, self.granularity = math.prod(self.full), granularity
        axes = {"layer": -1, "filter": 0, "input": 1}
        if granularity == "weight":
            self.shape = self.full
        elif isinstance(granularity, str) and granularity in axes:
            axis = axes[granularity]
            if axis >= len(self.full):
                raise ValueError(f"granularity {granularity!r} must name a dimension of the weight, got {self.full}")
            self.shape = tuple(size if i == axis else 1 for i, size in enumerate(self.full))
        elif isinstance(granularity, tuple | list) and len(granularity) == 2 and granularity[0] == "block":
            size = granularity[1]
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"granularity: block size must be an integer >= 1, got {size!r}")
            if strict and self.numel % size:
                raise ValueError(f"granularity: block size {size} must divide the {self.numel} weights (strict)")
            self.block, self.granularity, self.shape = size, ("block", size), (-(-self.numel // size),)
        else:
            names = "'weight', 'filter', 'input', 'layer' or ('block', g)"
            raise ValueError(f"granularity must be {names}, got {granularity!r}")

    @classmethod
    def broadcast(cls, full: Iterable[int], shape: Iterable[int]) -> "Groups":
        """Return the groups of limits whose ``shape`` broadcasts to that of the weight, ``full``."""
        groups = cls(full)
        groups.granularity, groups.shape = None, tuple(shape)
        return groups

    def expand(self, values: Tensor) -> Tensor:
        """Return values per group, ``shape``, as something that broadcasts to the weight."""
        if not self.block:
            return values
        return values.unsqueeze(1).expand(-1, self.block).reshape(-1)[: self.numel].view(self.full)

    def reduce(self, full: Tensor) -> Tensor:
        """Return the sums over each group: the weight's shape to ``shape``."""
        if not self.block:
            return full if self.shape == self.full else full.sum_to_size(self.shape)
        flat = full.reshape(-1)
        if missing := len(flat) and -len(flat) % self.block:
            flat = torch.nn.functional.pad(flat, (0, missing))
        return flat.view(-1, self.block).sum(1)

    def sizes(self, like: Tensor) -> Tensor | float:
        """Return the weights in each group: a number where all are equal, else a tensor ``shape`` like ``like``."""
        count = math.prod(self.shape)
        if self.block and self.numel % self.block:
            sizes = torch.full(self.shape, float(self.block), dtype=like.dtype, device=like.device)
            sizes[-1] = self.numel % self.block
            return sizes
        return self.numel / count if count else 0.0


# --- trainable noise -------------------------------------------------------------------------------------------------

#: E[eps^2] relative to uniform noise: the penalty must be multiplied by it to get the same bits.
NOISE_POWER = {"uniform": 1.0, "rademacher": 3.0}
# What one integer stands for: odd int16 over 2^15, or +-1 itself.
_UNIT = {"uniform": 2.0**-15, "rademacher": 1.0}
_ODD = 0x0001000100010001


@functools.cache
def _eight_signs(device: torch.device) -> Tensor:
    """For every byte its eight bits as int8 of -1 and +1, together one int64."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (2 * bits - 1).to(torch.int8).view(torch.int64).reshape(-1).to(device)


def draw_noise(
    count: int, noise: str = "uniform", generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    r"""Return independent noise as small integers: four uniform values, or 64 signs, from one 64-bit draw.

    Uniform noise is an odd int16, to be read as ``i / 2^15``: 32768 values symmetric in (-1, 1), mean 0, variance
    ``(1 - 2^-30) / 3``. Rademacher noise is an int8 of -1 or +1.

    Args:
        count: number of values, >= 0; the result is ``(count,)``.
        noise: ``"uniform"`` or ``"rademacher"``.
        generator, device: stream to draw from (``None`` for torch's own), and where the values live.

    Raises:
        ValueError: unknown noise, or a negative count.

    >>> draw_noise(3, "rademacher", torch.Generator().manual_seed(0)).abs()
    tensor([1, 1, 1], dtype=torch.int8)
    """
    check_choice("noise", noise, NOISE_POWER)
    check_count("count", count, ge=0)
    # Drawing floats costs three times as much, and on a linear layer the draw is most of what the method costs.
    per_word = 4 if noise == "uniform" else 64
    words = torch.empty(-(-count // per_word), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    if noise == "uniform":
        return words.bitwise_or_(_ODD).view(torch.int16)[:count]  # odd, so that 0 is the mean and never a value
    eights = _eight_signs(words.device).index_select(0, words.view(torch.uint8).int())
    return eights.view(torch.int8)[:count]


class _Perturb(torch.autograd.Function):
    """``base * w + size * scales * sigma(s) * eps``; the penalty's gradient, too, goes to ``s``.

    Only the integers ``eps`` and ``sigma`` are kept for the backward pass, no float of the weight's size.
    """

    @staticmethod
    def forward(ctx, w, s, eps, groups: Groups, base, size: float, scales: Tensor | None, push):
        sigma = torch.sigmoid(s)
        ctx.save_for_backward(sigma, eps, scales)
        ctx.groups, ctx.base, ctx.size, ctx.push = groups, base, size, push
        # In place from here on: at these sizes fresh memory costs more than arithmetic.
        noise = eps.to(w.dtype).mul_(groups.expand(sigma))
        if scales is not None:
            noise.mul_(scales)
        return torch.add(w if base is None else w * base, noise, alpha=size, out=noise)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        sigma, eps, scales = ctx.saved_tensors
        grad_w = grad_s = None
        if ctx.needs_input_grad[0]:
            grad_w = grad if ctx.base is None else grad * ctx.base
        if ctx.needs_input_grad[1]:
            pull = eps.to(grad.dtype).mul_(grad)
            if scales is not None:
                pull.mul_(scales)
            # d/ds = (1 - sigma) * (size * sigma * sum(g eps) - lam n / ln 2)
            grad_s = ctx.groups.reduce(pull).mul_(sigma).mul_(ctx.size).add_(ctx.push)
            grad_s.addcmul_(grad_s, sigma, value=-1)
        return grad_w, grad_s, None, None, None, None, None, None


def perturb_weight(
    w: Tensor, s: Tensor, eps: Tensor, noise: str, groups: Groups, scale: Tensor | float, lam: float, base=None
) -> Tensor:
    """Return ``base * w + scale * sigma(s) * eps`` for integers ``eps`` of :func:`draw_noise`; ``None`` stands for 1.

    The gradient of ``lam * sum(n_g * log2(1 + exp(-s_g)))`` is added to that of ``s``. A ``scale`` that is a Python
    float costs no pass over the weight.
    """
    push = groups.sizes(s) * (-lam / LN2)
    size, scales = (scale, None) if isinstance(scale, float) else (1.0, scale)
    return _Perturb.apply(w, s, eps.view(w.shape), groups, base, size * _UNIT[noise], scales, push)


def perturb(
    u: Tensor,
    s: Tensor,
    scale: float | Tensor = 1.0,
    noise: str = "uniform",
    generator: torch.Generator | None = None,
    lam: float = 0.0,
) -> Tensor:
    r"""Return weights under trainable noise, ``W = scale * (u + sigma(s) * eps)``, fresh for every weight and call.

    Gradients: ``dL/du = scale * g`` and ``dL/ds = scale * g * eps * sigma (1 - sigma)``, summed over the weights that
    share an ``s``, plus that of the penalty ``lam * sum(n_g * log2(1 + exp(-s_g)))`` if ``lam`` is given.

    Args:
        u: normalised weights, any shape; the result has its shape and type.
        s: limits, a shape that broadcasts to ``u``; the noise is independent for every weight all the same.
        scale: positive number, or a tensor that broadcasts to ``u``.
        noise: ``"uniform"`` in (-1, 1), or ``"rademacher"``, +-1 (variance 1 instead of 1/3).
        generator: stream for the noise; ``None`` for torch's own.
        lam: strength of the fused penalty, >= 0; it counts bits above one.

    Raises:
        ValueError: unknown noise, ``lam`` negative, ``scale`` not positive and finite, shapes that do not broadcast.

    Reference: savarese2022bits

    >>> w = perturb(torch.zeros(1000), torch.tensor(0.0), scale=2.0, generator=torch.Generator().manual_seed(0))
    >>> bool(w.abs().max() < 1.0), bool(w.std() > 0.55)
    (True, True)
    """
    check_number("lam", lam, ge=0)
    check_number("scale", scale, gt=0)
    check_broadcast("s", s.shape, u.shape)
    if isinstance(scale, Tensor):
        check_broadcast("scale", scale.shape, u.shape)
    scale = scale.to(u.dtype) if isinstance(scale, Tensor) and scale.numel() != 1 else float(scale)
    eps = draw_noise(u.numel(), noise, generator, u.device)
    return perturb_weight(u, s, eps, noise, Groups.broadcast(u.shape, s.shape), scale, lam, base=scale)
