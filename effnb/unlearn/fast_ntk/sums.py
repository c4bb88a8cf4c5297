"""Sufficient statistics of a data set: the curvature, the gradient and the number of samples, which add up."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import Batches, batches, check_labels
from .linalg import check_semidefinite, ridge_solve
from .losses import curvature_rows, residual


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
    def size(self) -> int:
        """Number of parameters."""
        return len(self.grad)

    @property
    def is_dual(self) -> bool:
        """Whether rows are kept instead of their product."""
        return self.gram is None

    def add(self, rows: Tensor, grad: Tensor, count: int) -> None:
        """Add ``count`` samples with weighted Jacobian rows ``(m, P)`` and gradient ``(P,)``."""
        rows = rows.to(self.grad)
        self.grad += grad
        self.count += count
        if self.is_dual and len(self.rows) + len(rows) <= self.size:
            self.rows = torch.cat([self.rows, rows])
            self.signs = torch.cat([self.signs, self.signs.new_ones(len(rows))])
            return
        if self.is_dual:
            self.gram, self.rows, self.signs = self.dense(), self.rows[:0], self.signs[:0]
        self.gram.addmm_(rows.T, rows)

    def dense(self) -> Tensor:
        """The curvature ``(P, P)``."""
        return (self.rows.T * self.signs) @ self.rows if self.gram is None else self.gram

    def times(self, vector: Tensor) -> Tensor:
        """The curvature times a vector."""
        return self.rows.T @ (self.signs * (self.rows @ vector)) if self.gram is None else self.gram @ vector

    def without(self, other: "Sums") -> "Sums":
        """The sums of the samples that are not in ``other``; neither operand changes."""
        left = Sums(self.size, self.grad.dtype, self.grad.device)
        left.grad, left.count = self.grad - other.grad, self.count - other.count
        left.eps = max(self.eps, other.eps)
        if self.is_dual and other.is_dual:
            left.rows, left.signs = torch.cat([self.rows, other.rows]), torch.cat([self.signs, -other.signs])
        elif other.is_dual:
            left.gram = torch.addmm(self.gram, other.rows.T * other.signs, other.rows, alpha=-1)
        else:
            left.gram = self.dense() - other.gram
        return left

    def plus(self, other: "Sums") -> "Sums":
        """The sums of both sets of samples; neither operand changes."""
        both = Sums(self.size, self.grad.dtype, self.grad.device)
        both.grad, both.count = self.grad + other.grad, self.count + other.count
        both.eps = max(self.eps, other.eps)
        if self.is_dual and other.is_dual:
            both.rows, both.signs = torch.cat([self.rows, other.rows]), torch.cat([self.signs, other.signs])
        else:
            both.gram = self.dense() + other.dense()
        return both

    def solve(self, rhs: Tensor, ridge: float, *, check: bool = False) -> Tensor:
        """``(G + ridge * I)^-1 rhs``; ``check`` first makes sure that ``G`` has no negative eigenvalue.

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
        return self._solve_in_span(rhs, ridge, check)

    def _solve_in_span(self, rhs: Tensor, ridge: float, check: bool) -> Tensor:
        """Dual solve with negative rows or without a ridge, in an orthonormal basis of the rows."""
        basis, corner = torch.linalg.qr(self.rows.T)
        matrix = (corner * self.signs) @ corner.T
        if check:
            check_semidefinite(matrix, ridge, self.eps)
        inside = basis.T @ rhs
        found = basis @ ridge_solve(matrix, inside, ridge)
        return found if ridge == 0 else found + (rhs - basis @ inside) / ridge

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {name: getattr(self, name) for name in ("rows", "signs", "gram", "grad", "count", "eps")}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Sums":
        """The inverse of :meth:`state_dict`."""
        made = cls(len(state["grad"]), state["grad"].dtype, state["grad"].device)
        for name, value in state.items():
            setattr(made, name, value.clone() if isinstance(value, Tensor) else value)
        return made


def accumulate(
    sums: Sums, jacobians: Callable, data: Batches, name: str, loss: str, hessian: str, centred: bool
) -> Sums:
    """Add all samples of ``data`` to ``sums``; ``jacobians`` maps inputs to chunks of outputs and Jacobians."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # a shuffling loader draws from the global stream
        for x, y in batches(data, name):
            start = 0
            for out, jac in jacobians(x):
                labels = y[start : start + len(out)].to(out.device)
                check_labels(labels, out.shape[1], name)
                start += len(out)
                sums.eps = max(sums.eps, torch.finfo(jac.dtype).eps)
                out, jac = out.to(sums.grad), jac.to(sums.grad)
                grad = jac.flatten(0, 1).T @ residual(out, labels, loss, centred).flatten()
                sums.add(curvature_rows(jac, out, loss, hessian).flatten(0, 1), grad, len(out))
    return sums
