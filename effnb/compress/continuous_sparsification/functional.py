"""The gate as functions: soft ``c * sigmoid(beta * s) * w`` with fused penalty gradient, hard ``c * H(s) * w``."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST_S0 = -15.0


def gate_scale(s0: float | None) -> float:
    """The constant ``c = 1 / sigmoid(s0)`` that makes a fresh gate the identity at ``beta = 1``.

    Args:
        s0: initial gate score; ``None`` asks for no scaling, ``c = 1``.

    Raises:
        ValueError: ``s0`` is not finite, or so small (< -15) that ``c`` exceeds three million.

    Reference: savarese2020winning

    >>> gate_scale(0.0)
    2.0
    """
    if s0 is None:
        return 1.0
    if not math.isfinite(s0) or s0 < SMALLEST_S0:
        raise ValueError(f"s0 must be finite and at least {SMALLEST_S0:g}, got {s0}")
    return 1.0 + math.exp(-s0)


def _check(weights: Sequence[Tensor], scores: Sequence[Tensor], beta: float, lam: float) -> None:
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"lam must be >= 0 and finite, got {lam}")
    if len(weights) != len(scores):
        raise ValueError(f"scores must hold one tensor per weight ({len(weights)}), got {len(scores)}")
    for w, s in zip(weights, scores, strict=True):
        if w.shape != s.shape:
            raise ValueError(f"scores must have the weight's shape {tuple(w.shape)}, got {tuple(s.shape)}")


class _SoftGates(torch.autograd.Function):
    """All soft gates of a model in one node; keeps only ``w`` (a parameter anyway) and ``sigmoid(beta * s)``."""

    @staticmethod
    def forward(ctx, beta: float, scale: float, lam: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, scores = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        if scores[0].is_cuda:
            opened = torch._foreach_mul(scores, beta)
            torch._foreach_sigmoid_(opened)
            outputs = torch._foreach_mul(weights, opened)
            torch._foreach_mul_(outputs, scale)
        else:
            # A 0-d zero turns addcmul into "scale * w * m": one pass where mul().mul_() takes two.
            opened = [torch.mul(s, beta).sigmoid_() for s in scores]
            outputs = [torch.addcmul(w.new_zeros(()), w, m, value=scale) for w, m in zip(weights, opened, strict=True)]
        ctx.save_for_backward(*weights, *opened)
        ctx.constants = beta, scale, lam
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        beta, scale, lam = ctx.constants
        saved = ctx.saved_tensors
        weights, opened = saved[: len(grads)], saved[len(grads) :]
        needs = ctx.needs_input_grad[3:]
        grad_w: list[Tensor | None] = [None] * len(grads)
        grad_s: list[Tensor | None] = [None] * len(grads)
        for i, (g, w, m) in enumerate(zip(grads, weights, opened, strict=True)):
            if needs[i]:
                grad_w[i] = torch.addcmul(g.new_zeros(()), g, m, value=scale)
            if needs[len(grads) + i]:
                # d/ds [L + lam * sum(c m)] = (g w + lam) * c * beta * m (1 - m)
                push = torch.addcmul(g.new_full((), lam * scale * beta), g, w, value=scale * beta)
                grad_s[i] = torch.ops.aten.sigmoid_backward(push, m)
        return None, None, None, *grad_w, *grad_s


def soft_gates(
    weights: Sequence[Tensor],
    scores: Sequence[Tensor],
    beta: float,
    s0: float | None = 0.0,
    lam: float = 0.0,
) -> tuple[Tensor, ...]:
    r"""Soft effective weights of many layers at once, ``W = c * sigmoid(beta * s) * w`` with ``c = 1 / sigmoid(s0)``.

    The backward pass adds the gradient of ``lam * sum(c * sigmoid(beta * s))`` to that of the scores, so the penalty
    needs no graph of its own. That part is added once per backward pass through the result and does not follow a
    factor put on the loss (gradient accumulation, loss scaling): divide ``lam`` accordingly there.

    Args:
        weights: tensors of any shapes.
        scores: gate scores ``s``, one tensor of the same shape per weight.
        beta: inverse temperature, > 0.
        s0: initial score that fixes ``c``; ``None`` for ``c = 1``.
        lam: strength of the penalty on the open gates, >= 0.

    Returns:
        The effective weights, in order, with the shapes of ``weights``.

    Raises:
        ValueError: unequal numbers or shapes, or a constant out of range.

    Reference: savarese2020winning

    >>> soft_gates([torch.tensor([2.0])], [torch.tensor([0.0])], beta=7.0)
    (tensor([2.]),)
    """
    scale = gate_scale(s0)
    _check(weights, scores, beta, lam)
    return _SoftGates.apply(float(beta), scale, float(lam), *weights, *scores) if weights else ()


def soft_gate(w: Tensor, s: Tensor, beta: float, s0: float | None = 0.0, lam: float = 0.0) -> Tensor:
    r"""Soft effective weight ``c * sigmoid(beta * s) * w`` of one layer; see :func:`soft_gates`.

    Args:
        w: weight of any shape.
        s: gate scores of the same shape.
        beta: inverse temperature, > 0.
        s0: initial score, ``c = 1 / sigmoid(s0)``; ``None`` for ``c = 1``.
        lam: penalty whose gradient is fused into that of ``s``, >= 0.

    Returns:
        The effective weight, shape of ``w``.

    Raises:
        ValueError: unequal shapes, or a constant out of range.

    Reference: savarese2020winning

    >>> soft_gate(torch.tensor([3.0, 3.0]), torch.tensor([-1.0, 1.0]), beta=200.0)
    tensor([0., 6.])
    """
    return soft_gates([w], [s], beta, s0, lam)[0]


def hard_gate(w: Tensor, s: Tensor, s0: float | None = 0.0) -> Tensor:
    r"""Ticket weight ``c * H(s) * w`` where ``H(s) = 1`` for ``s > 0`` and 0 otherwise (so 0 for ``s == 0``).

    Args:
        w: weight of any shape.
        s: gate scores of the same shape; no gradient flows to them.
        s0: initial score, ``c = 1 / sigmoid(s0)``; ``None`` for ``c = 1``.

    Returns:
        The masked, scaled weight, shape of ``w``.

    Raises:
        ValueError: unequal shapes, or ``s0`` out of range.

    Reference: savarese2020winning

    >>> hard_gate(torch.tensor([3.0, 3.0]), torch.tensor([0.0, 1e-9]))
    tensor([0., 6.])
    """
    scale = gate_scale(s0)
    _check([w], [s], 1.0, 0.0)
    # A mask of the weight's type: multiplying by a bool tensor is several times slower on a CPU.
    mask = (s > 0).to(w.dtype)
    return w * (mask if scale == 1.0 else mask.mul_(scale))
