"""How lr and eps interact: scores over a grid of both, and a problem on which a rate that sees its gradient fails."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from effnb.common import check_choice, check_count, check_number


class AxisSearch(NamedTuple):
    """What a search of one axis after the other finds, and what it costs; ``regret`` is against the full grid."""

    lr: float
    eps: float
    score: float
    regret: float
    runs: int
    grid_runs: int


@dataclass(frozen=True)
class SweepResult:
    """Scores of a grid, higher is better; ``nan`` marks a run that failed and never counts as best.

    Args:
        lrs: learning rates, one per column, > 0.
        epss: values of eps, one per row, > 0.
        seeds: one per repetition.
        scores: ``(epss, lrs, seeds)``.

    Raises:
        ValueError: a shape that does not fit, a value <= 0, or a row without any finite score.

    >>> grid = SweepResult((0.1, 1.0, 10.0), (0.1, 1.0), (0,), np.array([[[1.0], [5.0], [4.8]], [[1.0], [2.0], [5.0]]]))
    >>> grid.best_lr_per_eps()  # 1 and 10 tie in the first row: their geometric mean
    array([ 3.16227766, 10.        ])
    >>> grid.drift()
    0.5
    """

    lrs: tuple[float, ...]
    epss: tuple[float, ...]
    seeds: tuple[int, ...]
    scores: np.ndarray

    def __post_init__(self) -> None:
        expected = (len(self.epss), len(self.lrs), len(self.seeds))
        if self.scores.shape != expected:
            raise ValueError(f"scores must have shape (epss, lrs, seeds) = {expected}, got {self.scores.shape}")
        if min(*self.lrs, *self.epss, np.inf) <= 0:
            raise ValueError(f"lrs and epss must be > 0, got {self.lrs} and {self.epss}")
        if np.isnan(self.table).all(axis=1).any():
            raise ValueError("every eps needs a learning rate whose runs all have a finite score")

    @property
    def table(self) -> np.ndarray:
        """Mean over seeds, ``(epss, lrs)``; ``nan`` where any seed failed."""
        return self.scores.mean(axis=2)

    def for_seed(self, index: int) -> "SweepResult":
        """The grid of one repetition, ``scores`` of shape ``(epss, lrs, 1)``."""
        return SweepResult(self.lrs, self.epss, (self.seeds[index],), self.scores[:, :, [index]])

    def best_lr_per_eps(self, tolerance: float = 0.5) -> np.ndarray:
        """Geometric mean of all learning rates within ``tolerance`` of the best score of their row, ``(epss,)``.

        A plain argmax over noisy scores jumps between ties and looks like a drift where there is none.
        """
        check_number("tolerance", tolerance, ge=0)
        near = self.table >= np.nanmax(self.table, axis=1, keepdims=True) - tolerance
        logs = np.log10(self.lrs)
        return np.array([10 ** logs[row].mean() for row in near])

    def _rows(self, eps_range: tuple[float, float] | None) -> np.ndarray:
        low, high = eps_range or (0, np.inf)
        rows = np.array([low * 0.999 <= eps <= high * 1.001 for eps in self.epss])
        if not rows.any():
            raise ValueError(f"eps_range must contain a value of eps, got {eps_range} for {self.epss}")
        return rows

    def drift(self, eps_range: tuple[float, float] | None = None, tolerance: float = 0.5) -> float:
        """Decades between the smallest and the largest best learning rate over the rows in ``eps_range``."""
        best = np.log10(self.best_lr_per_eps(tolerance)[self._rows(eps_range)])
        return float(best.max() - best.min())

    def slope(self, eps_range: tuple[float, float] | None = None, tolerance: float = 0.5) -> float:
        """Least-squares slope of log best learning rate over log eps: 0 for columns, 1 for a diagonal."""
        rows = self._rows(eps_range)
        if rows.sum() < 2:
            raise ValueError(f"eps_range must contain at least two values of eps, got {eps_range}")
        logs = np.log10(np.asarray(self.epss)[rows]), np.log10(self.best_lr_per_eps(tolerance)[rows])
        return float(np.polyfit(*logs, 1)[0])

    def transfer_regret(self, eps: float) -> np.ndarray:
        """Score lost in each row by the learning rate that is best at ``eps``, ``(epss,)``; nan where it failed."""
        column = np.nanargmax(self.table[self._index(eps)])
        return np.nanmax(self.table, axis=1) - self.table[:, column]

    def axis_search(self, eps: float = 0.1) -> AxisSearch:
        """Take the best learning rate at ``eps``, then the best eps at that learning rate."""
        column = int(np.nanargmax(self.table[self._index(eps)]))
        row = int(np.nanargmax(self.table[:, column]))
        score = float(self.table[row, column])
        runs = len(self.lrs) + len(self.epss) - 1
        regret = float(np.nanmax(self.table)) - score
        return AxisSearch(self.lrs[column], self.epss[row], score, regret, runs, self.table.size)

    def _index(self, eps: float) -> int:
        match = np.flatnonzero(np.isclose(self.epss, eps, rtol=1e-6, atol=0))
        if not match.size:
            raise ValueError(f"eps must be one of {self.epss}, got {eps}")
        return int(match[0])

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Draw the heat map with the best learning rate of each row marked; returns the image.

        Args:
            ax: matplotlib axes; ``None`` makes a new figure.
            **options: passed on to ``imshow``.
        """
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        image = ax.imshow(self.table, origin="lower", aspect="auto", **options)
        ax.set_xticks(range(len(self.lrs)), [f"{float(f'{lr:.2g}'):g}" for lr in self.lrs])
        ax.set_yticks(range(len(self.epss)), [f"{eps:g}".replace("e-0", "e-") for eps in self.epss])
        best = np.interp(np.log10(self.best_lr_per_eps()), np.log10(self.lrs), range(len(self.lrs)))
        ax.plot(best, range(len(self.epss)), marker="o", color="white", markeredgecolor="black")
        ax.set(xlabel="learning rate", ylabel="eps")
        return image


def lr_eps_sweep(
    fn: Callable[..., Any], lrs: Sequence[float], epss: Sequence[float], seeds: Sequence[int]
) -> SweepResult:
    """Score every pair of learning rate and eps with every seed.

    Args:
        fn: ``fn(lr, eps, seed)`` returns a score, higher is better (``nan``: failed).
        lrs: learning rates, > 0, increasing.
        epss: values of eps, > 0, increasing.
        seeds: repetitions, at least one.

    Returns:
        A :class:`SweepResult`.

    Raises:
        ValueError: an empty or unsorted axis, or a value <= 0.

    >>> result = lr_eps_sweep(lambda lr, eps, seed: -abs(np.log10(lr / eps)), (0.1, 1.0), (0.1, 1.0), (0,))
    >>> round(result.slope(), 6)  # the best learning rate is eps: a diagonal
    1.0
    """
    for name, axis in {"lrs": lrs, "epss": epss, "seeds": seeds}.items():
        if not len(axis):
            raise ValueError(f"{name} must not be empty")
    for name, axis in {"lrs": lrs, "epss": epss}.items():
        if min(axis) <= 0 or any(np.diff(axis) <= 0):
            raise ValueError(f"{name} must be > 0 and increasing, got {list(axis)}")
    scores = [[[float(fn(lr=lr, eps=eps, seed=seed)) for seed in seeds] for lr in lrs] for eps in epss]
    return SweepResult(tuple(lrs), tuple(epss), tuple(seeds), np.array(scores))


def clipped_chains(
    method: str,
    beta2: float | Sequence[float],
    *,
    curvature: float = 8.0,
    probability: float = 0.2,
    lr: float = 0.1,
    eps: float = 1e-8,
    steps: int = 20_000,
    chains: int = 200,
    tail: float = 0.2,
    seed: int = 0,
) -> np.ndarray:
    r"""Run many chains of stochastic descent on ``[0, 1]`` and return the mean of each over its last steps.

    The loss is :math:`C w^2/2` with probability ``p`` and :math:`-w` otherwise, so the expected loss has its minimum
    at :math:`w^* = (1-p)/(pC)` (0.5 by default). There is no momentum, the step size is ``lr / sqrt(t)``, and ``w`` is
    clipped to ``[0, 1]`` after each step.

    Args:
        method: ``"adam"`` (rate from :math:`v_t`), ``"delayed_adam"`` (from :math:`v_{t-1}`), or ``"sgd"`` (rate one;
            AvaGrad in one dimension).
        beta2: decay rate of the second moment, in [0, 1); with several, all see the same random numbers.
        curvature, probability: ``C`` > 0 and ``p`` in (0, 1).
        lr, eps: step size at the first step, and what is added to the root of the second moment, > 0.
        steps, chains: steps of each chain, and how many chains, >= 1.
        tail: fraction of the steps to average over, in (0, 1].
        seed: of the random numbers.

    Returns:
        ``(chains,)`` means, or ``(len(beta2), chains)``.

    Raises:
        TypeError: a number that is none.
        ValueError: an argument out of its range.

    Reference: savarese2021avagrad.

    >>> bool(clipped_chains("adam", 0.0, steps=2000, chains=10).mean() > 0.95)  # the boundary, far from 0.5
    True
    """
    check_choice("method", method, ("adam", "delayed_adam", "sgd"))
    decay = np.asarray(beta2, dtype=float)[..., None]
    if not ((decay >= 0) & (decay < 1)).all():
        raise ValueError(f"beta2 must be in [0, 1), got {beta2}")
    check_number("probability", probability, gt=0, lt=1)
    check_number("tail", tail, gt=0, le=1)
    for name, value in {"curvature": curvature, "lr": lr, "eps": eps}.items():
        check_number(name, value, gt=0)
    check_count("steps", steps)
    check_count("chains", chains)
    rng = np.random.default_rng(seed)
    w = np.broadcast_to(rng.random(chains), (*decay.shape[:-1], chains))
    v = np.zeros_like(w)
    start, total = steps - max(1, round(steps * tail)), np.zeros_like(w)
    for t in range(1, steps + 1):
        g = np.where(rng.random(chains) < probability, curvature * w, -1.0)
        before, v = v, decay * v + (1 - decay) * g * g
        if method == "adam":
            rate = 1 / (np.sqrt(v / (1 - decay**t)) + eps)
        elif method == "sgd":
            rate = 1.0
        else:  # at t = 1 there is no second moment yet: no step
            rate = 1 / (np.sqrt(before / (1 - decay ** (t - 1))) + eps) if t > 1 else 0.0
        w = np.clip(w - lr / np.sqrt(t) * rate * g, 0, 1)
        if t > start:
            total += w
    return total / (steps - start)
