"""Statistics of few runs: intervals of paired differences, exact tests, equivalence, aggregates over tasks.

The unit of replication is the seed, and method and baseline of one seed are paired. Which interval when: Student's t
on differences (logarithms for ratios) below 20 runs, order statistics for timing ratios, the stratified bootstrap
only for a matrix of at least 20 runs over tasks.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, stdtr, stdtrit

from effnb.lab.aggregate import (
    iqm,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)
from effnb.lab.interval import Array, Interval, differences, finite, in_unit, vector

__all__ = [
    "Equivalence",
    "Interval",
    "holm",
    "iqm",
    "optimality_gap",
    "order_statistic_interval",
    "paired_t_interval",
    "performance_profile",
    "probability_of_improvement",
    "sign_flip_test",
    "stratified_bootstrap",
    "tost",
]


@dataclass(frozen=True)
class Equivalence:
    """Outcome of two one-sided tests: ``equivalent`` if the whole interval lies strictly inside ``±margin``."""

    interval: Interval
    margin: float
    p: float
    equivalent: bool


def paired_t_interval(a: ArrayLike, b: ArrayLike | None = None, level: float = 0.95, log: bool = False) -> Interval:
    r"""Student interval of the mean paired difference, :math:`\bar d \pm t_{n-1} s_d / \sqrt n`.

    With ``log=True`` the differences are of logarithms and the result is their exponential: the geometric mean ratio
    ``a / b``, for times, perplexities and other positive quantities.

    Args:
        a: ``(n,)`` values, one a seed, n >= 2.
        b: ``(n,)`` values of the same seeds, subtracted (divided by); ``None`` takes ``a`` as it is.
        level: coverage in (0, 1).
        log: work on logarithms; all values must be positive.

    Raises:
        ValueError: unequal lengths, n < 2, values not finite, ``level`` out of range, values <= 0 with ``log``.

    Reference: student1908probable.

    >>> print(paired_t_interval([3.0, 5.0], [1.0, 1.0]))
    3 [-9.706, 15.71]
    """
    d = differences(a, b, log)
    half = stdtrit(len(d) - 1, (1 + in_unit("level", level)) / 2) * d.std(ddof=1) / math.sqrt(len(d))
    bounds = np.array([d.mean(), d.mean() - half, d.mean() + half])
    if log:
        return Interval(*np.exp(bounds).tolist(), level, len(d), "paired-t-log")
    return Interval(*bounds.tolist(), level, len(d), "paired-t")


def order_statistic_interval(x: ArrayLike, level: float = 0.95) -> Interval:
    """Median with the narrowest symmetric pair of order statistics that covers it with at least ``level``.

    Free of any assumption but independence; with 7 values it is min..max (98.4 %), with 15 the 4th..12th (96.5 %).

    Args:
        x: ``(n,)`` values, for instance ratios of paired timings.
        level: smallest coverage in (0, 1); the result's ``level`` is the one attained.

    Raises:
        ValueError: fewer than 2 values or too few for ``level`` (6 for 95 %), values not finite, ``level`` wrong.

    Reference: david2003order.

    >>> print(order_statistic_interval([1, 2, 3, 4, 5, 6, 7]))
    4 [1, 7]
    """
    values = np.sort(vector("x", x))
    n = len(values)
    coverage = 1 - 2 * bdtr(np.arange((n + 1) // 2, dtype=float), n, 0.5)
    if coverage[0] < in_unit("level", level):
        raise ValueError(f"x must hold more values for a {level:.0%} interval of the median, got {n}")
    k = int(np.flatnonzero(coverage >= level)[-1])
    median, lo, hi = np.median(values), values[k], values[n - 1 - k]
    return Interval(float(median), float(lo), float(hi), float(coverage[k]), n, "order-statistic")


def sign_flip_test(a: ArrayLike, b: ArrayLike | None = None, alternative: str = "greater") -> float:
    """Exact p value of the mean paired difference over all ``2**n`` sign vectors, the identity included.

    Args:
        a: ``(n,)`` values, 2 <= n <= 24.
        b: ``(n,)`` values of the same seeds, or ``None``.
        alternative: ``"greater"``, ``"less"`` or ``"two-sided"``. The least one-sided p is ``2**-n``.

    Raises:
        ValueError: unequal lengths, n out of range, values not finite, unknown ``alternative``.

    Reference: fisher1935design.

    >>> sign_flip_test([1.0, 2.0, 3.0])
    0.125
    """
    d = differences(a, b)
    if len(d) > 24:
        raise ValueError(f"a must hold at most 24 values for an exact test, got {len(d)}")
    if alternative not in ("greater", "less", "two-sided"):
        raise ValueError(f"alternative must be 'greater', 'less' or 'two-sided', got {alternative!r}")
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums + value, sums - value])
    sums = {"greater": sums, "less": -sums, "two-sided": np.abs(sums)}[alternative]
    return float((sums >= sums[0] - 1e-12 * np.abs(d).sum()).mean())


def tost(a: ArrayLike, b: ArrayLike | None, margin: float, alpha: float = 0.05) -> Equivalence:
    """Two one-sided t tests of ``|mean(a - b)| < margin``, by the interval of level ``1 - 2 alpha`` (90 %).

    Args:
        a: ``(n,)`` values, n >= 2.
        b: ``(n,)`` values of the same seeds, or ``None``.
        margin: the largest difference that does not matter, > 0, fixed before the data are seen.
        alpha: size of each test, below 0.5.

    Raises:
        ValueError: unequal lengths, n < 2, values not finite, ``margin`` or ``alpha`` out of range.

    Reference: schuirmann1987comparison.

    >>> tost([0.1, -0.1, 0.2, 0.0], None, margin=1.0).equivalent
    True
    """
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"margin must be positive and finite, got {margin}")
    in_unit("2 alpha", 2 * alpha)
    d = differences(a, b)
    interval = paired_t_interval(d, level=1 - 2 * alpha)
    gap = margin - abs(d.mean())
    error = d.std(ddof=1) / math.sqrt(len(d))
    t = gap / error if error > 0 else (math.inf if gap > 0 else -math.inf)
    inside = bool(-margin < interval.lo and interval.hi < margin)
    return Equivalence(interval, margin, float(stdtr(len(d) - 1, -t)), inside)


def holm(p: ArrayLike) -> Array:
    """Holm's adjusted p values in the order given: reject those <= alpha and the family-wise error is <= alpha.

    Args:
        p: ``(m,)`` p values in [0, 1], m >= 1.

    Raises:
        ValueError: empty, not one row, or a value outside [0, 1].

    Reference: holm1979simple.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    values = finite("p", p)
    if values.ndim != 1 or values.min() < 0 or values.max() > 1:
        raise ValueError(f"p must be one row of values in [0, 1], got {p}")
    order = np.argsort(values)
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted
