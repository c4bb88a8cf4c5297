"""Adjacency matrices of subnetworks: checked, and pruned to what lies between input and output."""

from collections.abc import Sequence

import numpy as np
import torch

Array = np.ndarray
Rng = np.random.Generator | torch.Generator | int | Sequence[int]


def as_rng(rng: Rng) -> np.random.Generator:
    """A NumPy generator from one (used as it is), a torch generator (which gives a seed) or a seed; never ``None``."""
    if rng is None:
        raise TypeError("rng must be a generator or a seed, got None")
    if isinstance(rng, torch.Generator):
        return np.random.default_rng(int(torch.randint(2**62, (), generator=rng, device=rng.device)))
    return np.random.default_rng(rng)


def _find_cycle(adjacency: Array) -> list[int] | None:
    """Nodes of one cycle, first node repeated at the end, or ``None``."""
    alive = adjacency.copy()
    while (dead := ~alive.any(1) & alive.any(0)).any():  # nodes without a way out lie on no cycle
        alive[:, dead] = False
    if not alive.any():
        return None
    walk = [int(alive.any(1).argmax())]
    while (following := int(alive[walk[-1]].argmax())) not in walk:
        walk.append(following)
    return [*walk[walk.index(following) :], following]


def check_adjacency(adjacency: Array, name: str = "adjacency") -> Array:
    """The matrix as ``bool`` after all checks: square, binary, acyclic, nodes in topological order, an r-d path.

    Raises:
        ValueError: naming the rule that is broken, with the cycle if there is one.
    """
    a = np.asarray(adjacency)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or len(a) < 2:
        raise ValueError(f"{name} must be a square matrix of at least 2 nodes, got shape {a.shape}")
    binary = a.astype(bool)
    if a.dtype != bool and not (a == binary).all():
        raise ValueError(f"{name} must be binary, got the value {a[a != binary].flat[0]}")
    if np.tril(binary).any():
        if cycle := _find_cycle(binary):
            raise ValueError(f"{name} must be acyclic, got the cycle {' -> '.join(map(str, cycle))}")
        i, j = (int(k[0]) for k in np.nonzero(np.tril(binary)))
        raise ValueError(f"{name} must have its nodes in topological order, got the edge {i} -> {j}")
    if not _on_paths(binary)[-1]:
        raise ValueError(f"{name} must have a path from node 0 to node {len(a) - 1}, got none")
    return binary


def _on_paths(a: Array) -> Array:
    """``(n,)``: whether a node of a topologically ordered graph lies on a path from the first to the last node."""
    n = len(a)
    ahead, back = np.zeros(n, bool), np.zeros(n, bool)
    ahead[0] = back[-1] = True
    for v in range(n):
        if ahead[v]:
            ahead |= a[v]
        u = n - 1 - v
        if back[u]:
            back |= a[:, u]
    return ahead & back


def prune_to_terminals(adjacency: Array) -> Array:
    """Keep only the edges on some path from node 0 to the last node.

    Args:
        adjacency: ``(n, n)``, binary, nodes in topological order.

    Returns:
        A new matrix of the same dtype; rows and columns of nodes off all paths are zero.

    Raises:
        ValueError: not square, not binary, cyclic (the cycle is named), not in topological order, or no path.

    Reference: li2023tips.

    >>> prune_to_terminals(np.array([[0, 1, 1], [0, 0, 0], [0, 0, 0]])).tolist()  # node 1 leads nowhere
    [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    """
    on = _on_paths(check_adjacency(adjacency))
    return np.where(on[:, None] & on, adjacency, 0).astype(np.asarray(adjacency).dtype)
