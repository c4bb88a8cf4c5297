"""The idealised chain: Frank-Wolfe over a nuclear-norm ball, and greedy fitting of the residual."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class FrankWolfeResult(NamedTuple):
    """Iterates' summary of :func:`frank_wolfe_low_rank`.

    Attributes: ``D``, the last iterate; ``gaps``, the dual gap ``<g, D_k - V_k>`` before each step, an upper bound of
    the primal gap for convex f; ``step_sizes``; ``iterates``, ``D_0`` to ``D_steps``.
    """

    D: Tensor
    gaps: list[float]
    step_sizes: list[float]
    iterates: list[Tensor]


def frank_wolfe_low_rank(
    grad_fn: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    tau: float,
    steps: int,
    line_search: str | Callable[[Tensor, Tensor, Tensor], float] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> FrankWolfeResult:
    r"""Minimise f over the matrices of nuclear norm at most ``tau`` by steps of rank one.

    From :math:`D_0 = 0`: :math:`V_k = -\tau u_1 v_1^\top` with the leading singular pair of the gradient,
    :math:`D_{k+1} = (1 - \gamma_k) D_k + \gamma_k V_k`, :math:`\gamma_k = 2 / (k + 2)`. A link of a chain approximates
    one such step. For convex f with an L-Lipschitz gradient the primal gap after k steps is at most
    :math:`2 L (2\tau)^2 / (k + 2)`, and the rank of :math:`D_k` at most k.

    Args:
        grad_fn: gradient of f at ``D``, of the shape of ``D``.
        shape: ``(rows, columns)``.
        tau: radius of the ball, > 0.
        steps: number of steps, >= 1.
        line_search: ``None`` for 2/(k+2), ``"quadratic"`` for the exact minimiser along the segment of a quadratic f
            (one gradient more), or ``line_search(D, V, gradient)`` that returns the step.
        dtype: of the iterates.

    Raises:
        ValueError: a shape, radius or number of steps outside its range, an unknown line search, a gradient of another
            shape or with NaN or Inf, a step outside [0, 1].

    Reference: jaggi2013revisiting

    >>> target = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    >>> result = frank_wolfe_low_rank(lambda D: D - target, (2, 2), tau=3.0, steps=200)
    >>> bool((result.D - target).norm() < 0.1)
    True
    """
    if len(shape) != 2 or min(shape) < 1 or steps < 1 or not 0 < tau < float("inf"):
        raise ValueError(f"shape, steps and tau must be positive, got {shape}, {steps} and {tau}")
    if not (line_search is None or line_search == "quadratic" or callable(line_search)):
        raise ValueError(f"line_search must be None, 'quadratic' or a function, got {line_search!r}")
    D = torch.zeros(shape, dtype=dtype)
    gaps, sizes, iterates = [], [], [D]
    for k in range(steps):
        gradient = grad_fn(D)
        if gradient.shape != D.shape or not torch.isfinite(gradient).all():
            raise ValueError(f"grad_fn must return a finite {tuple(D.shape)} matrix, got {tuple(gradient.shape)}")
        gradient = gradient.detach()
        V = -tau * leading_pair(gradient)[1]
        gap = ((D - V) * gradient).sum().item()
        if line_search is None:
            gamma = 2 / (k + 2)
        elif line_search == "quadratic":
            curvature = ((V - D) * (grad_fn(V) - gradient)).sum().item()
            gamma = min(1.0, gap / curvature) if curvature > 0 else 1.0
            gamma = gamma if gap > 0 else 0.0
        else:
            gamma = float(line_search(D, V, gradient))
            if not 0 <= gamma <= 1:
                raise ValueError(f"line_search must return a step in [0, 1], got {gamma}")
        D = (1 - gamma) * D + gamma * V
        gaps.append(gap)
        sizes.append(gamma)
        iterates.append(D)
    return FrankWolfeResult(D, gaps, sizes, iterates)


def leading_pair(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The largest singular value and the matrix ``u_1 v_1^T`` of its pair."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return S[0], torch.outer(U[:, 0], Vh[0])


def greedy_rank_one(target: Tensor, steps: int) -> list[Tensor]:
    r"""Fit a matrix by adding the best rank-one matrix to what is left: a chain whose links are solved exactly.

    Step k adds :math:`\sigma_1 u_1 v_1^\top` of the residual; after k steps the fit is the truncated singular value
    decomposition, with squared error :math:`\sum_{i > k} \sigma_i^2`.

    Args:
        target: ``(rows, columns)``.
        steps: number of rank-one matrices, >= 1.

    Returns:
        The fits after 0, 1, ..., ``steps`` steps.

    Raises:
        ValueError: ``target`` is no finite matrix, or ``steps`` is below 1.

    Reference: eckart1936approximation

    >>> fits = greedy_rank_one(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    >>> [round(float((torch.diag(torch.tensor([3.0, 2.0, 1.0])) - D).square().sum()), 4) for D in fits]
    [14.0, 5.0, 1.0]
    """
    if target.dim() != 2 or not torch.isfinite(target).all() or steps < 1:
        raise ValueError(f"target must be a finite matrix and steps >= 1, got shape {tuple(target.shape)} and {steps}")
    fits = [torch.zeros_like(target)]
    for _ in range(steps):
        value, pair = leading_pair(target - fits[-1])
        fits.append(fits[-1] + value * pair)
    return fits
