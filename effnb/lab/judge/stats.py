"""Intervals for few runs, over scipy.stats, and what covers test items and units beside the seeds."""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as sps

Array = NDArray[np.float64]
STATISTICS = ("mean", "spearman", "kendall")


@dataclass(frozen=True)
class Interval:
    """A point estimate with its confidence interval; ``level`` is what the interval attains.

    >>> print(Interval(1.5, 1.0, 2.0))
    1.5 [1, 2]
    """

    estimate: float
    lo: float
    hi: float
    level: float = 0.95
    n: int = 0
    method: str = "none"

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.lo:.4g}, {self.hi:.4g}]"


def finite(name: str, values: ArrayLike, ndim: int = 1, least: int = 2) -> Array:
    """Return ``values`` as finite float64 of ``ndim`` dimensions with at least ``least`` entries along the last."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite and not empty, got {values}")
    if array.ndim != ndim or array.shape[-1] < least:
        what = "one row" if ndim == 1 else "a matrix (seeds, units)"
        raise ValueError(f"{name} must be {what} of n >= {least} values, got shape {array.shape}")
    return array


def differences(a: ArrayLike, b: ArrayLike | None, log: bool = False) -> Array:
    """Return ``a - b`` of one length n >= 2, or ``a`` alone; of logarithms with ``log=True``."""
    pair = [finite(name, values) for name, values in (("a", a), ("b", b)) if values is not None]
    if len({len(values) for values in pair}) > 1:
        raise ValueError(f"a and b must have the same length, got {len(pair[0])} and {len(pair[1])}")
    if log and (least := min(values.min() for values in pair)) <= 0:
        raise ValueError(f"a and b must be positive with log=True, got {least}")
    pair = [np.log(values) for values in pair] if log else pair
    return pair[0] - pair[1] if len(pair) == 2 else pair[0]


def coverage(level: float) -> float:
    """Return ``level``; raise unless it lies strictly between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    return level


def paired_t_interval(a: ArrayLike, b: ArrayLike | None = None, level: float = 0.95, log: bool = False) -> Interval:
    r"""Return Student's interval of the mean paired difference, :math:`\bar d \pm t_{n-1} s_d / \sqrt n`.

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # equal differences: the interval is a point
        found = sps.ttest_1samp(d, 0.0).confidence_interval(coverage(level))
    bounds = np.array([d.mean(), found.low, found.high])
    bounds = np.exp(bounds) if log else bounds
    return Interval(*bounds.tolist(), level, len(d), "t-log" if log else "t")


def item_variance(a: ArrayLike, b: ArrayLike | None = None) -> tuple[list[float], list[float] | None, float, int]:
    """Return what :func:`items_interval` needs of per-item values ``(seeds, items)``, such as 100 for a hit.

    That is: the means of ``a`` and of ``b`` (None without it), one a seed; the variance ``d`` over the items of the
    difference averaged over seeds; the number of items ``m``. ValueError for matrices of different shapes.

    >>> item_variance([[1, 0, 1, 0]])
    ([0.5], None, 0.3333333333333333, 4)
    """
    ours = finite("a", a, ndim=2)
    theirs = np.zeros_like(ours) if b is None else finite("b", b, ndim=2)
    if ours.shape != theirs.shape:
        raise ValueError(f"a and b must have the same shape, got {ours.shape} and {theirs.shape}")
    d = float((ours - theirs).mean(0).var(ddof=1))
    return ours.mean(1).tolist(), None if b is None else theirs.mean(1).tolist(), d, ours.shape[1]


def items_interval(a: ArrayLike, b: ArrayLike | None, d: float, m: int, level: float = 0.95) -> Interval:
    r"""Return the interval of a mean over seeds that share ``m`` test items, :math:`se^2 = s^2 / n + d / m`.

    A t interval with n - 1 degrees of freedom. Seeds alone would leave out that another test set has other items.
    Arguments and errors are as in :func:`paired_t_interval`; ``d`` >= 0 and ``m`` >= 2 as in :func:`item_variance`.

    >>> print(items_interval([1.0, 2.0, 3.0], None, d=0.0, m=100))
    2 [-0.4841, 4.484]
    """
    values = differences(a, b)
    if not (d >= 0 and math.isfinite(d)) or m < 2:
        raise ValueError(f"d must be finite and >= 0 and m >= 2, got {d} and {m}")
    n = len(values)
    half = sps.t.ppf((1 + coverage(level)) / 2, n - 1) * math.sqrt(values.var(ddof=1) / n + d / m)
    middle = float(values.mean())
    return Interval(middle, middle - float(half), middle + float(half), level, n, "t-items")


def order_statistic_interval(x: ArrayLike, level: float = 0.95) -> Interval:
    """Return the median with the pair of order statistics that covers it with at least ``level``.

    Free of any assumption but independence; with 7 values it is min..max (98.4 %), with 15 the 4th..12th (96.5 %).
    The result's ``level`` is the one attained.

    Raises:
        ValueError: fewer than 2 values or too few for ``level`` (6 for 95 %), values not finite, ``level`` wrong.

    Reference: david2003order.

    >>> print(order_statistic_interval([1, 2, 3, 4, 5, 6, 7]))
    4 [1, 7]
    """
    values, level = finite("x", x), coverage(level)
    found = sps.quantile_test(values, q=0.0, p=0.5).confidence_interval(level)
    if not np.isfinite([found.low, found.high]).all():
        raise ValueError(f"x must hold more values for a {level:.0%} interval of the median, got {len(values)}")
    n, below = len(values), int((np.sort(values) < found.low).sum())
    attained = float(1 - 2 * sps.binom.cdf(below, n, 0.5))
    return Interval(float(np.median(values)), float(found.low), float(found.high), attained, n, "order")


def binomial_interval(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Return a share with its exact (Clopper-Pearson) interval; ValueError for other counts than 0 to ``trials``.

    Reference: clopper1934use.

    >>> print(binomial_interval(9, 10))
    0.9 [0.555, 0.9975]
    """
    if not (trials >= 1 and 0 <= successes <= trials):
        raise ValueError(f"successes must be from 0 to trials >= 1, got {successes} of {trials}")
    found = sps.binomtest(int(successes), int(trials)).proportion_ci(coverage(level), method="exact")
    return Interval(successes / trials, float(found.low), float(found.high), level, int(trials), "binomial")


def unit_statistic(values: Array, target: Array | None, statistic: str) -> Array:
    """Return the mean of each row ``(..., units)``, or its rank correlation with ``target``, which is broadcast."""
    if statistic == "mean":
        return values.mean(-1)
    if statistic == "kendall":
        rows = (side.reshape(-1, values.shape[-1]) for side in (values, np.broadcast_to(target, values.shape)))
        found = [sps.kendalltau(v, t).statistic for v, t in zip(*rows, strict=True)]
        return np.array(found).reshape(values.shape[:-1])
    x, y = (sps.rankdata(side, axis=-1) for side in (values, target))
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a constant row has no correlation: nan
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


def units_interval(
    a: ArrayLike,
    b: ArrayLike | None = None,
    target: ArrayLike | None = None,
    statistic: str = "mean",
    level: float = 0.95,
    reps: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return a statistic over units (architectures, supernets, graphs) with a two-way percentile bootstrap.

    Units and, where there are several, seeds are drawn with replacement, each on their own, so that the interval says
    what other units and other seeds would give. The statistic is taken per seed over the units, then averaged.

    Args:
        a: ``(seeds, units)``, at least 20 units.
        b: the rival's values on the same units and seeds; its statistic is subtracted.
        target: ``(units,)`` what a rank correlation is taken with.
        statistic: ``"mean"``, ``"spearman"`` or ``"kendall"`` with ``target``.
        level: coverage in (0, 1).
        reps: resamples, >= 100.
        seed: of the resampling.

    Raises:
        ValueError: shapes that do not fit, fewer than 20 units or 100 ``reps``, unknown ``statistic``, a target missing
            or superfluous, values not finite.

    Reference: owen2007pigeonhole.

    >>> units = np.arange(40.0)
    >>> interval = units_interval([units, units + 1])
    >>> interval.lo < interval.estimate == 20.0 < interval.hi
    True
    """
    if statistic not in STATISTICS or (statistic == "mean") != (target is None):
        raise ValueError(f"statistic must be one of {STATISTICS}, the last two with a target, got {statistic!r}")
    sides = [finite("a", a, 2, 20), *([finite("b", b, 2, 20)] if b is not None else [])]
    rows = [*sides, *([finite("target", target, 1, 20)[None]] if target is not None else [])]
    if len({side.shape for side in sides}) > 1 or len({row.shape[1] for row in rows}) > 1 or reps < 100:
        raise ValueError(f"a, b and target must share their units and reps be >= 100, got {[r.shape for r in rows]}")
    (seeds, units), rng = sides[0].shape, np.random.default_rng(seed)

    def value(who: Array, which: Array) -> Array:
        """Statistic for chosen seeds ``(r, seeds)`` and units ``(r, units)``: ``(r,)``."""
        aim = None if target is None else rows[-1][0][which][:, None]
        found = [unit_statistic(side[who[:, :, None], which[:, None, :]], aim, statistic).mean(-1) for side in sides]
        return found[0] - found[1] if b is not None else found[0]

    estimate = value(np.arange(seeds)[None], np.arange(units)[None])[0]
    chunk, samples = max(1, 2_000_000 // (seeds * units)), []
    for start in range(0, reps, chunk):
        count = min(chunk, reps - start)
        samples.append(value(rng.integers(seeds, size=(count, seeds)), rng.integers(units, size=(count, units))))
    tail = (1 - coverage(level)) / 2
    lo, hi = np.nanquantile(np.concatenate(samples), [tail, 1 - tail])
    return Interval(float(estimate), float(lo), float(hi), level, units, "bootstrap-units")


def sign_flip_test(a: ArrayLike, b: ArrayLike | None = None, alternative: str = "greater") -> float:
    """Return the exact p value of the mean paired difference over all ``2**n`` sign vectors, the identity included.

    Args:
        a: ``(n,)`` values, 2 <= n <= 24.
        b: ``(n,)`` values of the same seeds, or ``None``.
        alternative: ``"greater"``, ``"less"`` or ``"two-sided"``. The least one-sided p is ``2**-n``.

    Raises:
        ValueError: as :func:`paired_t_interval`, or an unknown ``alternative``.

    Reference: fisher1935design.

    >>> sign_flip_test([1.0, 2.0, 3.0])
    0.125
    """
    d = differences(a, b)
    if len(d) > 24:
        raise ValueError(f"a must hold at most 24 values for an exact test, got {len(d)}")
    if alternative not in ("greater", "less", "two-sided"):
        raise ValueError(f"alternative must be 'greater', 'less' or 'two-sided', got {alternative!r}")
    scale = np.abs(d).max() or 1.0
    turn = {"greater": lambda m: m, "less": np.negative, "two-sided": np.abs}[alternative]

    def mean(x: Array, axis: int) -> Array:
        # Rounded: ties that rounding errors part would lower p. |mean| is exact for a symmetric null; scipy doubles.
        return np.round(turn(x.mean(axis)) / scale, 12)

    found = sps.permutation_test((d,), mean, permutation_type="samples", n_resamples=np.inf, alternative="greater")
    return float(found.pvalue)
