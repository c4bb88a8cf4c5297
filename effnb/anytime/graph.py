"""Supernets as graphs: operations are edges, feature maps are nodes, node 0 is the input and the last the output."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from effnb.anytime.adjacency import Rng, as_rng, check_adjacency, prune_to_terminals

__all__ = ["SuperGraph", "prune_to_terminals", "sample_masks", "sample_subgraph"]

Array = np.ndarray
TRIES, ROUNDS, CHUNK = 32, 2000, 256  # draws at a time for each subnetwork, most rounds, subnetworks at a time


@dataclass(frozen=True)
class SuperGraph:
    """A directed acyclic graph whose subgraphs are the subnetworks.

    Args:
        n: number of nodes, >= 2; nodes are in topological order, 0 is the input and ``n - 1`` the output.
        edges: pairs ``(i, j)`` with ``i < j``, one an operation; kept sorted.

    Raises:
        ValueError: an edge out of range or given twice, a cycle (which is named), an order that is not topological,
            or no path from the input to the output.

    Reference: li2023tips.

    >>> graph = SuperGraph(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
    >>> graph.num_edges, graph.count_paths(), list(graph.paths())
    (4, 2, [[0, 1, 3], [0, 2, 3]])
    """

    n: int
    edges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        edges = sorted((int(i), int(j)) for i, j in self.edges)
        if self.n < 2:
            raise ValueError(f"n must be >= 2, got {self.n}")
        if wrong := [e for e in edges if not 0 <= min(e) <= max(e) < self.n]:
            raise ValueError(f"edges must join nodes in 0..{self.n - 1}, got {wrong[0]}")
        if len(set(edges)) < len(edges):
            raise ValueError(f"edges must be distinct, got {next(e for e in edges if edges.count(e) > 1)} twice")
        object.__setattr__(self, "edges", tuple(edges))
        check_adjacency(self.adjacency, "edges")

    @classmethod
    def from_adjacency(cls, adjacency: Array) -> "SuperGraph":
        """The graph of a binary ``(n, n)`` matrix."""
        a = check_adjacency(adjacency)
        return cls(len(a), tuple(zip(*(k.tolist() for k in np.nonzero(a)), strict=True)))

    @property
    def num_edges(self) -> int:
        """Number of operations."""
        return len(self.edges)

    @cached_property
    def ends(self) -> tuple[Array, Array]:
        """Sources and targets of the edges, ``(E,)`` each."""
        pairs = np.array(self.edges, int).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    @cached_property
    def adjacency(self) -> Array:
        """``(n, n)`` matrix of zeros and ones."""
        return self.matrices(np.ones(len(self.edges), bool))

    def matrices(self, masks: Array) -> Array:
        """Adjacency matrices ``(..., n, n)`` of edge masks ``(..., E)``."""
        masks = np.asarray(masks)
        out = np.zeros((*masks.shape[:-1], self.n, self.n), np.int64)
        out[..., self.ends[0], self.ends[1]] = masks
        return out

    def masks(self, adjacency: Array) -> Array:
        """Edge masks ``(..., E)`` of adjacency matrices ``(..., n, n)`` of subgraphs."""
        a = np.asarray(adjacency)
        if a.shape[-2:] != (self.n, self.n):
            raise ValueError(f"adjacency must end in ({self.n}, {self.n}), got shape {a.shape}")
        found = a[..., self.ends[0], self.ends[1]].astype(bool)
        if found.sum() != np.count_nonzero(a):
            raise ValueError("adjacency must hold edges of the supernet only, got others")
        return found

    def prune(self, masks: Array) -> Array:
        """Pruned edge masks ``(k, E)``; a row that has lost its last path is all ``False``."""
        columns = np.ascontiguousarray(np.asarray(masks, bool).T)
        ahead, back = np.zeros((2, self.n, columns.shape[1]), bool)
        ahead[0] = back[-1] = True
        for (i, j), column in zip(self.edges, columns, strict=True):  # sorted: a source is complete when it is used
            ahead[j] |= ahead[i] & column
        for (i, j), column in zip(reversed(self.edges), columns[::-1], strict=True):
            back[i] |= back[j] & column
        return (columns & ahead[self.ends[0]] & back[self.ends[1]]).T

    def path_edges(self, path: Sequence[int]) -> Array:
        """Edge mask ``(E,)`` of a path from input to output, given by its nodes."""
        steps = set(pairwise(path))
        if list(path[:1]) != [0] or path[-1] != self.n - 1 or not steps <= set(self.edges):
            raise ValueError(f"path must lead from 0 to {self.n - 1} along edges of the graph, got {list(path)}")
        return np.array([e in steps for e in self.edges])

    @cached_property
    def _ways(self) -> list[int]:
        ways = [0] * (self.n - 1) + [1]
        for i, j in reversed(self.edges):
            ways[i] += ways[j]
        return ways

    @property
    def on_paths(self) -> set[int]:
        """Nodes on some path from input to output."""
        alive = self.prune(np.ones((1, len(self.edges)), bool))[0]
        return {v for e, kept in zip(self.edges, alive, strict=True) if kept for v in e}

    def count_paths(self) -> int:
        """Exact number of paths from input to output, without listing them."""
        return self._ways[0]

    def paths(self) -> Iterator[list[int]]:
        """All paths from input to output in lexicographic order; their number may be exponential."""
        stack = [[0]]
        following = [[j for i, j in self.edges if i == v and self._ways[j]] for v in range(self.n)]
        while stack:
            path = stack.pop()
            if path[-1] == self.n - 1:
                yield path
            stack.extend([*path, j] for j in reversed(following[path[-1]]))

    def random_path(self, rng: Rng) -> list[int]:
        """One path, every path with the same probability."""
        rng, path = as_rng(rng), [0]
        while path[-1] != self.n - 1:
            options = [j for i, j in self.edges if i == path[-1] and self._ways[j]]
            chances = np.array([self._ways[j] / self._ways[path[-1]] for j in options])
            path.append(int(rng.choice(options, p=chances / chances.sum())))
        return path


def check_keeps(keep: float | Array, count: int, anchored: bool) -> Array:
    keeps = np.broadcast_to(np.asarray(keep, float), count)
    if not (np.isfinite(keeps).all() and (keeps <= 1).all() and ((keeps >= 0) if anchored else (keeps > 0)).all()):
        raise ValueError(f"keep must be in {'[0, 1]' if anchored else '(0, 1]'}, got {keep}")
    return keeps


def sample_masks(
    graph: SuperGraph,
    keep: float | Array,
    count: int,
    *,
    anchor: Sequence[int] | None = None,
    anchor_keep: float = 1.0,
    rng: Rng,
) -> Array:
    """Edge masks of random subnetworks: operations kept one by one, pruned, drawn again where no path is left.

    Args:
        graph: the supernet.
        keep: probability of keeping an operation, one number or one a subnetwork, in (0, 1] (0 with an anchor).
        count: number of subnetworks, >= 1.
        anchor: nodes of a path whose operations are kept with ``anchor_keep`` instead.
        anchor_keep: probability in (0, 1].
        rng: generator or seed.

    Returns:
        ``(count, E)`` bool.

    Raises:
        ValueError: a probability or ``count`` out of range, an anchor that is no path, or no path in 64 000 draws.
        TypeError: ``rng`` is ``None``.

    Reference: li2023tips.

    >>> sample_masks(SuperGraph(3, [(0, 1), (1, 2), (0, 2)]), 0.0, 1, anchor=[0, 2], rng=0)  # edges 01, 02, 12
    array([[False,  True, False]])
    """
    rng = as_rng(rng)
    if count < 1 or not 0 < anchor_keep <= 1:
        raise ValueError(f"count must be >= 1 and anchor_keep in (0, 1], got {count}, {anchor_keep}")
    chance = np.repeat(check_keeps(keep, count, anchor is not None)[:, None], graph.num_edges, axis=1)
    if anchor is not None:
        chance[:, graph.path_edges(anchor)] = anchor_keep
    tries = 1 if anchor is not None and anchor_keep == 1 else TRIES
    masks, todo = np.zeros(chance.shape, bool), np.arange(count)
    for _ in range(ROUNDS):
        part = todo[:CHUNK]
        drawn = rng.random((tries, *chance[part].shape)) < chance[part]
        pruned = graph.prune(drawn.reshape(-1, graph.num_edges)).reshape(drawn.shape)
        connected = pruned.any(-1)
        hit, first = connected.any(0), connected.argmax(0)
        masks[part[hit]] = pruned[first[hit], np.flatnonzero(hit)]
        todo = np.concatenate([part[~hit], todo[CHUNK:]])
        if not len(todo):
            return masks
    raise ValueError(f"keep must leave a path from input to output, got {keep}: none in {ROUNDS * tries} draws")


def sample_subgraph(
    graph: SuperGraph, keep: float, *, anchor: Sequence[int] | None = None, anchor_keep: float = 1.0, rng: Rng
) -> Array:
    """One random subnetwork as a pruned adjacency matrix (see :func:`sample_masks`).

    Args:
        graph: the supernet.
        keep: probability of keeping an operation, in (0, 1] (0 with an anchor).
        anchor: nodes of a path whose operations are kept with ``anchor_keep`` instead.
        anchor_keep: probability in (0, 1].
        rng: generator or seed.

    Returns:
        ``(n, n)`` zeros and ones.

    Raises:
        ValueError: a probability out of range, an anchor that is no path, or no path in 64 000 draws.
        TypeError: ``rng`` is ``None``.

    Reference: li2023tips.

    >>> sample_subgraph(SuperGraph(3, [(0, 1), (1, 2), (0, 2)]), 1.0, rng=0).tolist()
    [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    """
    return graph.matrices(sample_masks(graph, keep, 1, anchor=anchor, anchor_keep=anchor_keep, rng=rng)[0])
