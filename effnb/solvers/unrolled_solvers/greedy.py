"""Solvers that choose a support: orthogonal matching pursuit, and the oracle that knows it."""

from __future__ import annotations

import torch
from torch import Tensor

from effnb.solvers.unrolled_solvers._check import check_batch, check_count, check_matrix


@torch.no_grad()
def omp(A: Tensor, b: Tensor, k: int, tol: float | None = None) -> Tensor:
    r"""Orthogonal matching pursuit of a batch: pick the atom nearest to the residual, refit, ``k`` times.

    A batched Gram-Schmidt basis of the chosen atoms is kept, so that an iteration costs one product with ``A``.

    Args:
        A: ``(m, n)`` with columns of length one.
        b: ``(batch, m)``.
        k: number of atoms, at most ``min(m, n)``.
        tol: an instance stops when its residual is below ``tol`` times ``b``'s norm; a few roundings by default.

    Returns:
        ``(batch, n)``.

    Raises:
        ValueError: for wrong shapes or ``k`` outside its range.

    Reference: pati1993orthogonal

    >>> omp(torch.eye(3), torch.tensor([[0.0, 2.0, 1.0]]), k=1).tolist()
    [[0.0, 2.0, 0.0]]
    """
    check_matrix(A)
    check_batch(b, A.shape[0])
    check_count(k, "k", 0, min(A.shape))
    m, n, batch = *A.shape, b.shape[0]
    eps = torch.finfo(b.dtype).eps
    limit = (10 * eps if tol is None else tol) * b.norm(dim=1)
    basis, R = b.new_zeros(batch, k, m), b.new_zeros(batch, k, k)
    chosen = torch.zeros(batch, k, dtype=torch.long, device=b.device)
    coefficients, residual = b.new_zeros(batch, k), b.clone()
    taken = torch.zeros(batch, n, dtype=torch.bool, device=b.device)
    for j in range(k):
        pick = (residual @ A).abs().masked_fill(taken, -1).argmax(1)
        atom = A.T[pick]
        first = torch.einsum("bkm,bm->bk", basis, atom)
        q = atom - torch.einsum("bkm,bk->bm", basis, first)
        second = torch.einsum("bkm,bm->bk", basis, q)  # once is not enough in floating point
        q = q - torch.einsum("bkm,bk->bm", basis, second)
        length = q.norm(dim=1)
        live = (residual.norm(dim=1) > limit) & (length > 100 * eps)
        q = torch.where(live[:, None], q / length.clamp_min(eps)[:, None], 0.0)
        R[:, :, j] = torch.where(live[:, None], first + second, 0.0)
        R[:, j, j] = torch.where(live, length, 1.0)
        basis[:, j], chosen[:, j] = q, pick
        taken |= torch.nn.functional.one_hot(pick, n).bool() & live[:, None]
        coefficients[:, j] = (q * residual).sum(1)
        residual = residual - coefficients[:, j, None] * q
    x = b.new_zeros(batch, n)
    values = torch.linalg.solve_triangular(R, coefficients.unsqueeze(2), upper=True).squeeze(2)
    return x.scatter_add_(1, chosen, values)


@torch.no_grad()
def support_least_squares(A: Tensor, b: Tensor, support: Tensor) -> Tensor:
    """Return the least-squares solution on a given support, what an oracle that knows the support would reach.

    Args:
        A: ``(m, n)``.
        b: ``(batch, m)``.
        support: boolean ``(batch, n)``.

    Returns:
        ``(batch, n)``, zero outside the support.

    Raises:
        ValueError: for wrong shapes.

    Reference: chen2021hyperparameter

    >>> support_least_squares(torch.eye(2), torch.tensor([[3.0, 4.0]]), torch.tensor([[True, False]])).tolist()
    [[3.0, 0.0]]
    """
    check_matrix(A)
    check_batch(b, A.shape[0])
    if support.dtype != torch.bool or support.shape != (b.shape[0], A.shape[1]):
        raise ValueError(f"support must be boolean ({b.shape[0]}, {A.shape[1]}), got {tuple(support.shape)}")
    x = b.new_zeros(support.shape)
    for row, columns in enumerate(support):
        x[row, columns] = torch.linalg.lstsq(A[:, columns], b[row, :, None]).solution.squeeze(1)
    return x
