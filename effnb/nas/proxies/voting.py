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
    scores = [score_all(model, [batch], names, loss_fn=loss_fn, seed=seed) for model in models]
    return rank_average({name: [row[name] for row in scores] for name in names}, method=method)


def rank_average(scores: Mapping[str, Sequence[float]], *, method: str = "rank") -> list[float]:
    if method not in ("rank", "majority"):
        raise ValueError(f"method must be 'rank' or 'majority', got {method!r}")
    if not scores:
        raise ValueError("scores must hold at least one proxy, got none")
    known = available_proxies()
    columns = [np.asarray(v, float) * (1 if name not in known or known[name].higher_is_better else -1) for name, v in scores.items()]
    for name, column in zip(scores, columns, strict=True):
        if np.isnan(column).any():
            raise ValueError(f"scores must not be NaN, {name} is for network {int(np.isnan(column).argmax())}")
    if len({len(c) for c in columns}) != 1:
        raise ValueError("lengths")
    if method == "rank":
        return np.mean([rankdata(c) for c in columns], axis=0).tolist()
    wins = sum(np.sign(rankdata(c)[:, None] - rankdata(c)) for c in columns)
    return (np.sign(wins) / 2 + 0.5).sum(1).tolist()
