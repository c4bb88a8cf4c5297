"""Topological scores of nodes and paths (TAS, TPS) and the path that matters most.

The paper's abstract and the caption of its Figure 2 name these objects; their exact form here is a reconstruction.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from effnb.anytime.chain import (
    DENSE_LIMIT,
    check_coupling,
    couple,
    hyper_adjacency,
    pruned_floats,
    solve,
    stationary_distribution,
    transition_matrix,
)
from effnb.anytime.paths import most_important_path, path_score

__all__ = [
    "TopologicalScores",
    "hyper_adjacency",
    "most_important_path",
    "path_score",
    "stationary_distribution",
    "topological_scores",
    "transition_matrix",
    "visit_probabilities",
]

Array = np.ndarray


class TopologicalScores(NamedTuple):
    """What the chain says about the nodes.

    Args:
        tas: ``(n,)`` node scores, the stationary mass summed over the subnetworks; they sum to 1.
        pi: ``(T, n)`` stationary law, 0 where a node is absent.
        present: ``(T, n)`` whether a node is on a path of the subnetwork.

    Reference: li2023tips.
    """

    tas: Array
    pi: Array
    present: Array


def topological_scores(
    adjs: Sequence[Array], lam: float = 1.0, closure: str = "cyclic", *, method: str = "solve"
) -> TopologicalScores:
    r"""Node scores of subnetworks that are trained together, :math:`\mathrm{TAS}(v) = \sum_k \pi_{(k,v)}`.

    Args:
        adjs: T binary ``(n, n)`` matrices in topological order, node 0 the input.
        lam: coupling of the copies of a node, > 0; 0 only for T = 1 or ``method="per-block"``.
        closure: ``"cyclic"`` or ``"symmetric"``.
        method: ``"solve"``, ``"lazy"``, or ``"per-block"``: without coupling, every subnetwork with mass 1/T.

    Returns:
        A :class:`TopologicalScores`.

    Raises:
        ValueError: see :func:`hyper_adjacency`; ``"per-block"`` with a coupling.

    Reference: li2023tips, taylor2017eigenvector.

    >>> topological_scores([np.triu(np.ones((3, 3)), 1)], lam=0.0).tas  # visits 1, 1/2, 1
    array([0.4, 0.2, 0.4])
    """
    T = len(adjs)
    if method == "per-block":
        if lam != 0:
            raise ValueError(f"lam must be 0 with method='per-block', got {lam}")
        single = [topological_scores([a], 0.0, closure) for a in adjs]
        pi, present = (np.concatenate([getattr(s, name) for s in single]) for name in ("pi", "present"))
        return TopologicalScores(pi.sum(0) / T, pi / T, present)
    check_coupling(T, lam, closure)
    pruned = pruned_floats(adjs)
    H, present = couple(pruned, lam, closure, as_sparse=T * len(pruned[0]) > DENSE_LIMIT)
    P = transition_matrix(H, present)
    pi = np.zeros(present.shape)
    pi[present] = solve(P) if method == "solve" else stationary_distribution(P, method)  # irreducible by construction
    return TopologicalScores(pi.sum(0), pi, present)


def visit_probabilities(adjacency: Array) -> Array:
    r"""Probability that the uniform random walk from node 0 passes each node, :math:`N_v = \sum_u N_u / o_u`.

    Args:
        adjacency: binary ``(n, n)`` in topological order; pruned first.

    Returns:
        ``(n,)``; 1 for input and output.

    Raises:
        ValueError: see :func:`prune_to_terminals`.

    Reference: li2023tips.

    >>> visit_probabilities(np.triu(np.ones((4, 4)), 1))
    array([1.        , 0.33333333, 0.5       , 1.        ])
    """
    (a,) = pruned_floats([adjacency])
    visits, degree = np.zeros(len(a)), a.sum(1)
    visits[0] = 1.0
    for v in np.flatnonzero(degree):
        visits += visits[v] / degree[v] * a[v]
    return visits
