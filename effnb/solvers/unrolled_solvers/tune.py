"""Search for the three numbers of HyperLISTA."""

import dataclasses
import itertools
import math
import operator

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from effnb.common import check_choice, check_count
from effnb.solvers.unrolled_solvers.hyperlista import HyperLISTA
from effnb.solvers.unrolled_solvers.problem import check_matrix, nmse_db

SCORES = ("nmse", "robust", "p99")


@dataclasses.dataclass(frozen=True)
class TuneResult:
    """Outcome of ``tune_hyperlista``.

    Attributes:
        c: the three numbers.
        score: score of ``c`` on the whole tuning set, in dB.
        trials: every point tried, as ``(c1, c2, c3, score)``.

    >>> TuneResult((0.1, 0.01, 10.0), -40.0, []).score
    -40.0
    """

    c: tuple[float, float, float]
    score: float
    trials: list[tuple[float, float, float, float]]


def recovery_score(x: Tensor, x_true: Tensor, score: str = "robust") -> Tensor:
    """Return one number in dB for a batch, lower is better.

    Args:
        x, x_true: ``(batch, n)``.
        score: ``"nmse"`` is the papers' ratio of sums, which one instance can dominate; ``"robust"`` the mean of the
            instances' dB, each clipped to -100..20; ``"p99"`` their 99th percentile.

    Raises:
        ValueError: for an unknown ``score`` or shapes that differ.

    >>> float(recovery_score(torch.zeros(2, 3), torch.ones(2, 3)))
    0.0
    """
    check_choice("score", score, SCORES)
    if score == "nmse":
        return nmse_db(x, x_true)
    each = nmse_db(x, x_true, reduce="instance").clamp(-100.0, 20.0)
    return each.mean() if score == "robust" else torch.quantile(each, 0.99)


def tune_hyperlista(
    A: Tensor,
    x: Tensor,
    b: Tensor,
    method: str = "random",
    n_trials: int = 160,
    seed: int = 0,
    *,
    score: str = "nmse",
    local_trials: int = 60,
    spreads: tuple[float, ...] = (0.3, 0.1),
    bounds: tuple[tuple[float, float], ...] | None = None,
    **options,
) -> TuneResult:
    r"""Return the best ``c`` found for ``HyperLISTA(A, c, **options)`` on given instances.

    Args:
        A: ``(m, n)``.
        x: ``(batch, n)`` true codes.
        b: ``(batch, m)`` measurements.
        method: ``"random"``: log-uniform points, then ``local_trials`` steps around the best for each of ``spreads``;
            ``"grid"``: the official grid, thinned to about ``n_trials``; ``"backprop"``: a quarter of the trials at
            random, the rest Adam on c1 and c2 (c3 has no gradient).
        n_trials: number of points of the global search.
        seed: of the random points.
        score: as in ``recovery_score``; with noise take ``"robust"`` or ``"p99"`` and at least 512 instances.
        local_trials: points of each local round.
        spreads: standard deviations of the local rounds, in logarithms.
        bounds: three pairs for the random points; (0.01, 1), (0.001, 0.1), (0.01, n) by default.
        options: passed to ``HyperLISTA``.

    Raises:
        ValueError: for an unknown ``method`` or ``score``, wrong shapes or bounds.

    Reference: chen2021hyperparameter

    >>> from effnb.solvers import SparseProblem
    >>> problem = SparseProblem(20, 40, p=0.05)
    >>> tune_hyperlista(problem.A, *problem.sample(32), n_trials=20, local_trials=5).score < -10
    True
    """
    check_choice("method", method, ("random", "grid", "backprop"))
    check_choice("score", score, SCORES)
    check_count("n_trials", n_trials)
    check_count("local_trials", local_trials, 0)
    net = HyperLISTA(A, **options)
    m, n = A.shape
    check_matrix(b, "b", m)
    check_matrix(x, "x", n)
    if len(x) != len(b):
        raise ValueError(f"x and b must have the same batch, got {len(x)} and {len(b)}")
    low, high = np.array(bounds or ((0.01, 1.0), (0.001, 0.1), (0.01, n))).T
    if low.shape != (3,) or not (low > 0).all() or not (low <= high).all():
        raise ValueError(f"bounds must be three ordered positive pairs, got {bounds}")
    rng, trials, best = np.random.default_rng(seed), [], ((math.nan,) * 3, math.inf)

    @torch.no_grad()
    def value(c: np.ndarray, rows: int | None = None) -> float:
        net.c.copy_(torch.as_tensor(c))
        # Many points of a wide search diverge: they must lose, not stop it.
        estimate = net(b[:rows], x_true=x[:rows] if net.oracle else None).nan_to_num(1e9, 1e9, -1e9)
        return float(recovery_score(estimate, x[:rows], score))

    def offer(c: np.ndarray) -> None:
        nonlocal best
        trials.append((*map(float, c), value(c)))
        best = min(best, (trials[-1][:3], trials[-1][3]), key=operator.itemgetter(1))  # of equal ones the first

    if method == "grid":
        # The official grid has the coherence folded into c1 and c2, and c3 as a fraction of n.
        points = max(2, round(n_trials ** (1 / 3)))
        small = np.linspace(1e-3, 1e-2, min(11, points)) / net.mu
        for c in itertools.product(small, small, np.linspace(0.1, 1, min(21, points)) * n):
            offer(np.array(c))
        return TuneResult(*best, trials)

    # Log-uniform points, screened on a quarter of the batch; the best tenth is scored on all of it. A screened score
    # can not become the best: it is of other instances.
    screened = n_trials if method == "random" else math.ceil(n_trials / 4)
    points = np.exp(rng.uniform(np.log(low), np.log(high), (screened, 3)))
    rough = np.array([value(c, max(1, len(b) // 4)) for c in points])
    trials += [(*map(float, c), found) for c, found in zip(points, rough, strict=True)]
    for index in np.argsort(rough)[: math.ceil(screened / 10)]:
        offer(points[index])

    if method == "random":
        for spread in spreads:
            for _ in range(local_trials):
                offer(np.array(best[0]) * np.exp(spread * rng.standard_normal(3)))
        return TuneResult(*best, trials)

    # Adam on the logarithms of c1 and c2, which keeps them positive; the count behind c3 has no gradient.
    start = torch.as_tensor(best[0], dtype=b.dtype).log()
    free, fixed = start[:2].clone().requires_grad_(), start[2:].exp()
    optimizer = torch.optim.Adam([free], lr=0.03)
    for _ in range(n_trials - screened):
        c = torch.cat([free.exp(), fixed])
        estimate = functional_call(net, {"c": c}, (b,), {"x_true": x if net.oracle else None})
        (gradient,) = torch.autograd.grad(recovery_score(estimate, x, score), free)
        offer(c.detach().cpu().numpy())
        free.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
    return TuneResult(*best, trials)
