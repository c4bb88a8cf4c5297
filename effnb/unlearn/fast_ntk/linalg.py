"""Solves with a ridge: Cholesky in float64, and the minimum-norm solution where there is no ridge."""

import torch
from torch import Tensor

RCOND = 1e-10


class NotPositive(ValueError):
    """The matrix is not positive definite, though it should be."""


def ridge_solve(matrix: Tensor, rhs: Tensor, ridge: float) -> Tensor:
    """``(matrix + ridge * I)^-1 rhs`` for a positive semi-definite matrix; minimum-norm if ``ridge`` is 0."""
    if not len(matrix):
        return rhs.clone()
    columns = rhs.unsqueeze(1) if rhs.ndim == 1 else rhs
    if ridge == 0:
        found = torch.linalg.pinv(matrix, rtol=RCOND, hermitian=True) @ columns
    else:
        shifted = matrix.clone()
        shifted.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if info.any():
            raise NotPositive(f"matrix + {ridge:g} I must be positive definite, Cholesky failed")
        found = torch.cholesky_solve(columns, factor)
    return found.view_as(rhs)


def check_semidefinite(matrix: Tensor, ridge: float, eps: float = 0.0) -> None:
    """Raise unless the smallest eigenvalue of ``matrix + ridge * I`` is at least ``ridge * (1 - 1e-8)``.

    A Cholesky factorisation of the matrix shifted by ``1e-8 * ridge`` decides it, at a fraction of the cost of the
    eigenvalues; ``P * eps64 * |matrix|`` allows for the rounding of the sums themselves. ``eps`` is that of the
    Jacobians: a float32 network rounds differently in batches of another size, so that the difference of the sums
    may have an eigenvalue of ``-eps * |matrix|``. That is let pass where it changes the ridge by at most 1 %.
    """
    size = float(torch.linalg.matrix_norm(matrix))
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps * size
    shifted = matrix.clone()
    allowed = max(rounding, torch.finfo(matrix.dtype).tiny, min(eps * size, 0.01 * ridge))
    shifted.diagonal().add_(1e-8 * ridge + allowed)
    if torch.linalg.cholesky_ex(shifted)[1].any():
        raise NotPositive("the retained sums have a negative eigenvalue")
