"""Gates as parametrisations: the learned sigmoid gate, and the fixed mask that all other methods need."""

import torch
from torch import Tensor, nn

from .functional import _check, gate_scale, hard_gate, soft_gate


class ContinuousGate(nn.Module):
    r"""Multiply a weight by a learned deterministic gate, ``W = sigmoid(beta * s) / sigmoid(s0) * w``.

    A parametrisation for :func:`torch.nn.utils.parametrize.register_parametrization`. While ``is_hard`` the gate is
    the ticket ``H(s)`` and gets no gradient. ``state_dict`` holds the scores and (as one small tensor) the
    temperature, the mode and the scale.

    Args:
        shape: shape of the weight.
        s0: initial score of every gate, in [-15, inf).
        scale_init: divide by ``sigmoid(s0)``, so that a fresh gate at ``beta = 1`` changes nothing.
        lam: strength of the penalty on open gates, fused into the backward pass, >= 0.
        device: where the scores live.
        dtype: type of the scores.

    Raises:
        ValueError: ``s0`` or ``lam`` out of range.

    Reference: savarese2020winning

    >>> gate = ContinuousGate((2, 3), s0=-0.1)
    >>> w = torch.arange(6.0).reshape(2, 3)
    >>> torch.allclose(gate(w), w), gate.density()
    (True, 0.0)
    """

    def __init__(
        self,
        shape: torch.Size | tuple[int, ...],
        s0: float = 0.0,
        scale_init: bool = True,
        lam: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        gate_scale(s0)
        _check([], [], 1.0, lam)
        self.scores = nn.Parameter(torch.full(tuple(shape), float(s0), device=device, dtype=dtype))
        self.s0, self.scale_s0 = float(s0), float(s0) if scale_init else None
        self.beta, self.lam, self.is_hard = 1.0, float(lam), False
        self._ready: Tensor | None = None  # filled by the handle when all layers are gated at once

    @property
    def scale(self) -> float:
        """The factor ``1 / sigmoid(s0)``, or 1 without ``scale_init`` and after folding."""
        return gate_scale(self.scale_s0)

    def forward(self, w: Tensor) -> Tensor:
        """The effective weight, shape of ``w``."""
        if self._ready is not None:
            return self._ready
        if self.is_hard:
            return hard_gate(w, self.scores, self.scale_s0)
        return soft_gate(w, self.scores, self.beta, self.scale_s0, self.lam)

    def mask(self) -> Tensor:
        """The ticket ``s > 0`` as a bool tensor of the weight's shape."""
        return self.scores.detach() > 0

    def openness(self) -> Tensor:
        """``sigmoid(beta * s)`` without gradient, in [0, 1]."""
        return torch.sigmoid(self.scores.detach() * self.beta)

    def density(self) -> float:
        """Fraction of gates with ``s > 0``; does not depend on the temperature."""
        return float(self.mask().float().mean())

    def hard(self, flag: bool = True) -> "ContinuousGate":
        """Use the ticket instead of the soft gate (or the soft gate again); returns the gate."""
        self.is_hard = bool(flag)
        return self

    def get_extra_state(self) -> Tensor:
        """Temperature, penalty, mode and scale as one float64 tensor, for ``state_dict``."""
        scale_s0 = float("nan") if self.scale_s0 is None else self.scale_s0
        return torch.tensor([self.beta, self.lam, self.is_hard, self.s0, scale_s0], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` returned."""
        self.beta, self.lam, is_hard, self.s0, scale_s0 = state.tolist()
        self.is_hard, self.scale_s0 = bool(is_hard), None if scale_s0 != scale_s0 else scale_s0

    def extra_repr(self) -> str:
        """Shape, initial score and temperature."""
        return f"{tuple(self.scores.shape)}, s0={self.s0:g}, beta={self.beta:g}, hard={self.is_hard}"


class FixedMask(nn.Module):
    """Multiply a weight by a mask that does not learn; applied in every forward pass, so nothing is revived.

    Args:
        mask: bool tensor of the weight's shape.
        dtype: type of the weight; the mask is kept in it, since multiplying by bool is several times slower.

    Raises:
        TypeError: the mask is not bool.

    Reference: frankle2019lottery

    >>> FixedMask(torch.tensor([True, False]))(torch.tensor([5.0, 5.0]))
    tensor([5., 0.])
    """

    def __init__(self, mask: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if mask.dtype is not torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
        self.register_buffer("keep", mask.to(dtype))

    def forward(self, w: Tensor) -> Tensor:
        """The masked weight, shape of ``w``."""
        return w * self.keep

    def mask(self) -> Tensor:
        """The mask as a bool tensor of the weight's shape."""
        return self.keep > 0
