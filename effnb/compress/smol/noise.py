"""Trainable noise: integer draws that cost a third of floats, and the perturbed weight as one autograd node."""

import functools
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .digits import LN2, _check_broadcast
from .groups import Groups

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


def check_noise(noise: str) -> None:
    """Raise unless ``noise`` is known."""
    if noise not in _UNIT:
        raise ValueError(f"noise must be one of {sorted(_UNIT)}, got {noise!r}")


def draw_noise(
    count: int, noise: str = "uniform", generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    r"""Independent noise as small integers: four uniform values, or 64 signs, from one 64-bit draw.

    Uniform noise is an odd int16, to be read as ``i / 2^15``: 32768 values symmetric in (-1, 1), mean 0, variance
    ``(1 - 2^-30) / 3``. Rademacher noise is an int8 of -1 or +1.

    Args:
        count: number of values, >= 0.
        noise: ``"uniform"`` or ``"rademacher"``.
        generator: stream to draw from; ``None`` for torch's own.
        device: where the values live.

    Returns:
        ``(count,)`` int16 or int8.

    Raises:
        ValueError: unknown noise, or a negative count.

    Reference: savarese2022bits

    >>> draw_noise(3, "rademacher", torch.Generator().manual_seed(0)).abs()
    tensor([1, 1, 1], dtype=torch.int8)
    """
    check_noise(noise)
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    per_word = 4 if noise == "uniform" else 64
    words = torch.empty(-(-count // per_word), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    if noise == "uniform":
        return words.bitwise_or_(_ODD).view(torch.int16)[:count]
    eights = _eight_signs(words.device).index_select(0, words.view(torch.uint8).int())
    return eights.view(torch.int8)[:count]


class _Perturb(torch.autograd.Function):
    """``base * u + size * sigma(s) * eps`` plus the penalty's gradient; keeps the integers and ``sigma``."""

    @staticmethod
    def forward(ctx, u: Tensor, s: Tensor, eps: Tensor, constants: tuple, groups: Groups, tensor_size: Tensor | None):
        base, size, _ = constants
        sigma = torch.sigmoid(s)
        ctx.save_for_backward(sigma, eps, tensor_size)
        ctx.constants, ctx.groups = constants, groups
        # In place from here on: at these sizes fresh memory costs more than arithmetic.
        noise = eps.to(u.dtype).mul_(groups.expand(sigma))
        if tensor_size is not None:
            noise.mul_(tensor_size)
        return torch.add(u if base is None else u * base, noise, alpha=size, out=noise)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        sigma, eps, tensor_size = ctx.saved_tensors
        base, size, push = ctx.constants
        grad_u = grad_s = None
        if ctx.needs_input_grad[0]:
            grad_u = grad if base is None else grad * base
        if ctx.needs_input_grad[1]:
            pull = eps.to(grad.dtype).mul_(grad)
            if tensor_size is not None:
                pull.mul_(tensor_size)
            # d/ds = (1 - sigma) * (size * sigma * sum(g eps) - lam n / ln 2)
            grad_s = ctx.groups.reduce(pull).mul_(sigma).mul_(size).add_(push)
            grad_s.addcmul_(grad_s, sigma, value=-1)
        return grad_u, grad_s, None, None, None, None


def perturb_weight(
    w: Tensor, s: Tensor, eps: Tensor, noise: str, groups: Groups, scale: Tensor | float, lam: float, base=None
) -> Tensor:
    """``base * w + scale * sigma(s) * eps`` for integers ``eps`` of :func:`draw_noise`; ``base=None`` stands for 1.

    The gradient of ``lam * sum(n_g * log2(1 + exp(-s_g)))`` is added to that of ``s``.
    """
    push = groups.sizes(s) * (-lam / LN2)
    one = isinstance(scale, float)
    constants = base, (scale if one else 1.0) * _UNIT[noise], push
    return _Perturb.apply(w, s, eps.view(w.shape), constants, groups, None if one else scale)


def perturb(
    u: Tensor,
    s: Tensor,
    scale: float | Tensor = 1.0,
    noise: str = "uniform",
    generator: torch.Generator | None = None,
    lam: float = 0.0,
) -> Tensor:
    r"""Weights under trainable noise, ``W = scale * (u + sigma(s) * eps)``, fresh noise for every weight and call.

    Gradients: ``dL/du = scale * g`` and ``dL/ds = scale * g * eps * sigma (1 - sigma)``, summed over the weights that
    share an ``s``, plus that of the penalty ``lam * sum(n_g * log2(1 + exp(-s_g)))`` if ``lam`` is given.

    Args:
        u: normalised weights, any shape.
        s: limits, a shape that broadcasts to ``u``; the noise is independent for every weight all the same.
        scale: positive number, or a tensor that broadcasts to ``u``.
        noise: ``"uniform"`` in (-1, 1), or ``"rademacher"``, +-1 (variance 1 instead of 1/3).
        generator: stream for the noise; ``None`` for torch's own.
        lam: strength of the fused penalty, >= 0; it counts bits above one.

    Returns:
        Noisy weights, shape and type of ``u``.

    Raises:
        ValueError: unknown noise, ``lam`` negative, ``scale`` not positive and finite, shapes that do not broadcast.

    Reference: savarese2022bits

    >>> u, s = torch.zeros(1000), torch.tensor(0.0)
    >>> w = perturb(u, s, scale=2.0, generator=torch.Generator().manual_seed(0))
    >>> bool(w.abs().max() < 1.0), bool(w.std() > 0.55)
    (True, True)
    """
    check_noise(noise)
    check_lam(lam)
    check_scale(scale)
    _check_broadcast("s", s.shape, u.shape)
    if isinstance(scale, Tensor):
        _check_broadcast("scale", scale.shape, u.shape)
        scale = float(scale) if scale.numel() == 1 else scale.to(u.dtype)
    eps = draw_noise(u.numel(), noise, generator, u.device)
    return perturb_weight(u, s, eps, noise, _Broadcast(u.shape, s.shape), scale, lam, base=scale)


class _Broadcast(Groups):
    """Groups given by a shape that broadcasts to the weight's."""

    def __init__(self, full: torch.Size, shape: torch.Size) -> None:
        self.full, self.numel, self.block, self.granularity = tuple(full), math.prod(full), None, None
        self.shape, self.each = tuple(shape), tuple(shape) == tuple(full)


def check_lam(lam: float) -> None:
    """Raise unless ``lam`` is a finite number >= 0."""
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"lam must be >= 0 and finite, got {lam}")


def check_scale(scale: float | Tensor, name: str = "scale") -> None:
    """Raise unless every scale is positive and finite."""
    tensor = torch.as_tensor(scale)
    if not bool(((tensor > 0) & tensor.isfinite()).all()):
        shown = f"{float(tensor):g}" if tensor.numel() == 1 else f"values down to {float(tensor.min()):g}"
        raise ValueError(f"{name} must be positive and finite, got {shown}")
