"""The unlearning direction by linear algebra: solves with a ridge, sums of samples that add up, and what each costs."""

from typing import NamedTuple

import torch
from torch import Tensor

from effnb.common import check_choice, check_count, check_number, kind

__all__ = ["SolveCost", "ntk_delta", "solve_cost"]

RCOND = 1e-10


class NotPositive(ValueError):
    """The matrix is not positive definite, though it should be."""


def ridge_solve(matrix: Tensor, rhs: Tensor, ridge: float) -> Tensor:
    """Return ``(matrix + ridge * I)^-1 rhs`` for a positive semi-definite matrix; minimum-norm if ``ridge`` is 0."""
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

    A Cholesky factorisation of the matrix shifted by ``1e-8 * ridge`` decides it, far cheaper than the eigenvalues;
    ``P * eps64 * |matrix|`` allows for the rounding of the sums themselves. ``eps`` is that of the Jacobians: a float32
    network rounds differently in batches of another size, so that the difference of the sums may have an eigenvalue of
    ``-eps * |matrix|``. That is let pass where it changes the ridge by at most 1 %.
    """
    size, limits = float(torch.linalg.matrix_norm(matrix)), torch.finfo(matrix.dtype)
    allowed = max(len(matrix) * limits.eps * size, limits.tiny, min(eps * size, 0.01 * ridge))
    shifted = matrix.clone()
    shifted.diagonal().add_(1e-8 * ridge + allowed)
    if torch.linalg.cholesky_ex(shifted)[1].any():
        raise NotPositive("the retained sums have a negative eigenvalue")


class Sums:
    r"""``G = sum_i J_i^T H_i J_i``, ``b = J^T r`` and ``N`` of the samples seen so far.

    While there are fewer Jacobian rows than parameters the rows are kept and systems are solved on their side (dual);
    from then on only the ``P x P`` matrix is (primal). Both are exact, and nothing of size ``NK x NK`` outlives the
    point where it would be the larger one.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> None:
        self.rows = torch.zeros(0, size, dtype=dtype, device=device)
        self.signs = torch.zeros(0, dtype=dtype, device=device)  # -1 for rows that have been taken away again
        self.gram: Tensor | None = None
        self.grad = torch.zeros(size, dtype=dtype, device=device)
        self.count = 0
        self.eps = 0.0  # of the coarsest Jacobians that were added

    @property
    def is_dual(self) -> bool:
        """Whether rows are kept instead of their product."""
        return self.gram is None

    def add(self, rows: Tensor, grad: Tensor, count: int) -> None:
        """Add ``count`` samples with weighted Jacobian rows ``(m, P)`` and gradient ``(P,)``."""
        rows = rows.to(self.grad)
        self.grad += grad
        self.count += count
        if self.is_dual and len(self.rows) + len(rows) <= len(self.grad):
            self.rows = torch.cat([self.rows, rows])
            self.signs = torch.cat([self.signs, self.signs.new_ones(len(rows))])
            return
        if self.is_dual:
            self.gram, self.rows, self.signs = self.dense(), self.rows[:0], self.signs[:0]
        self.gram.addmm_(rows.T, rows)

    def dense(self) -> Tensor:
        """Return the curvature ``(P, P)``."""
        return (self.rows.T * self.signs) @ self.rows if self.gram is None else self.gram

    def times(self, vector: Tensor) -> Tensor:
        """Return the curvature times a vector."""
        return self.rows.T @ (self.signs * (self.rows @ vector)) if self.gram is None else self.gram @ vector

    def plus(self, other: "Sums", sign: int = 1) -> "Sums":
        """Return the sums of both sets, or with ``sign=-1`` of what is not in ``other``; neither operand changes."""
        made = Sums(len(self.grad), self.grad.dtype, self.grad.device)
        made.grad, made.count = self.grad + sign * other.grad, self.count + sign * other.count
        made.eps = max(self.eps, other.eps)
        if self.is_dual and other.is_dual:
            made.rows = torch.cat([self.rows, other.rows])
            made.signs = torch.cat([self.signs, sign * other.signs])
        elif sign < 0 and other.is_dual:  # the usual request: no second P x P matrix for its few rows
            made.gram = torch.addmm(self.gram, other.rows.T * other.signs, other.rows, alpha=-1)
        else:
            made.gram = torch.add(self.dense(), other.dense(), alpha=sign)
        return made

    def solve(self, rhs: Tensor, ridge: float, *, check: bool = False) -> Tensor:
        """Return ``(G + ridge * I)^-1 rhs``; ``check`` first makes sure that ``G`` has no negative eigenvalue.

        Raises:
            NotPositive: the sums do not belong together (samples taken away that were never added), or cancellation.
        """
        if not self.is_dual:
            if check:
                check_semidefinite(self.gram, ridge, self.eps)
            return ridge_solve(self.gram, rhs, ridge)
        if ridge > 0 and bool((self.signs > 0).all()):
            inner = ridge_solve(self.rows @ self.rows.T, self.rows @ rhs, ridge)
            return (rhs - self.rows.T @ inner) / ridge
        # Negative rows, or no ridge: J J^T would not do, so solve in an orthonormal basis of the rows.
        basis, corner = torch.linalg.qr(self.rows.T)
        matrix = (corner * self.signs) @ corner.T
        if check:
            check_semidefinite(matrix, ridge, self.eps)
        inside = basis.T @ rhs
        found = basis @ ridge_solve(matrix, inside, ridge)
        return found if ridge == 0 else found + (rhs - basis @ inside) / ridge


def _rows(jac: Tensor, residual: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return a checked Jacobian as float64 rows ``(n * K, P)`` and its residual as ``(n * K,)``."""
    if not isinstance(jac, Tensor) or not isinstance(residual, Tensor):
        raise TypeError(f"J_{name} and r_{name} must be tensors, got {type(jac).__name__}, {type(residual).__name__}")
    if jac.ndim not in (2, 3):
        raise ValueError(f"J_{name} must have shape (n, K, P), or (n, P) for one output, got {kind(jac)}")
    rows = jac.double().flatten(0, -2)
    if residual.numel() != len(rows) or len(residual) not in (len(jac), len(rows)):
        raise ValueError(f"r_{name} must have one value a row of J_{name} ({len(rows)}), got {kind(residual)}")
    if not torch.isfinite(rows).all() or not torch.isfinite(residual).all():
        raise ValueError(f"J_{name} and r_{name} must be finite, got NaN or infinity")
    return rows, residual.double().reshape(-1)


def ntk_delta(
    J_retain: Tensor,
    r_retain: Tensor,
    J_forget: Tensor,
    r_forget: Tensor,
    weight_decay: float,
    form: str = "auto",
    *,
    ridge: float | None = None,
) -> Tensor:
    r"""Return the unlearning direction :math:`\delta = w_{lin}(D_r) - w_{lin}(D)`, ``(P,)``, with
    :math:`w_{lin} = -J^\top (J J^\top + n\lambda I)^{-1} r`.

    ``n`` counts samples, not samples times outputs, so the ridge of ``D`` is larger than that of ``D_r``. All forms
    solve in float64. With ``weight_decay=0`` each step is the minimum-norm one (eigenvalues below 1e-10 of the
    largest count as zero). The direction is exactly zero if there is nothing to forget.

    Args:
        J_retain: Jacobian of the retained samples, ``(n_r, K, P)``; ``(n_r, P)`` for one output.
        r_retain: residuals ``(n_r, K)``: outputs minus targets (mse), or softmax minus one-hot (ce).
        J_forget: Jacobian of the samples to forget, ``(n_f, K, P)``.
        r_forget: their residuals ``(n_f, K)``.
        weight_decay: ``lam`` of the objective, mean loss + ``lam / 2 |w - w0|^2``, >= 0.
        form: ``"primal"`` (a ``P x P`` system), ``"dual"`` (``nK x nK``, the official one), ``"auto"`` (the smaller of
            the two), or ``"block"`` (the projection form, which uses one ridge for both sets).
        ridge: one ridge for both sets instead of ``n * weight_decay``; ``"block"`` uses ``(n_r + n_f) * weight_decay``
            if it is not given.

    Raises:
        TypeError: a Jacobian or residual that is no tensor, or a number that is none.
        ValueError: shapes that do not fit, both sets empty, values not finite, a ridge < 0, or an unknown form.

    Reference: golatkar2020forgetting, li2023fastntk

    >>> jac, res = torch.eye(2).view(2, 1, 2), torch.tensor([[1.0], [1.0]])
    >>> ntk_delta(jac[:1], res[:1], jac[1:], res[1:], weight_decay=0.5)  # the second weight returns
    tensor([-0.1667,  0.5000], dtype=torch.float64)
    """
    check_choice("form", form, ("auto", "primal", "dual", "block"))
    check_number("weight_decay", weight_decay, ge=0)
    (jr, rr), (jf, rf) = _rows(J_retain, r_retain, "retain"), _rows(J_forget, r_forget, "forget")
    if J_retain.shape[1:] != J_forget.shape[1:]:
        raise ValueError(f"J_forget must match J_retain, got {kind(J_forget)} and {kind(J_retain)}")
    n_r, n = len(J_retain), len(J_retain) + len(J_forget)
    if n == 0:
        raise ValueError("J_retain and J_forget must not both be empty")
    if ridge is not None:
        check_number("ridge", ridge, ge=0)
    ridge_r, ridge_all = (m * float(weight_decay) if ridge is None else float(ridge) for m in (n_r, n))
    if n == n_r:
        return jr.new_zeros(jr.shape[1])

    if form == "block":  # P_r J_f^T S^-1 V, with the Schur complement S of the retained block
        cross = jf @ jr.T
        solved = ridge_solve(jr @ jr.T, torch.cat([cross.T, rr[:, None]], dim=1), ridge_all)
        schur = jf @ jf.T - cross @ solved[:, :-1]
        # The sign of V is that of r = f - t; printed with targets, its first term often has the wrong one.
        v = rf - cross @ solved[:, -1]
        u = ridge_solve((schur + schur.T) / 2, v, ridge_all)
        return jf.T @ u - jr.T @ (solved[:, :-1] @ u)
    if form == "primal" or (form == "auto" and jr.shape[1] <= len(jr) + len(jf)):
        # J^T (J J^T + mu I)^-1 = (J^T J + mu I)^-1 J^T, and the sums of D are those of its parts.
        gram_r, grad_r = jr.T @ jr, jr.T @ rr
        of_all = ridge_solve(gram_r + jf.T @ jf, grad_r + jf.T @ rf, ridge_all)
        return of_all - ridge_solve(gram_r, grad_r, ridge_r)
    j, r = torch.cat([jr, jf]), torch.cat([rr, rf])
    return j.T @ ridge_solve(j @ j.T, r, ridge_all) - jr.T @ ridge_solve(jr @ jr.T, rr, ridge_r)


class SolveCost(NamedTuple):
    """Multiply-adds of one solve, bytes of its system matrix (float64) and of the Jacobian (float32)."""

    macs: int
    matrix_bytes: int
    jacobian_bytes: int


def solve_cost(samples: int, outputs: int, parameters: int, form: str = "primal") -> SolveCost:
    """Return the cost to form and factorise a system: ``NK P^2 + P^3 / 3`` (primal), ``(NK)^2 P + (NK)^3 / 3`` (dual).

    Args:
        samples, outputs, parameters: ``N``, ``K`` and ``P``, >= 1.
        form: ``"primal"`` or ``"dual"``.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a count below 1, or an unknown form.

    >>> round(solve_cost(5000, 10, 506, "dual").macs / solve_cost(5000, 10, 506).macs, -2)
    3300.0
    """
    check_choice("form", form, ("primal", "dual"))
    for name, count in (("samples", samples), ("outputs", outputs), ("parameters", parameters)):
        check_count(name, count)
    rows = samples * outputs
    small, large = (parameters, rows) if form == "primal" else (rows, parameters)
    return SolveCost(large * small**2 + small**3 // 3, 8 * small**2, 4 * rows * parameters)
