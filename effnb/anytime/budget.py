"""Cost of subnetworks: expected shares, equal cost for different samplers, subnetworks that fill a budget."""

from collections.abc import Sequence

import numpy as np

from effnb.anytime.adjacency import Rng, as_rng
from effnb.anytime.graph import SuperGraph, sample_masks

Array = np.ndarray


def shares(graph: SuperGraph, masks: Array, costs: Array | None = None) -> Array:
    """Share of the supernet's cost that subnetworks keep.

    Args:
        graph: the supernet.
        masks: ``(..., E)`` operations that are kept.
        costs: ``(E,)`` positive costs of the operations; ``None`` counts operations.

    Returns:
        ``(...)`` numbers in [0, 1].

    Raises:
        ValueError: costs that are not positive or not one an operation.

    Reference: li2023tips.

    >>> float(shares(SuperGraph(3, [(0, 1), (1, 2), (0, 2)]), [True, False, True], costs=[1, 2, 1]))
    0.5
    """
    weights = np.ones(graph.num_edges) if costs is None else np.asarray(costs, float)
    if weights.shape != (graph.num_edges,) or not (weights > 0).all():
        raise ValueError(f"costs must hold {graph.num_edges} positive numbers, got shape {weights.shape}")
    return np.asarray(masks) @ (weights / weights.sum())


def expected_share(graph: SuperGraph, keep: float, *, costs: Array | None = None, draws: int = 1024, rng: Rng) -> float:
    """Mean share of the cost that uniform sampling keeps after pruning and rejection.

    Args:
        graph: the supernet.
        keep: probability of keeping an operation, in (0, 1].
        costs: ``(E,)`` positive costs of the operations; ``None`` counts operations.
        draws: number of subnetworks that are averaged.
        rng: generator or seed.

    Returns:
        A number in (0, 1].

    Raises:
        ValueError: see :func:`sample_masks`; costs that do not fit.

    Reference: li2023tips.

    >>> expected_share(SuperGraph(2, [(0, 1)]), 0.5, rng=0)
    1.0
    """
    return float(shares(graph, sample_masks(graph, keep, draws, rng=rng), costs).mean())


def matched_keep(
    graph: SuperGraph,
    share: float,
    anchor: Sequence[int],
    *,
    costs: Array | None = None,
    draws: int = 1024,
    rng: Rng,
) -> float:
    """The probability at which anchored sampling has the expected cost ``share``, by bisection.

    Args:
        graph: the supernet.
        share: wanted share of the supernet's cost, at most 1.
        anchor: nodes of the path that is always kept.
        costs: ``(E,)`` positive costs of the operations; ``None`` counts operations.
        draws: number of subnetworks that are averaged.
        rng: generator or seed.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: ``share`` above 1 or below the anchor's own cost.

    Reference: li2023tips.

    >>> matched_keep(SuperGraph(3, [(0, 1), (1, 2), (0, 2)]), 1.0, [0, 2], rng=0) > 0.99
    True
    """
    kept = graph.path_edges(anchor)
    least = float(shares(graph, kept, costs))
    if not least - 1e-9 <= share <= 1 + 1e-9:
        raise ValueError(f"share must lie between the cost of the anchor {least:.4f} and 1, got {share}")
    numbers = as_rng(rng).random((draws, graph.num_edges))
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        mean = shares(graph, graph.prune((numbers < middle) | kept), costs).mean()
        low, high = (middle, high) if mean <= share else (low, middle)
    return low


def fill_budget(
    graph: SuperGraph, budget: float, anchors: Sequence[Sequence[int]], priority: Array, *, costs: Array | None = None
) -> Array:
    """Grow paths to maximal subnetworks within a budget, operations taken greedily by priority.

    An operation that hangs loose costs nothing until others join it to input and output; one that would exceed the
    budget is left out. What hangs loose at the end is pruned.

    Args:
        graph: the supernet.
        budget: largest share of the supernet's cost, in (0, 1].
        anchors: k paths to start from, as nodes.
        priority: ``(k, E)``, higher is taken first; ties go to the lexicographically first edge.
        costs: ``(E,)`` positive costs of the operations; ``None`` counts operations.

    Returns:
        ``(k, n, n)`` zeros and ones.

    Raises:
        ValueError: a budget below the cost of a path or above 1, an anchor that is no path, a wrong shape.

    Reference: li2023tips.

    >>> graph = SuperGraph(4, [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)])
    >>> graph.masks(fill_budget(graph, 0.8, [[0, 1, 3]], np.array([[0, 9, 1, 0, 2]]))).tolist()
    [[True, True, False, True, True]]
    """
    kept, priority = np.array([graph.path_edges(path) for path in anchors]), np.asarray(priority, float)
    if priority.shape != kept.shape:
        raise ValueError(f"priority must have shape {kept.shape}, got {priority.shape}")
    least = float(shares(graph, kept, costs).max())
    if not least <= budget + 1e-9 <= 1 + 2e-9:
        raise ValueError(f"budget must lie between the cost of its path {least:.4f} and 1, got {budget}")
    rows = np.arange(len(kept))
    for e in np.argsort(-priority, axis=1, kind="stable").T:
        before = kept[rows, e]
        kept[rows, e] = True
        kept[rows, e] = before | (shares(graph, graph.prune(kept), costs) <= budget + 1e-9)
    return graph.matrices(graph.prune(kept))


def candidate_subnetworks(
    graph: SuperGraph,
    budget: float,
    tas: Array,
    *,
    anchor: Sequence[int] | None = None,
    k: int = 8,
    costs: Array | None = None,
    rng: Rng,
) -> Array:
    """Subnetworks within a budget for validation to choose from: one greedy by node scores, the others random.

    The first takes operations by the scores of their two end nodes, the others in random order. All start from
    ``anchor``, or each from a random path of its own.

    Args:
        graph: the supernet.
        budget: largest share of the supernet's cost, in (0, 1].
        tas: ``(n,)`` node scores.
        anchor: nodes of a path that all candidates hold; ``None`` draws one for every candidate.
        k: number of candidates, >= 1.
        costs: ``(E,)`` positive costs of the operations; ``None`` counts operations.
        rng: generator or seed.

    Returns:
        ``(k, n, n)``.

    Raises:
        ValueError: ``k`` below 1, scores that do not fit, see :func:`fill_budget`.

    Reference: li2023tips.

    >>> graph = SuperGraph(3, [(0, 1), (1, 2), (0, 2)])
    >>> candidate_subnetworks(graph, 1.0, np.ones(3), k=2, rng=0).sum((1, 2))
    array([3, 3])
    """
    if k < 1 or np.shape(tas) != (graph.n,):
        raise ValueError(f"k must be >= 1 and tas hold {graph.n} scores, got {k} and shape {np.shape(tas)}")
    rng, scores = as_rng(rng), np.asarray(tas, float)
    orders = [scores[graph.ends[0]] + scores[graph.ends[1]], *rng.random((k - 1, graph.num_edges))]
    starts = [graph.random_path(rng) if anchor is None else anchor for _ in orders]
    return fill_budget(graph, budget, starts, np.array(orders), costs=costs)
