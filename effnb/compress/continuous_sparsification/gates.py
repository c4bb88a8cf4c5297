"""Gates on single weights: the learned sigmoid as function and layer, and its stochastic rival, hard concrete."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable

from effnb.common import check_number
from effnb.compress._gated import select_layers
from effnb.compress.continuous_sparsification.masks import MaskedLayers, top_k_masks

__all__ = ["ContinuousGate", "HardConcreteGate", "L0Handle", "apply_l0", "hard_gate", "soft_gate"]


def gate_scale(s0: float | None) -> float:
    """Return ``c = 1 / sigmoid(s0)`` (1 for ``None``), at which a fresh gate is the identity; at most three million."""
    if s0 is None:
        return 1.0
    if not -15 <= s0 < math.inf:  # as in `soft_gates`: the full check only where it will fail
        check_number("s0", s0, ge=-15)
    return 1.0 + math.exp(-s0)


def _check_shapes(weights: Sequence[Tensor], scores: Sequence[Tensor]) -> None:
    """Raise unless there is one tensor of scores per weight, of its shape."""
    if [w.shape for w in weights] != [s.shape for s in scores]:
        wanted, found = ([tuple(t.shape) for t in tensors] for tensors in (weights, scores))
        raise ValueError(f"scores must have the weight's shape, one tensor per weight: {wanted}, got {found}")


class _SoftGates(torch.autograd.Function):
    """All soft gates of a model in one node; keeps only ``w`` (a parameter anyway) and ``sigmoid(beta * s)``."""

    @staticmethod
    def forward(ctx, beta: float, scale: float, lam: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, scores = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        if scores[0].is_cuda:
            # On a GPU a small layer's kernel costs its launch: one for all layers.
            opened = torch._foreach_mul(scores, beta)
            torch._foreach_sigmoid_(opened)
            outputs = torch._foreach_mul(weights, opened)
            torch._foreach_mul_(outputs, scale)
        else:
            # A 0-d zero turns addcmul into "scale * w * m": one pass where mul().mul_() takes two.
            opened = [torch.mul(s, beta).sigmoid_() for s in scores]
            outputs = [torch.addcmul(w.new_zeros(()), w, m, value=scale) for w, m in zip(weights, opened, strict=True)]
        ctx.save_for_backward(*weights, *opened)
        ctx.constants = beta, scale, lam
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        beta, scale, lam = ctx.constants
        saved = ctx.saved_tensors
        weights, opened = saved[: len(grads)], saved[len(grads) :]
        needs = ctx.needs_input_grad[3:]
        grad_w: list[Tensor | None] = [None] * len(grads)
        grad_s: list[Tensor | None] = [None] * len(grads)
        for i, (g, w, m) in enumerate(zip(grads, weights, opened, strict=True)):
            if needs[i]:
                grad_w[i] = torch.addcmul(g.new_zeros(()), g, m, value=scale)
            if needs[len(grads) + i]:
                # d/ds [L + lam * sum(c m)] = (g w + lam) * c * beta * m (1 - m)
                push = torch.addcmul(g.new_full((), lam * scale * beta), g, w, value=scale * beta)
                grad_s[i] = torch.ops.aten.sigmoid_backward(push, m)
        return None, None, None, *grad_w, *grad_s


def soft_gates(
    weights: Sequence[Tensor], scores: Sequence[Tensor], beta: float, s0: float | None = 0.0, lam: float = 0.0
) -> tuple[Tensor, ...]:
    """Return the soft effective weights of many layers at once: :func:`soft_gate` for each pair, in one graph node."""
    scale = gate_scale(s0)
    # In every forward pass of every layer: the full checks, some microseconds each, only where one will fail.
    if not (0 < beta < math.inf and 0 <= lam < math.inf):
        check_number("beta", beta, gt=0)
        check_number("lam", lam, ge=0)
    _check_shapes(weights, scores)
    return _SoftGates.apply(float(beta), scale, float(lam), *weights, *scores) if weights else ()


def soft_gate(w: Tensor, s: Tensor, beta: float, s0: float | None = 0.0, lam: float = 0.0) -> Tensor:
    r"""Return the soft effective weight ``W = c * sigmoid(beta * s) * w`` with ``c = 1 / sigmoid(s0)``.

    The backward pass adds the gradient of ``lam * sum(c * sigmoid(beta * s))`` to that of the scores, so the penalty
    needs no graph of its own. That part is added once per backward pass through the result and does not follow a
    factor put on the loss (gradient accumulation, loss scaling): divide ``lam`` accordingly there.

    Args:
        w: weight of any shape.
        s: gate scores of the same shape.
        beta: inverse temperature, > 0.
        s0: initial score, ``c = 1 / sigmoid(s0)``; ``None`` for ``c = 1``.
        lam: penalty whose gradient is fused into that of ``s``, >= 0.

    Raises:
        ValueError: unequal shapes, or a constant out of range.

    Reference: savarese2020winning

    >>> soft_gate(torch.tensor([3.0, 3.0]), torch.tensor([-1.0, 1.0]), beta=200.0)
    tensor([0., 6.])
    """
    return soft_gates([w], [s], beta, s0, lam)[0]


def hard_gate(w: Tensor, s: Tensor, s0: float | None = 0.0) -> Tensor:
    r"""Return the ticket weight ``c * H(s) * w`` where ``H(s) = 1`` for ``s > 0`` and 0 otherwise (0 for ``s == 0``).

    Args:
        w, s, s0: as in :func:`soft_gate`; no gradient flows to ``s``.

    Raises:
        ValueError: unequal shapes, a score that is NaN, or ``s0`` out of range.

    Reference: savarese2020winning

    >>> hard_gate(torch.tensor([3.0, 3.0]), torch.tensor([0.0, 1e-9]))
    tensor([0., 6.])
    """
    _check_shapes([w], [s])
    if s.isnan().any():
        raise ValueError("scores must not hold NaN: it would count as pruned")
    return _ticket_weight(w, s, gate_scale(s0))


def _ticket_weight(w: Tensor, s: Tensor, scale: float) -> Tensor:
    """``scale * H(s) * w``, unchecked: it runs in every forward pass of a fine-tuning."""
    # A mask of the weight's type: multiplying by a bool tensor is several times slower on a CPU.
    mask = (s > 0).to(w.dtype)
    return w * (mask if scale == 1.0 else mask.mul_(scale))


class ContinuousGate(nn.Module):
    r"""A learned deterministic gate on a weight, ``W = sigmoid(beta * s) / sigmoid(s0) * w``.

    A parametrisation for :func:`torch.nn.utils.parametrize.register_parametrization`. While ``is_hard`` the gate is the
    ticket ``H(s)`` and gets no gradient. ``state_dict`` holds the scores and, in one small tensor, all the rest.

    Args:
        shape: shape of the weight.
        s0: initial score of every gate, in [-15, inf).
        scale_init: divide by ``sigmoid(s0)``, so that a fresh gate at ``beta = 1`` changes nothing.
        lam: strength of the penalty on open gates, fused into the backward pass, >= 0.
        device, dtype: of the scores.

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
        check_number("lam", lam, ge=0)
        self.scores = nn.Parameter(torch.full(tuple(shape), float(s0), device=device, dtype=dtype))
        self.s0, self.scale_s0 = float(s0), float(s0) if scale_init else None
        self.beta, self.lam, self.is_hard = 1.0, float(lam), False
        self._ready: Tensor | None = None  # filled by the handle when all layers are gated at once

    @property
    def scale(self) -> float:
        """The factor ``1 / sigmoid(s0)``, or 1 without ``scale_init`` and after folding."""
        return gate_scale(self.scale_s0)

    def forward(self, w: Tensor) -> Tensor:
        """Return the effective weight, shape of ``w``."""
        if self._ready is not None:
            return self._ready
        if self.is_hard:
            return _ticket_weight(w, self.scores, self.scale)
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
        """Use the ticket instead of the soft gate (or the soft gate again); return the gate."""
        self.is_hard = bool(flag)
        return self

    def get_extra_state(self) -> Tensor:
        """Temperature, penalty, mode and scale as one float64 tensor, for ``state_dict``."""
        scale_s0 = float("nan") if self.scale_s0 is None else self.scale_s0
        return torch.tensor([self.beta, self.lam, self.is_hard, self.s0, scale_s0], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` returned."""
        self.beta, self.lam, is_hard, self.s0, scale_s0 = state.tolist()
        self.is_hard, self.scale_s0 = bool(is_hard), None if math.isnan(scale_s0) else scale_s0

    def extra_repr(self) -> str:
        """Shape, initial score and temperature."""
        return f"{tuple(self.scores.shape)}, s0={self.s0:g}, beta={self.beta:g}, hard={self.is_hard}"


TEMPERATURE, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # of hard concrete, as published


class HardConcreteGate(nn.Module):
    r"""A sampled gate on a weight, ``z = clamp(sigmoid((logit(u) + a) / T) (zeta - gamma) + gamma, 0, 1)``.

    In evaluation mode the noise and ``T`` are left out. ``a`` is the parameter ``scores``; the expected number of gates
    that are not zero is ``sum sigmoid(a - T log(-gamma / zeta))``.

    Args:
        shape: shape of the weight.
        init: initial ``a``; at 2.2 a gate is open with probability 0.98.
        lam: strength of the penalty on the expected number of open gates, >= 0.
        generator: stream of the noise ``u``; ``None`` for torch's own.

    Raises:
        ValueError: ``lam`` negative.

    Reference: louizos2018learning

    >>> gate = HardConcreteGate((3,), init=10.0).eval()
    >>> gate(torch.ones(3))
    tensor([1., 1., 1.], grad_fn=...)
    """

    def __init__(
        self, shape: tuple[int, ...], init: float = 2.2, lam: float = 0.0, generator: Generator | None = None
    ) -> None:
        super().__init__()
        check_number("init", init)
        check_number("lam", lam, ge=0)
        self.scores = nn.Parameter(torch.full(tuple(shape), float(init)))
        self.lam, self.generator, self.is_hard = float(lam), generator, False

    def forward(self, w: Tensor) -> Tensor:
        """Return the gated weight, shape of ``w``."""
        if self.is_hard:
            return w * self.mask()
        logits = self.scores
        if self.training:
            u = torch.rand(logits.shape, generator=self.generator, dtype=logits.dtype, device=logits.device)
            # A float32 `u` is 0 now and then: the clamp keeps its logit finite.
            logits = (torch.logit(u.clamp_(1e-6, 1 - 1e-6)) + logits) / TEMPERATURE
        return w * (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def expected_open(self) -> Tensor:
        """Probability that each gate is not zero, with gradient."""
        return torch.sigmoid(self.scores - TEMPERATURE * math.log(-GAMMA / ZETA))

    def mask(self) -> Tensor:
        """Gates that are open without noise, as a bool tensor of the weight's shape."""
        return torch.sigmoid(self.scores.detach()) * (ZETA - GAMMA) + GAMMA > 0


class L0Handle(MaskedLayers):
    """A model with hard-concrete gates, made by :func:`apply_l0`; add :meth:`penalty` to the loss.

    >>> handle = apply_l0(nn.Linear(4, 2), lam=0.1)
    >>> handle.density()
    1.0
    """

    def penalty(self) -> Tensor:
        """``lam`` times the expected number of open gates, with gradient."""
        return sum(gate.lam * gate.expected_open().sum() for gate in self.gates.values())

    @torch.no_grad()
    def fold(self, density: float | None = None) -> None:
        """Fold the noiseless gates into the weights; keep the open ones, or exactly ``density`` by largest score."""
        masks = self.masks()
        if density is not None:
            masks = top_k_masks({name: gate.scores for name, gate in self.gates.items()}, density)
        for name, weight in self.weights().items():
            gate, training = self.gates[name], self.gates[name].training
            weight.copy_(gate.eval()(weight) * masks[name])
            gate.train(training)
            gate.scores.copy_(torch.where(masks[name], 10.0, -10.0))  # far on either side: `mask()` reads them
            gate.is_hard = True


def apply_l0(
    model: nn.Module,
    init: float = 2.2,
    include: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
    exclude: Iterable[str | type[nn.Module]] = (),
    *,
    lam: float = 0.0,
    generator: Generator | None = None,
) -> L0Handle:
    """Put a hard-concrete gate on every chosen weight, in place, and return the handle.

    Args:
        model: any module.
        init: initial score of every gate.
        include, exclude: layers to gate, see :func:`select_layers`.
        lam: strength of the penalty, >= 0.
        generator: stream of the gates' noise, on the model's device.

    Raises:
        ValueError: ``lam`` negative, no layer matches, or gates are on already.

    Reference: louizos2018learning

    >>> apply_l0(nn.Linear(3, 2), lam=1.0).penalty().item() > 5.8
    True
    """
    weights = {name: layer.weight for name, layer in select_layers(model, include, exclude).items()}
    return L0Handle(model, {n: HardConcreteGate(w.shape, init, lam, generator).to(w) for n, w in weights.items()})
