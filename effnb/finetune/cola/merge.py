"""What may be merged, and the sum ``W + s B A`` in a precision that keeps it."""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class AdapterError(TypeError, ValueError):
    """A layer that cannot carry an adapter: its class, its quantised or its shared weight."""


def check_base(layer: nn.Module, name: str = "base") -> None:
    """Refuse what ``W + s B A`` would lose or misplace: no ``nn.Linear``, quantised or computed weights."""
    if not isinstance(layer, nn.Linear):
        raise AdapterError(f"{name} must be an nn.Linear, got {type(layer).__name__}")
    if parametrize.is_parametrized(layer, "weight"):
        raise AdapterError(f"{name}.weight is computed by a parametrization: a merge would be lost, remove it first")
    weight = layer.weight
    if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.itemsize < 2:
        kind = f"{type(weight).__name__} of {weight.dtype}"
        raise AdapterError(f"{name}.weight must be a plain floating-point tensor, got {kind}: merging would lose dW")


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Precision of factors, products and sums: at least float32, float64 for float64 weights."""
    return torch.promote_types(weight.dtype, torch.float32)


def check_factors(A: Tensor, B: Tensor, scale: float, name: str = "adapter") -> None:
    """Refuse factors with NaN or Inf, or so large that their product could overflow, before any weight changes."""
    bound = abs(scale) * A.shape[0] * A.abs().max().item() * B.abs().max().item()
    if not bound < torch.finfo(A.dtype).max:
        raise ValueError(f"{name} must have finite factors, got NaN, Inf or an overflow: the weights stay as they were")


@torch.no_grad()
def add_low_rank_(weight: Tensor, A: Tensor, B: Tensor, scale: float, master: Tensor | None = None) -> Tensor:
    """``weight += scale * B @ A`` in place: one rank-r product, in float32 where the weight is of half precision.

    Args:
        weight: ``(out, in)``.
        A: ``(r, in)``.
        B: ``(out, r)``.
        scale: ``alpha / r``.
        master: the weight in higher precision; takes the sum, and ``weight`` becomes its rounded copy.

    Returns:
        ``weight``.

    Raises:
        ValueError: the factors are not finite or the sum overflows; ``weight`` is unchanged then.
    """
    check_factors(A, B, scale)
    dtype = torch.promote_types(factor_dtype(weight), A.dtype)
    if master is None and weight.dtype == A.dtype == dtype:
        return weight.addmm_(B, A, alpha=scale)
    if master is not None and not torch.equal(master.to(weight.dtype), weight):
        master.copy_(weight)  # somebody loaded other weights since
    start = weight.to(dtype) if master is None else master
    total = torch.addmm(start, B.to(start.dtype), A.to(start.dtype), alpha=scale)
    rounded = total.to(weight.dtype)
    if not torch.isfinite(rounded).all():
        raise ValueError(f"W + s B A overflows {weight.dtype}: the weights stay as they were")
    if master is None:
        _warn_of_loss(start, total, rounded)
    else:
        master.copy_(total)
    return weight.copy_(rounded)


def _warn_of_loss(start: Tensor, total: Tensor, rounded: Tensor) -> None:
    moved = total != start
    lost = (moved & (rounded == start)).sum().item() / max(moved.sum().item(), 1)
    if lost > 0:
        warnings.warn(
            f"{lost:.0%} of the updates are below half an ulp of {rounded.dtype} and vanish in this merge; "
            "master_dtype=torch.float32 keeps them",
            stacklevel=4,
        )
