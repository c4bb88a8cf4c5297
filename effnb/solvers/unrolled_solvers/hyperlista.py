"""HyperLISTA: three numbers for the whole network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effnb.solvers.unrolled_solvers._check import (
    check_batch,
    check_choice,
    check_count,
    check_full_row_rank,
    check_matrix,
    check_number,
    check_unit_columns,
)
from effnb.solvers.unrolled_solvers.conjugate import FrozenSupport
from effnb.solvers.unrolled_solvers.frame import check_weights
from effnb.solvers.unrolled_solvers.kernels import STOP, infer
from effnb.solvers.unrolled_solvers.problem import normalize_columns
from effnb.solvers.unrolled_solvers.thresholds import select
from effnb.solvers.unrolled_solvers.weights import analytic_weights, mutual_coherence


class HyperLISTA(nn.Module):
    r"""Unrolled solver whose thresholds, momentum and support selection follow from three numbers.

    With the residual :math:`r_k = A x_k - b`, the pseudo-inverse :math:`A^+` and the coherence :math:`\mu`:

    .. math::
        \theta_k &= c_1\mu\|A^+ r_k\|_1,\quad \beta_k = c_2\mu\|x_k\|_0,\quad
        p_k = c_3\min(\log(\|A^+b\|_1/\|A^+r_k\|_1), n)\\
        x_{k+1} &= S^{ss}_{\theta_k,p_k}(x_k - W^T r_k + \beta_k(x_k - x_{k-1}))

    per instance. Where no gradient is asked for, a faster path runs that returns the same. The official code differs
    from the paper: it folds :math:`\mu` into ``c`` and applies :math:`A^+` to the transformed residual.

    Args:
        A: ``(m, n)``, columns of length one, rows independent.
        c: the three numbers; the default was tuned for 250 x 500 and 10% nonzeros without noise.
        layers: K.
        symmetric: symmetric analytic weights, as in the paper; ``False`` saves one of three matrix products a layer.
        oracle: take :math:`\|x_k-x^*\|_1` and :math:`\|x^*\|_0` instead of their estimates (needs ``x_true``).
        cg_after: from this layer on, an instance whose support stood still for two layers continues with conjugate
            gradients on it; ``None`` never.
        pinv_of: ``"residual"`` as in the paper, ``"transformed"`` as in the official code (symmetric weights only).
        weights: other weights ``(m, n)`` with a unit diagonal of ``W^T A``.
        normalize: rescale the columns of ``A`` first, and the solution back.

    Raises:
        ValueError: for a dictionary or a setting outside its rules.

    Reference: chen2021hyperparameter

    >>> sum(p.numel() for p in HyperLISTA(torch.eye(4)).parameters())
    3
    """

    def __init__(
        self,
        A: Tensor,
        c: Sequence[float] = (0.07, 0.015, 100.0),
        layers: int = 16,
        symmetric: bool = True,
        oracle: bool = False,
        cg_after: int | None = None,
        *,
        pinv_of: str = "residual",
        weights: Tensor | None = None,
        normalize: bool = False,
    ):
        super().__init__()
        check_matrix(A)
        check_count(layers, "layers")
        if len(c) != 3:
            raise ValueError(f"c must hold 3 numbers, got {len(c)}")
        check_number(torch.as_tensor(c, dtype=torch.float64), "c", 0)
        check_choice(pinv_of, "pinv_of", ("residual", "transformed"))
        if pinv_of == "transformed" and (not symmetric or weights is not None):
            raise ValueError("pinv_of='transformed' needs the symmetric analytic weights")
        if cg_after is not None:
            check_count(cg_after, "cg_after", 1)
        A, norms = normalize_columns(A.detach()) if normalize else (A.detach().clone(), A.new_ones(A.shape[1]))
        check_unit_columns(A)
        check_full_row_rank(A)
        W = analytic_weights(A, symmetric) if weights is None else weights.detach().clone()
        check_weights(W, A)
        self.layers, self.symmetric, self.oracle, self.cg_after = layers, symmetric, oracle, cg_after
        self.normalize, self.mu = normalize, mutual_coherence(A, W)
        self.c = nn.Parameter(A.new_tensor(c if not isinstance(c, Tensor) else c.tolist()))
        for name, value in {"A": A, "W": W, "column_norms": norms}.items():
            self.register_buffer(name, value)
        self._set_pseudo_inverse(pinv_of, by_diagonal=not symmetric and weights is None)

    def _set_pseudo_inverse(self, pinv_of: str, by_diagonal: bool) -> None:
        """Store ``H^-1 A`` (whose transpose is ``A^+``), or the diagonal that turns ``W^T r`` into ``A^+ r``."""
        A, W = self.A.double(), self.W.double()
        P = torch.cholesky_solve(A, torch.linalg.cholesky(A @ A.T))
        diagonal = (A * P).sum(0).to(self.A.dtype) if by_diagonal else None
        if pinv_of == "transformed":  # W = M A and G = M^1/2: A^+ G r
            values, vectors = torch.linalg.eigh(W @ P.T)
            P = (vectors * values.clamp_min(0).sqrt()) @ (vectors.T @ P)
        self.register_buffer("pinv_diagonal", diagonal)
        self.register_buffer("pinv", None if by_diagonal else P.to(self.A.dtype))

    def _pinv_norm(self, r: Tensor, v: Tensor) -> Tensor:
        """Return the l1 norm of ``A^+ r`` from ``r`` and ``v = W^T r``, per instance ``(batch, 1)``."""
        estimate = v * self.pinv_diagonal if self.pinv is None else r @ self.pinv
        return estimate.abs().sum(1, keepdim=True)

    def _layer(self, x: Tensor, x_old: Tensor, b: Tensor, start: Tensor | None, x_true: Tensor | None):
        """Return the next iterate and the first residual norm (the readable form of ``kernels.infer``)."""
        c_theta, c_beta, c_p = self.c
        r = x @ self.A.T - b
        v = r @ self.W
        residual, nonzeros = self._pinv_norm(r, v), (x != 0).sum(1, keepdim=True)
        if x_true is not None:
            residual = (x - x_true).abs().sum(1, keepdim=True)
            nonzeros = (x_true != 0).sum(1, keepdim=True)
        start = residual if start is None else start
        done = residual <= STOP * start
        ratio = torch.where(done, 1.0, start / torch.where(done, 1.0, residual))
        p = (c_p * ratio.log()).detach().clamp(0, x.shape[1]).long()
        z = x - v + c_beta * self.mu * nonzeros * (x - x_old)
        new = select(z, c_theta * self.mu * residual, p)
        return torch.where(done, x, new), start

    def forward(
        self, b: Tensor, n_layers: int | None = None, return_all: bool = False, x_true: Tensor | None = None
    ) -> Tensor:
        """Return the estimate ``(batch, n)``, or with ``return_all`` every layer's ``(n_layers, batch, n)``.

        Args:
            b: ``(batch, m)``.
            n_layers: use only the first layers.
            return_all: return the estimates of all layers.
            x_true: ``(batch, n)``, needed by the oracle and allowed only there.

        Raises:
            ValueError: for a wrong shape, values that are not finite, too many layers, or ``x_true`` without oracle.
        """
        m, n = self.A.shape
        check_batch(b, m)
        n_layers = self.layers if n_layers is None else n_layers
        check_count(n_layers, "n_layers", 0, self.layers)
        if self.oracle != (x_true is not None):
            raise ValueError(f"x_true must be given exactly if oracle is set, got oracle={self.oracle}")
        if x_true is not None:
            check_batch(x_true, n, "x_true")
            x_true = x_true * self.column_norms
        outputs: list[Tensor] = []
        wants_gradient = torch.is_grad_enabled() and (b.requires_grad or self.c.requires_grad)
        if wants_gradient or self.oracle or self.cg_after is not None:
            x = self._run(b, n_layers, outputs, x_true)
        else:
            x = infer(self, b, n_layers, outputs if return_all else None)
        result = torch.stack(outputs) if return_all and outputs else x
        return result / self.column_norms if self.normalize else result

    def _run(self, b: Tensor, n_layers: int, outputs: list[Tensor], x_true: Tensor | None) -> Tensor:
        x = x_old = b.new_zeros(b.shape[0], self.A.shape[1])
        start, frozen = None, None
        for k in range(n_layers):
            new, start = self._layer(x, x_old, b, start, x_true)
            if self.cg_after is not None:
                frozen = FrozenSupport(self.A, b) if frozen is None else frozen
                new = frozen.advance(x, new, may_freeze=k + 1 >= self.cg_after)
            x_old, x = x, new
            outputs.append(x)
        return x
