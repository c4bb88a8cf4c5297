"""Which subnetworks are trained and tested: samplers for training, equal cost, subnetworks that fill a budget.

A sampler is called with T and returns ``(T, n, n)`` adjacency matrices; its ``smallest()`` is the path that the
sandwich rule trains in every step.
"""

from collections.abc import Callable, Sequence

import numpy as np

from effnb.anytime.tips.graph import Rng, SuperGraph, as_rng, check_adjacency, check_keeps, sample_masks
from effnb.anytime.tips.scores import most_important_path, topological_scores
from effnb.common import check_count

Array = np.ndarray
STOCK = 256  # subnetworks drawn at once: one at a time would cost more than the training step


def shares(graph: SuperGraph, masks: Array, costs: Array | None = None) -> Array:
    """Return the shares ``(...)`` in [0, 1] of the supernet's cost that subnetworks keep.

    Args:
        graph: the supernet.
        masks: ``(..., E)`` operations that are kept.
        costs: ``(E,)`` positive costs of the operations; ``None`` counts operations.

    Raises:
        ValueError: costs that are not positive or not one an operation.

    >>> float(shares(SuperGraph(3, [(0, 1), (1, 2), (0, 2)]), [True, False, True], costs=[1, 2, 1]))
    0.5
    """
    weights = np.ones(graph.num_edges) if costs is None else np.asarray(costs, float)
    if weights.shape != (graph.num_edges,) or not (weights > 0).all():
        raise ValueError(f"costs must hold {graph.num_edges} positive numbers, got shape {weights.shape}")
    return np.asarray(masks) @ (weights / weights.sum())


def expected_share(graph: SuperGraph, keep: float, *, costs: Array | None = None, draws: int = 1024, rng: Rng) -> float:
    """Mean share of the cost that uniform sampling keeps after pruning and rejection."""
    return float(shares(graph, sample_masks(graph, keep, draws, rng=rng), costs).mean())


def matched_keep(
    graph: SuperGraph, share: float, anchor: Sequence[int], *, costs: Array | None = None, draws: int = 1024, rng: Rng
) -> float:
    """The probability in [0, 1] at which anchored sampling has the expected cost ``share``, by bisection."""
    kept = graph.path_edges(anchor)
    least = float(shares(graph, kept, costs))
    if not least - 1e-9 <= share <= 1 + 1e-9:
        raise ValueError(f"share must lie between the cost of the anchor {least:.4f} and 1, got {share}")
    numbers = as_rng(rng).random((draws, graph.num_edges))  # the same for all steps: the mean is monotone in keep
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        mean = shares(graph, graph.prune((numbers < middle) | kept), costs).mean()
        low, high = (middle, high) if mean <= share else (low, middle)
    return low


def fill_budget(
    graph: SuperGraph, budget: float, anchors: Sequence[Sequence[int]], priority: Array, *, costs: Array | None = None
) -> Array:
    """Grow k paths to maximal subnetworks ``(k, n, n)`` within a budget, operations taken greedily by priority.

    The highest of ``(k, E)`` priorities comes first, of equal ones the lexicographically first edge. An operation that
    hangs loose costs nothing until others join it to input and output; one that would exceed the budget is left out.
    What hangs loose at the end is pruned.
    """
    kept, priority = np.array([graph.path_edges(path) for path in anchors]), np.asarray(priority, float)
    if priority.shape != kept.shape or np.isnan(priority).any():
        raise ValueError(f"priority must have shape {kept.shape} and no nan, got shape {priority.shape}")
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
    """Return subnetworks ``(k, n, n)`` within a budget, to choose from: one greedy by node scores, the others random.

    The first takes operations by the scores of their two end nodes, the others in random order, as long as they fit.
    All start from ``anchor``, or each from a random path of its own; none can grow within the budget.

    Args:
        graph: the supernet.
        budget: largest share of the supernet's cost, in (0, 1].
        tas: ``(n,)`` node scores.
        anchor: nodes of a path that all candidates hold; ``None`` draws one for every candidate.
        k: number of candidates, >= 1.
        costs: ``(E,)`` positive costs of the operations; ``None`` counts operations.
        rng: generator or seed.

    Raises:
        ValueError: ``k`` below 1, scores that do not fit, a budget below the cost of a path or above 1, an anchor that
            is no path.

    >>> graph = SuperGraph(3, [(0, 1), (1, 2), (0, 2)])
    >>> candidate_subnetworks(graph, 1.0, np.ones(3), k=2, rng=0).sum((1, 2))
    array([3, 3])
    """
    check_count("k", k)
    if np.shape(tas) != (graph.n,):
        raise ValueError(f"tas must hold {graph.n} scores, got shape {np.shape(tas)}")
    rng, scores = as_rng(rng), np.asarray(tas, float)
    orders = [scores[graph.ends[0]] + scores[graph.ends[1]], *rng.random((k - 1, graph.num_edges))]
    starts = [graph.random_path(rng) if anchor is None else anchor for _ in orders]
    return fill_budget(graph, budget, starts, np.array(orders), costs=costs)


class UniformSampler:
    """Independent random subnetworks; the probability of an operation is drawn from a grid.

    Called with ``T=1`` it is single-path one-shot training: one random subnetwork a step.

    Args:
        graph: the supernet.
        keeps: probabilities of keeping an operation, one of which is drawn for every subnetwork.
        rng: generator or seed.

    Raises:
        TypeError: ``rng`` is ``None``.
        ValueError: no or wrong ``keeps``.

    Reference: guo2020single, yu2019universally.

    >>> UniformSampler(SuperGraph(3, [(0, 1), (1, 2), (0, 2)]), (1.0,), rng=0)(2).sum((1, 2))
    array([3, 3])
    """

    anchor: list[int] | None = None
    anchor_keep = 1.0

    def __init__(self, graph: SuperGraph, keeps: float | Sequence[float] = (0.25, 0.5, 0.75), *, rng: Rng) -> None:
        if not np.size(keeps):
            raise ValueError("keeps must hold at least one probability, got none")
        self.graph, self.rng = graph, as_rng(rng)
        self.keeps = check_keeps(keeps, np.size(keeps), self.anchor is not None)
        self._stock = np.zeros((0, graph.num_edges), bool)

    def __call__(self, T: int) -> Array:
        """Return ``(T, n, n)`` subnetworks."""
        check_count("T", T, ge=0)
        if len(self._stock) < T:
            keeps, options = self.rng.choice(self.keeps, max(T, STOCK)), {"anchor": self.anchor, "rng": self.rng}
            fresh = sample_masks(self.graph, keeps, len(keeps), anchor_keep=self.anchor_keep, **options)
            self._stock = np.concatenate([self._stock, fresh])
        taken, self._stock = self._stock[:T], self._stock[T:]
        return self.graph.matrices(taken)

    def smallest(self) -> Array:
        """Return the cheapest subnetwork ``(n, n)``: the anchor, or without one a path drawn anew."""
        path = self.graph.random_path(self.rng) if self.anchor is None else self.anchor
        return self.graph.matrices(self.graph.path_edges(path))


class AnchoredSampler(UniformSampler):
    """Random subnetworks that all hold one path, at the same expected cost as uniform ones.

    Args:
        graph: the supernet.
        anchor: nodes of the path.
        keeps: the probabilities of the uniform sampler to match; the ones in use are in ``keeps`` afterwards.
        anchor_keep: probability of keeping an operation of the anchor, in (0, 1].
        costs: ``(E,)`` positive costs of the operations to be matched; ``None`` counts operations.
        match: ``False`` takes ``keeps`` as they are: larger subnetworks, which win for that reason alone.
        rng: generator or seed.

    Raises:
        ValueError: an anchor that is no path or costs more than the expected cost, wrong probabilities.

    >>> graph = SuperGraph(4, [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)])
    >>> bool((AnchoredSampler(graph, [0, 1, 3], rng=0)(50)[:, 0, 1] == 1).all())
    True
    """

    def __init__(
        self,
        graph: SuperGraph,
        anchor: Sequence[int],
        keeps: float | Sequence[float] = (0.25, 0.5, 0.75),
        *,
        anchor_keep: float = 1.0,
        costs: Array | None = None,
        match: bool = True,
        rng: Rng,
    ) -> None:
        rng = as_rng(rng)
        graph.path_edges(anchor)  # checks that it is a path
        self.anchor, self.anchor_keep = [int(v) for v in anchor], anchor_keep
        if match:
            wanted = [expected_share(graph, q, costs=costs, rng=rng) for q in np.atleast_1d(keeps)]
            keeps = [matched_keep(graph, share, anchor, costs=costs, rng=rng) for share in wanted]
        super().__init__(graph, keeps, rng=rng)


class TIPSSampler(AnchoredSampler):
    """Random subnetworks that all hold the topologically important path.

    Args:
        graph: the supernet.
        keeps: the probabilities of the uniform sampler whose expected cost is matched.
        T: subnetworks of one training step, coupled in one chain.
        blocks: chains whose scores are averaged; by default 16 of 4 subnetworks, 64 in all.
        lam, closure: of the chain.
        reduction: of the path score.
        refresh_every: estimate scores and path again after this many calls; ``None`` keeps the first.
        rng: generator or seed.
        options: of :class:`AnchoredSampler`.

    Raises:
        TypeError: ``rng`` is ``None``.
        ValueError: see :class:`AnchoredSampler` and :func:`topological_scores`.

    Reference: li2023tips.

    >>> TIPSSampler(SuperGraph(4, [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]), rng=0, match=False).anchor
    [0, 1, 2, 3]
    """

    def __init__(
        self,
        graph: SuperGraph,
        keeps: float | Sequence[float] = (0.25, 0.5, 0.75),
        *,
        T: int = 4,
        blocks: int = 16,
        lam: float = 1.0,
        closure: str = "cyclic",
        reduction: str = "sum",
        refresh_every: int | None = None,
        rng: Rng,
        **options: object,
    ) -> None:
        self.graph, self.rng, self.reduction = graph, as_rng(rng), reduction
        # Scores come from uniform sampling: an anchor would vote for itself.
        self._source = SandwichSampler(UniformSampler(graph, keeps, rng=self.rng))
        self._chain, self._options = (T, blocks, lam, closure), {"keeps": keeps, **options}
        self.refresh_every, self._calls = refresh_every, 0
        self.refresh()

    def refresh(self) -> None:
        """Estimate the scores from fresh subnetworks and take the path that is important now."""
        self.tas = mean_scores(self._source, *self._chain)
        path = most_important_path(self.graph.adjacency, self.tas, self.reduction)
        super().__init__(self.graph, path, rng=self.rng, **self._options)

    def __call__(self, T: int) -> Array:
        self._calls += 1
        if self.refresh_every and self._calls % self.refresh_every == 0:
            self.refresh()
        return super().__call__(T)


class SandwichSampler:
    """The sandwich rule: the whole supernet, the smallest subnetwork, and T - 2 of another sampler.

    Args:
        sampler: where the others and the smallest come from.

    Reference: yu2019universally.

    >>> graph = SuperGraph(3, [(0, 1), (1, 2), (0, 2)])
    >>> SandwichSampler(AnchoredSampler(graph, [0, 2], match=False, rng=0))(4).sum((1, 2))[:2]
    array([3, 1])
    """

    def __init__(self, sampler: UniformSampler) -> None:
        self.sampler, self.graph = sampler, sampler.graph

    def __call__(self, T: int) -> Array:
        """Return ``(T, n, n)`` subnetworks, T >= 2, the whole one first."""
        if T < 2:
            raise ValueError(f"T must be >= 2 for the sandwich rule, got {T}")
        return np.concatenate([[self.graph.adjacency, self.sampler.smallest()], self.sampler(T - 2)])


class JointSampler:
    """The same subnetworks in every step: joint training, stand-alone training, the largest only.

    Args:
        subnetworks: binary ``(n, n)`` matrices, all trained in each step.

    Raises:
        ValueError: no subnetwork, or one that is no valid graph.

    Reference: yu2019slimmable.

    >>> JointSampler([np.triu(np.ones((3, 3)), 1)])(1).shape
    (1, 3, 3)
    """

    def __init__(self, subnetworks: Sequence[Array]) -> None:
        if len(subnetworks) == 0:
            raise ValueError("subnetworks must hold at least one matrix, got none")
        self._all = np.array([check_adjacency(a, f"subnetworks[{k}]") for k, a in enumerate(subnetworks)], int)

    def __call__(self, T: int) -> Array:
        """Return all subnetworks; ``T`` must be their number."""
        if len(self._all) != T:
            raise ValueError(f"T must be the number of subnetworks {len(self._all)}, got {T}")
        return self._all


def mean_scores(
    sampler: Callable[[int], Array], T: int = 4, blocks: int = 16, lam: float = 1.0, closure: str = "cyclic"
) -> Array:
    """Return node scores ``(n,)`` averaged over several chains, each of the T subnetworks of one training step.

    Args:
        sampler: gives ``(T, n, n)`` subnetworks when called with T.
        T: subnetworks of a chain, >= 1.
        blocks: number of chains, >= 1.
        lam, closure: of the chains.

    Raises:
        ValueError: ``blocks`` below 1, see :func:`topological_scores`.

    >>> mean_scores(JointSampler([np.triu(np.ones((3, 3)), 1)]), T=1, blocks=1)
    array([0.4, 0.2, 0.4])
    """
    check_count("blocks", blocks)
    return np.mean([topological_scores(sampler(T), lam, closure).tas for _ in range(blocks)], axis=0)
