"""Without learning: the thresholds that every solver applies, ISTA, FISTA and orthogonal matching pursuit."""

import numbers
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from effnb.common import check_choice, check_count, check_number
from effnb.solvers.unrolled_solvers.problem import check_matrix

Callback = Callable[[int, Tensor], bool | None]


def _per_row(name: str, value: float | Tensor, z: Tensor) -> Tensor:
    """Check a number or one value per instance (>= 0) and give it a shape that broadcasts against ``z (batch, n)``."""
    value = value if isinstance(value, numbers.Real) else torch.as_tensor(value, device=z.device)
    check_number(name, value, ge=0)
    # as_tensor alone would round a Python number to float32
    value = torch.as_tensor(value, dtype=z.dtype if isinstance(value, float) else None, device=z.device)
    return value.unsqueeze(-1) if value.ndim == 1 else value


def soft_unchecked(z: Tensor, theta: Tensor) -> Tensor:
    """Return ``soft_threshold`` without the checks."""
    # Products with constant masks instead of `clamp`: the same values at a third of the cost of the backward pass.
    kept = (z.detach().abs() > theta.detach()).to(z.dtype)
    return z * kept - theta * (kept * z.detach().sign())


def kth_largest(size: Tensor, p: int | Tensor) -> Tensor:
    """Return each row's ``p``-th largest entry ``(batch, 1)``, infinity for 0; ``p`` is one rank or ``(batch, 1)``."""
    # NumPy's vectorised sort and partition beat torch's on a CPU by about eight times.
    in_numpy = size.device.type == "cpu" and size.dtype in (torch.float32, torch.float64)
    if isinstance(p, Tensor):
        ordered = torch.from_numpy(np.sort(size.numpy(), axis=-1)) if in_numpy else size.sort(dim=-1).values
        cutoff = ordered.gather(-1, (size.shape[-1] - p).clamp_max(size.shape[-1] - 1))
        return torch.where(p == 0, torch.inf, cutoff)
    if p == 0:
        return size.new_full((1, 1), torch.inf)
    if not in_numpy:
        return size.topk(p, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    place = size.shape[-1] - p
    return torch.from_numpy(np.partition(size.numpy(), place, axis=-1)[..., place : place + 1])


def select_unchecked(z: Tensor, theta: Tensor, p: int | Tensor) -> Tensor:
    """Return ``support_select`` in count mode without the checks; ``p`` is an integer, or a tensor ``(batch, 1)``."""
    size = z.detach().abs()
    cutoff = kth_largest(size, p)
    kept = size >= theta.detach()  # `>=` although the soft threshold has `>`: at equality it leaves zero anyway
    shrunk = kept & (size < cutoff)
    return z * kept.to(z.dtype) - theta * (shrunk.to(z.dtype) * z.detach().sign())


def soft_threshold(z: Tensor, theta: float | Tensor) -> Tensor:
    r"""Return every entry shrunk towards zero by ``theta``: :math:`\operatorname{sign}(z)\max(|z|-\theta, 0)`.

    Args:
        z: ``(batch, n)``.
        theta: one number, or one per instance ``(batch,)`` or ``(batch, 1)``; >= 0.

    Raises:
        ValueError: if ``theta`` is negative or not finite.

    Reference: beck2009fast

    >>> soft_threshold(torch.tensor([[3.0, -0.5, -2.0]]), 1.0).tolist()
    [[2.0, 0.0, -1.0]]
    """
    return soft_unchecked(z, _per_row("theta", theta, z).to(z.dtype))


def support_select(z: Tensor, theta: float | Tensor, p: float | Tensor, mode: str = "count") -> Tensor:
    r"""Return ``z`` shrunk by ``theta``, but for the ``p`` largest entries of each instance, which pass unchanged.

    With :math:`\tau` the ``p``-th largest :math:`|z|` of the instance, entries with :math:`|z|\ge\tau` and
    :math:`|z|\ge\theta` stay as they are; all others are soft-thresholded. ``p = 0`` is the soft threshold, and ``p``
    at or above the number of entries with :math:`|z|\ge\theta` is the hard one. The choice carries no gradient.

    Args:
        z: ``(batch, n)``.
        theta: one number or one per instance; >= 0.
        p: one number or one per instance. ``mode="count"``: how many entries pass, from 0 to n, floored.
            The quantile modes take a fraction in [0, 1].
        mode: ``"quantile"`` takes the interpolated ``1 - p`` quantile as :math:`\tau`, as the official PyTorch code
            does (the largest entry passes even at ``p = 0``); ``"quantile-strict"`` asks for :math:`|z|>\tau`, as the
            official TensorFlow code does.

    Raises:
        ValueError: for a negative ``theta``, ``p`` outside its range or an unknown ``mode``.

    Reference: chen2018theoretical

    >>> support_select(torch.tensor([[3.0, -0.5, -2.0]]), 1.0, 1).tolist()
    [[3.0, 0.0, -1.0]]
    """
    check_choice("mode", mode, ("count", "quantile", "quantile-strict"))
    theta, p = _per_row("theta", theta, z).to(z.dtype), _per_row("p", p, z)
    highest = z.shape[-1] if mode == "count" else 1
    if (p > highest).any():
        raise ValueError(f"p must be at most {highest} in mode {mode!r}, got {float(p.max()):g}")
    if mode == "count":
        p = p.floor().long()
        return select_unchecked(z, theta, int(p) if p.numel() == 1 else p)
    # Not `torch.quantile`, which takes one table of ranks for all rows: a rank per row would cost batch x batch.
    size = z.detach().abs()
    ranks = (1.0 - p.to(z.dtype)) * (z.shape[-1] - 1)
    ordered = size.sort(dim=-1).values
    low = ordered.gather(-1, ranks.floor().long().expand(*z.shape[:-1], 1))
    high = ordered.gather(-1, ranks.ceil().long().expand(*z.shape[:-1], 1))
    cutoff = torch.lerp(low, high, ranks - ranks.floor())
    passed = ((size > cutoff) if mode == "quantile-strict" else (size >= cutoff)) & (size >= theta)
    return torch.where(passed, z, soft_unchecked(z, theta))


def _proximal(
    A: Tensor, b: Tensor, lam: float, max_iter: int, gram: bool | Tensor | None, x0: Tensor | None
) -> tuple[Tensor, float, Callable[[Tensor], Tensor]]:
    """Check the arguments of ``ista`` and ``fista``; return the start, ``L`` and ``y -> y - A^T(Ay - b) / L``."""
    check_matrix(A)
    m, n = A.shape
    check_matrix(b, "b", m)
    check_number("lam", lam, ge=0)
    check_count("max_iter", max_iter, 0)
    if x0 is not None:
        check_matrix(x0, "x0", n)
    lipschitz = float(torch.linalg.matrix_norm(A, 2)) ** 2  # the official TensorFlow code multiplies it by 1.001
    if lipschitz == 0:
        raise ValueError("A must not be zero throughout")
    x, step = (b.new_zeros(b.shape[0], n) if x0 is None else x0.clone()), 1 / lipschitz
    # The Gram form is one product with an n x n matrix instead of two with m x n: cheaper up to n = 2m.
    if gram is None:
        gram = n <= 2 * m
    if gram is False:
        At = A.T.contiguous()
        return x, lipschitz, lambda y: torch.addmm(y, torch.addmm(b, y, At, beta=-1), A, alpha=-step)
    G = A.T @ A if gram is True else gram
    if G.shape != (n, n):
        raise ValueError(f"gram must have shape ({n}, {n}), got {tuple(G.shape)}")
    forward = torch.eye(n, dtype=A.dtype, device=A.device) - step * G
    constant = step * (b @ A)
    return x, lipschitz, lambda y: torch.addmm(constant, y, forward)


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
    r"""Return the minimiser ``(batch, n)`` of :math:`\tfrac12\|Ax-b\|^2 + \lambda\|x\|_1` by proximal gradient steps.

    .. math:: x \leftarrow S_{\lambda/L}(x - A^T(Ax-b)/L),\qquad L=\|A\|_2^2

    Args:
        A: ``(m, n)``.
        b: ``(batch, m)``.
        lam: weight of the l1 norm, >= 0.
        max_iter: number of iterations.
        gram: use :math:`A^TA` (or a given one); ``None`` does when ``n <= 2 m``.
        x0: start ``(batch, n)``, zero by default.
        callback: called as ``callback(iteration, x)`` after each; a true value stops.

    Raises:
        ValueError: for a negative ``lam``, wrong shapes, or values that are not finite.

    Reference: beck2009fast

    >>> ista(torch.eye(2), torch.tensor([[3.0, 0.5]]), lam=1.0, max_iter=5).tolist()
    [[2.0, 0.0]]
    """
    x, lipschitz, step = _proximal(A, b, lam, max_iter, gram, x0)
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
    r"""Return what ``ista`` does, by accelerated steps.

    .. math::
        x_{k+1} &= S_{\lambda/L}(y_k - A^T(Ay_k-b)/L),\quad t_{k+1} = (1+\sqrt{1+4t_k^2})/2\\
        y_{k+1} &= x_{k+1} + \tfrac{t_k-1}{t_{k+1}}(x_{k+1}-x_k)

    Args:
        A, b, lam, max_iter, gram, x0, callback: as in ``ista``.
        restart: ``"gradient"`` forgets the momentum of an instance when it points uphill.
        continuation: factor in (0, 1), the papers' 0.98: start at :math:`0.1\|A^Tb\|_\infty` and shrink to ``lam``.

    Raises:
        ValueError: as ``ista``, or for an unknown ``restart`` or a factor outside (0, 1).

    Reference: beck2009fast

    >>> fista(torch.eye(2), torch.tensor([[3.0, 0.5]]), lam=1.0, max_iter=5, restart="gradient").tolist()
    [[2.0, 0.0]]
    """
    check_choice("restart", restart, (None, "gradient"))
    if continuation is not None:
        check_number("continuation", continuation, gt=0, lt=1)
    x, lipschitz, step = _proximal(A, b, lam, max_iter, gram, x0)
    lam_k = 0.1 * (b @ A).abs().amax(1, keepdim=True) if continuation is not None else None
    y, t = x, torch.ones(b.shape[0], 1, dtype=b.dtype, device=b.device)
    for k in range(max_iter):
        if lam_k is None:
            new = torch.nn.functional.softshrink(step(y), lam / lipschitz)
        else:
            lam_k = (lam_k * continuation if k else lam_k).clamp_min(lam)
            new = soft_unchecked(step(y), lam_k / lipschitz)
        if restart is not None:
            # Each instance decides for itself, so that a result does not depend on its neighbours in the batch.
            uphill = ((y - new) * (new - x)).sum(1, keepdim=True) > 0
            t = torch.where(uphill, 1.0, t)
        t_new = (1 + torch.sqrt(1 + 4 * t * t)) / 2
        y, x, t = torch.lerp(x, new, 1 + (t - 1) / t_new), new, t_new  # the lerp overshoots `new`: the momentum
        if callback is not None and callback(k + 1, x):
            break
    return x


@torch.no_grad()
def omp(A: Tensor, b: Tensor, k: int, tol: float | None = None) -> Tensor:
    r"""Return the codes ``(batch, n)`` of orthogonal matching pursuit: the atom nearest to the residual, ``k`` times.

    Args:
        A: ``(m, n)`` with columns of length one.
        b: ``(batch, m)``.
        k: number of atoms, at most ``min(m, n)``.
        tol: an instance stops when its residual is below ``tol`` times ``b``'s norm; a few roundings by default.

    Raises:
        ValueError: for wrong shapes or ``k`` outside its range.

    Reference: pati1993orthogonal

    >>> omp(torch.eye(3), torch.tensor([[0.0, 2.0, 1.0]]), k=1).tolist()
    [[0.0, 2.0, 0.0]]
    """
    check_matrix(A)
    check_matrix(b, "b", A.shape[0])
    check_count("k", k, 0, min(A.shape))
    m, n, batch = *A.shape, b.shape[0]
    eps = torch.finfo(b.dtype).eps
    limit = (10 * eps if tol is None else tol) * b.norm(dim=1)
    # A Gram-Schmidt basis of the chosen atoms, so that an iteration costs one product with A.
    basis, R = b.new_zeros(batch, k, m), b.new_zeros(batch, k, k)
    chosen = torch.zeros(batch, k, dtype=torch.long, device=b.device)
    coefficients, residual = b.new_zeros(batch, k), b.clone()
    taken = torch.zeros(batch, n, dtype=torch.bool, device=b.device)
    for j in range(k):
        pick = (residual @ A).abs().masked_fill(taken, -1).argmax(1)
        atom = A.T[pick]
        first = torch.einsum("bkm,bm->bk", basis, atom)
        q = atom - torch.einsum("bkm,bk->bm", basis, first)
        second = torch.einsum("bkm,bm->bk", basis, q)  # once is not enough in floating point
        q = q - torch.einsum("bkm,bk->bm", basis, second)
        length = q.norm(dim=1)
        # An instance that is done, or whose atom lies in the span already, goes on with a zero direction and a unit
        # pivot: its later coefficients are zero and the triangular system stays solvable.
        live = (residual.norm(dim=1) > limit) & (length > 100 * eps)
        q = torch.where(live[:, None], q / length.clamp_min(eps)[:, None], 0.0)
        R[:, :, j] = torch.where(live[:, None], first + second, 0.0)
        R[:, j, j] = torch.where(live, length, 1.0)
        basis[:, j], chosen[:, j] = q, pick
        taken |= torch.nn.functional.one_hot(pick, n).bool() & live[:, None]
        coefficients[:, j] = (q * residual).sum(1)
        residual = residual - coefficients[:, j, None] * q
    x = b.new_zeros(batch, n)
    values = torch.linalg.solve_triangular(R, coefficients.unsqueeze(2), upper=True).squeeze(2)
    return x.scatter_add_(1, chosen, values)  # adds: idle steps may name one atom twice


@torch.no_grad()
def support_least_squares(A: Tensor, b: Tensor, support: Tensor) -> Tensor:
    """Return the least-squares solution ``(batch, n)`` on a given support, what an oracle that knows it would reach.

    Args:
        A: ``(m, n)``.
        b: ``(batch, m)``.
        support: boolean ``(batch, n)``.

    Raises:
        ValueError: for wrong shapes.

    >>> support_least_squares(torch.eye(2), torch.tensor([[3.0, 4.0]]), torch.tensor([[True, False]])).tolist()
    [[3.0, 0.0]]
    """
    check_matrix(A)
    check_matrix(b, "b", A.shape[0])
    if support.dtype != torch.bool or support.shape != (b.shape[0], A.shape[1]):
        raise ValueError(f"support must be boolean ({b.shape[0]}, {A.shape[1]}), got {tuple(support.shape)}")
    x = b.new_zeros(support.shape)
    for row, columns in enumerate(support):  # supports differ in size: no batch of equal systems
        x[row, columns] = torch.linalg.lstsq(A[:, columns], b[row, :, None]).solution.squeeze(1)
    return x
