"""Paths by score: the best one by dynamic programming, never by enumeration, and the control paths."""

from collections.abc import Sequence

import numpy as np

from effnb.anytime.adjacency import check_adjacency
from effnb.anytime.graph import SuperGraph

Array = np.ndarray
REDUCTIONS = ("sum", "mean")
ANCHORS = ("tips", "anti", "random", "degree", "longest")
TIE = 1e-12  # scores closer than this times the largest score are ties: a solver leaves noise of 1e-16


def _check_scores(tas: Array, n: int | None = None) -> Array:
    scores = np.asarray(tas, float)
    if scores.ndim != 1 or not np.isfinite(scores).all() or (n is not None and len(scores) != n):
        raise ValueError(f"tas must hold one finite score a node, got shape {scores.shape} for {n} nodes")
    return scores


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")


def path_score(tas: Array, path: Sequence[int], reduction: str = "sum") -> float:
    r"""Topological path score, the sum (or mean) of the node scores on a path.

    Args:
        tas: ``(n,)`` node scores.
        path: distinct node numbers.
        reduction: ``"sum"`` or ``"mean"``. With ``"sum"`` a path beats every path through a subset of its nodes, so
            the densest graph elects its longest path; ``"mean"`` removes that.

    Returns:
        The score.

    Raises:
        ValueError: an empty path, a node out of range or twice, unknown ``reduction``.

    Reference: li2023tips.

    >>> path_score(np.array([0.4, 0.2, 0.4]), [0, 2], "mean")
    0.4
    """
    scores, nodes = _check_scores(tas), [int(v) for v in path]
    _check_reduction(reduction)
    if not nodes or len(set(nodes)) < len(nodes) or not 0 <= min(nodes) <= max(nodes) < len(scores):
        raise ValueError(f"path must hold distinct nodes in 0..{len(scores) - 1}, got {nodes}")
    return float(scores[nodes].sum() if reduction == "sum" else scores[nodes].mean())


def most_important_path(adj: Array, tas: Array, reduction: str = "sum") -> list[int]:
    """The path from node 0 to the last node with the highest score; of equal ones the lexicographically first.

    ``"sum"`` takes one pass over the nodes in reverse order, ``"mean"`` a table over (node, length). Scores within
    1e-12 (relative to the largest) count as equal.

    Args:
        adj: binary ``(n, n)`` in topological order.
        tas: ``(n,)`` node scores; ``-tas`` finds the least important path.
        reduction: ``"sum"`` or ``"mean"``.

    Returns:
        Node numbers from 0 to n - 1.

    Raises:
        ValueError: see :func:`prune_to_terminals`; scores that do not fit, unknown ``reduction``.

    Reference: li2023tips.

    >>> most_important_path(np.triu(np.ones((4, 4)), 1), [0.3, 0.1, 0.2, 0.4])
    [0, 1, 2, 3]
    >>> most_important_path(np.triu(np.ones((4, 4)), 1), [0.3, 0.1, 0.2, 0.4], "mean")
    [0, 3]
    """
    a = check_adjacency(adj)
    scores = _check_scores(tas, len(a))
    _check_reduction(reduction)
    slack = TIE * max(float(np.abs(scores).max()), np.finfo(float).tiny)
    return _best_sum(a, scores, slack) if reduction == "sum" else _best_mean(a, scores, slack)


def _best_sum(a: Array, scores: Array, slack: float) -> list[int]:
    last = len(a) - 1
    ahead = np.full(len(a), -np.inf)  # best sum over the nodes from here to the end
    ahead[last] = scores[last]
    following = [row.nonzero()[0] for row in a]
    for v in range(last - 1, -1, -1):
        if len(following[v]):
            ahead[v] = scores[v] + ahead[following[v]].max()
    path = [0]
    while path[-1] != last:
        options = following[path[-1]]
        path.append(int(options[(ahead[options] >= ahead[options].max() - slack).argmax()]))
    return path


def _best_mean(a: Array, scores: Array, slack: float) -> list[int]:
    n, last = len(a), len(a) - 1
    ahead = np.full((n, n + 1), -np.inf)  # best sum over exactly l nodes from here to the end
    ahead[last, 1] = scores[last]
    following = [row.nonzero()[0] for row in a]
    for v in range(last - 1, -1, -1):
        if len(following[v]):
            ahead[v, 1:] = scores[v] + ahead[following[v], :-1].max(0)
    means = ahead[0, 1:] / np.arange(1, n + 1)
    found = []
    for length in np.flatnonzero(means >= means.max() - slack) + 1:
        path = [0]
        for left in range(length - 1, 0, -1):
            options = following[path[-1]]
            column = ahead[options, left]
            path.append(int(options[(column >= column.max() - slack).argmax()]))
        found.append(path)
    return min(found)


def anchor_path(
    graph: SuperGraph,
    kind: str,
    *,
    tas: Array | None = None,
    reduction: str = "sum",
    rng: np.random.Generator | int | None = None,
) -> list[int]:
    """The path that a sampler always trains: the important one, or a control.

    Args:
        graph: the supernet.
        kind: ``"tips"`` (highest score), ``"anti"`` (lowest score), ``"random"`` (uniform over all paths), ``"degree"``
            (most total degree) or ``"longest"`` (most nodes).
        tas: ``(n,)`` node scores for ``"tips"`` and ``"anti"``.
        reduction: of the path score.
        rng: generator or seed for ``"random"``.

    Returns:
        Node numbers; ties go to the lexicographically first path.

    Raises:
        ValueError: unknown ``kind``, or ``tas`` or ``rng`` is missing.

    Reference: li2023tips.

    >>> anchor_path(SuperGraph(4, [(0, 1), (0, 2), (1, 2), (2, 3)]), "longest")
    [0, 1, 2, 3]
    """
    if kind not in ANCHORS:
        raise ValueError(f"kind must be one of {ANCHORS}, got {kind!r}")
    if kind == "random":
        if rng is None:
            raise ValueError("rng must be given for a random path, got None")
        return graph.random_path(rng)
    if kind in ("tips", "anti") and tas is None:
        raise ValueError(f"tas must be given for the {kind!r} path, got None")
    a = graph.adjacency
    if kind in ("degree", "longest"):
        return most_important_path(a, a.sum(0) + a.sum(1) if kind == "degree" else np.ones(graph.n))
    scores = _check_scores(tas, graph.n)
    return most_important_path(a, scores if kind == "tips" else -scores, reduction)
