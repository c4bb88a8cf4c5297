"""HyperLISTA: three numbers for the whole network; its conjugate-gradient end, and a form for single instances."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from effnb.common import check_choice, check_count, check_number
from effnb.solvers.unrolled_solvers.classic import kth_largest, select_unchecked
from effnb.solvers.unrolled_solvers.problem import (
    analytic_weights,
    check_full_row_rank,
    check_matrix,
    check_weights,
    mutual_coherence,
    unit_dictionary,
)

STOP = 1e-12  # an instance whose residual fell this far below its start is done; also what keeps b = 0 at 0


def select_in_place(z: Tensor, theta: Tensor, p: Tensor, size: Tensor, kept: Tensor) -> Tensor:
    """Apply ``support_select`` to ``z`` itself; return the number of nonzeros ``(batch, 1)``.

    Only ``c``, the number of entries at or above the threshold, decides: no entry is spared at ``p = 0`` (soft
    threshold), all of them at ``p >= c`` (hard threshold). The rows between, and only they, are ranked.
    ``theta`` must be positive; ``size`` and ``kept`` are scratch of the shape of ``z``.
    """
    # A comparison that writes zeros and ones of z's own dtype makes mask, count and product three vectorised passes.
    torch.abs(z, out=size)
    torch.ge(size, theta, out=kept)
    count = kept.sum(1, keepdim=True)
    if not p.any():
        z.sub_(torch.clamp(z, -theta, theta, out=size))
        return count
    z.mul_(kept)
    spared = p >= count
    if spared.all():
        return count
    cutoff = torch.where(spared, theta, torch.inf)
    rows = (~spared & (p > 0)).squeeze(1).nonzero().squeeze(1)
    if rows.numel():
        cutoff[rows] = kth_largest(size[rows], p[rows])
    kept.mul_(size < cutoff).mul_(z.sign())
    z.addcmul_(kept, -theta)
    return count


class FrozenSupport:
    """Per-instance switch from an iteration to conjugate gradients for the least squares on its support.

    An instance is frozen once its support stood still for ``patience`` layers, and re-opened when a step leaves more
    than the fraction ``stall`` of its residual above the rounding level: then the support was wrong.
    """

    def __init__(self, A: Tensor, b: Tensor, patience: int = 2, stall: float = 0.95):
        self.A, self.b, self.patience, self.stall = A, b, patience, stall
        batch = b.shape[0]
        self.frozen = torch.zeros(batch, dtype=torch.bool, device=b.device)
        self.unchanged = torch.zeros(batch, dtype=torch.long, device=b.device)
        self.support = b.new_zeros(batch, A.shape[1])
        self.residual, self.direction = torch.zeros_like(b), torch.zeros_like(self.support)
        self.floor = 100 * torch.finfo(b.dtype).eps * b.norm(dim=1)

    def _slope(self) -> Tensor:
        """Return the negative gradient of the least squares on the support."""
        return (self.residual @ self.A) * self.support

    def advance(self, x: Tensor, proposal: Tensor, may_freeze: bool) -> Tensor:
        """Return the next iterate: a conjugate gradient step where frozen, the ``proposal`` elsewhere."""
        # One CGLS step of every instance. One that is not frozen has the direction 0: 0/0 becomes 0 and it stays.
        frozen, before, power = self.frozen, self.residual.norm(dim=1), self._slope().square().sum(1)
        image = self.direction @ self.A.T
        length = (power / image.square().sum(1)).nan_to_num(0.0, 0.0, 0.0)[:, None]
        self.residual = self.residual - length * image
        slope = self._slope()
        keep = (slope.square().sum(1) / power).nan_to_num(0.0, 0.0, 0.0)[:, None]
        moved = x + length * self.direction
        self.direction = slope + keep * self.direction

        # A wrong support cannot explain b, so its residual stalls: x stays for this layer, the iteration goes on after.
        after = self.residual.norm(dim=1)
        reopen = frozen & (after > self.stall * before) & (after > self.floor)
        self.frozen = frozen & ~reopen
        self.unchanged = torch.where(reopen, 0, self.unchanged)
        self.direction = torch.where(reopen[:, None], 0.0, self.direction)
        new = torch.where(frozen[:, None], torch.where(reopen[:, None], x, moved), proposal)

        same = ((new != 0) == (x != 0)).all(1)
        self.unchanged = torch.where(same | self.frozen, self.unchanged + 1, 0)
        if may_freeze:  # from here on the support is fixed, and conjugate gradients start from steepest descent
            rows = ~self.frozen & (self.unchanged >= self.patience)
            self.support = torch.where(rows[:, None], (new != 0).to(new.dtype), self.support)
            self.residual = torch.where(rows[:, None], self.b - new @ self.A.T, self.residual)
            self.direction = torch.where(rows[:, None], self._slope(), self.direction)
            self.frozen = self.frozen | rows
        return new


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
            gradients on it, until its residual stalls; ``None`` never.
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
        check_count("layers", layers)
        if len(c) != 3:
            raise ValueError(f"c must hold 3 numbers, got {len(c)}")
        check_number("c", torch.as_tensor(c, dtype=torch.float64), ge=0)
        check_choice("pinv_of", pinv_of, ("residual", "transformed"))
        if pinv_of == "transformed" and (not symmetric or weights is not None):
            raise ValueError("pinv_of='transformed' needs the symmetric analytic weights")
        if cg_after is not None:
            check_count("cg_after", cg_after)
        A, norms = unit_dictionary(A, normalize)
        check_full_row_rank(A)
        W = analytic_weights(A, symmetric) if weights is None else weights.detach().clone()
        check_weights(W, A)
        self.layers, self.symmetric, self.oracle, self.cg_after = layers, symmetric, oracle, cg_after
        self.normalize, self.mu = normalize, mutual_coherence(A, W)
        self.c = nn.Parameter(A.new_tensor(c if not isinstance(c, Tensor) else c.tolist()))

        wide = A.double()
        P = torch.cholesky_solve(wide, torch.linalg.cholesky(wide @ wide.T))  # H^-1 A, whose transpose is A^+
        if pinv_of == "transformed":  # W = M A and G = M^1/2: A^+ G r
            values, vectors = torch.linalg.eigh(W.double() @ P.T)
            P = (vectors * values.clamp_min(0).sqrt()) @ (vectors.T @ P)
        # Free weights are W = P / diag(A^T P), so A^+ r = diag(A^T P) * (W^T r): no product of its own.
        free = not symmetric and weights is None
        diagonal, pinv = ((wide * P).sum(0).to(A.dtype), None) if free else (None, P.to(A.dtype))
        for name, value in (("A", A), ("W", W), ("column_norms", norms), ("pinv_diagonal", diagonal), ("pinv", pinv)):
            self.register_buffer(name, value)

    def forward(
        self, b: Tensor, n_layers: int | None = None, return_all: bool = False, x_true: Tensor | None = None
    ) -> Tensor:
        """Return the estimate ``(batch, n)``, or with ``return_all`` every layer's ``(n_layers, batch, n)``.

        Args:
            b: ``(batch, m)``.
            n_layers, return_all: as in ``LISTA``.
            x_true: ``(batch, n)``, needed by the oracle and allowed only there.

        Raises:
            ValueError: for a wrong shape, values that are not finite, too many layers, or ``x_true`` without oracle.
        """
        m, n = self.A.shape
        check_matrix(b, "b", m)
        n_layers = self.layers if n_layers is None else n_layers
        check_count("n_layers", n_layers, 0, self.layers)
        if self.oracle != (x_true is not None):
            raise ValueError(f"x_true must be given exactly if oracle is set, got oracle={self.oracle}")
        if x_true is not None:
            check_matrix(x_true, "x_true", n)
            x_true = x_true * self.column_norms  # the iterates are those of the normalised dictionary
        outputs: list[Tensor] = []
        wants_gradient = torch.is_grad_enabled() and (b.requires_grad or self.c.requires_grad)
        if wants_gradient or self.oracle or self.cg_after is not None:
            x = self._iterate(b, n_layers, outputs, x_true)
        else:
            x = self._infer(b, n_layers, outputs if return_all else None)
        result = torch.stack(outputs) if return_all and outputs else x
        return result / self.column_norms if self.normalize else result

    def _iterate(self, b: Tensor, n_layers: int, outputs: list[Tensor], x_true: Tensor | None) -> Tensor:
        """Run the layers by the formula, with gradients, oracle and conjugate gradients; append each to ``outputs``."""
        c_theta, c_beta, c_p = self.c
        x = x_old = b.new_zeros(b.shape[0], self.A.shape[1])
        start = frozen = None
        for k in range(n_layers):
            r = x @ self.A.T - b
            v = r @ self.W
            if x_true is None:
                estimate = v * self.pinv_diagonal if self.pinv is None else r @ self.pinv
                residual, nonzeros = estimate.abs().sum(1, keepdim=True), (x != 0).sum(1, keepdim=True)
            else:
                residual, nonzeros = (x - x_true).abs().sum(1, keepdim=True), (x_true != 0).sum(1, keepdim=True)
            start = residual if start is None else start
            # Both sides of the quotient are 1 where an instance is done: a NaN in the branch that `where` drops would
            # still reach the gradient.
            done = residual <= STOP * start
            ratio = torch.where(done, 1.0, start / torch.where(done, 1.0, residual))
            p = (c_p * ratio.log()).detach().clamp(0, x.shape[1]).long()
            z = x - v + c_beta * self.mu * nonzeros * (x - x_old)
            new = torch.where(done, x, select_unchecked(z, c_theta * self.mu * residual, p))
            if self.cg_after is not None:
                frozen = FrozenSupport(self.A, b) if frozen is None else frozen
                new = frozen.advance(x, new, may_freeze=k + 1 >= self.cg_after)
            x_old, x = x, new
            outputs.append(x)
        return x

    @torch.no_grad()
    def _infer(self, b: Tensor, n_layers: int, outputs: list[Tensor] | None) -> Tensor:
        """Run the layers without gradient: buffers made once, no third product where A^+ r is free, little sorting."""
        n, batch = self.A.shape[1], b.shape[0]
        At, W, P, diagonal = self.A.T.contiguous(), self.W, self.pinv, self.pinv_diagonal
        c_theta, c_beta, c_p = (float(value) for value in self.c)
        x, x_old, z = (b.new_zeros(batch, n) for _ in range(3))
        v, size, kept = (b.new_empty(batch, n) for _ in range(3))
        r, start, tiny = torch.neg(b), None, torch.finfo(b.dtype).tiny
        nonzeros = b.new_zeros(batch, 1)
        for k in range(n_layers):
            if k:
                torch.addmm(b, x, At, beta=-1, out=r)
            torch.mm(r, W, out=v)
            if diagonal is not None:
                residual = torch.mv(torch.abs(v, out=size), diagonal).unsqueeze(1)
            else:
                residual = torch.linalg.vector_norm(torch.mm(r, P, out=size), 1, dim=1, keepdim=True)
            start = residual if start is None else start
            done = residual <= STOP * start
            beta = c_beta * self.mu * nonzeros
            # 0/0 at b = 0 gives no count, and a residual of zero gives all n
            p = (c_p * torch.log(start / residual)).nan_to_num(0.0, n, 0.0).clamp_(0, n).long()
            torch.lerp(x_old, x, 1 + beta, out=z).sub_(v)
            theta = (c_theta * self.mu * residual).clamp_min(tiny)  # positive, so that the count is that of nonzeros
            nonzeros = select_in_place(z, theta, p, size, kept)
            if done.any():
                z = torch.where(done, x, z)
            x_old, x, z = x, z, x_old  # the next layer overwrites the oldest: hence the copy of what is handed out
            if outputs is not None:
                outputs.append(x.clone())
        return x


class SingleSolver:
    r"""NumPy form of a ``HyperLISTA`` for single measurement vectors, where torch spends most of its time on dispatch.

    A layer is a few array operations, and :math:`A x` gathers only the columns of the nonzeros of :math:`x`.

    Args:
        net: on the CPU, without oracle and conjugate gradients.

    Raises:
        TypeError: if ``net`` is no ``HyperLISTA``.
        ValueError: if it has an oracle or ``cg_after``, or is not on the CPU.

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
        self.layers, self.mu, self.c = net.layers, net.mu, tuple(net.c.tolist())
        self.At, self.W = np.ascontiguousarray(net.A.T.numpy()), net.W.numpy()
        self.scale = net.column_norms.numpy() if net.normalize else None
        self.pinv = None if net.pinv is None else net.pinv.numpy()
        self.diagonal = None if net.pinv_diagonal is None else net.pinv_diagonal.numpy()

    def __call__(self, b: np.ndarray, n_layers: int | None = None) -> np.ndarray:
        """Return the estimate ``(n,)`` of one measurement vector ``b (m,)``, by the first ``n_layers`` if given.

        Raises:
            ValueError: for a wrong shape, values that are not finite or too many layers.
        """
        b = np.asarray(b, dtype=self.W.dtype)
        if b.shape != (self.W.shape[0],) or not np.isfinite(b).all():
            raise ValueError(f"b must be finite with shape ({self.W.shape[0]},), got {b.shape}")
        n_layers = self.layers if n_layers is None else n_layers
        check_count("n_layers", n_layers, 0, self.layers)
        c_theta, c_beta, c_p = self.c
        x = x_old = np.zeros(self.W.shape[1], self.W.dtype)
        support, start = np.empty(0, np.intp), None
        for _ in range(n_layers):
            r = x[support] @ self.At[support] - b
            v = r @ self.W
            residual = float(np.abs(v) @ self.diagonal if self.pinv is None else np.abs(r @ self.pinv).sum())
            start = residual if start is None else start
            if residual <= STOP * start:
                break
            z = x - v + c_beta * self.mu * len(support) * (x - x_old)
            p = int(min(max(c_p * math.log(start / residual), 0.0), len(x)))
            theta = c_theta * self.mu * residual
            size = np.abs(z)
            support = np.flatnonzero(size > 0 if theta == 0 else size >= theta)  # exactly the nonzeros, also at c1 = 0
            values, kept = z[support], size[support]
            if p < len(support):
                cutoff = np.partition(kept, len(kept) - p)[len(kept) - p] if p else np.inf
                values = np.where(kept >= cutoff, values, values - theta * np.sign(values))
            x_old, x = x, np.zeros_like(z)
            x[support] = values
        return x if self.scale is None else x / self.scale
