"""Continuous sparsification of a whole model: put gates on, anneal, reset between rounds, harden, finish."""

from collections.abc import Iterable

import torch
from torch import nn

from .functional import _check, soft_gates
from .gate import ContinuousGate
from .guard import watch_weight_decay
from .layers import GatedLayers, select_layers, warn_dead
from .masks import top_k_masks


class CSHandle(GatedLayers):
    """Everything a training loop needs to run continuous sparsification; made by :func:`apply_cs`.

    Args:
        model: the model, changed in place.
        gates: layer's name to its gate.
        min_keep: gates that :meth:`hard` keeps open in every layer.
        foreach: gate all layers at once in the model's forward pass.

    Reference: savarese2020winning

    >>> handle = apply_cs(nn.Linear(4, 2), s0=0.1)
    >>> handle.set_beta(200.0)
    >>> handle.density(), round(handle.undecided(), 2)
    (1.0, 0.0)
    """

    def __init__(
        self, model: nn.Module, gates: dict[str, ContinuousGate], min_keep: int = 0, foreach: bool = False
    ) -> None:
        super().__init__(model, gates)
        self.min_keep, self._folded = min_keep, False
        self._hooks = []
        if foreach:
            self._hooks.append(model.register_forward_pre_hook(lambda *_: self._gate_all()))
            self._hooks.append(model.register_forward_hook(lambda *_: self._release(), always_call=True))
        watch_weight_decay(self)

    def _gate_all(self) -> None:
        gates = list(self.gates.values())
        if self.is_hard or not gates:
            return
        weights, scores = list(self.weights().values()), [gate.scores for gate in gates]
        ready = soft_gates(weights, scores, self.beta, gates[0].scale_s0, gates[0].lam)
        for gate, weight in zip(gates, ready, strict=True):
            gate._ready = weight

    def _release(self) -> None:
        for gate in self.gates.values():
            gate._ready = None

    def _first(self) -> ContinuousGate:
        self._alive()
        return next(iter(self.gates.values()))

    @property
    def beta(self) -> float:
        """The inverse temperature in use."""
        return self._first().beta

    def set_beta(self, beta: float) -> None:
        """Set the inverse temperature of all gates, > 0."""
        self._alive()
        _check([], [], beta, 0.0)
        for gate in self.gates.values():
            gate.beta = float(beta)

    @property
    def is_hard(self) -> bool:
        """Whether the model computes with the ticket instead of the soft gates."""
        return self._first().is_hard

    def gate_parameters(self) -> list[nn.Parameter]:
        """The scores; for an optimiser group **without** weight decay, which would pull them to the threshold 0."""
        self._alive()
        return [gate.scores for gate in self.gates.values()]

    def weight_parameters(self) -> list[nn.Parameter]:
        """All other parameters of the model: weights, biases, normalisation, layers without a gate."""
        scores = {id(p) for p in self.gate_parameters()}
        return [p for p in self.model.parameters() if id(p) not in scores]

    def param_groups(self, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0) -> list[dict]:
        """Two groups for one optimiser: weights (with decay), scores (without, at ``gate_lr`` or else ``lr``)."""
        return [
            {"params": self.weight_parameters(), "lr": lr, "weight_decay": weight_decay},
            {"params": self.gate_parameters(), "lr": lr if gate_lr is None else gate_lr, "weight_decay": 0.0},
        ]

    def penalty(self) -> float:
        """``lam * sum(c * sigmoid(beta * s))`` for the log; its gradient is already in that of the scores."""
        self._alive()
        return sum(gate.lam * gate.scale * float(gate.openness().sum()) for gate in self.gates.values())

    def density(self, hard: bool = True) -> float:
        """Fraction of gates with ``s > 0`` over all layers, or (``hard=False``) the mean of ``sigmoid(beta * s)``."""
        if hard:
            return super().density()
        self._alive()
        gates = list(self.gates.values())
        return sum(float(gate.openness().sum()) for gate in gates) / sum(gate.scores.numel() for gate in gates)

    def undecided(self, low: float = 0.01, high: float = 0.99) -> float:
        """Fraction of gates with ``low < sigmoid(beta * s) < high``."""
        self._alive()
        open_ = torch.cat([gate.openness().reshape(-1) for gate in self.gates.values()])
        return float(((open_ > low) & (open_ < high)).float().mean())

    @torch.no_grad()
    def end_round(self, reset: str = "paper") -> None:
        """Reset the scores for the next round, ``s <- min(beta * s, s0)``, and the temperature to 1.

        Suppressed gates end far below zero and stay closed; open ones get a fresh chance. ``reset="official"``
        does what the published code does: it sets the temperature to 1 first, so that ``s <- min(s, s0)``.
        """
        if reset not in ("paper", "official"):
            raise ValueError(f"reset must be 'paper' or 'official', got {reset!r}")
        if self.is_hard:
            raise RuntimeError("end_round() needs soft gates; call hard(False) before")
        warn_dead(self.masks())
        for gate in self.gates.values():
            gate.scores.mul_(gate.beta if reset == "paper" else 1.0).clamp_(max=gate.s0)
        self.set_beta(1.0)
        watch_weight_decay(self)

    @torch.no_grad()
    def hard(self, flag: bool = True, density: float | None = None) -> None:
        """Compute with the ticket ``c * H(s) * w`` from now on (``flag=False``: with the soft gates again).

        With ``density`` exactly that fraction stays, chosen by the largest ``s`` over all layers; ``min_keep`` and
        ``density`` work by flipping the sign of the scores concerned, so the scores always hold the whole ticket.
        """
        self._alive()
        if not flag and self._folded:
            raise RuntimeError("hard(False) is not possible after fold(): the mask is in the weights")
        if flag:
            self._settle(density)
            warn_dead(self.masks())
        for gate in self.gates.values():
            gate.hard(flag)
            gate.scores.grad = None  # a stale gradient would let an optimiser move the ticket

    def _settle(self, density: float | None) -> None:
        scores = {name: gate.scores for name, gate in self.gates.items()}
        if density is not None:
            wanted = top_k_masks(scores, density, self.min_keep)
        else:
            floor = {name: top_k_masks({name: s}, 1 / s.numel(), self.min_keep)[name] for name, s in scores.items()}
            wanted = {name: (s > 0) | (floor[name] & (self.min_keep > 0)) for name, s in scores.items()}
        for name, s in scores.items():
            size = s.abs().clamp_min(torch.finfo(s.dtype).tiny)
            flipped = torch.where(wanted[name], size, -size)
            s.copy_(torch.where(wanted[name] == (s > 0), s, flipped))

    @torch.no_grad()
    def fold(self, density: float | None = None) -> None:
        """Harden, and move ``c * H(s)`` into the weights: ``w <- c * H(s) * w``; the mask stays on for fine-tuning."""
        self.hard(density=density)
        for name, weight in self.weights().items():
            weight.copy_(self.gates[name](weight))
            self.gates[name].scale_s0 = None
        self._folded = True

    def rewind(self) -> None:
        """Put back what :meth:`checkpoint` saved; the gates stay as they are. Use a new optimiser afterwards."""
        if self._folded:
            raise RuntimeError(
                "rewind() after fold() would lose the scale 1 / sigmoid(s0); use hard() instead of fold()"
            )
        super().rewind()

    def finalize(self, sparse: bool = False, density: float | None = None) -> nn.Module:
        """Harden (at exactly ``density`` if given), fold, and take the gates off; the handle is used up.

        Args:
            sparse: also turn every gated ``nn.Linear`` into a CSR layer for inference.
            density: keep exactly this fraction, by the largest scores over all layers.

        Returns:
            The plain model, without gate parameters.
        """
        self.hard(density=density)
        for hook in self._hooks:
            hook.remove()
        return super().finalize(sparse)


def apply_cs(
    model: nn.Module,
    s0: float = 0.0,
    include: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
    exclude: Iterable[str | type[nn.Module]] = (),
    *,
    lam: float = 0.0,
    scale_init: bool = True,
    min_keep: int = 0,
    foreach: bool | None = None,
) -> CSHandle:
    r"""Put a learned gate on every chosen weight: ``W = sigmoid(beta * s) / sigmoid(s0) * w``, in place.

    The published experiments gate the 3x3 convolutions only; leave out the rest with ``exclude``.

    Args:
        model: any module.
        s0: initial score; the smaller, the sparser (about -0.3 .. 0.3 is useful).
        include: types of layers to gate.
        exclude: names, patterns or types to leave out.
        lam: strength of the penalty ``lam * sum(gates)``, >= 0. The push on a gate is about steps x gate lr x lam:
            a value for 85 epochs does nothing in 5.
        scale_init: divide by ``sigmoid(s0)``, so that the model starts unchanged.
        min_keep: weights that every layer keeps in the ticket, >= 0.
        foreach: compute all gates in one go at the model's forward pass; ``None``: when the model is on a GPU.

    Returns:
        The handle.

    Raises:
        ValueError: a number out of range, no layer matches, or gates are on already.

    Reference: savarese2020winning

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> apply_cs(model, s0=-0.05, exclude=["2"]).per_layer()
    {'0': 0.0}
    """
    layers = select_layers(model, include, exclude)
    if min_keep < 0:
        raise ValueError(f"min_keep must be >= 0, got {min_keep}")
    weights = {name: layer.weight for name, layer in layers.items()}
    gates = {
        name: ContinuousGate(w.shape, s0, scale_init, lam, device=w.device, dtype=w.dtype)
        for name, w in weights.items()
    }
    if foreach is None:
        foreach = all(w.is_cuda for w in weights.values())
    return CSHandle(model, gates, min_keep, foreach)
