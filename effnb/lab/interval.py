"""The interval that every statistic returns, and the checks that every statistic makes first."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


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


def finite(name: str, values: ArrayLike) -> Array:
    """``values`` as float64.

    Raises:
        ValueError: empty, or holding ``nan`` or ``inf``.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite and not empty, got {values}")
    return array


def vector(name: str, values: ArrayLike) -> Array:
    """``(n,)`` finite float64 values, n >= 2.

    Raises:
        ValueError: another shape, fewer than two values, values not finite.
    """
    array = finite(name, values)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"{name} must be one row of n >= 2 values, got shape {array.shape}")
    return array


def matrix(name: str, values: ArrayLike) -> Array:
    """``(seeds, tasks)`` finite float64 values; a vector becomes one task.

    Raises:
        ValueError: more than two dimensions, empty, values not finite.
    """
    array = finite(name, values)
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape (seeds, tasks) or (seeds,), got {array.shape}")
    return array.reshape(len(array), -1)


def differences(a: ArrayLike, b: ArrayLike | None, log: bool = False) -> Array:
    """``a - b`` of one length n >= 2, or ``a`` alone; of logarithms with ``log=True``.

    Raises:
        ValueError: unequal lengths, n < 2, values not finite, values <= 0 with ``log``.
    """
    pair = [vector(name, values) for name, values in (("a", a), ("b", b)) if values is not None]
    if len({len(values) for values in pair}) > 1:
        raise ValueError(f"a and b must have the same length, got {len(pair[0])} and {len(pair[1])}")
    if log and min(values.min() for values in pair) <= 0:
        raise ValueError(f"a and b must be positive with log=True, got {min(values.min() for values in pair)}")
    pair = [np.log(values) for values in pair] if log else pair
    return pair[0] - pair[1] if len(pair) == 2 else pair[0]


def in_unit(name: str, value: float) -> float:
    """``value`` itself.

    Raises:
        ValueError: not strictly between 0 and 1.
    """
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value}")
    return value
