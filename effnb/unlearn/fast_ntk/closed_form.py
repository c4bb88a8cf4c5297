"""The unlearning direction from Jacobians and residuals: primal, dual and block form; and what each costs."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_choice, check_number
from .linalg import ridge_solve

FORMS = ("auto", "primal", "dual", "block")


def _rows(jac: Tensor, residual: Tensor, name: str) -> tuple[Tensor, Tensor, int]:
    """Jacobian as float64 rows ``(n * K, P)``, residual as ``(n * K,)``, and ``n``."""
    if not isinstance(jac, Tensor) or not isinstance(residual, Tensor):
        raise TypeError(f"J_{name} and r_{name} must be tensors, got {type(jac).__name__}, {type(residual).__name__}")
    if jac.ndim not in (2, 3):
        raise ValueError(f"J_{name} must have shape (n, K, P), or (n, P) for one output, got {tuple(jac.shape)}")
    rows = jac.double().flatten(0, -2) if jac.ndim == 3 else jac.double()
    if residual.numel() != len(rows) or len(residual) not in (len(jac), len(rows)):
        raise ValueError(f"r_{name} must have one value a row of J_{name} ({len(rows)}), got {tuple(residual.shape)}")
    if not torch.isfinite(rows).all() or not torch.isfinite(residual).all():
        raise ValueError(f"J_{name} and r_{name} must be finite, got NaN or infinity")
    return rows, residual.double().reshape(-1), len(jac)


def _dual_step(rows: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """``w_lin = -J^T (J J^T + ridge I)^-1 r``."""
    return -(rows.T @ ridge_solve(rows @ rows.T, residual, ridge))


def _primal_difference(retain: tuple[Tensor, Tensor], forget: tuple[Tensor, Tensor], ridges: list[float]) -> Tensor:
    """Both steps on the other side of the push-through identity; the sums of ``D`` are those of its parts."""
    grams, grads = zip(*((rows.T @ rows, rows.T @ residual) for rows, residual in (retain, forget)), strict=True)
    after = ridge_solve(grams[0], grads[0], ridges[0])
    return ridge_solve(grams[0] + grams[1], grads[0] + grads[1], ridges[1]) - after


def _block_step(retain: tuple[Tensor, Tensor], forget: tuple[Tensor, Tensor], ridge: float) -> Tensor:
    """The projection form: ``P_r J_f^T S^-1 V`` with the Schur complement ``S`` of the retained block."""
    (jr, rr), (jf, rf) = retain, forget
    cross = jf @ jr.T
    solved = ridge_solve(jr @ jr.T, torch.cat([cross.T, rr[:, None]], dim=1), ridge)
    schur = jf @ jf.T - cross @ solved[:, :-1]
    v = rf - cross @ solved[:, -1]
    u = ridge_solve((schur + schur.T) / 2, v, ridge)
    return jf.T @ u - jr.T @ (solved[:, :-1] @ u)


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
    r"""Unlearning direction :math:`\delta = w_{lin}(D_r) - w_{lin}(D)` with
    :math:`w_{lin} = -J^\top (J J^\top + n\lambda I)^{-1} r`.

    ``n`` counts samples, not samples times outputs, so the ridge of ``D`` is larger than that of ``D_r``. All forms
    solve in float64. With ``weight_decay=0`` each step is the minimum-norm one (eigenvalues below 1e-10 of the
    largest count as zero).

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

    Returns:
        ``(P,)``, float64; exactly zero if there is nothing to forget.

    Raises:
        TypeError: a Jacobian or residual that is no tensor.
        ValueError: shapes that do not fit, both sets empty, values that are not finite, ``weight_decay`` < 0, or an
            unknown form.

    Reference: golatkar2020forgetting, li2023fastntk

    >>> jac, res = torch.eye(2).view(2, 1, 2), torch.tensor([[1.0], [1.0]])
    >>> ntk_delta(jac[:1], res[:1], jac[1:], res[1:], weight_decay=0.5)  # the second weight returns
    tensor([-0.1667,  0.5000], dtype=torch.float64)
    """
    check_choice("form", form, FORMS)
    lam = check_number("weight_decay", weight_decay)
    jr, rr, n_r = _rows(J_retain, r_retain, "retain")
    jf, rf, n_f = _rows(J_forget, r_forget, "forget")
    if jr.shape[1] != jf.shape[1] or J_retain.shape[1:] != J_forget.shape[1:]:
        raise ValueError(f"J_forget must match J_retain, got {tuple(J_forget.shape)} and {tuple(J_retain.shape)}")
    if n_r + n_f == 0:
        raise ValueError("J_retain and J_forget must not both be empty")
    common = None if ridge is None else check_number("ridge", ridge)
    if n_f == 0:
        return jr.new_zeros(jr.shape[1])
    if form == "block":
        return _block_step((jr, rr), (jf, rf), (n_r + n_f) * lam if common is None else common)
    if form == "auto":
        form = "primal" if jr.shape[1] <= len(jr) + len(jf) else "dual"
    ridges = [n_r * lam, (n_r + n_f) * lam] if common is None else [common, common]
    if form == "primal":
        return _primal_difference((jr, rr), (jf, rf), ridges)
    return _dual_step(jr, rr, ridges[0]) - _dual_step(torch.cat([jr, jf]), torch.cat([rr, rf]), ridges[1])


class SolveCost(NamedTuple):
    """Multiply-adds of one solve, bytes of its system matrix (float64) and of the Jacobian (float32).

    Reference: li2023fastntk
    """

    macs: int
    matrix_bytes: int
    jacobian_bytes: int


def solve_cost(samples: int, outputs: int, parameters: int, form: str = "primal") -> SolveCost:
    """What one linear step costs, counted: ``NK P^2 + P^3 / 3`` (primal), ``(NK)^2 P + (NK)^3 / 3`` (dual).

    Args:
        samples: ``N`` >= 1.
        outputs: ``K`` >= 1.
        parameters: ``P`` >= 1.
        form: ``"primal"`` or ``"dual"``.

    Returns:
        Multiply-adds of forming and factorising the system, and bytes.

    Raises:
        ValueError: a count below 1, or an unknown form.

    Reference: li2023fastntk

    >>> round(solve_cost(5000, 10, 506, "dual").macs / solve_cost(5000, 10, 506).macs, -2)
    3300.0
    """
    check_choice("form", form, ("primal", "dual"))
    if min(samples, outputs, parameters) < 1:
        raise ValueError(f"samples, outputs and parameters must be >= 1, got {samples}, {outputs}, {parameters}")
    rows = samples * outputs
    small, large = (parameters, rows) if form == "primal" else (rows, parameters)
    return SolveCost(large * small**2 + small**3 // 3, 8 * small**2, 4 * rows * parameters)
