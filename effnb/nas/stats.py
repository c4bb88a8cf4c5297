"""Rank correlation of scores with accuracy: ties, missing values, and paired bootstrap intervals over architectures."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import kendalltau

from effnb.common import check_choice, check_count, check_number

__all__ = ["Correlation", "rank_correlation", "rank_table", "spearman_brown"]


@dataclass(frozen=True)
class Correlation:
    """A rank correlation, or the difference of two, with a percentile interval over resampled architectures.

    ``lo`` and ``hi`` are NaN without a bootstrap; ``count`` is the number of architectures that were used, ``dropped``
    those left out for a missing value; ``resamples`` holds the bootstrap values.

    >>> print(Correlation(0.8, 0.75, 0.85, 200))
    0.800 [0.750, 0.850]
    """

    estimate: float
    lo: float
    hi: float
    count: int
    dropped: int = 0
    resamples: np.ndarray | None = None

    def __float__(self) -> float:
        return self.estimate

    def __str__(self) -> str:
        interval = "" if np.isnan(self.lo) else f" [{self.lo:.3f}, {self.hi:.3f}]"
        return f"{self.estimate:.3f}{interval}"


def rank_correlation(
    scores: ArrayLike,
    accuracy: ArrayLike,
    *,
    method: str = "spearman",
    bootstrap: int = 0,
    seed: int = 0,
    paired_with: ArrayLike | None = None,
    level: float = 0.95,
    nan: str = "raise",
) -> Correlation:
    r"""Return Spearman's :math:`\rho` or Kendall's :math:`\tau_b` between scores and accuracy.

    Ties take their mean rank (Spearman) or the tie correction (:math:`\tau_b`), as in SciPy. The bootstrap resamples
    architectures and ranks each resample anew. With ``paired_with`` the result is the difference
    ``corr(scores, accuracy) - corr(paired_with, accuracy)`` over the same resamples.

    Args:
        scores: ``(n,)`` scores, n >= 3; minus infinity is allowed and ranks last.
        accuracy: ``(n,)`` values to be predicted.
        method: ``"spearman"`` or ``"kendall"``.
        bootstrap: number of resamples, 0 for none.
        seed: of the resampling; equal seeds and lengths give equal resamples.
        paired_with: ``(n,)`` rival scores.
        level: of the interval, in (0, 1).
        nan: ``"raise"``, or ``"drop"`` the architectures with a NaN in any of the inputs.

    Returns:
        The estimate with its interval. Where all values tie it is NaN; such resamples are left out of the interval.

    Raises:
        ValueError: unequal lengths, fewer than 3 architectures, NaN with ``nan="raise"``, an unknown ``method`` or
            ``nan``, a negative ``bootstrap``, ``level`` out of range.

    Reference: efron1993bootstrap, kendall1938new.

    >>> rank_correlation([1, 2, 3, 4], [10, 20, 40, 30], method="kendall").estimate
    0.666...
    """
    check_choice("method", method, ("spearman", "kendall"))
    check_count("bootstrap", bootstrap, 0)
    check_number("level", level, gt=0, lt=1)
    check_choice("nan", nan, ("raise", "drop"))
    inputs = [scores, accuracy] if paired_with is None else [scores, accuracy, paired_with]
    arrays = [np.asarray(column, dtype=np.float64) for column in inputs]
    if any(a.ndim != 1 or len(a) != len(arrays[0]) for a in arrays):
        raise ValueError(f"scores, accuracy and paired_with must be of one length, got {[a.shape for a in arrays]}")
    # NaN compares false with everything: a sort would give it some rank without a word.
    missing = np.isnan(arrays).any(0)
    dropped, count = int(missing.sum()), int((~missing).sum())
    if dropped and nan == "raise":
        raise ValueError(f"scores and accuracy must not be NaN, got {dropped} of {len(missing)}; see nan='drop'")
    if count < 3:
        raise ValueError(f"scores must hold at least 3 architectures, got {count}")
    columns = np.stack(arrays)[:, ~missing]
    statistic = spearman if method == "spearman" else kendall
    estimate = float(contrast(statistic, columns, np.arange(count)[None])[0])
    if not bootstrap:
        return Correlation(estimate, np.nan, np.nan, count, dropped)
    index = np.random.default_rng(seed).integers(count, size=(bootstrap, count))
    resamples = contrast(statistic, columns, index)
    tail = (1 - level) / 2
    # A resample may tie in all values; NaN for every one of them would only warn.
    lo, hi = np.nanquantile(resamples, [tail, 1 - tail]) if np.isfinite(resamples).any() else (np.nan, np.nan)
    return Correlation(estimate, float(lo), float(hi), count, dropped, resamples)


def contrast(statistic, columns: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Correlation of scores and accuracy on each row of ``index``, minus that of the rival if there is one."""
    # The same resamples for both: their common noise cancels in the difference.
    scores, accuracy, *rival = columns
    value = statistic(scores, accuracy, index)
    return value - statistic(rival[0], accuracy, index) if rival else value


def spearman(x: np.ndarray, y: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Pearson correlation of mean ranks on each row of ``index``."""
    a, b = (centred_ranks(values, index) for values in (x, y))
    return ratio((a * b).sum(1), np.sqrt((a * a).sum(1) * (b * b).sum(1)))


def centred_ranks(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Mean ranks of ``values[index]`` row by row, minus their mean.

    A resample draws a value c times; its mean rank is the number of smaller draws plus (c + 1) / 2. Counting by the
    value's dense rank needs no sort of the resamples.
    """
    dense = np.unique(values, return_inverse=True)[1]
    drawn, width = dense[index], dense.max() + 1
    rows, n = index.shape
    counts = np.bincount((drawn + width * np.arange(rows)[:, None]).ravel(), minlength=rows * width)
    counts = counts.reshape(rows, width)
    ranks = counts.cumsum(1) - (counts - 1) / 2
    return np.take_along_axis(ranks, drawn, 1) - (n + 1) / 2


def kendall(x: np.ndarray, y: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Kendall's tau-b on each row of ``index``.

    One row, or one too long for n x n signs, goes to SciPy, in n log n. Else the signs of all pairs are taken once,
    and a resample is a vector of counts c: concordant minus discordant pairs are the quadratic form c' S c / 2.
    """
    n = len(x)
    if len(index) == 1 or n > 4096:
        return np.array([kendalltau(x[row], y[row]).statistic for row in index])
    counts = np.stack([np.bincount(row, minlength=n) for row in index]).astype(np.float64)
    # Ranks without gaps compare as the values do, infinities included.
    dense = [np.unique(values, return_inverse=True)[1] for values in (x, y)]
    signs = [np.sign(ranks[:, None] - ranks).astype(np.float64) for ranks in dense]
    forms = [((counts @ form) * counts).sum(1) for form in (signs[0] * signs[1], signs[0] ** 2, signs[1] ** 2)]
    return ratio(forms[0], np.sqrt(forms[1] * forms[2]))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Quotient, NaN where all values tie."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def spearman_brown(reliability: float, count: float) -> float:
    r"""Return the reliability of a mean of ``count`` runs, :math:`k r / (1 + (k - 1) r)`, from that of one run.

    Its square root is the noise ceiling: no score can be expected to correlate higher with such a mean.

    Args:
        reliability: correlation r between two single runs, in (-1, 1].
        count: number k of runs in the mean, > 0.

    Reference: spearman1910correlation.

    >>> spearman_brown(0.5, 3)
    0.75
    """
    check_number("reliability", reliability, gt=-1, le=1)
    check_number("count", count, gt=0)
    return count * reliability / (1 + (count - 1) * reliability)


def rank_table(
    scores: Mapping[str, ArrayLike],
    targets: Mapping[str, ArrayLike],
    *,
    rivals: Iterable[tuple[str, str]] = (),
    **options: object,
) -> list[dict[str, object]]:
    """Return the correlation of every score with every target, and the differences of pairs of scores, as rows.

    Args:
        scores: name to ``(n,)`` scores.
        targets: name to ``(n,)`` values to be predicted.
        rivals: pairs of names; the row holds the correlation of the first minus that of the second.
        options: of `rank_correlation`, which also says what raises.

    Returns:
        Rows with the keys ``scores``, ``rival`` (empty for a correlation), ``target``, ``estimate``, ``lo``, ``hi``.

    >>> rows = rank_table({"a": [1, 2, 3], "b": [3, 2, 1]}, {"y": [1, 2, 3]}, rivals=[("a", "b")])
    >>> [(row["scores"], row["rival"], round(row["estimate"], 6)) for row in rows]
    [('a', '', 1.0), ('b', '', -1.0), ('a', 'b', 2.0)]
    """
    rows = []
    for first, second in [*((name, "") for name in scores), *rivals]:
        for target, values in targets.items():
            rival = {"paired_with": scores[second]} if second else {}
            found = rank_correlation(scores[first], values, **options, **rival)
            row = {"scores": first, "rival": second, "target": target}
            rows.append(row | {"estimate": found.estimate, "lo": found.lo, "hi": found.hi})
    return rows
