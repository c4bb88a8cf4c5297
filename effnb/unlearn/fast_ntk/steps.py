"""The five ways to turn sufficient statistics into an unlearning step."""

from typing import NamedTuple

import torch
from torch import Tensor

from .sums import Sums


class Problem(NamedTuple):
    """Sums of all data, of what stays and of what goes, linearised at ``v``.

    ``pull`` is ``v - w0`` and ``shift`` is ``u - v``, where ``u`` are the weights that the step starts from.
    """

    all: Sums
    retain: Sums
    forget: Sums
    weight_decay: float
    pull: Tensor
    shift: Tensor
    downdated: bool


def gradient(sums: Sums, problem: Problem) -> Tensor:
    """``J^T r + N lam (v - w0)``: gradient of the summed objective at the linearisation point."""
    return sums.grad + sums.count * problem.weight_decay * problem.pull


def solve(sums: Sums, rhs: Tensor, problem: Problem, *, check: bool = False) -> Tensor:
    """``A^-1 rhs`` with ``A = G + N lam I``."""
    return sums.solve(rhs, sums.count * problem.weight_decay, check=check)


def linear_step(sums: Sums, problem: Problem, *, check: bool = False) -> Tensor:
    """``w_lin = -(G + N lam I)^-1 J^T r``, which takes the linearisation point for ``w0``; zero without samples."""
    if sums.count == 0:
        return torch.zeros_like(sums.grad)
    return -solve(sums, sums.grad, problem, check=check)


def step_of_all(form: str, problem: Problem) -> Tensor | None:
    """The part of a step that does not depend on the request, to be kept between requests."""
    if form == "golatkar":
        return linear_step(problem.all, problem)
    if form == "newton-diff":
        return -solve(problem.all, gradient(problem.all, problem), problem)
    return None


def delta(form: str, problem: Problem, of_all: Tensor | None) -> Tensor:
    """The step from ``u``, ``(P,)``.

    Under the quadratic model around ``v`` the gradient at ``u`` is ``g(v) + A (u - v)``; this is what makes each form
    exact for a linear model wherever it is linearised, and successive requests add up to the joint one.
    """
    retain, check = problem.retain, problem.downdated
    if form == "golatkar":
        return linear_step(retain, problem, check=check) - of_all
    if form == "influence":
        forget = problem.forget
        moved = forget.times(problem.shift) + forget.count * problem.weight_decay * problem.shift
        return solve(retain, gradient(forget, problem) + moved, problem, check=check)
    step = -solve(retain, gradient(retain, problem), problem, check=check)
    return step - problem.shift if form == "newton" else step - of_all


def trapezium(step: Tensor, displacement: Tensor, retained_step: Tensor) -> float:
    r"""The official heuristic for the length of a step, ``s = 1 + 2 |c| |e| / |delta|``.

    ``e = (w - w0) - w_lin(D_r)`` and ``c`` is the cosine of the angle between ``delta`` and ``e``.
    """
    error = displacement - retained_step
    length, size = torch.linalg.vector_norm(step), torch.linalg.vector_norm(error)
    if length == 0 or size == 0:
        return 1.0
    cosine = (step @ error / (length * size)).clamp(-1, 1)
    return float(1 + 2 * cosine.abs() * size / length)
