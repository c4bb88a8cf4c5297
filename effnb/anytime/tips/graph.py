"""Supernets as graphs: operations are edges, feature maps are nodes, node 0 is the input and the last the output."""

import graphlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from effnb.common import check_count, check_number

Array = np.ndarray
Rng = np.random.Generator | torch.Generator | int | Sequence[int]
TRIES, ROUNDS, CHUNK = 32, 2000, 256  # draws at a time for each subnetwork, most rounds, subnetworks at a time


def as_rng(rng: Rng) -> np.random.Generator:
    """A NumPy generator from one (used as it is), a torch generator (which gives a seed) or a seed; never ``None``."""
    if rng is None:
        raise TypeError("rng must be a generator or a seed, got None")
    if isinstance(rng, torch.Generator):
        return np.random.default_rng(int(torch.randint(2**62, (), generator=rng, device=rng.device)))
    return np.random.default_rng(rng)


def check_adjacency(adjacency: Array, name: str = "adjacency") -> Array:
    """The matrix as ``bool``, checked as :func:`prune_to_terminals` says, with only the edges on some path."""
    a = np.asarray(adjacency)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or len(a) < 2:
        raise ValueError(f"{name} must be a square matrix of at least 2 nodes, got shape {a.shape}")
    binary = a.astype(bool)
    if a.dtype != bool and not (a == binary).all():
        raise ValueError(f"{name} must be binary, got the value {a[a != binary].flat[0]}")
    if np.tril(binary).any():
        try:
            graphlib.TopologicalSorter({v: np.flatnonzero(into) for v, into in enumerate(binary.T)}).prepare()
        except graphlib.CycleError as error:
            raise ValueError(f"{name} must be acyclic, got the cycle {' -> '.join(map(str, error.args[1]))}") from None
        i, j = np.argwhere(np.tril(binary))[0]
        raise ValueError(f"{name} must have its nodes in topological order, got the edge {i} -> {j}")
    ahead, back = np.zeros((2, len(a)), bool)  # nodes that the input leads to, nodes that lead to the output
    ahead[0] = back[-1] = True
    for v in range(len(a)):
        if ahead[v]:
            ahead |= binary[v]
        if back[-1 - v]:
            back |= binary[:, -1 - v]
    if not ahead[-1]:
        raise ValueError(f"{name} must have a path from node 0 to node {len(a) - 1}, got none")
    on = ahead & back
    return binary & on[:, None] & on


def prune_to_terminals(adjacency: Array) -> Array:
    """Return a copy of the matrix with only the edges on some path from node 0 to the last node.

    Args:
        adjacency: ``(n, n)``, binary, nodes in topological order.

    Raises:
        ValueError: not square, not binary, cyclic (the cycle is named), not in topological order, or no path.

    >>> prune_to_terminals(np.array([[0, 1, 1], [0, 0, 0], [0, 0, 0]])).tolist()  # node 1 leads nowhere
    [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    """
    return check_adjacency(adjacency).astype(np.asarray(adjacency).dtype)


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
        check_count("n", self.n, ge=2)
        if wrong := [e for e in edges if not 0 <= min(e) <= max(e) < self.n]:
            raise ValueError(f"edges must join nodes in 0..{self.n - 1}, got {wrong[0]}")
        if len(set(edges)) < len(edges):
            raise ValueError(f"edges must be distinct, got {next(e for e in edges if edges.count(e) > 1)} twice")
        object.__setattr__(self, "edges", tuple(edges))
        check_adjacency(self.adjacency, "edges")

    @classmethod
    def from_adjacency(cls, adjacency: Array) -> "SuperGraph":
        """Return the graph of a binary ``(n, n)`` matrix."""
        check_adjacency(adjacency)
        return cls(len(adjacency), np.argwhere(np.asarray(adjacency)))

    @property
    def num_edges(self) -> int:
        """Number of operations."""
        return len(self.edges)

    @cached_property
    def ends(self) -> tuple[Array, Array]:
        """Sources and targets of the edges, ``(E,)`` each."""
        return tuple(np.array(self.edges, int).reshape(-1, 2).T)

    @cached_property
    def adjacency(self) -> Array:
        """``(n, n)`` matrix of zeros and ones."""
        return self.matrices(np.ones(len(self.edges), bool))

    def matrices(self, masks: Array) -> Array:
        """Return the adjacency matrices ``(..., n, n)`` of edge masks ``(..., E)``."""
        masks = np.asarray(masks)
        out = np.zeros((*masks.shape[:-1], self.n, self.n), np.int64)
        out[..., self.ends[0], self.ends[1]] = masks
        return out

    def masks(self, adjacency: Array) -> Array:
        """Return the edge masks ``(..., E)`` of adjacency matrices ``(..., n, n)`` of subgraphs."""
        a = np.asarray(adjacency)
        if a.shape[-2:] != (self.n, self.n):
            raise ValueError(f"adjacency must end in ({self.n}, {self.n}), got shape {a.shape}")
        found = a[..., self.ends[0], self.ends[1]].astype(bool)
        if found.sum() != np.count_nonzero(a):
            raise ValueError("adjacency must hold edges of the supernet only, got others")
        return found

    def prune(self, masks: Array) -> Array:
        """Return pruned edge masks ``(k, E)``; a row that has lost its last path is all ``False``."""
        columns = np.ascontiguousarray(np.asarray(masks, bool).T)
        ahead, back = np.zeros((2, self.n, columns.shape[1]), bool)
        ahead[0] = back[-1] = True
        for (i, j), column in zip(self.edges, columns, strict=True):  # sorted: a source is complete when it is used
            ahead[j] |= ahead[i] & column
        for (i, j), column in zip(reversed(self.edges), columns[::-1], strict=True):
            back[i] |= back[j] & column
        return (columns & ahead[self.ends[0]] & back[self.ends[1]]).T

    def path_edges(self, path: Sequence[int]) -> Array:
        """Return the edge mask ``(E,)`` of a path from input to output, given by its nodes."""
        steps = set(pairwise(path))
        if list(path[:1]) != [0] or path[-1] != self.n - 1 or not steps <= set(self.edges):
            raise ValueError(f"path must lead from 0 to {self.n - 1} along edges of the graph, got {list(path)}")
        return np.array([e in steps for e in self.edges])

    @cached_property
    def _ways(self) -> list[int]:
        """Number of paths from each node to the output; Python integers, which do not overflow."""
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
        """Return the exact number of paths from input to output, without listing them."""
        return self._ways[0]

    def paths(self) -> Iterator[list[int]]:
        """Yield all paths from input to output in lexicographic order; their number may be exponential."""
        stack = [[0]]
        following = [[j for i, j in self.edges if i == v and self._ways[j]] for v in range(self.n)]
        while stack:
            path = stack.pop()
            if path[-1] == self.n - 1:
                yield path
            stack.extend([*path, j] for j in reversed(following[path[-1]]))

    def random_path(self, rng: Rng) -> list[int]:
        """Return one path, every path with the same probability."""
        rng, path = as_rng(rng), [0]
        while path[-1] != self.n - 1:
            options = [j for i, j in self.edges if i == path[-1] and self._ways[j]]
            chances = np.array([self._ways[j] / self._ways[path[-1]] for j in options])
            path.append(int(rng.choice(options, p=chances / chances.sum())))
        return path


def check_keeps(keep: float | Array, count: int, anchored: bool) -> Array:
    """``(count,)`` probabilities of keeping an operation; 0 only where an anchor is left."""
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
    """Return edge masks ``(count, E)`` of random subnetworks: operations kept one by one, then pruned.

    Where no path from input to output is left, a subnetwork is drawn again.

    Args:
        graph: the supernet.
        keep: probability of keeping an operation, one number or one a subnetwork, in (0, 1] (0 with an anchor).
        count: number of subnetworks, >= 1.
        anchor: nodes of a path whose operations are kept with ``anchor_keep`` instead.
        anchor_keep: probability in (0, 1].
        rng: generator or seed.

    Raises:
        ValueError: a probability or ``count`` out of range, an anchor that is no path, or no path in 64 000 draws.
        TypeError: ``rng`` is ``None``, or a number that is none.

    >>> sample_masks(SuperGraph(3, [(0, 1), (1, 2), (0, 2)]), 0.0, 1, anchor=[0, 2], rng=0)  # edges 01, 02, 12
    array([[False,  True, False]])
    """
    rng = as_rng(rng)
    check_count("count", count)
    check_number("anchor_keep", anchor_keep, gt=0, le=1)
    chance = np.repeat(check_keeps(keep, count, anchor is not None)[:, None], graph.num_edges, axis=1)
    if anchor is not None:
        chance[:, graph.path_edges(anchor)] = anchor_keep
    # A kept anchor is a path already. Else many draws at once: at a low keep hardly any is connected.
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
    """Return one random subnetwork as a pruned adjacency matrix ``(n, n)`` of zeros and ones.

    Args:
        graph, keep, anchor, anchor_keep, rng: as :func:`sample_masks`, which also says what raises.

    >>> sample_subgraph(SuperGraph(3, [(0, 1), (1, 2), (0, 2)]), 1.0, rng=0).tolist()
    [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    """
    return graph.matrices(sample_masks(graph, keep, 1, anchor=anchor, anchor_keep=anchor_keep, rng=rng)[0])


def layered_graph(layers: int, width: int, p: float = 1.0, *, min_edges: int = 0, rng: Rng = 0) -> SuperGraph:
    """Return a random layered supernet: input, ``layers`` layers of ``width`` nodes, output.

    Input and output are joined to their whole neighbouring layer, nodes of neighbouring layers with probability ``p``.
    Draws in which a node lies on no path, or with fewer than ``min_edges`` edges, are rejected.

    Args:
        layers: >= 1.
        width: nodes of a layer, >= 1.
        p: probability of a connection, in (0, 1].
        min_edges: least number of operations.
        rng: generator or seed.

    Raises:
        TypeError: a number that is none.
        ValueError: an argument out of range, ``min_edges`` above what the layout holds, or no draw in 10 000 passes.

    >>> layered_graph(4, 3).num_edges, layered_graph(4, 3, 0.6, rng=0).n
    (33, 14)
    """
    check_count("layers", layers)
    check_count("width", width)
    check_number("p", p, gt=0, le=1)
    most = 2 * width + (layers - 1) * width**2
    if min_edges > most:
        raise ValueError(f"min_edges must be at most {most} for this layout, got {min_edges}")
    rows = [range(1 + k * width, 1 + (k + 1) * width) for k in range(layers)]
    rng, last = as_rng(rng), 1 + layers * width
    fixed = [(0, v) for v in rows[0]] + [(u, last) for u in rows[-1]]
    between = [(u, v) for a, b in pairwise(rows) for u in a for v in b]
    for _ in range(10_000):
        chosen = rng.random(len(between)) < p
        edges = [*fixed, *(e for e, kept in zip(between, chosen, strict=True) if kept)]
        inner = {u for u, _ in edges} & {v for _, v in edges}
        if len(edges) >= min_edges and len(inner) == layers * width:
            return SuperGraph(last + 1, tuple(edges))
    raise ValueError(f"p must leave every node on a path with at least {min_edges} edges, got {p}")
