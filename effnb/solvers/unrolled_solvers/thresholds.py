"""Soft threshold, and the threshold that spares the largest entries."""

from __future__ import annotations

import torch
from torch import Tensor

from effnb.solvers.unrolled_solvers._check import check_choice, check_number

MODES = ("count", "quantile", "quantile-strict")


def _per_row(value: float | Tensor, z: Tensor) -> Tensor:
    """Bring a number or one value per instance to a shape that broadcasts against ``z (batch, n)``."""
    if isinstance(value, float):  # as_tensor alone would round a Python number to float32
        value = torch.tensor(value, dtype=z.dtype)
    value = torch.as_tensor(value, device=z.device)
    return value.unsqueeze(-1) if value.ndim == 1 else value


def soft(z: Tensor, theta: Tensor) -> Tensor:
    """Return ``soft_threshold`` without the checks: one subtraction and one clamp."""
    return z - torch.clamp(z, -theta, theta)


def soft_threshold(z: Tensor, theta: float | Tensor) -> Tensor:
    r"""Shrink every entry towards zero by ``theta``: :math:`\operatorname{sign}(z)\max(|z|-\theta, 0)`.

    Args:
        z: ``(batch, n)``.
        theta: one number, or one per instance ``(batch,)`` or ``(batch, 1)``; >= 0.

    Returns:
        ``(batch, n)``.

    Raises:
        ValueError: if ``theta`` is negative or not finite.

    Reference: beck2009fast

    >>> soft_threshold(torch.tensor([[3.0, -0.5, -2.0]]), 1.0).tolist()
    [[2.0, 0.0, -1.0]]
    """
    check_number(theta, "theta", 0)
    return soft(z, _per_row(theta, z).to(z.dtype))


def _cutoff_by_count(size: Tensor, p: Tensor) -> Tensor:
    """Return the ``p``-th largest entry of each row; infinity where ``p`` is 0."""
    highest = int(p.max()) if p.numel() else 0
    if highest == 0:
        return size.new_full((), torch.inf)
    ranked = size.topk(highest, dim=-1).values
    rows = p.expand(*size.shape[:-1], 1)
    cutoff = ranked.gather(-1, (rows - 1).clamp_min(0))
    return torch.where(rows == 0, torch.inf, cutoff)


def select(z: Tensor, theta: Tensor, p: Tensor) -> Tensor:
    """Return ``support_select`` in count mode without the checks; ``p`` is an integer tensor."""
    size = z.detach().abs()
    passed = (size >= _cutoff_by_count(size, p)) & (size >= theta)
    return torch.where(passed, z, soft(z, theta))


def support_select(z: Tensor, theta: float | Tensor, p: float | Tensor, mode: str = "count") -> Tensor:
    r"""Shrink by ``theta``, but let the ``p`` largest entries of each instance pass unchanged.

    With :math:`\tau` the ``p``-th largest :math:`|z|` of the instance, entries with :math:`|z|\ge\tau` and
    :math:`|z|\ge\theta` stay as they are; all others are soft-thresholded. ``p = 0`` is the soft threshold, and ``p``
    at or above the number of entries with :math:`|z|\ge\theta` is the hard one. The choice carries no gradient.

    Args:
        z: ``(batch, n)``.
        theta: one number or one per instance; >= 0.
        p: one number or one per instance. ``mode="count"``: how many entries pass, from 0 to n, floored.
            The quantile modes take a fraction in [0, 1].
        mode: ``"quantile"`` takes the interpolated ``1 - p`` quantile as :math:`\tau`, as the official PyTorch code
            does (the largest entry passes even at ``p = 0``); ``"quantile-strict"`` asks for :math:`|z|>\tau`, as the
            official TensorFlow code does.

    Returns:
        ``(batch, n)``.

    Raises:
        ValueError: for a negative ``theta``, ``p`` outside its range or an unknown ``mode``.

    Reference: chen2018theoretical

    >>> support_select(torch.tensor([[3.0, -0.5, -2.0]]), 1.0, 1).tolist()
    [[3.0, 0.0, -1.0]]
    """
    check_choice(mode, "mode", MODES)
    check_number(theta, "theta", 0)
    check_number(p, "p", 0)
    theta, p = _per_row(theta, z).to(z.dtype), _per_row(p, z)
    highest = z.shape[-1] if mode == "count" else 1
    if (p > highest).any():
        raise ValueError(f"p must be at most {highest} in mode {mode!r}, got {float(p.max()):g}")
    if mode == "count":
        return select(z, theta, p.floor().long() if p.is_floating_point() else p.long())
    size = z.detach().abs()
    ranks = (1.0 - p.to(z.dtype)) * (z.shape[-1] - 1)
    ordered = size.sort(dim=-1).values
    low = ordered.gather(-1, ranks.floor().long().expand(*z.shape[:-1], 1))
    high = ordered.gather(-1, ranks.ceil().long().expand(*z.shape[:-1], 1))
    cutoff = torch.lerp(low, high, ranks - ranks.floor())
    passed = ((size > cutoff) if mode == "quantile-strict" else (size >= cutoff)) & (size >= theta)
    return torch.where(passed, z, soft(z, theta))
