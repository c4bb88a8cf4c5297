"""Input checks that the solvers share: every message names the argument, the rule and the value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_UNIT_TOLERANCE = 1e-4  # float32 columns normalised in float32 miss one by about 1e-7


def check_matrix(A: Any, name: str = "A") -> None:
    """Raise unless ``A`` is a finite floating-point matrix."""
    if not isinstance(A, Tensor) or not A.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(A, 'dtype', type(A).__name__)}")
    if A.ndim != 2 or A.numel() == 0:
        raise ValueError(f"{name} must be a non-empty matrix (2-D), got shape {tuple(A.shape)}")
    if not torch.isfinite(A).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def check_unit_columns(A: Tensor) -> None:
    """Raise unless every column of ``A`` has length one."""
    norms = torch.linalg.vector_norm(A.detach(), dim=0)
    if (norms == 0).any():
        raise ValueError(f"A must have no zero column, got {int((norms == 0).sum())} of them")
    worst = float((norms - 1).abs().max())
    if worst > _UNIT_TOLERANCE:
        raise ValueError(f"A must have columns of length 1, got an error of {worst:.3g} (normalize=True rescales them)")


def check_full_row_rank(A: Tensor) -> None:
    """Raise unless the rows of ``A`` are independent, so that ``A A^T`` can be inverted."""
    m, n = A.shape
    if m > n:
        raise ValueError(f"A must have at least as many columns as rows, got shape ({m}, {n})")
    singular = torch.linalg.svdvals(A.detach().double())
    condition = math.inf if singular[-1] == 0 else float(singular[0] / singular[-1])
    limit = 1.0 / (torch.finfo(A.dtype).eps * n)
    if condition > limit:
        raise ValueError(f"A must have full row rank, got condition number {condition:.3g} (limit {limit:.3g})")


def check_batch(b: Any, width: int, name: str = "b") -> None:
    """Raise unless ``b`` is a finite batch ``(batch, width)``."""
    if not isinstance(b, Tensor) or not b.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(b, 'dtype', type(b).__name__)}")
    if b.ndim != 2 or b.shape[1] != width:
        raise ValueError(f"{name} must have shape (batch, {width}), got {tuple(b.shape)}")
    if not torch.isfinite(b).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def check_number(value: Any, name: str, low: float, *, strict: bool = False) -> None:
    """Raise unless ``value`` (a number or a tensor) is finite and at least (``strict``: above) ``low``."""
    tensor = torch.as_tensor(value).detach()
    good = torch.isfinite(tensor) & ((tensor > low) if strict else (tensor >= low))
    if not good.all():
        worst = value if tensor.ndim == 0 else tensor[~good].flatten()[0].item()
        raise ValueError(f"{name} must be finite and {'>' if strict else '>='} {low:g}, got {worst}")


def check_count(value: Any, name: str, low: int = 1, high: int | None = None) -> None:
    """Raise unless ``value`` is an integer from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        bound = f">= {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {bound}, got {value}")


def check_choice(value: Any, name: str, choices: tuple) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
