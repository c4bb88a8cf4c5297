"""Weights of a layer computed from the dictionary alone, in closed form."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from effnb.solvers.unrolled_solvers._check import check_choice, check_full_row_rank, check_matrix, check_unit_columns


def mutual_coherence(A: Tensor, W: Tensor | None = None) -> float:
    r"""Return the largest off-diagonal entry of :math:`|W^T A|` (of :math:`|A^T A|` without ``W``).

    Args:
        A: ``(m, n)``.
        W: ``(m, n)`` or ``None``.

    Raises:
        ValueError: if ``A`` is not a matrix or ``W`` has another shape.

    Reference: liu2019alista

    >>> mutual_coherence(torch.eye(3))
    0.0
    """
    check_matrix(A)
    W = A if W is None else W
    if W.shape != A.shape:
        raise ValueError(f"W must have the shape of A {tuple(A.shape)}, got {tuple(W.shape)}")
    cross = (W.T @ A).abs()
    return float(cross.fill_diagonal_(0).max())


def _closed_form(A: Tensor) -> Tensor:
    """Column by column ``H^-1 a / (a^T H^-1 a)`` with ``H = A A^T``."""
    P = torch.cholesky_solve(A, torch.linalg.cholesky(A @ A.T))
    return P / (A * P).sum(0)


def _projected_gradient(A: Tensor, step: float, steps: int) -> Tensor:
    """Official iteration: gradient of ``||W^T A - I||^2``, then back to ``w_j^T a_j = 1``."""
    W, eye = A.clone(), torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    for _ in range(steps):
        W = W - step * (A @ (A.T @ W - eye))
        W = W + (1 - (A * W).sum(0)) * A
    return W


def _to_cone(N: Tensor) -> Tensor:
    """Project a symmetric matrix onto the positive semidefinite cone."""
    values, vectors = torch.linalg.eigh(N)
    return (vectors * values.clamp_min(0)) @ vectors.T


def _symmetric_weights(A: Tensor, projections: int | None) -> Tensor:
    r"""Minimise :math:`\|A^T M A - I\|^2` over :math:`M\succeq0` with unit :math:`a_j^T M a_j`; return ``M A``.

    With ``V = H^-1/2 A`` and ``N = H^1/2 M H^1/2`` the objective is ``||N - I||^2`` up to a constant: ``N`` is the
    projection of the identity onto an affine set (closed form) and the cone (needed only if the first leaves it).
    """
    m, n = A.shape
    if n > m * (m + 1) // 2:
        raise ValueError(f"symmetric weights need n <= m(m+1)/2 = {m * (m + 1) // 2}, got n = {n}; use symmetric=False")
    values, vectors = torch.linalg.eigh(A @ A.T)
    V = (vectors * values.rsqrt()) @ (vectors.T @ A)
    solver = torch.linalg.lu_factor((V.T @ V).square())

    def to_affine(N: Tensor) -> Tensor:
        gap = 1 - (V * (N @ V)).sum(0)
        return N + (V * torch.linalg.lu_solve(*solver, gap.unsqueeze(1)).T) @ V.T

    N = to_affine(torch.eye(m, dtype=A.dtype, device=A.device))
    if projections is None and torch.linalg.eigvalsh(N)[0] < -1e-10:
        warnings.warn("closed form is not positive semidefinite; using projected iterations", stacklevel=3)
        projections = 500
    correction = torch.zeros_like(N)
    for _ in range(projections or 0):  # Dykstra: the affine set needs no correction of its own
        cone = _to_cone(N + correction)
        correction = N + correction - cone
        N = to_affine(cone)
    return (vectors * values.rsqrt()) @ (vectors.T @ (N @ V))


def analytic_weights(
    A: Tensor, symmetric: bool = False, method: str = "closed", *, step: float = 0.01, steps: int = 2000
) -> Tensor:
    r"""Return the weights that make :math:`W^T A` as close to the identity as its unit diagonal allows.

    :math:`\min_W \|W^T A\|_F^2` subject to :math:`w_j^T a_j = 1`, solved by
    :math:`w_j = H^{-1}a_j / (a_j^T H^{-1}a_j)` with :math:`H = AA^T`. The symmetric version asks for :math:`W = MA`
    with :math:`M \succeq 0`: with :math:`P=H^{-1}A` and the projection :math:`K=A^TP`, solve
    :math:`(K\circ K)\nu = 1` and take :math:`M = P\,\mathrm{diag}(\nu)P^T`. Both are computed in float64.

    Args:
        A: ``(m, n)``, columns of length one, rows independent.
        symmetric: make :math:`W^T A` symmetric (HyperLISTA).
        method: ``"closed"``, or ``"pgd"``: the official projected gradient iteration (for symmetric weights,
            alternating projections onto the constraint and the cone), kept as a reference.
        step: step size of the projected gradient.
        steps: number of iterations of ``"pgd"``.

    Returns:
        ``W (m, n)`` with a unit diagonal of ``W^T A``, in the dtype of ``A``.

    Raises:
        ValueError: if ``A`` is not 2-D, has columns of other lengths, is rank-deficient (names the condition number),
            or ``symmetric`` with more than m(m+1)/2 columns.

    Reference: liu2019alista

    >>> A = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64), dim=0)
    >>> W = analytic_weights(A)
    >>> torch.allclose((W * A).sum(0), torch.ones(8, dtype=torch.float64))
    True
    """
    check_matrix(A)
    check_choice(method, "method", ("closed", "pgd"))
    check_unit_columns(A)
    check_full_row_rank(A)
    wide = A.detach().double()
    if symmetric:
        W = _symmetric_weights(wide, steps if method == "pgd" else None)
    else:
        W = _closed_form(wide) if method == "closed" else _projected_gradient(wide, step, steps)
    return W.to(A.dtype)
