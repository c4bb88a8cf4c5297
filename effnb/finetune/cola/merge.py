"""What may be merged, and the sum ``W + s B A`` in a precision that keeps it."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effnb.finetune.cola.kernel import add_product_


class AdapterError(TypeError, ValueError):
    """A layer that cannot carry an adapter: its class, its quantised or its shared weight.

    Reference: hu2022lora
    """


def check_base(layer: nn.Module, name: str = "base", kinds: tuple[type, ...] = (nn.Linear,)) -> None:
    """Refuse what ``W + s B A`` would lose or misplace: no ``nn.Linear``, quantised or computed weights."""
    if not isinstance(layer, kinds):
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


@torch.no_grad()
def check_sum(weight: Tensor, A: Tensor, B: Tensor, scale: float, name: str = "adapter") -> None:
    """Refuse NaN, Inf and overflow before any weight changes; a bound from the largest entries is nearly always enough.

    Raises:
        ValueError: names the adapter; ``weight`` is only read.
    """
    bound = abs(scale) * A.shape[0] * A.abs().max().item() * B.abs().max().item()
    if not bound < torch.finfo(torch.promote_types(A.dtype, torch.float32)).max:
        raise ValueError(f"{name} must have finite factors, got NaN, Inf or an overflow: the weights stay as they were")
    limit = torch.finfo(weight.dtype).max
    if bound + weight.abs().max().item() >= limit:
        total = torch.addmm(weight.to(A.dtype), B, A, alpha=scale)
        if not (total.abs() <= limit).all():
            raise ValueError(f"{name} makes W + s B A overflow {weight.dtype}: the weights stay as they were")


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
    check_sum(weight, A, B, scale)
    dtype = torch.promote_types(factor_dtype(weight), A.dtype)
    if master is None and weight.dtype == A.dtype == dtype:
        return add_product_(weight, B, A, scale)
    return round_into_(weight, scale * (B.to(dtype) @ A.to(dtype)), master)


@torch.no_grad()
def round_into_(weight: Tensor, delta: Tensor, master: Tensor | None = None) -> Tensor:
    """``weight += delta`` with the sum in the precision of ``delta`` or of ``master``; warns of what rounding loses."""
    if master is None and weight.dtype == delta.dtype:
        return weight.add_(delta)
    if master is None:
        start = weight.to(delta.dtype)
        total = start + delta
        rounded = total.to(weight.dtype)
        _warn_of_loss(start, total, rounded)
        return weight.copy_(rounded)
    if not torch.equal(master.to(weight.dtype), weight):
        master.copy_(weight)  # somebody loaded other weights since
    return weight.copy_(master.add_(delta))


def _warn_of_loss(start: Tensor, total: Tensor, rounded: Tensor) -> None:
    moved = total != start
    lost = (moved & (rounded == start)).sum().item() / max(moved.sum().item(), 1)
    if lost > 0:
        warnings.warn(
            f"{lost:.0%} of the updates are below half an ulp of {rounded.dtype} and vanish in this merge; "
            "master_dtype=torch.float32 keeps them",
            stacklevel=2,
        )


def numerical_rank(pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float) -> int:
    """Rank of the sum of ``B A`` over pairs ``(A, B)``, from the triangles of the stacked factors."""
    if not pairs:
        return 0
    rows = torch.linalg.qr(torch.cat([A for A, _ in pairs]).T).R
    columns = torch.linalg.qr(torch.cat([B for _, B in pairs], 1)).R
    values = torch.linalg.svdvals(columns @ rows.T)
    return int((values > tolerance * values[0]).sum())


def check_ranks(ranks: Sequence[int], limit: float = math.inf) -> tuple[int, ...]:
    """At least one rank, all integers from 1 to the shorter side of the smallest layer."""
    if isinstance(ranks, int) or not len(ranks):
        raise ValueError(f"ranks must hold one rank for each link, got {ranks!r}")
    if not all(isinstance(r, int) and not isinstance(r, bool) and 1 <= r <= limit for r in ranks):
        raise ValueError(f"ranks must be integers in [1, {limit}], got {tuple(ranks)}")
    return tuple(ranks)


def check_alpha(alpha: float) -> float:
    """A positive, finite number."""
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    return alpha
