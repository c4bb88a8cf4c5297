"""Subnetworks that are trained together as one Markov chain: coupled, normalised, solved for its stationary law.

The abstract and one figure caption of the paper name the objects; their exact form here is a reconstruction along the
lines of supracentrality, which couples the layers of a temporal network in the same way.
"""

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph, linalg

from effnb.anytime.adjacency import check_adjacency, prune_to_terminals

Array = np.ndarray
Matrix = np.ndarray | sparse.csr_array
CLOSURES = ("cyclic", "symmetric")
DENSE_LIMIT = 500  # states; beyond, sparse LU beats the dense solve on all but complete graphs


def pruned_floats(adjs: Sequence[Array]) -> list[Array]:
    if len(adjs) == 0:
        raise ValueError("adjs must hold at least one adjacency matrix, got none")
    checked = [check_adjacency(a, f"adjs[{k}]") for k, a in enumerate(adjs)]
    if len({a.shape for a in checked}) > 1:
        raise ValueError(f"adjs must have one size, got {sorted({len(a) for a in checked})}")
    return [prune_to_terminals(a).astype(float) for a in checked]


def check_coupling(T: int, lam: float, closure: str) -> None:
    if closure not in CLOSURES:
        raise ValueError(f"closure must be one of {CLOSURES}, got {closure!r}")
    if not 0 <= lam < np.inf:
        raise ValueError(f"lam must be >= 0 and finite, got {lam}")
    if lam == 0 and T > 1:
        raise ValueError(f"lam must be > 0 for {T} subnetworks, got 0: the chain falls apart (method='per-block')")


def hyper_adjacency(
    adjs: Sequence[Array], lam: float, closure: str = "cyclic", *, sparse_output: bool = False
) -> tuple[Matrix, Array]:
    r"""Couple the subnetworks, :math:`H = \mathrm{blockdiag}(B_1..B_T) + \lambda [Z_{ij}]_{i \ne j}`.

    ``B_k`` closes the walk through subnetwork k: with ``"cyclic"`` it is ``A_k`` with an edge from the output back to
    the input, with ``"symmetric"`` it is ``A_k + A_k^T``. ``Z_ij`` is diagonal, 1 where a node is present in both.

    Args:
        adjs: T binary ``(n, n)`` matrices in topological order, node 0 the input; nodes off all paths are pruned.
        lam: coupling, > 0; 0 only for T = 1.
        closure: ``"cyclic"`` or ``"symmetric"``.
        sparse_output: return ``H`` as a ``scipy.sparse.csr_array``.

    Returns:
        ``H`` ``(T n, T n)``, state ``k n + v`` for node v of subnetwork k, with zero rows and columns for absent
        states, and ``present`` ``(T, n)``.

    Raises:
        ValueError: no matrix, sizes that differ, a matrix that is not square, binary, acyclic or ordered or has no
            path, ``lam`` out of range, unknown ``closure``.

    Reference: li2023tips, taylor2017eigenvector.

    >>> H, present = hyper_adjacency([np.triu(np.ones((3, 3)), 1)] * 2, lam=0.5)
    >>> H[0].tolist()  # the input: two operations and its copy in the other subnetwork
    [0.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    check_coupling(len(adjs), lam, closure)
    return couple(pruned_floats(adjs), lam, closure, sparse_output)


def couple(adjs: list[Array], lam: float, closure: str, as_sparse: bool) -> tuple[Matrix, Array]:
    T, n = len(adjs), len(adjs[0])
    present = np.array([a.any(0) | a.any(1) for a in adjs])
    blocks = [a + a.T if closure == "symmetric" else a for a in adjs]
    if closure == "cyclic":
        for block in blocks:
            block[-1, 0] = 1.0
    if as_sparse:
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
    """Drop the absent states of a hyper-adjacency matrix and divide every row by its sum.

    Args:
        H: ``(T n, T n)``, dense or sparse.
        present: ``(T, n)``.

    Returns:
        The row-stochastic matrix over the present states, in their order; dense or sparse as ``H``.

    Raises:
        ValueError: the size of ``present`` does not fit, or a present state has no way out.

    Reference: li2023tips.

    >>> transition_matrix(*hyper_adjacency([np.triu(np.ones((3, 3)), 1)], lam=0.0)).tolist()
    [[0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    keep = np.asarray(present, bool).reshape(-1)
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
    r"""The law that the chain keeps, :math:`\pi P = \pi`, :math:`\sum \pi = 1`.

    ``"solve"`` replaces one equation of the singular system by the sum (sparse LU beyond 500 states). ``"lazy"``
    iterates :math:`(I + P)/2`, which has the same law and no period; iterating ``P`` itself oscillates for a cyclic
    closure of a layered graph.

    Args:
        P: ``(m, m)`` row-stochastic and irreducible, dense or sparse.
        method: ``"solve"`` or ``"lazy"``.
        tol: the lazy iteration stops when no entry changes by more.
        max_iter: most steps of the lazy iteration.

    Returns:
        ``(m,)``, positive.

    Raises:
        ValueError: not square, negative entries, rows that do not sum to 1, a reducible chain, unknown ``method``.
        RuntimeError: the lazy iteration has not converged.

    Reference: li2023tips.

    >>> stationary_distribution(np.array([[0.0, 1.0], [1.0, 0.0]]))
    array([0.5, 0.5])
    """
    if method not in ("solve", "lazy"):
        raise ValueError(f"method must be 'solve' or 'lazy', got {method!r}")
    P = P if sparse.issparse(P) else np.asarray(P, float)
    if P.ndim != 2 or P.shape[0] != P.shape[1] or not P.shape[0]:
        raise ValueError(f"P must be a square matrix, got shape {P.shape}")
    sums = np.asarray(P.sum(1)).reshape(-1)
    if not (P.min() >= 0 and np.allclose(sums, 1, rtol=0, atol=1e-9)):
        raise ValueError(f"P must have entries >= 0 and rows that sum to 1, got least entry {P.min()}, sums {sums}")
    if (parts := csgraph.connected_components(sparse.csr_array(P), connection="strong")[0]) > 1:
        raise ValueError(f"P must be irreducible, got {parts} classes")
    return _lazy(P, tol, max_iter) if method == "lazy" else solve(P)


def solve(P: Matrix) -> Array:
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


def _lazy(P: Matrix, tol: float, max_iter: int) -> Array:
    law, transposed = np.full(P.shape[0], 1 / P.shape[0]), P.T.copy()
    for _ in range(max_iter):
        before, law = law, (law + transposed @ law) / 2
        if np.abs(law - before).max() <= tol:
            return law / law.sum()
    raise RuntimeError(f"the lazy chain has not converged to {tol} in {max_iter} steps; use method='solve'")
