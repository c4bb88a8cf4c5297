"""One ranking from several proxies: mean of ranks, or majority in pairwise tournaments."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata
from torch import nn
from torch.nn import functional as F

from .common import Loss
from .registry import available_proxies
from .scoring import score_all

VOTERS = ("synflow", "jacob_cov", "snip")


def vote(
    models: Iterable[nn.Module],
    batch: Any,
    *,
    names: Sequence[str] = VOTERS,
    method: str = "rank",
    loss_fn: Loss = F.cross_entropy,
    seed: int | None = 0,
) -> list[float]:
    """Return one score a network from the ranks that several proxies give it among the others; higher is better.

    Args:
        models: networks; they stay as they were.
        batch: ``(x, y)``.
        names: proxies that need one batch.
        method: ``"rank"`` or ``"majority"``, see `rank_average`.
        loss_fn: mean loss of a batch.
        seed: of what a proxy or a network draws itself.

    Returns:
        One number a network; it means something within this list only.

    Raises:
        ValueError: an unknown proxy or ``method``, no network, or a score that is NaN.
        TypeError: what the proxies raise.

    Reference: abdelfattah2021zerocost.

    >>> from effnb.nas.nanobench import build_net
    >>> vote(map(build_net, ("000100", "333333")), torch.zeros(2, 1, 14, 14), names=["count_params", "count_macs"])
    [1.0, 2.0]
    """
    scores = [score_all(model, [batch], names, loss_fn=loss_fn, seed=seed) for model in models]
    return rank_average({name: [row[name] for row in scores] for name in names}, method=method)


def rank_average(scores: Mapping[str, Sequence[float]], *, method: str = "rank") -> list[float]:
    """Return one score a network from scores that are known already; higher is better.

    Args:
        scores: name of a proxy to its scores, one a network; those of `ntk_condition` are turned round, unknown names
            count as higher is better. Infinite scores are ranked last or first.
        method: ``"rank"`` averages ranks, 1 for the worst, ties shared; ``"majority"`` counts the networks that most
            proxies place below, a tie half.

    Returns:
        One number a network.

    Raises:
        ValueError: an unknown ``method``, no scores, lists of different lengths, or a score that is NaN.

    Reference: abdelfattah2021zerocost.

    >>> rank_average({"snip": [1.0, 2.0, 3.0], "ntk_condition": [9.0, 2.0, 4.0]})
    [1.0, 2.5, 2.5]
    """
    if method not in ("rank", "majority"):
        raise ValueError(f"method must be 'rank' or 'majority', got {method!r}")
    if not scores or len({len(column) for column in scores.values()}) != 1 or not all(map(len, scores.values())):
        lengths = {name: len(column) for name, column in scores.items()}
        raise ValueError(f"scores must hold one value a network for at least one proxy, got {lengths}")
    ranks = np.array([proxy_ranks(name, column) for name, column in scores.items()])
    if method == "rank":
        return ranks.mean(0).tolist()
    majority = np.sign(np.sign(ranks[:, :, None] - ranks[:, None, :]).sum(0))
    return ((majority + 1).sum(1) / 2 - 0.5).tolist()


def proxy_ranks(name: str, scores: Sequence[float]) -> np.ndarray:
    """Return ranks from the worst (1) to the best; raise for NaN, which has no rank."""
    column, known = np.asarray(scores, float), available_proxies()
    if np.isnan(column).any():
        raise ValueError(f"scores must not be NaN, {name} is for network {int(np.isnan(column).argmax())}")
    return rankdata(-column if name in known and not known[name].higher_is_better else column)
