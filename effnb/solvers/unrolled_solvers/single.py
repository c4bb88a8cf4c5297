"""HyperLISTA for one instance at a time, where a batch is not to be had."""

from __future__ import annotations

import math

import numpy as np

from effnb.solvers.unrolled_solvers._check import check_count
from effnb.solvers.unrolled_solvers.hyperlista import HyperLISTA
from effnb.solvers.unrolled_solvers.kernels import STOP


class SingleSolver:
    r"""NumPy form of a ``HyperLISTA`` for single measurement vectors.

    A batch of one spends most of its time on dispatch. Here a layer is a few array operations, and
    :math:`A x` gathers only the columns of the nonzeros of :math:`x`.

    Args:
        net: on the CPU, without oracle and conjugate gradients.

    Raises:
        TypeError: if ``net`` is no ``HyperLISTA``.
        ValueError: if it has an oracle or ``cg_after``, or is not on the CPU.

    Reference: chen2021hyperparameter

    >>> from effnb.solvers import SparseProblem
    >>> problem = SparseProblem(20, 40)
    >>> net = HyperLISTA(problem.A, layers=4)
    >>> b = problem.sample(1)[1]
    >>> np.allclose(SingleSolver(net)(b[0].numpy()), net(b)[0].detach().numpy(), atol=1e-5)
    True
    """

    def __init__(self, net: HyperLISTA):
        if not isinstance(net, HyperLISTA):
            raise TypeError(f"net must be a HyperLISTA, got {type(net).__name__}")
        if net.oracle or net.cg_after is not None:
            raise ValueError(f"net must have neither oracle nor cg_after, got {net.oracle} and {net.cg_after}")
        if net.A.device.type != "cpu":
            raise ValueError(f"net must be on the CPU, got {net.A.device}")
        self.layers, self.mu = net.layers, net.mu
        self.c = tuple(net.c.tolist())
        self.At, self.W = np.ascontiguousarray(net.A.T.numpy()), net.W.numpy()
        self.scale = net.column_norms.numpy() if net.normalize else None
        self.pinv = None if net.pinv is None else net.pinv.numpy()
        self.diagonal = None if net.pinv_diagonal is None else net.pinv_diagonal.numpy()

    def __call__(self, b: np.ndarray, n_layers: int | None = None) -> np.ndarray:
        """Return the estimate ``(n,)`` of one measurement vector ``b (m,)``.

        Args:
            b: ``(m,)``.
            n_layers: use only the first layers.

        Raises:
            ValueError: for a wrong shape, values that are not finite or too many layers.
        """
        b = np.asarray(b, dtype=self.W.dtype)
        if b.shape != (self.W.shape[0],) or not np.isfinite(b).all():
            raise ValueError(f"b must be finite with shape ({self.W.shape[0]},), got {b.shape}")
        n_layers = self.layers if n_layers is None else n_layers
        check_count(n_layers, "n_layers", 0, self.layers)
        x = x_old = np.zeros(self.W.shape[1], self.W.dtype)
        support, start = np.empty(0, np.intp), None
        for _ in range(n_layers):
            r = x[support] @ self.At[support] - b
            v = r @ self.W
            residual = float(np.abs(v) @ self.diagonal if self.pinv is None else np.abs(r @ self.pinv).sum())
            start = residual if start is None else start
            if residual <= STOP * start:
                break
            z = x - v + self.c[1] * self.mu * len(support) * (x - x_old)
            p = int(min(max(self.c[2] * math.log(start / residual), 0.0), len(x)))
            x_old, (x, support) = x, self._select(z, self.c[0] * self.mu * residual, p)
        return x if self.scale is None else x / self.scale

    @staticmethod
    def _select(z: np.ndarray, theta: float, p: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ``support_select`` of one vector and the places of its nonzeros."""
        size = np.abs(z)
        support = np.flatnonzero(size > 0 if theta == 0 else size >= theta)
        values, kept = z[support], size[support]
        if p < len(support):
            cutoff = np.partition(kept, len(kept) - p)[len(kept) - p] if p else np.inf
            values = np.where(kept >= cutoff, values, values - theta * np.sign(values))
        x = np.zeros_like(z)
        x[support] = values
        return x, support
