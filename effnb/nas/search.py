"""Search under a budget: evolution by mutation (ZiCo's algorithm 1), and random search as what it must beat."""

import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from effnb.common import check_choice, check_count
from effnb.nas.nb201 import EDGES, OPERATIONS, check_edges

__all__ = ["CellSpace", "SearchResult", "evolve", "random_search"]

Arch = TypeVar("Arch", bound=Hashable)
ATTEMPTS = 10_000


class Space(Protocol[Arch]):
    """What can be searched: hashable architectures that can be drawn and changed a little."""

    def sample(self, rng: np.random.Generator) -> Arch:
        """Return a random architecture."""

    def mutate(self, arch: Arch, rng: np.random.Generator) -> Arch:
        """Return a random neighbour of ``arch``."""


class CellSpace:
    """The 15,625 cells of NAS-Bench-201; neighbours differ in the operation of one edge.

    Reference: dong2020nasbench201.

    >>> rng = np.random.default_rng(0)
    >>> cell = CellSpace().sample(rng)
    >>> sum(a != b for a, b in zip(cell, CellSpace().mutate(cell, rng)))
    1
    """

    def sample(self, rng: np.random.Generator) -> str:
        """Return a cell, each with the same probability."""
        return "".join(map(str, rng.integers(len(OPERATIONS), size=len(EDGES))))

    def mutate(self, arch: str, rng: np.random.Generator) -> str:
        """Return the cell with another operation on one edge."""
        # A step of at least one round the operations: the result is never the cell itself.
        edge, step = rng.integers(len(EDGES)), rng.integers(1, len(OPERATIONS))
        digit = (int(check_edges(arch)[edge]) + step) % len(OPERATIONS)
        return f"{arch[:edge]}{digit}{arch[edge + 1 :]}"


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    ``history`` holds ``(architecture, score)`` of each step that was within the budget, the start first, and
    ``evaluations`` counts calls of the score; ``population`` is what was left of it, the best first.
    """

    best: Hashable
    score: float
    history: tuple[tuple[Hashable, float], ...]
    evaluations: int
    population: tuple[Hashable, ...] = ()


def evolve(
    space: Space[Arch],
    score_fn: Callable[[Arch], float],
    *,
    steps: int,
    population: int,
    budget_fn: Callable[[Arch], bool] | None = None,
    seed: int = 0,
    start: Arch | None = None,
    drop: str = "lowest",
) -> SearchResult:
    """Evolve architectures towards high scores, within a budget.

    ``steps`` times: pick a member at random, mutate it; if the mutant is within the budget, score it, add it, and drop
    the member with the lowest score once there are more than ``population``. An architecture is scored once.

    Args:
        space: `CellSpace`, or any `Space`.
        score_fn: higher is better; minus infinity is allowed, NaN is not.
        steps: number of mutations, also of those over the budget, >= 1.
        population: members at most, >= 1.
        budget_fn: whether an architecture is within the budget; ``None`` allows all.
        seed: of all random choices.
        start: the first member, within the budget; ``None`` draws one.
        drop: ``"lowest"`` score (the paper), or ``"oldest"`` member (regularised evolution).

    Returns:
        The best of all architectures that were scored; the first of equals.

    Raises:
        ValueError: an argument out of range, no architecture within the budget, or a score that is NaN.

    Reference: li2023zico, real2019regularized.

    >>> evolve(CellSpace(), lambda cell: cell.count("3"), steps=300, population=16, seed=0).best
    '333333'
    """
    check_count("steps", steps)
    check_count("population", population)
    check_choice("drop", drop, ("lowest", "oldest"))
    rng, score = np.random.default_rng(seed), scored(score_fn)
    start = feasible(space, budget_fn, rng) if start is None else start
    if budget_fn and not budget_fn(start):
        raise ValueError(f"start must be within the budget, got {start!r}")
    members = [(start, score(start))]
    history = members[:]
    for _ in range(steps):
        arch = space.mutate(members[rng.integers(len(members))][0], rng)
        if budget_fn and not budget_fn(arch):
            continue  # a step all the same, as in the paper
        members.append((arch, score(arch)))
        history.append(members[-1])
        if len(members) > population:
            # Of equals the oldest goes, else a plateau of the score could not be crossed.
            lowest = min(range(len(members)), key=lambda i: members[i][1])
            members.pop(0 if drop == "oldest" else lowest)
    best, highest = max(history, key=lambda entry: entry[1])
    left = tuple(arch for arch, _ in sorted(members, key=lambda entry: -entry[1]))
    return SearchResult(best, highest, tuple(history), score.cache_info().misses, left)


def random_search(
    space: Space[Arch],
    score_fn: Callable[[Arch], float],
    *,
    steps: int,
    budget_fn: Callable[[Arch], bool] | None = None,
    seed: int = 0,
) -> SearchResult:
    """Draw ``steps`` architectures within the budget and return the one with the highest score.

    Args:
        space, score_fn, budget_fn, seed: as for `evolve`, which also says what raises.
        steps: number of draws, >= 1.

    >>> random_search(CellSpace(), lambda cell: cell.count("3"), steps=100, seed=0).score
    4
    """
    check_count("steps", steps)
    rng, score = np.random.default_rng(seed), scored(score_fn)
    history = [(arch, score(arch)) for arch in (feasible(space, budget_fn, rng) for _ in range(steps))]
    best, highest = max(history, key=lambda entry: entry[1])
    return SearchResult(best, highest, tuple(history), score.cache_info().misses)


def scored(score_fn: Callable[[Arch], float]) -> Callable[[Arch], float]:
    """Return a score that is remembered, and refuses NaN: comparisons with it would silently pick anything."""

    @functools.cache
    def score(arch: Arch) -> float:
        value = score_fn(arch)
        if math.isnan(value):
            raise ValueError(f"score_fn must not return NaN, got it for {arch!r}")
        return value

    return score


def feasible(space: Space[Arch], budget_fn: Callable[[Arch], bool] | None, rng: np.random.Generator) -> Arch:
    """Return a random architecture within the budget."""
    for _ in range(ATTEMPTS):
        arch = space.sample(rng)
        if budget_fn is None or budget_fn(arch):
            return arch
    raise ValueError(f"budget_fn must allow some architecture, none of {ATTEMPTS} random ones is within it")
