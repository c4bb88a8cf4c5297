"""Aggregates over runs and tasks, and the stratified bootstrap that puts intervals on them."""

import inspect
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike

from effnb.lab.interval import Array, Interval, finite, in_unit, matrix


def stratified_bootstrap(
    scores: ArrayLike | tuple[ArrayLike, ...],
    stat: Callable[..., ArrayLike],
    reps: int = 2000,
    generator: torch.Generator | None = None,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap that draws seeds with replacement within each task; the tasks stay fixed.

    Args:
        scores: ``(seeds, tasks)`` with at least 20 entries, or a tuple of such matrices (each resampled on its own).
        stat: takes the matrices; given ``axis=(-2, -1)`` for a whole stack at once if it has that parameter. May
            return a vector (a profile): then estimate, lo and hi are arrays.
        reps: resamples, >= 100; publish with 50 000.
        generator: CPU stream; ``None`` is a fixed one.
        level: coverage in (0, 1).

    Raises:
        ValueError: a matrix with fewer than 20 entries (use :func:`paired_t_interval`) or with values not finite,
            fewer than 100 ``reps``, ``level`` out of range.

    Reference: agarwal2021precipice.

    >>> scores = np.linspace(0, 1, 20).reshape(5, 4)
    >>> interval = stratified_bootstrap(scores, np.mean)
    >>> interval.lo < 0.5 < interval.hi
    True
    """
    matrices = [matrix("scores", s) for s in (scores if isinstance(scores, tuple) else (scores,))]
    if min(m.size for m in matrices) < 20 or reps < 100:
        raise ValueError(f"scores need 20 entries and reps 100, got {[m.shape for m in matrices]} and {reps}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    stacked = "axis" in inspect.signature(stat).parameters
    chunk = max(1, 2_000_000 // sum(m.size for m in matrices))
    values = []
    for start in range(0, reps, chunk):
        samples = [_resample(m, min(chunk, reps - start), generator) for m in matrices]
        values.append(stat(*samples, axis=(-2, -1)) if stacked else [stat(*s) for s in zip(*samples, strict=True)])
    tail = (1 - in_unit("level", level)) / 2
    lo, hi = np.quantile(np.concatenate(values), [tail, 1 - tail], axis=0)
    result = (v if v.ndim else float(v) for v in map(np.asarray, (stat(*matrices), lo, hi)))
    return Interval(*result, level, len(matrices[0]), "stratified-bootstrap")


def iqm(scores: ArrayLike, axis: int | tuple[int, ...] | None = None) -> float | Array:
    """Interquartile mean: the mean without the lowest and highest ``floor(n / 4)`` values.

    Args:
        scores: any shape; all entries are pooled unless ``axis`` names the ones to reduce.
        axis: axes to pool; ``None`` for all.

    Raises:
        ValueError: empty or not finite.

    Reference: agarwal2021precipice.

    >>> iqm([0, 1, 2, 100])
    1.5
    """
    x = finite("scores", scores)
    axes = tuple(range(x.ndim)) if axis is None else tuple(np.atleast_1d(axis))
    x = np.moveaxis(x, axes, range(-len(axes), 0))
    x = x.reshape(*x.shape[: x.ndim - len(axes)], -1)
    cut, n = x.shape[-1] // 4, x.shape[-1]
    middle = np.sort(x, axis=-1)[..., cut : n - cut].mean(axis=-1)
    return middle if middle.ndim else float(middle)


def probability_of_improvement(a: ArrayLike, b: ArrayLike) -> float:
    """``P(A > B)`` for one run of each, ties counted half, averaged over tasks.

    Args:
        a: ``(seeds, tasks)``, or ``(seeds,)`` for one task.
        b: ``(other seeds, tasks)``.

    Raises:
        ValueError: different numbers of tasks, empty or not finite.

    Reference: agarwal2021precipice.

    >>> probability_of_improvement([1, 2], [1, 0])
    0.875
    """
    a, b = matrix("a", a), matrix("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have the same number of tasks, got {a.shape[1]} and {b.shape[1]}")
    return float((np.sign(a[:, None] - b[None]) / 2 + 0.5).mean())


def optimality_gap(scores: ArrayLike, target: float = 1.0) -> float:
    """Mean shortfall ``max(target - score, 0)`` over all runs and tasks; what exceeds the target earns nothing.

    Raises:
        ValueError: empty or not finite.

    Reference: agarwal2021precipice.

    >>> optimality_gap([0.5, 1.5])
    0.25
    """
    return float(np.maximum(target - finite("scores", scores), 0).mean())


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> Array:
    """Share of all runs and tasks whose score exceeds each threshold.

    Args:
        scores: any shape.
        thresholds: ``(k,)``.

    Returns:
        ``(k,)`` values in [0, 1].

    Raises:
        ValueError: empty or not finite.

    Reference: agarwal2021precipice.

    >>> performance_profile([0.2, 0.4, 0.6, 0.8], [0.0, 0.5, 0.8]).tolist()
    [1.0, 0.5, 0.0]
    """
    return (finite("scores", scores).reshape(-1, 1) > finite("thresholds", thresholds)).mean(axis=0)


def _resample(scores: Array, reps: int, generator: torch.Generator) -> Array:
    """``(reps, seeds, tasks)``: for every task its own draw of seeds."""
    rows = torch.randint(len(scores), (reps, *scores.shape), generator=generator).numpy()
    return np.take_along_axis(scores[None], rows, axis=1)
