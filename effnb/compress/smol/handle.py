"""SMOL for a whole model: put limits on, search, freeze the bits, fine-tune, finish; and what the bits cost."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnb.common import check_choice, check_count, check_number, mode_restored
from effnb.compress._gated import GatedLayers, check_optimizer, select_layers, watch_decay
from effnb.compress.smol.gate import SmolActivation, SmolGate
from effnb.compress.smol.noise import NOISE_POWER, Granularity, check_bits

__all__ = ["BitCost", "Frozen", "SmolHandle", "apply_smol", "map_entropy", "recalibrate_batch_norm", "warn_of_decay"]


class Frozen(NamedTuple):
    """What :meth:`SmolHandle.freeze` did: mean bits, and how many weights were cut to the range of bits."""

    average_bits: float
    capped: int  # wanted more than p_max
    raised: int  # wanted less than p_min


class BitCost(NamedTuple):
    """Bits per weight: ``payload`` (the digits) and ``index`` (the map of how many digits each weight has).

    >>> BitCost(1.5, 0.25).total
    1.75
    """

    payload: float
    index: float

    @property
    def total(self) -> float:
        """Payload and index."""
        return self.payload + self.index


def map_entropy(bits: Tensor) -> float:
    r"""Return the entropy ``-sum(q log2 q)`` of the frequencies ``q`` of the values, in bits per entry.

    Args:
        bits: whole numbers, any shape; empty or constant, they have 0.

    Reference: shannon1948mathematical

    >>> map_entropy(torch.tensor([1, 1, 2, 8]))
    1.5
    """
    counts = torch.bincount(bits.reshape(-1).long()).double()
    share = counts[counts > 0] / max(1, bits.numel())
    return float(-(share * share.log2()).sum()) + 0.0  # not -0.0


class SmolHandle(GatedLayers):
    """Everything a training loop needs; made by :func:`apply_smol` or :func:`uniform_qat`.

    Reference: savarese2022bits

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> handle = apply_smol(model, init_bits=3)
    >>> handle.freeze().average_bits, handle.histogram()
    (3.0, {3: 18})
    """

    decay_harm = "on limits s pulls them to 0, which is 2 bits for every weight"

    def __init__(self, model: nn.Module, gates: Mapping[str, SmolGate]) -> None:
        super().__init__(model, gates)
        self.activations: dict[str, SmolActivation] = {}  # set by apply_smol
        if not self.is_frozen:
            self.clip_()
            watch_decay(self)

    def _all(self) -> list[SmolGate]:
        """All gates, those on activations too."""
        return [*self.gates.values(), *self.activations.values()]

    @property
    def is_frozen(self) -> bool:
        """Whether the bits are fixed (phase II)."""
        return all(gate.is_frozen for gate in self._all())

    is_fixed = is_frozen  # the base's name for it: frozen limits are safe from weight decay

    def precision_parameters(self) -> list[nn.Parameter]:
        """Return the limits ``s``; for Adam **without** weight decay, which would pull every weight to 2 bits."""
        return [gate.s for gate in self._all()]

    gate_parameters = precision_parameters

    def param_groups(self, lr: float, s_lr: float = 1e-3, weight_decay: float = 0.0) -> list[dict]:
        """Two groups for one optimiser: weights at ``lr`` (no division by ``a^2`` is needed), limits at ``s_lr``."""
        return super().param_groups(lr, s_lr, weight_decay)

    def penalty(self) -> Tensor:
        """Return the bits above one over all weights (and activations), ``sum(n_g * (p(s_g) - 1))``, with gradient.

        Add ``lam * handle.penalty()`` to the loss, or give ``lam`` to :func:`apply_smol` and add nothing.
        """
        return torch.stack([gate.penalty() for gate in self._all()]).sum()

    def _mean(self, values: Mapping[str, float]) -> float:
        """Mean over weights of a value per layer."""
        sizes = {name: gate.groups.numel for name, gate in self.gates.items()}
        return sum(values[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def average_bits(self, real: bool = False) -> float:
        """Return the mean bits of a weight (payload only): whole after the bit rule, or (``real=True``) as learned."""
        return self._mean(self.per_layer(real))

    def per_layer(self, real: bool = False) -> dict[str, float]:
        """Return the mean bits of each layer's weights."""
        return {name: gate.average_bits(real) for name, gate in self.gates.items()}

    def bits(self) -> dict[str, Tensor]:
        """Return whole bits of every weight, layer's name to uint8 tensor of the weight's shape."""
        return {name: gate.weight_bits() for name, gate in self.gates.items()}

    def histogram(self) -> dict[int, int]:
        """Return bits to number of weights."""
        counts = torch.cat([bits.flatten().cpu() for bits in self.bits().values()]).bincount()
        return {bits: count for bits, count in enumerate(counts.tolist()) if count}

    def cost(self) -> BitCost:
        """Return bits per weight: payload, entropy of the map of bits (which must be stored too), and their sum."""
        # The map is stored once per group, and its price shared by the weights of the group.
        index = {name: map_entropy(g.group_bits()) * g.bits.numel() / g.groups.numel for name, g in self.gates.items()}
        return BitCost(self.average_bits(), self._mean(index))

    @torch.no_grad()
    def clip_(self) -> None:
        """Clip all weights to the range of the codes, ``|u| <= 2 - sigma(s)``; call it after every optimiser step."""
        for name, weight in self.weights().items():
            self.gates[name].clip_(weight)

    def sample(self, mode: str = "training") -> None:
        """Draw noise in training mode only (``"training"``), always (``"on"``) or never (``"off"``)."""
        check_choice("mode", mode, ("training", "on", "off"))
        for gate in self._all():
            gate.sampling = mode

    def freeze(self, rounding: str = "round", p_min: int = 1, p_max: int = 8) -> Frozen:
        """Fix whole bits, ``clamp(round(p(s)), p_min, p_max)``, and quantise from now on (phase II).

        ``rounding="ceil"`` never allows a rounding error above the learned limit, except at ``p_max``. The limits get
        no gradient any more: use a new optimiser on :meth:`weight_parameters`, with its own schedule.
        """
        if any(gate.is_frozen for gate in self._all()):
            raise RuntimeError("freeze() must be called once: the bits are fixed already")
        check_choice("rounding", rounding, ("round", "ceil"))
        check_bits(p_min, 8, "p_min")
        check_bits(p_max, 8, "p_max")
        if p_min > p_max:
            raise ValueError(f"p_min must not exceed p_max={p_max}, got {p_min}")
        capped = raised = 0
        for gate in self.gates.values():
            # Counted before the cut; no learned limit stands for 99 bits.
            free, sizes = gate.group_bits(rounding, 1, 99), gate.groups.sizes(gate.s)
            capped += int(((free > p_max) * sizes).sum())
            raised += int(((free < p_min) * sizes).sum())
        for gate in self._all():
            gate.freeze(gate.group_bits(rounding, p_min, p_max))
        return Frozen(self.average_bits(), capped, raised)

    def finalize(self) -> nn.Module:
        """Put the quantised weights in place of the gates; the handle is finished. Activation layers stay."""
        if not self.is_frozen:
            raise RuntimeError("finalize() needs fixed bits: call freeze() before")
        return super().finalize()


#: Run by itself at the first step of an optimiser that holds the limits.
warn_of_decay = check_optimizer


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
        include, exclude: layers to take, see :func:`select_layers`.
        lam: price of a bit, >= 0, fused into the gradient of the limits. Stated for uniform noise: Rademacher noise
            has three times the variance, and its price is multiplied by 3 so that the same ``lam`` gives the same bits.
        granularity, noise, scale, strict, generator: as in :class:`SmolGate`.
        activations: name of a module to its number of output channels: learn limits for these activations too. The
            module becomes ``nn.Sequential(module, SmolActivation)``.

    Raises:
        ValueError: a number out of range, no layer matches, a weight without scale (all zero), unknown names.

    Reference: savarese2022bits

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> handle = apply_smol(model, granularity="input", lam=1e-4)
    >>> [tuple(s.shape) for s in handle.precision_parameters()], handle.average_bits()
    ([(1, 4), (1, 3)], 8.0)
    """
    # All that can be refused is refused before the model is touched.
    check_number("lam", lam, ge=0)
    check_choice("noise", noise, NOISE_POWER)
    weights = {name: layer.weight for name, layer in select_layers(model, include, exclude).items()}
    if unknown := sorted(set(activations or {}) - {name for name, _ in model.named_modules() if name}):
        raise ValueError(f"activations must name modules of the model, got {unknown}")
    lam *= NOISE_POWER[noise]
    gates = {n: SmolGate(w, init_bits, granularity, noise, lam, scale, strict, generator) for n, w in weights.items()}
    device, wanted = next(iter(weights.values())).device, (activations or {}).items()
    added = {n: SmolActivation(c, init_bits, noise, lam, generator=generator).to(device) for n, c in wanted}
    handle = SmolHandle(model, gates)
    for name, layer in added.items():
        # The handle keeps layers, not only names, since a gated layer itself may move into the Sequential.
        module = model.get_submodule(name)
        model.set_submodule(name, nn.Sequential(module, layer.train(module.training)))
    handle.activations = added
    return handle


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, x: Tensor, batch_size: int = 256) -> int:
    """Estimate all running means and variances anew on ``x``: those collected under noise are of another network.

    Call it after ``freeze()``. All else runs in eval mode, so that neither noise nor dropout is drawn. Each batch
    counts alike. Returns the number of normalisation layers.

    Args:
        model: any module; modes and momenta are restored.
        x: inputs ``(n, ...)``, from the training data.
        batch_size: examples at once, >= 1.

    Raises:
        ValueError: no input, or ``batch_size`` below 1.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> recalibrate_batch_norm(model, torch.randn(10, 2))
    1
    """
    check_count("batch_size", batch_size)
    if len(x) == 0:
        raise ValueError("x must hold examples, got none")
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    if not momenta:
        return 0
    with mode_restored(model, train=False):
        try:
            for norm in momenta:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.train()
            for batch in x.split(batch_size):
                model(batch)
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum
    return len(momenta)
