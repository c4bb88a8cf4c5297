"""SMOL for a whole model: put limits on, search, freeze the bits, fine-tune, finish."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effnb.compress._gated import select_layers

from .activation import SmolActivation, add_activations
from .digits import check_bits
from .gate import SmolGate
from .groups import Granularity
from .guard import watch_weight_decay
from .noise import NOISE_POWER, check_lam
from .storage_cost import BitCost, map_entropy


class Frozen(NamedTuple):
    """What :meth:`SmolHandle.freeze` did: mean bits, and how many weights were cut to the range of bits.

    Reference: savarese2022bits

    >>> Frozen(2.5, 3, 0).capped
    3
    """

    average_bits: float
    capped: int  # wanted more than p_max
    raised: int  # wanted less than p_min


class SmolHandle:
    """Everything a training loop needs; made by :func:`apply_smol` or :func:`uniform_qat`.

    Args:
        model: the model, changed in place.
        gates: layer's name to the gate on its weight.

    Reference: savarese2022bits

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> handle = apply_smol(model, init_bits=3)
    >>> handle.freeze().average_bits, handle.histogram()
    (3.0, {3: 18})
    """

    def __init__(self, model: nn.Module, gates: dict[str, SmolGate]) -> None:
        self.model, self.gates = model, gates
        self.activations: dict[str, SmolActivation] = {}
        self.layers = {name: model.get_submodule(name) for name in gates}
        for name, gate in gates.items():
            parametrize.register_parametrization(self.layers[name], "weight", gate)
            self.layers[name].parametrizations.train(self.layers[name].training)
        if not self.is_frozen:
            self.clip_()
            watch_weight_decay(self)

    def _alive(self) -> None:
        if not self.gates:
            raise ValueError("the handle holds no layer: the model is empty, or finalize() took the gates off")

    def _all(self) -> list[SmolGate]:
        self._alive()
        return [*self.gates.values(), *self.activations.values()]

    @property
    def is_frozen(self) -> bool:
        """Whether the bits are fixed (phase II)."""
        return all(gate.is_frozen for gate in self._all())

    def weights(self) -> dict[str, Tensor]:
        """Raw weights ``a * u`` (before noise or rounding), layer's name to parameter."""
        self._alive()
        return {name: layer.parametrizations.weight.original for name, layer in self.layers.items()}

    def precision_parameters(self) -> list[nn.Parameter]:
        """The limits ``s``; for Adam **without** weight decay, which would pull every weight to 2 bits."""
        return [gate.s for gate in self._all()]

    def weight_parameters(self) -> list[nn.Parameter]:
        """All other parameters: weights, biases, normalisation, layers left out."""
        limits = {id(p) for p in self.precision_parameters()}
        return [p for p in self.model.parameters() if id(p) not in limits]

    def param_groups(self, lr: float, s_lr: float = 1e-3, weight_decay: float = 0.0) -> list[dict]:
        """Two groups for one optimiser: weights at ``lr`` (no division by ``a^2`` is needed), limits at ``s_lr``."""
        return [
            {"params": self.weight_parameters(), "lr": lr, "weight_decay": weight_decay},
            {"params": self.precision_parameters(), "lr": s_lr, "weight_decay": 0.0},
        ]

    def penalty(self) -> Tensor:
        """Bits above one over all weights (and activations), ``sum(n_g * (p(s_g) - 1))``, with gradient.

        Add ``lam * handle.penalty()`` to the loss, or give ``lam`` to :func:`apply_smol` and add nothing.
        """
        return torch.stack([gate.penalty() for gate in self._all()]).sum()

    def _weighted(self, values: Mapping[str, float]) -> float:
        self._alive()
        sizes = {name: gate.groups.numel for name, gate in self.gates.items()}
        return sum(values[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def average_bits(self, real: bool = False) -> float:
        """Mean bits of a weight (payload only): whole after the bit rule, or (``real=True``) as learned."""
        return self._weighted({name: gate.average_bits(real) for name, gate in self.gates.items()})

    def per_layer(self, real: bool = False) -> dict[str, float]:
        """Mean bits of each layer's weights."""
        self._alive()
        return {name: gate.average_bits(real) for name, gate in self.gates.items()}

    def bits(self) -> dict[str, Tensor]:
        """Whole bits of every weight, layer's name to uint8 tensor of the weight's shape."""
        self._alive()
        return {name: gate.weight_bits() for name, gate in self.gates.items()}

    def histogram(self) -> dict[int, int]:
        """Bits to number of weights."""
        counts: Counter[int] = Counter()
        for bits in self.bits().values():
            levels, numbers = bits.unique(return_counts=True)
            counts.update(dict(zip(levels.tolist(), numbers.tolist(), strict=True)))
        return dict(sorted(counts.items()))

    def cost(self) -> BitCost:
        """Bits per weight: payload, entropy of the map of bits (which must be stored too), and their sum."""
        index = {name: map_entropy(g.group_bits()) * g.bits.numel() / g.groups.numel for name, g in self.gates.items()}
        return BitCost(self.average_bits(), self._weighted(index))

    @torch.no_grad()
    def clip_(self) -> None:
        """Clip all weights to the range of the codes, ``|u| <= 2 - sigma(s)``; call it after every optimiser step."""
        for name, weight in self.weights().items():
            self.gates[name].clip_(weight)

    def sample(self, mode: str = "training") -> None:
        """Draw noise in training mode only (``"training"``), always (``"on"``) or never (``"off"``)."""
        if mode not in ("training", "on", "off"):
            raise ValueError(f"mode must be 'training', 'on' or 'off', got {mode!r}")
        for gate in self._all():
            gate.sampling = mode

    def freeze(self, rounding: str = "round", p_min: int = 1, p_max: int = 8) -> Frozen:
        """Fix whole bits, ``clamp(round(p(s)), p_min, p_max)``, and quantise from now on (phase II).

        ``rounding="ceil"`` never allows a rounding error above the learned limit, except at ``p_max``. The limits get
        no gradient any more: use a new optimiser on :meth:`weight_parameters`, with its own schedule.
        """
        if any(gate.is_frozen for gate in self._all()):
            raise RuntimeError("freeze() must be called once: the bits are fixed already")
        if rounding not in ("round", "ceil"):
            raise ValueError(f"rounding must be 'round' or 'ceil', got {rounding!r}")
        check_bits(p_min, 8, "p_min")
        check_bits(p_max, 8, "p_max")
        if p_min > p_max:
            raise ValueError(f"p_min must not exceed p_max={p_max}, got {p_min}")
        capped = raised = 0
        for gate in self.gates.values():
            free, sizes = gate.group_bits(rounding, 1, 99), gate.groups.sizes(gate.s)
            capped += int(((free > p_max) * sizes).sum())
            raised += int(((free < p_min) * sizes).sum())
        for gate in self._all():
            gate.freeze(gate.group_bits(rounding, p_min, p_max))
        return Frozen(self.average_bits(), capped, raised)

    def finalize(self) -> nn.Module:
        """Put the quantised weights in place of the gates; the handle is used up. Activation layers stay.

        Returns:
            The model, with plain weights.
        """
        if not self.is_frozen:
            raise RuntimeError("finalize() needs fixed bits: call freeze() before")
        for layer in self.layers.values():
            with torch.no_grad():
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        self.gates, self.layers = {}, {}
        return self.model


def apply_smol(
    model: nn.Module,
    init_bits: float = 8.0,
    granularity: Granularity = "weight",
    include: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
    exclude: Iterable[str | type[nn.Module]] = (),
    *,
    lam: float = 0.0,
    noise: str = "uniform",
    scale: str | float = "std",
    activations: Mapping[str, int] | None = None,
    strict: bool = False,
    generator: torch.Generator | None = None,
) -> SmolHandle:
    r"""Put trainable noise on every chosen weight, ``W = a * (u + sigma(s) * eps)``, in place (phase I).

    By default all weight matrices and kernels, first and last layer included; biases and normalisation never. The
    weight is clipped to ``|u| <= 2 - sigma``: a scale of one standard deviation cuts the tails at two.

    Args:
        model: any module.
        init_bits: bits that all limits start from, in (1, 16].
        granularity: ``"weight"``, ``"filter"``, ``"input"``, ``"layer"`` or ``("block", g)``.
        include: types of layers to take.
        exclude: names, patterns or types to leave out.
        lam: price of a bit, >= 0, fused into the gradient of the limits. Stated for uniform noise: Rademacher noise
            has three times the variance, and its price is multiplied by 3 so that the same ``lam`` gives the same bits.
        noise: ``"uniform"`` or ``"rademacher"``.
        scale: ``"std"``, ``"max"`` or a factor on the standard deviation (see :func:`initial_scale`).
        activations: name of a module to its number of output channels: learn limits for these activations too.
        strict: refuse blocks that do not divide a weight.
        generator: stream for the noise; ``None`` for torch's own.

    Returns:
        The handle.

    Raises:
        ValueError: a number out of range, no layer matches, a weight without scale (all zero), unknown names.

    Reference: savarese2022bits

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> handle = apply_smol(model, granularity="input", lam=1e-4)
    >>> [tuple(s.shape) for s in handle.precision_parameters()], handle.average_bits()
    ([(1, 4), (1, 3)], 8.0)
    """
    check_lam(lam)
    options = {"init_bits": init_bits, "noise": noise, "generator": generator}
    options["lam"] = lam * NOISE_POWER.get(noise, 1.0)
    layers = select_layers(model, include, exclude)
    gates = {
        name: SmolGate(layer.weight, granularity=granularity, scale=scale, strict=strict, **options)
        for name, layer in layers.items()
    }
    handle = SmolHandle(model, gates)
    handle.activations = add_activations(model, dict(activations or {}), **options)
    return handle
