"""Temperature over time, and the search for the initial score that gives a wanted density."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BetaSchedule:
    r"""Exponential annealing of the gates' inverse temperature from 1 to ``final``.

    ``granularity="epoch"``: ``beta_k = final ** (k / (total - 1))`` for the epochs ``k = 0 .. total - 1`` of a round,
    constant inside an epoch. ``granularity="step"``: ``beta_t = final ** (t / total)`` before the optimiser's step
    ``t``; ``t = total`` is the state after the last one. With fewer than about 20 epochs the steps between epochs
    get so large that annealing by step is the better choice.

    Args:
        total: epochs or optimiser steps of one round, >= 2.
        final: inverse temperature at the end of a round, >= 1; 1 switches annealing off.
        granularity: ``"epoch"`` or ``"step"``.

    Raises:
        ValueError: a field out of range, or an index outside the round when called.

    Reference: savarese2020winning

    >>> schedule = BetaSchedule(total=3, final=100.0)
    >>> [round(schedule(k), 6) for k in range(3)]
    [1.0, 10.0, 100.0]
    """

    total: int
    final: float = 200.0
    granularity: str = "epoch"

    def __post_init__(self) -> None:
        if self.total < 2:
            raise ValueError(f"total must be at least 2, got {self.total}")
        if not (math.isfinite(self.final) and self.final >= 1):
            raise ValueError(f"final must be finite and at least 1, got {self.final}")
        if self.granularity not in ("epoch", "step"):
            raise ValueError(f"granularity must be 'epoch' or 'step', got {self.granularity!r}")

    def __call__(self, index: int) -> float:
        """The inverse temperature of epoch or step ``index`` (counted from 0)."""
        last = self.total - (self.granularity == "epoch")
        if not 0 <= index <= last:
            raise ValueError(f"index must lie in 0 .. {last}, got {index}")
        return self.final ** (index / last)


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit_s0` found: ``s0``, the ``density`` it gave, and every ``(s0, density)`` that was tried.

    Reference: savarese2020winning
    """

    s0: float
    density: float
    tried: list[tuple[float, float]] = field(default_factory=list)


def fit_s0(
    density_at: Callable[[float], float],
    target: float,
    low: float = -0.3,
    high: float = 0.3,
    rtol: float = 0.1,
    max_runs: int = 10,
) -> FitResult:
    r"""Bisect the initial gate score until a run ends at the wanted density.

    A larger ``s0`` leaves more weights, so the density is taken to grow with it. Each evaluation is a whole run; ask
    for the exact density by ``finalize(density=...)`` afterwards.

    Args:
        density_at: runs the method at one ``s0`` and returns the density in [0, 1] that it reached.
        target: wanted density in (0, 1).
        low: left end of the bracket.
        high: right end of the bracket, > ``low``.
        rtol: stop when ``|density - target| <= rtol * target``.
        max_runs: most evaluations, >= 2 (the two ends of the bracket count).

    Returns:
        The best run as :class:`FitResult`.

    Raises:
        ValueError: an argument out of range, or the bracket's densities do not enclose ``target``.

    Reference: savarese2020winning

    >>> fit_s0(lambda s0: 0.5 + s0, target=0.4, rtol=0.01).s0
    -0.1...
    """
    if not 0 < target < 1:
        raise ValueError(f"target must be in (0, 1), got {target}")
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    if max_runs < 2 or rtol <= 0:
        raise ValueError(f"max_runs must be >= 2 and rtol > 0, got {max_runs} and {rtol}")
    tried = [(s0, float(density_at(s0))) for s0 in (low, high)]
    if not tried[0][1] <= target <= tried[1][1]:
        raise ValueError(
            f"target must lie between the densities at low and high, "
            f"got {target} outside [{tried[0][1]:.4g}, {tried[1][1]:.4g}]; change low, high or lam"
        )

    def miss(run: tuple[float, float]) -> float:
        return abs(run[1] - target)

    while miss(min(tried, key=miss)) > rtol * target and len(tried) < max_runs:
        middle = (low + high) / 2
        tried.append((middle, float(density_at(middle))))
        low, high = (middle, high) if tried[-1][1] < target else (low, middle)
    best = min(tried, key=miss)
    return FitResult(best[0], best[1], tried)
