"""From subnetworks that are trained together to the path that matters most: Markov chain, node scores, path scores.

The abstract and one figure caption of the paper name the objects (hyper-adjacency, TAS, TPS); their exact form here is
a reconstruction along the lines of supracentrality, which couples the layers of a temporal network in the same way.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph, linalg

from effnb.anytime.tips.graph import Rng, SuperGraph, check_adjacency
from effnb.common import check_choice

Array = np.ndarray
Matrix = np.ndarray | sparse.csr_array
DENSE_LIMIT = 500  # states; beyond, sparse LU beats the dense solve on all but complete graphs
TIE = 1e-12  # scores closer than this times the largest score are ties: a solver leaves noise of 1e-16


def hyper_adjacency(
    adjs: Sequence[Array], lam: float, closure: str = "cyclic", *, sparse_output: bool | None = False
) -> tuple[Matrix, Array]:
    r"""Return the coupled subnetworks, :math:`H = \mathrm{blockdiag}(B_1..B_T) + \lambda [Z_{ij}]_{i \ne j}`.

    ``B_k`` closes the walk through subnetwork k: with ``"cyclic"`` it is ``A_k`` with an edge from the output back to
    the input, with ``"symmetric"`` it is ``A_k + A_k^T``. ``Z_ij`` is diagonal, 1 where a node is present in both.

    Args:
        adjs: T binary ``(n, n)`` matrices in topological order, node 0 the input; nodes off all paths are pruned.
        lam: coupling, > 0; 0 only for T = 1.
        closure: ``"cyclic"`` or ``"symmetric"``.
        sparse_output: return ``H`` as a ``scipy.sparse.csr_array``; ``None`` does so beyond 500 states.

    Returns:
        ``H`` ``(T n, T n)``, state ``k n + v`` for node v of subnetwork k, with zero rows and columns for absent
        states, and ``present`` ``(T, n)``.

    Raises:
        ValueError: no matrix, sizes that differ, a matrix that :func:`prune_to_terminals` refuses, ``lam`` out of
            range, unknown ``closure``.

    Reference: li2023tips, taylor2017eigenvector.

    >>> H, present = hyper_adjacency([np.triu(np.ones((3, 3)), 1)] * 2, lam=0.5)
    >>> H[0].tolist()  # the input: two operations and its copy in the other subnetwork
    [0.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    T = len(adjs)
    check_choice("closure", closure, ("cyclic", "symmetric"))
    if not 0 <= lam < np.inf:
        raise ValueError(f"lam must be >= 0 and finite, got {lam}")
    if lam == 0 and T > 1:
        raise ValueError(f"lam must be > 0 for {T} subnetworks, got 0: the chain falls apart (method='per-block')")
    if T == 0:
        raise ValueError("adjs must hold at least one adjacency matrix, got none")
    pruned = [check_adjacency(a, f"adjs[{k}]") for k, a in enumerate(adjs)]
    if len(sizes := {len(a) for a in pruned}) > 1:
        raise ValueError(f"adjs must have one size, got {sorted(sizes)}")
    blocks = np.array(pruned, float)
    n, present = blocks.shape[-1], blocks.any(1) | blocks.any(2)
    if closure == "symmetric":
        blocks += blocks.transpose(0, 2, 1)
    else:
        blocks[:, -1, 0] = 1.0
    if T * n > DENSE_LIMIT if sparse_output is None else sparse_output:
        i, j = np.nonzero(~np.eye(T, dtype=bool))
        k, v = np.nonzero(present[i] & present[j])
        ones = np.full(len(k), float(lam))
        coupling = sparse.csr_array((ones, (i[k] * n + v, j[k] * n + v)), shape=(T * n, T * n))
        return sparse.csr_array(sparse.block_diag(blocks) + coupling), present
    H = np.zeros((T, n, T, n))
    both = present[:, None] & present[None] & ~np.eye(T, dtype=bool)[:, :, None]
    H[:, np.arange(n), :, np.arange(n)] = lam * both.transpose(2, 0, 1)
    H[np.arange(T), :, np.arange(T)] = blocks
    return H.reshape(T * n, T * n), present


def transition_matrix(H: Matrix, present: Array) -> Matrix:
    """Return ``H`` without its absent states, every row divided by its sum; dense or sparse as ``H``.

    Args:
        H: ``(T n, T n)``, dense or sparse.
        present: ``(T, n)``.

    Raises:
        ValueError: the size of ``present`` does not fit, or a present state has no way out.

    Reference: li2023tips.

    >>> transition_matrix(*hyper_adjacency([np.triu(np.ones((3, 3)), 1)], lam=0.0)).tolist()
    [[0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    keep = np.asarray(present, bool).reshape(-1)  # absent states go: as self-loops they would absorb the walk
    if H.shape != (len(keep), len(keep)):
        raise ValueError(f"present must have one entry a state of H, {H.shape}, got {len(keep)}")
    kept = H[keep][:, keep]
    out = np.asarray(kept.sum(1)).reshape(-1)
    if not (out > 0).all():
        raise ValueError(f"present must mark states with a way out only, got state {int((out <= 0).argmax())}")
    return sparse.csr_array(sparse.diags_array(1 / out) @ kept) if sparse.issparse(kept) else kept / out[:, None]


def stationary_distribution(
    P: Matrix, method: str = "solve", *, tol: float = 1e-13, max_iter: int = 1_000_000
) -> Array:
    r"""Return the law ``(m,)`` that the chain keeps, :math:`\pi P = \pi`, :math:`\sum \pi = 1`.

    ``"solve"`` replaces one equation of the singular system by the sum (sparse LU beyond 500 states). ``"lazy"``
    iterates :math:`(I + P)/2`, which has the same law and no period; iterating ``P`` itself oscillates for a cyclic
    closure of a layered graph.

    Args:
        P: ``(m, m)`` row-stochastic and irreducible, dense or sparse.
        method: ``"solve"`` or ``"lazy"``.
        tol: the lazy iteration stops when no entry changes by more.
        max_iter: most steps of the lazy iteration.

    Raises:
        ValueError: not square, negative entries, rows that do not sum to 1, a reducible chain, unknown ``method``.
        RuntimeError: the lazy iteration has not converged.

    Reference: li2023tips.

    >>> stationary_distribution(np.array([[0.0, 1.0], [1.0, 0.0]]))
    array([0.5, 0.5])
    """
    check_choice("method", method, ("solve", "lazy"))
    P = P if sparse.issparse(P) else np.asarray(P, float)
    if P.ndim != 2 or P.shape[0] != P.shape[1] or not P.shape[0]:
        raise ValueError(f"P must be a square matrix, got shape {P.shape}")
    sums = np.asarray(P.sum(1)).reshape(-1)
    if not (P.min() >= 0 and np.allclose(sums, 1, rtol=0, atol=1e-9)):
        raise ValueError(f"P must have entries >= 0 and rows that sum to 1, got least entry {P.min()}, sums {sums}")
    if (parts := csgraph.connected_components(sparse.csr_array(P), connection="strong")[0]) > 1:
        raise ValueError(f"P must be irreducible, got {parts} classes")
    if method == "solve":
        return _solve(P)
    law, transposed = np.full(P.shape[0], 1 / P.shape[0]), P.T.copy()
    for _ in range(max_iter):
        before, law = law, (law + transposed @ law) / 2
        if np.abs(law - before).max() <= tol:
            return law / law.sum()
    raise RuntimeError(f"the lazy chain has not converged to {tol} in {max_iter} steps; use method='solve'")


def _solve(P: Matrix) -> Array:
    """The stationary law of an irreducible chain."""
    m = P.shape[0]
    if m <= DENSE_LIMIT:
        system = (P.toarray() if sparse.issparse(P) else P).T - np.eye(m)
        system[-1] = 1.0
        law = np.linalg.solve(system, np.eye(m)[-1])
    else:  # the same with the first entry set to 1 and scaled afterwards: a row of ones would fill the factors
        system = sparse.csc_array(sparse.eye_array(m) - sparse.csr_array(P).T)
        factors = linalg.splu(system[1:, 1:], diag_pivot_thresh=0.0)  # an M-matrix: needs no pivoting
        rest = factors.solve(-system[1:, [0]].toarray().reshape(-1))
        law = np.concatenate([[1.0], rest])
    return law / law.sum()


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
    r"""Return node scores of subnetworks that are trained together, :math:`\mathrm{TAS}(v) = \sum_k \pi_{(k,v)}`.

    Args:
        adjs: T binary ``(n, n)`` matrices in topological order, node 0 the input.
        lam: coupling of the copies of a node, > 0; 0 only for T = 1 or ``method="per-block"``.
        closure: ``"cyclic"`` or ``"symmetric"``.
        method: ``"solve"``, ``"lazy"``, or ``"per-block"``: without coupling, every subnetwork with mass 1/T.

    Raises:
        ValueError: see :func:`hyper_adjacency`; ``"per-block"`` with a coupling.

    Reference: li2023tips, taylor2017eigenvector.

    >>> topological_scores([np.triu(np.ones((3, 3)), 1)], lam=0.0).tas  # visits 1, 1/2, 1
    array([0.4, 0.2, 0.4])
    """
    if method == "per-block":
        if lam != 0:
            raise ValueError(f"lam must be 0 with method='per-block', got {lam}")
        single = [topological_scores([a], 0.0, closure) for a in adjs]
        _, pi, present = map(np.concatenate, zip(*single, strict=True))
        return TopologicalScores(pi.sum(0) / len(adjs), pi / len(adjs), present)
    H, present = hyper_adjacency(adjs, lam, closure, sparse_output=None)
    P = transition_matrix(H, present)
    pi = np.zeros(present.shape)
    # Irreducible by construction: every node is on a path, the walk is closed, and all copies are coupled at the input.
    pi[present] = _solve(P) if method == "solve" else stationary_distribution(P, method)
    return TopologicalScores(pi.sum(0), pi, present)


def visit_probabilities(adjacency: Array) -> Array:
    r"""Return how probably ``(n,)`` the uniform walk from node 0 passes each node, :math:`N_v = \sum_u N_u / o_u`.

    Args:
        adjacency: binary ``(n, n)`` in topological order; pruned first.

    Raises:
        ValueError: see :func:`prune_to_terminals`.

    >>> visit_probabilities(np.triu(np.ones((4, 4)), 1))
    array([1.        , 0.33333333, 0.5       , 1.        ])
    """
    a = check_adjacency(adjacency).astype(float)
    visits, degree = np.zeros(len(a)), a.sum(1)
    visits[0] = 1.0
    for v in np.flatnonzero(degree):
        visits += visits[v] / degree[v] * a[v]
    return visits


def _check_scores(tas: Array, reduction: str, n: int | None = None) -> Array:
    """The node scores as an array, one finite number a node."""
    scores = np.asarray(tas, float)
    if scores.ndim != 1 or not np.isfinite(scores).all() or (n is not None and len(scores) != n):
        raise ValueError(f"tas must hold one finite score a node, got shape {scores.shape} for {n} nodes")
    check_choice("reduction", reduction, ("sum", "mean"))
    return scores


def path_score(tas: Array, path: Sequence[int], reduction: str = "sum") -> float:
    r"""Return the topological path score (TPS), the sum (or mean) of the node scores on a path.

    Args:
        tas: ``(n,)`` node scores.
        path: distinct node numbers.
        reduction: ``"sum"`` or ``"mean"``. With ``"sum"`` a path beats every path through a subset of its nodes, so
            the densest graph elects its longest path; ``"mean"`` removes that.

    Raises:
        ValueError: an empty path, a node out of range or twice, unknown ``reduction``.

    Reference: li2023tips.

    >>> path_score(np.array([0.4, 0.2, 0.4]), [0, 2], "mean")
    0.4
    """
    scores, nodes = _check_scores(tas, reduction), [int(v) for v in path]
    if not nodes or len(set(nodes)) < len(nodes) or not 0 <= min(nodes) <= max(nodes) < len(scores):
        raise ValueError(f"path must hold distinct nodes in 0..{len(scores) - 1}, got {nodes}")
    return float(scores[nodes].sum() if reduction == "sum" else scores[nodes].mean())


def most_important_path(adj: Array, tas: Array, reduction: str = "sum") -> list[int]:
    """Return the path from node 0 to the last node with the highest score; of equal ones the lexicographically first.

    By dynamic programming over the nodes in reverse order (for ``"mean"`` over nodes and lengths), never by
    enumeration. Scores within 1e-12 (relative to the largest) count as equal.

    Args:
        adj: binary ``(n, n)`` in topological order.
        tas: ``(n,)`` node scores; ``-tas`` finds the least important path.
        reduction: ``"sum"`` or ``"mean"``.

    Raises:
        ValueError: see :func:`prune_to_terminals`; scores that do not fit, unknown ``reduction``.

    Reference: li2023tips.

    >>> most_important_path(np.triu(np.ones((4, 4)), 1), [0.3, 0.1, 0.2, 0.4])
    [0, 1, 2, 3]
    >>> most_important_path(np.triu(np.ones((4, 4)), 1), [0.3, 0.1, 0.2, 0.4], "mean")
    [0, 3]
    """
    a = check_adjacency(adj)
    n, last = len(a), len(a) - 1
    scores = _check_scores(tas, reduction, n)
    slack = TIE * max(float(np.abs(scores).max()), np.finfo(float).tiny)
    following = [row.nonzero()[0] for row in a]
    # Best sum over the nodes from here to the end; for the mean, over exactly as many nodes as the column says.
    exact = reduction == "mean"
    ahead = np.full((n, n + 1) if exact else n, -np.inf)
    ahead[(last, 1) if exact else last] = scores[last]
    for v in range(last - 1, -1, -1):
        if len(following[v]) and exact:
            ahead[v, 1:] = scores[v] + ahead[following[v], :-1].max(0)
        elif len(following[v]):
            ahead[v] = scores[v] + ahead[following[v]].max()
    best = ahead[0, 1:] / np.arange(1, n + 1) if exact else ahead[:1]
    paths = []
    for length in np.flatnonzero(best >= best.max() - slack) + 1:
        path = [0]
        while path[-1] != last:
            options = following[path[-1]]
            values = ahead[options, length - len(path)] if exact else ahead[options]
            path.append(int(options[(values >= values.max() - slack).argmax()]))  # a solver's noise decides no tie
        paths.append(path)
    return min(paths)


def anchor_path(
    graph: SuperGraph, kind: str, *, tas: Array | None = None, reduction: str = "sum", rng: Rng | None = None
) -> list[int]:
    """Return the path that a sampler always trains: the important one, or a control.

    Args:
        graph: the supernet.
        kind: ``"tips"`` (highest score), ``"anti"`` (lowest score), ``"random"`` (uniform over all paths), ``"degree"``
            (most total degree) or ``"longest"`` (most nodes).
        tas: ``(n,)`` node scores for ``"tips"`` and ``"anti"``.
        reduction: of the path score.
        rng: generator or seed for ``"random"``.

    Raises:
        ValueError: unknown ``kind``, or ``tas`` or ``rng`` is missing.

    >>> anchor_path(SuperGraph(4, [(0, 1), (0, 2), (1, 2), (2, 3)]), "longest")
    [0, 1, 2, 3]
    """
    check_choice("kind", kind, ("tips", "anti", "random", "degree", "longest"))
    if kind == "random":
        if rng is None:
            raise ValueError("rng must be given for a random path, got None")
        return graph.random_path(rng)
    if kind in ("tips", "anti") and tas is None:
        raise ValueError(f"tas must be given for the {kind!r} path, got None")
    a = graph.adjacency
    if kind in ("degree", "longest"):
        return most_important_path(a, a.sum(0) + a.sum(1) if kind == "degree" else np.ones(graph.n))
    return most_important_path(a, np.asarray(tas, float) * (1 if kind == "tips" else -1), reduction)
