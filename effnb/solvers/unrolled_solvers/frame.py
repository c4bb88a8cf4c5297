"""Frame of the trained networks: dictionary, thresholds, the loop over layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from effnb.solvers.unrolled_solvers._check import (
    check_batch,
    check_count,
    check_matrix,
    check_number,
    check_unit_columns,
)
from effnb.solvers.unrolled_solvers.problem import normalize_columns
from effnb.solvers.unrolled_solvers.thresholds import select, soft

SCHEDULE = (0.012, 0.13)  # of n: growth per layer and ceiling of the entries that pass unchanged (noiseless default)


def scalars(value: float, count: int, like: Tensor) -> nn.ParameterList:
    """Return ``count`` learnable numbers in the dtype and on the device of ``like``."""
    return nn.ParameterList([nn.Parameter(like.new_tensor(value)) for _ in range(count)])


def copies(value: Tensor, count: int) -> nn.ParameterList:
    """Return ``count`` learnable copies of a matrix."""
    return nn.ParameterList([nn.Parameter(value.clone()) for _ in range(count)])


class Unrolled(nn.Module):
    """Shared frame: the dictionary, the input checks and the loop over layers.

    Every parameter lives in a ``ParameterList`` of one entry per layer, or of a single entry if layers share it.
    """

    def __init__(self, A: Tensor, layers: int, lam: float, select: tuple[float, float] | None, normalize: bool):
        super().__init__()
        check_matrix(A)
        check_count(layers, "layers")
        check_number(lam, "lam", 0)
        A, norms = normalize_columns(A.detach()) if normalize else (A.detach().clone(), A.new_ones(A.shape[1]))
        check_unit_columns(A)
        self.register_buffer("A", A)
        self.register_buffer("column_norms", norms)
        self.layers, self.normalize = layers, normalize
        self.lipschitz = float(torch.linalg.matrix_norm(A, 2)) ** 2
        self.theta = scalars(lam / self.lipschitz, layers, A)
        self.counts = self._schedule(select)

    def _schedule(self, select: tuple[float, float] | None) -> list[int]:
        """Whole number of entries that pass unchanged in each layer."""
        if select is None:
            return [0] * self.layers
        growth, ceiling = select
        check_number(growth, "select[0]", 0)
        if not 0 <= ceiling <= 1:
            raise ValueError(f"select[1] must be in [0, 1], got {ceiling}")
        n = self.A.shape[1]
        return [math.floor(min(growth * (k + 1), ceiling) * n + 1e-9) for k in range(self.layers)]

    def _shrink(self, k: int, z: Tensor) -> Tensor:
        theta = self.theta[k].clamp_min(0)
        if self.counts[k] == 0:
            return soft(z, theta)
        return select(z, theta, self.counts[k])

    def _prepare(self, b: Tensor) -> Tensor:
        """Return what every layer needs of the measurements."""
        return b

    def _layer(self, k: int, x: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def layer_parameters(self, k: int) -> list[nn.Parameter]:
        """Return the parameters that layer ``k`` uses, shared ones included."""
        lists = [part for part in self.children() if isinstance(part, nn.ParameterList)]
        return [part[min(k, len(part) - 1)] for part in lists]

    @torch.no_grad()
    def warm_start(self, k: int) -> None:
        """Copy the parameters of layer ``k - 1`` into layer ``k``."""
        for new, old in zip(self.layer_parameters(k), self.layer_parameters(k - 1), strict=True):
            new.copy_(old)

    def forward(self, b: Tensor, n_layers: int | None = None, return_all: bool = False) -> Tensor:
        """Return the estimate ``(batch, n)``, or with ``return_all`` every layer's ``(n_layers, batch, n)``.

        Args:
            b: ``(batch, m)``.
            n_layers: use only the first layers.
            return_all: return the estimates of all layers.

        Raises:
            ValueError: for a wrong shape, values that are not finite or too many layers.
        """
        check_batch(b, self.A.shape[0])
        n_layers = self.layers if n_layers is None else n_layers
        check_count(n_layers, "n_layers", 0, self.layers)
        outputs = self.iterate(b, n_layers)
        if not outputs:
            return b.new_zeros(b.shape[0], self.A.shape[1])
        return torch.stack(outputs) if return_all else outputs[-1]

    def iterate(self, b: Tensor, n_layers: int, first_trained: int = 0) -> list[Tensor]:
        """Return the estimates of the first layers; those before ``first_trained`` run without gradient."""
        x, outputs = b.new_zeros(b.shape[0], self.A.shape[1]), []
        prepared = self._prepare(b)
        for k in range(n_layers):
            with torch.set_grad_enabled(torch.is_grad_enabled() and k >= first_trained):
                x = self._layer(k, x, prepared)
            outputs.append(x)
        return [x / self.column_norms for x in outputs] if self.normalize else outputs


def check_weights(W: Tensor, A: Tensor) -> None:
    """Raise unless ``W`` has the shape of ``A`` and ``W^T A`` a unit diagonal."""
    if W.shape != A.shape:
        raise ValueError(f"weights must have the shape of A {tuple(A.shape)}, got {tuple(W.shape)}")
    worst = float(((W * A).sum(0) - 1).abs().max())
    if not worst <= 1e-3:
        raise ValueError(f"weights must satisfy diag(W^T A) = 1, got an error of {worst:.3g}")
