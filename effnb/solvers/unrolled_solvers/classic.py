"""The classic iterations: ISTA, and FISTA with restart and continuation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effnb.solvers.unrolled_solvers._check import check_batch, check_choice, check_count, check_matrix, check_number
from effnb.solvers.unrolled_solvers.thresholds import soft

Callback = Callable[[int, Tensor], bool | None]


def lasso_objective(A: Tensor, b: Tensor, x: Tensor, lam: float) -> Tensor:
    r"""Return :math:`\tfrac12\|Ax-b\|^2 + \lambda\|x\|_1` of every instance.

    Args:
        A: ``(m, n)``.
        b: ``(batch, m)``.
        x: ``(batch, n)``.
        lam: weight of the l1 norm, >= 0.

    Returns:
        ``(batch,)``.

    Raises:
        ValueError: if ``lam`` is negative or a shape does not fit.

    Reference: beck2009fast

    >>> lasso_objective(torch.eye(2), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 0.5).tolist()
    [3.5]
    """
    check_matrix(A)
    check_batch(b, A.shape[0])
    check_batch(x, A.shape[1], "x")
    check_number(lam, "lam", 0)
    return (x @ A.T - b).square().sum(-1) / 2 + lam * x.abs().sum(-1)


def _start(A: Tensor, b: Tensor, lam: float, max_iter: int, x0: Tensor | None) -> tuple[Tensor, float]:
    """Check the arguments of a proximal iteration; return its start and the Lipschitz constant."""
    check_matrix(A)
    check_batch(b, A.shape[0])
    check_number(lam, "lam", 0)
    check_count(max_iter, "max_iter", 0)
    if x0 is not None:
        check_batch(x0, A.shape[1], "x0")
    lipschitz = float(torch.linalg.matrix_norm(A, 2)) ** 2
    if lipschitz == 0:
        raise ValueError("A must not be zero throughout")
    return (b.new_zeros(b.shape[0], A.shape[1]) if x0 is None else x0.clone()), lipschitz


def _gradient_step(A: Tensor, b: Tensor, step: float, gram: bool | Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return ``y -> y - step A^T(Ay - b)``; the Gram form is one product with an n x n matrix instead of two."""
    m, n = A.shape
    if gram is None:
        gram = n <= 2 * m
    if gram is False:
        At = A.T.contiguous()
        return lambda y: torch.addmm(y, torch.addmm(b, y, At, beta=-1), A, alpha=-step)
    G = A.T @ A if gram is True else gram
    if G.shape != (n, n):
        raise ValueError(f"gram must have shape ({n}, {n}), got {tuple(G.shape)}")
    forward = torch.eye(n, dtype=A.dtype, device=A.device) - step * G
    constant = step * (b @ A)
    return lambda y: torch.addmm(constant, y, forward)


@torch.no_grad()
def ista(
    A: Tensor,
    b: Tensor,
    lam: float,
    max_iter: int = 1000,
    *,
    gram: bool | Tensor | None = None,
    x0: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    r"""Minimise the lasso objective by :math:`x \leftarrow S_{\lambda/L}(x - A^T(Ax-b)/L)`, :math:`L=\|A\|_2^2`.

    Args:
        A: ``(m, n)``.
        b: ``(batch, m)``.
        lam: weight of the l1 norm, >= 0.
        max_iter: number of iterations.
        gram: use :math:`A^TA` (or a given one); ``None`` does when ``n <= 2 m``.
        x0: start ``(batch, n)``, zero by default.
        callback: called as ``callback(iteration, x)`` after each; a true value stops.

    Returns:
        ``(batch, n)``.

    Raises:
        ValueError: for a negative ``lam``, wrong shapes, or values that are not finite.

    Reference: beck2009fast

    >>> ista(torch.eye(2), torch.tensor([[3.0, 0.5]]), lam=1.0, max_iter=5).tolist()
    [[2.0, 0.0]]
    """
    x, lipschitz = _start(A, b, lam, max_iter, x0)
    step = _gradient_step(A, b, 1 / lipschitz, gram)
    for k in range(max_iter):
        x = torch.nn.functional.softshrink(step(x), lam / lipschitz)
        if callback is not None and callback(k + 1, x):
            break
    return x


@torch.no_grad()
def fista(
    A: Tensor,
    b: Tensor,
    lam: float,
    max_iter: int = 1000,
    *,
    restart: str | None = None,
    continuation: float | None = None,
    gram: bool | Tensor | None = None,
    x0: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    r"""Minimise the lasso objective by the accelerated proximal gradient method.

    Args:
        A: ``(m, n)``.
        b: ``(batch, m)``.
        lam: weight of the l1 norm, >= 0.
        max_iter: number of iterations.
        restart: ``"gradient"`` forgets the momentum of an instance when it points uphill.
        continuation: factor in (0, 1), the papers' 0.98: start at :math:`0.1\|A^Tb\|_\infty` and shrink to ``lam``.
        gram: use :math:`A^TA` (or a given one); ``None`` does when ``n <= 2 m``.
        x0: start ``(batch, n)``, zero by default.
        callback: called as ``callback(iteration, x)`` after each; a true value stops.

    Returns:
        ``(batch, n)``.

    Raises:
        ValueError: for a negative ``lam``, wrong shapes, an unknown ``restart`` or a factor outside (0, 1).

    Reference: beck2009fast

    >>> fista(torch.eye(2), torch.tensor([[3.0, 0.5]]), lam=1.0, max_iter=5, restart="gradient").tolist()
    [[2.0, 0.0]]
    """
    check_choice(restart, "restart", (None, "gradient"))
    if continuation is not None and not 0 < continuation < 1:
        raise ValueError(f"continuation must be in (0, 1), got {continuation}")
    x, lipschitz = _start(A, b, lam, max_iter, x0)
    step = _gradient_step(A, b, 1 / lipschitz, gram)
    weight = 0.1 * (b @ A).abs().amax(1, keepdim=True) if continuation is not None else None
    y, t = x, torch.ones(b.shape[0], 1, dtype=b.dtype, device=b.device)
    for k in range(max_iter):
        if weight is None:
            new = torch.nn.functional.softshrink(step(y), lam / lipschitz)
        else:
            weight = (weight * continuation).clamp_min(lam) if k else weight.clamp_min(lam)
            new = soft(step(y), weight / lipschitz)
        if restart is not None:
            uphill = ((y - new) * (new - x)).sum(1, keepdim=True) > 0
            t = torch.where(uphill, 1.0, t)
        t_new = (1 + torch.sqrt(1 + 4 * t * t)) / 2
        y, x, t = torch.lerp(x, new, 1 + (t - 1) / t_new), new, t_new
        if callback is not None and callback(k + 1, x):
            break
    return x
