"""The stochastic rival: L0 regularisation with hard-concrete gates, one gate per weight."""

import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn

from .layers import GatedLayers, select_layers
from .masks import top_k_masks

TEMPERATURE, GAMMA, ZETA = 2 / 3, -0.1, 1.1


class HardConcreteGate(nn.Module):
    r"""Multiply a weight by a sampled gate, ``z = clamp(sigmoid((logit(u) + a) / T) (zeta - gamma) + gamma, 0, 1)``.

    In evaluation mode the noise is left out. ``a`` is the parameter ``scores``; the expected number of gates that are
    not zero is ``sum sigmoid(a - T log(-gamma / zeta))``.

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
        self,
        shape: tuple[int, ...],
        init: float = 2.2,
        lam: float = 0.0,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        if lam < 0:
            raise ValueError(f"lam must be >= 0, got {lam}")
        self.scores = nn.Parameter(torch.full(tuple(shape), float(init)))
        self.lam, self.generator, self.is_hard = float(lam), generator, False

    def forward(self, w: Tensor) -> Tensor:
        """The gated weight, shape of ``w``."""
        if self.is_hard:
            return w * self.mask()
        logits = self.scores
        if self.training:
            # Noise of the scores' type would round u to 0 or 1 too often; the clamp keeps its logit finite.
            u = torch.rand(logits.shape, generator=self.generator, dtype=logits.dtype, device=logits.device)
            logits = (torch.logit(u.clamp_(1e-6, 1 - 1e-6)) + logits) / TEMPERATURE
        return w * (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def expected_open(self) -> Tensor:
        """Probability that each gate is not zero, with gradient."""
        return torch.sigmoid(self.scores - TEMPERATURE * math.log(-GAMMA / ZETA))

    def mask(self) -> Tensor:
        """Gates that are open without noise, as a bool tensor of the weight's shape."""
        return torch.sigmoid(self.scores.detach()) * (ZETA - GAMMA) + GAMMA > 0


class L0Handle(GatedLayers):
    """A model with hard-concrete gates, made by :func:`apply_l0`; add :meth:`penalty` to the loss.

    Reference: louizos2018learning

    >>> handle = apply_l0(nn.Linear(4, 2), lam=0.1)
    >>> handle.density()
    1.0
    """

    def penalty(self) -> Tensor:
        """``lam`` times the expected number of open gates, with gradient."""
        self._alive()
        return sum(gate.lam * gate.expected_open().sum() for gate in self.gates.values())

    def param_groups(self, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0) -> list[dict]:
        """Two groups for one optimiser: weights (with decay), scores (without)."""
        scores = [gate.scores for gate in self.gates.values()]
        known = {id(p) for p in scores}
        weights = [p for p in self.model.parameters() if id(p) not in known]
        return [
            {"params": weights, "lr": lr, "weight_decay": weight_decay},
            {"params": scores, "lr": lr if gate_lr is None else gate_lr, "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def fold(self, density: float | None = None) -> None:
        """Fold the noiseless gates into the weights; keep the open ones, or exactly ``density`` by largest score."""
        scores = {name: gate.scores for name, gate in self.gates.items()}
        masks = self.masks() if density is None else top_k_masks(scores, density)
        for name, weight in self.weights().items():
            gate, training = self.gates[name], self.gates[name].training
            weight.copy_(gate.eval()(weight) * masks[name])
            gate.train(training)
            gate.scores.copy_(torch.where(masks[name], 10.0, -10.0))
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
    """Put a hard-concrete gate on every chosen weight, in place.

    Args:
        model: any module.
        init: initial score of every gate.
        include: types of layers to gate.
        exclude: names, patterns or types to leave out.
        lam: strength of the penalty, >= 0.
        generator: stream of the gates' noise, on the model's device.

    Returns:
        The handle.

    Raises:
        ValueError: ``lam`` negative, no layer matches, or gates are on already.

    Reference: louizos2018learning

    >>> apply_l0(nn.Linear(3, 2), lam=1.0).penalty().item() > 5.8
    True
    """
    layers = select_layers(model, include, exclude)
    gates = {
        name: HardConcreteGate(layer.weight.shape, init, lam, generator).to(layer.weight)
        for name, layer in layers.items()
    }
    return L0Handle(model, gates)
