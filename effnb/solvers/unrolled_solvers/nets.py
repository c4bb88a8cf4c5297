"""The trained networks: LISTA, LISTA-CP, -SS, -CPSS, TiLISTA and ALISTA."""

from __future__ import annotations

import torch
from torch import Tensor

from effnb.solvers.unrolled_solvers.frame import SCHEDULE, Unrolled, check_weights, copies, scalars
from effnb.solvers.unrolled_solvers.weights import analytic_weights


class LISTA(Unrolled):
    r"""Network of :math:`x_{k+1} = S_{\theta_k}(W_1 b + W_{2,k} x_k)`, at first exactly ISTA.

    ``W1`` is shared, ``W2`` free in every layer: ``n m + K n^2 + K`` parameters.

    Args:
        A: ``(m, n)``, columns of length one.
        layers: K.
        lam: the thresholds start at ``lam / L``.
        tied: share ``W2`` over the layers.
        select: ``None``, or growth and ceiling of the support selection (LISTA-SS).
        normalize: rescale the columns of ``A`` first, and the solution back.

    Raises:
        ValueError: for a dictionary or a setting outside its rules.

    Reference: gregor2010learning

    >>> sum(p.numel() for p in LISTA(torch.eye(4), layers=3).parameters())
    67
    """

    def __init__(
        self,
        A: Tensor,
        layers: int = 16,
        *,
        lam: float = 0.1,
        tied: bool = False,
        select: tuple[float, float] | None = None,
        normalize: bool = False,
    ):
        super().__init__(A, layers, lam, select, normalize)
        A = self.A
        eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
        self.W1 = copies((A / self.lipschitz).T.contiguous(), 1)
        self.W2 = copies(eye - A.T @ A / self.lipschitz, 1 if tied else layers)

    def _prepare(self, b: Tensor) -> Tensor:
        return b @ self.W1[0].T

    def _layer(self, k: int, x: Tensor, b: Tensor) -> Tensor:
        W2 = self.W2[min(k, len(self.W2) - 1)]
        return self._shrink(k, torch.addmm(b, x, W2.T))


class LISTASS(LISTA):
    """LISTA with support selection: the largest entries of a layer pass unchanged.

    Takes the arguments of ``LISTA``; ``select`` is the papers' schedule: 1.2% of ``n`` more a layer, at most 13%.

    Raises:
        ValueError: as ``LISTA``.

    Reference: chen2018theoretical

    >>> LISTASS(torch.eye(100), layers=3).counts
    [1, 2, 3]
    """

    def __init__(self, A: Tensor, layers: int = 16, *, select: tuple[float, float] | None = SCHEDULE, **options):
        super().__init__(A, layers, select=select, **options)


class LISTACP(Unrolled):
    r"""Network with coupled weights: :math:`x_{k+1} = S_{\theta_k}(x_k + W_k^T(b - A x_k))`.

    ``W`` starts at ``A / L``, which is ISTA: ``K n m + K`` parameters, tied ``n m + K``.

    Args:
        A: ``(m, n)``, columns of length one.
        layers: K.
        lam: the thresholds start at ``lam / L``.
        tied: share ``W`` over the layers.
        select: ``None``, or growth and ceiling of the support selection.
        normalize: rescale the columns of ``A`` first, and the solution back.

    Raises:
        ValueError: for a dictionary or a setting outside its rules.

    Reference: chen2018theoretical

    >>> sum(p.numel() for p in LISTACP(torch.eye(4), layers=3).parameters())
    51
    """

    def __init__(
        self,
        A: Tensor,
        layers: int = 16,
        *,
        lam: float = 0.1,
        tied: bool = False,
        select: tuple[float, float] | None = None,
        normalize: bool = False,
    ):
        super().__init__(A, layers, lam, select, normalize)
        self.W = copies(self.A / self.lipschitz, 1 if tied else layers)

    def _layer(self, k: int, x: Tensor, b: Tensor) -> Tensor:
        W = self.W[min(k, len(self.W) - 1)]
        return self._shrink(k, torch.addmm(x, b - x @ self.A.T, W))


class LISTACPSS(LISTACP):
    """LISTA-CP with support selection.

    Takes the arguments of ``LISTACP``; ``select`` is the papers' schedule.

    Raises:
        ValueError: as ``LISTACP``.

    Reference: chen2018theoretical

    >>> LISTACPSS(torch.eye(100), layers=16, tied=True).counts[-3:]
    [13, 13, 13]
    """

    def __init__(self, A: Tensor, layers: int = 16, *, select: tuple[float, float] | None = SCHEDULE, **options):
        super().__init__(A, layers, select=select, **options)


class TiLISTA(Unrolled):
    r"""Network with one learned matrix and a step per layer: :math:`S^{ss}_{\theta_k}(x_k + \gamma_k W^T(b - A x_k))`.

    ``n m + 2 K`` parameters. ``W`` starts at ``A / L``.

    Args:
        A: ``(m, n)``, columns of length one.
        layers: K.
        lam: the thresholds start at ``lam / L``.
        select: growth and ceiling of the support selection, or ``None``.
        normalize: rescale the columns of ``A`` first, and the solution back.

    Raises:
        ValueError: for a dictionary or a setting outside its rules.

    Reference: liu2019alista

    >>> sum(p.numel() for p in TiLISTA(torch.eye(4), layers=3).parameters())
    22
    """

    def __init__(
        self,
        A: Tensor,
        layers: int = 16,
        *,
        lam: float = 0.1,
        select: tuple[float, float] | None = SCHEDULE,
        normalize: bool = False,
    ):
        super().__init__(A, layers, lam, select, normalize)
        self.gamma = scalars(1.0, layers, self.A)
        self.W = copies(self.A / self.lipschitz, 1)

    def _layer(self, k: int, x: Tensor, b: Tensor) -> Tensor:
        correction = (b - x @ self.A.T) @ self.W[0]
        return self._shrink(k, x + self.gamma[k] * correction)


class ALISTA(Unrolled):
    r"""TiLISTA with analytic weights: two learned numbers a layer, ``2 K`` in all.

    Args:
        A: ``(m, n)``, columns of length one, rows independent.
        layers: K.
        lam: the thresholds start at ``lam / L``.
        select: growth and ceiling of the support selection, or ``None``.
        weights: ``W (m, n)`` with a unit diagonal of ``W^T A``; ``analytic_weights(A)`` by default.
        normalize: rescale the columns of ``A`` first, and the solution back.

    Raises:
        ValueError: for a dictionary or a setting outside its rules.

    Reference: liu2019alista

    >>> sum(p.numel() for p in ALISTA(torch.eye(4)).parameters())
    32
    """

    def __init__(
        self,
        A: Tensor,
        layers: int = 16,
        *,
        lam: float = 0.4,
        select: tuple[float, float] | None = SCHEDULE,
        weights: Tensor | None = None,
        normalize: bool = False,
    ):
        super().__init__(A, layers, lam, select, normalize)
        weights = analytic_weights(self.A) if weights is None else weights.detach().clone()
        check_weights(weights, self.A)
        self.gamma = scalars(1.0, layers, self.A)
        self.register_buffer("W", weights)

    def _layer(self, k: int, x: Tensor, b: Tensor) -> Tensor:
        correction = (b - x @ self.A.T) @ self.W
        return self._shrink(k, x + self.gamma[k] * correction)
