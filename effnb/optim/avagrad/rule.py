"""What one step of a delayed adaptive method is told, and the scalars that follow from the step counters."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor


class Rule(NamedTuple):
    """Hyper-parameters of one step, shared by the single-tensor, foreach and fused paths.

    ``norm`` is ``"current"`` or ``"lagged"`` (AvaGrad) or ``None`` (Delayed Adam, no normalisation).
    """

    lr: Scalar
    beta1: float
    beta2: float
    eps: float
    weight_decay: float = 0.0
    decoupled: bool = False
    norm: str | None = "current"
    first_step: str = "skip"
    maximize: bool = False
    capturable: bool = False
    differentiable: bool = False


class Scalars(NamedTuple):
    """Per-parameter factors of one step; floats, or 0-d tensors when the counters stay on the device.

    ``root`` is :math:`1/\\sqrt{1-\\beta_2^{t-1}}` (0 at t = 1), ``next_root`` the same one step later,
    ``moved`` is 0 where the first update is skipped and 1 elsewhere, ``mean`` is ``moved / (1 - beta1^t)``.
    ``first`` says where an unnormalised method has no second moment yet and takes a rate of one.
    """

    root: list[Scalar]
    next_root: list[Scalar]
    moved: list[Scalar]
    mean: list[Scalar]
    first: list[Scalar]


def _float_scalars(step: float, rule: Rule) -> tuple[float, ...]:
    root = 1 / math.sqrt(1 - rule.beta2 ** (step - 1)) if step > 1 else 0.0
    next_root = 1 / math.sqrt(1 - rule.beta2**step)
    moved = 0.0 if step == 1 and rule.first_step == "skip" else 1.0
    return root, next_root, moved, moved / (1 - rule.beta1**step), float(step == 1)


def _bias_correction(beta: float, step: Tensor) -> Tensor:
    """``1 - beta^step`` without the cancellation that costs four digits in float32 at small steps."""
    if beta == 0:
        return (step > 0).to(step.dtype)
    return -torch.expm1(step * math.log(beta))


def _tensor_scalars(step: Tensor, rule: Rule) -> tuple[Tensor, ...]:
    first = (step == 1).to(step.dtype)
    # the clamp only keeps the branch that `where` drops finite
    root = torch.where(step > 1, _bias_correction(rule.beta2, step - 1).clamp_min(1e-30).rsqrt(), first - first)
    moved = 1 - first if rule.first_step == "skip" else torch.ones_like(step)
    return (
        root,
        _bias_correction(rule.beta2, step).rsqrt(),
        moved,
        moved / _bias_correction(rule.beta1, step),
        first,
    )


def step_scalars(steps: list[Tensor], rule: Rule) -> Scalars:
    """The factors of this step for every parameter; ``steps`` are the counters after their increment."""
    if rule.capturable:  # no branch on a counter's value, no host synchronisation
        return Scalars(*map(list, zip(*(_tensor_scalars(step, rule) for step in steps), strict=True)))
    known: dict[float, tuple[float, ...]] = {}
    values = [step.item() for step in steps]
    for value in set(values):
        known[value] = _float_scalars(value, rule)
    return Scalars(*map(list, zip(*(known[value] for value in values), strict=True)))


def accumulation_dtype(tensors: list[Tensor]) -> torch.dtype:
    """float64 if any tensor has it, else float32: half precision overflows in a sum of squared rates."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def inverse_rms(squares: Tensor, count: int, as_tensor: bool) -> Scalar:
    """``1 / sqrt(squares / count)``, read to the host where that costs no synchronisation."""
    if as_tensor or squares.device.type != "cpu":
        return (squares / count).rsqrt()
    return 1 / math.sqrt(squares.item() / count)
