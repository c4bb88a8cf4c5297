"""Conjugate gradients on a support that has settled, instance by instance."""

from __future__ import annotations

import torch
from torch import Tensor


class FrozenSupport:
    """Per-instance switch from an iteration to conjugate gradients for the least squares on its support.

    An instance is frozen once its support stood still for ``patience`` layers, and re-opened when its residual stops
    falling above the rounding level: then the support was wrong.

    Args:
        A: ``(m, n)``.
        b: ``(batch, m)``.
        patience: layers without a change of the support.
        stall: re-open when a step leaves more than this fraction of the residual.

    Reference: chen2021hyperparameter

    >>> FrozenSupport(torch.eye(2), torch.ones(1, 2)).frozen.tolist()
    [False]
    """

    def __init__(self, A: Tensor, b: Tensor, patience: int = 2, stall: float = 0.95):
        self.A, self.b, self.patience, self.stall = A, b, patience, stall
        batch = b.shape[0]
        self.frozen = torch.zeros(batch, dtype=torch.bool, device=b.device)
        self.unchanged = torch.zeros(batch, dtype=torch.long, device=b.device)
        self.support = b.new_zeros(batch, A.shape[1])
        self.residual, self.direction = torch.zeros_like(b), torch.zeros_like(self.support)
        self.floor = 100 * torch.finfo(b.dtype).eps * b.norm(dim=1)

    def advance(self, x: Tensor, proposal: Tensor, may_freeze: bool) -> Tensor:
        """Return the next iterate: a conjugate gradient step where frozen, the ``proposal`` elsewhere."""
        new = torch.where(self.frozen[:, None], self._step(x), proposal)
        same = ((new != 0) == (x != 0)).all(1)
        self.unchanged = torch.where(same | self.frozen, self.unchanged + 1, 0)
        if may_freeze:
            self._freeze(new, ~self.frozen & (self.unchanged >= self.patience))
        return new

    def _step(self, x: Tensor) -> Tensor:
        """One CGLS step of every instance; an instance that is not frozen has the direction 0 and stays."""
        power = self._slope().square().sum(1)
        image = self.direction @ self.A.T
        length = (power / image.square().sum(1)).nan_to_num(0.0, 0.0, 0.0)[:, None]
        before = self.residual.norm(dim=1)
        self.residual = self.residual - length * image
        slope = self._slope()
        keep = (slope.square().sum(1) / power).nan_to_num(0.0, 0.0, 0.0)[:, None]
        moved = x + length * self.direction
        self.direction = slope + keep * self.direction
        after = self.residual.norm(dim=1)
        reopen = self.frozen & (after > self.stall * before) & (after > self.floor)
        self.frozen = self.frozen & ~reopen
        self.unchanged = torch.where(reopen, 0, self.unchanged)
        self.direction = torch.where(reopen[:, None], 0.0, self.direction)
        return torch.where(reopen[:, None], x, moved)

    def _slope(self) -> Tensor:
        return (self.residual @ self.A) * self.support

    def _freeze(self, x: Tensor, rows: Tensor) -> None:
        """Fix the support of ``rows`` and start conjugate gradients from steepest descent."""
        self.support = torch.where(rows[:, None], (x != 0).to(x.dtype), self.support)
        self.residual = torch.where(rows[:, None], self.b - x @ self.A.T, self.residual)
        self.direction = torch.where(rows[:, None], self._slope(), self.direction)
        self.frozen = self.frozen | rows
