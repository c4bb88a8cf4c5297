"""Masks of an exact size, models under a fixed mask, tickets; gradual and iterative magnitude pruning."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from effnb.common import check_count, check_number
from effnb.compress._gated import GatedLayers, check_plain, select_layers, shuffled
from effnb.compress.continuous_sparsification.storage import sparsify_linears

__all__ = ["GradualPruner", "MaskHandle", "Ticket", "apply_masks", "full_masks", "global_magnitude_mask"]
__all__ += ["gmp_sparsity", "magnitude_ticket_search", "random_masks", "shuffled_masks", "top_k_masks"]


def top_k_masks(scores: Mapping[str, Tensor], density: float, min_keep: int = 0) -> dict[str, Tensor]:
    """Return masks of the ``round(density * n)`` highest scores over all layers together; ties go to the earlier one.

    Args:
        scores: name to tensor, any shapes; the bool masks have the same.
        density: fraction to keep, in (0, 1]; at least one entry is kept.
        min_keep: entries that each layer keeps in any case (within the total, unless that is too small for it).

    Raises:
        ValueError: no scores, ``density`` out of range, ``min_keep`` negative, or a score is NaN.

    >>> top_k_masks({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.0])}, density=0.5)
    {'a': tensor([ True, False]), 'b': tensor([ True, False])}
    """
    check_number("density", density, gt=0, le=1)
    check_count("min_keep", min_keep, ge=0)
    if not scores:
        raise ValueError("scores must name at least one tensor, got none")
    sizes = [score.numel() for score in scores.values()]
    flat = torch.cat([score.detach().reshape(-1) for score in scores.values()])
    if flat.isnan().any():
        raise ValueError("scores must not hold NaN")
    if min_keep:
        for part in flat.split(sizes):
            # `split` gives views: the infinity is written into `flat`.
            part[part.argsort(descending=True, stable=True)[:min_keep]] = torch.inf
    # What min_keep asks for may be more than the density allows.
    count = max(1, round(density * flat.numel()), int((flat == torch.inf).sum()) if min_keep else 0)
    # A selection and a scan in place of a sort: linear in the number of weights.
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    keep = flat > threshold
    ties = (flat == threshold).nonzero().flatten()
    keep[ties[: count - int(keep.sum())]] = True
    return {name: k.reshape(scores[name].shape) for name, k in zip(scores, keep.split(sizes), strict=True)}


def global_magnitude_mask(model: nn.Module, sparsity: float, **layers) -> dict[str, Tensor]:
    """Return masks that drop the fraction ``sparsity`` of smallest absolute weights over all chosen layers.

    Args:
        model: plain model.
        sparsity: fraction to drop, in [0, 1).
        **layers: ``include`` and ``exclude`` of :func:`select_layers`.

    Raises:
        ValueError: ``sparsity`` out of range, or no layer matches.

    >>> layer = nn.Linear(2, 1)
    >>> layer.weight.data = torch.tensor([[0.1, -3.0]])
    >>> global_magnitude_mask(layer, 0.5)
    {'': tensor([[False,  True]])}
    """
    check_number("sparsity", sparsity, ge=0, lt=1)
    chosen = select_layers(model, **layers)
    return top_k_masks({name: layer.weight.detach().abs() for name, layer in chosen.items()}, 1 - sparsity)


def full_masks(model: nn.Module, **layers) -> dict[str, Tensor]:
    """Return all-ones masks, layer's name to bool tensor, of the layers that :func:`select_layers` takes.

    Args:
        model, layers: as in :func:`global_magnitude_mask`.

    >>> full_masks(nn.Linear(2, 1))
    {'': tensor([[True, True]])}
    """
    chosen = select_layers(model, **layers)
    return {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in chosen.items()}


def random_masks(like: Mapping[str, Tensor], density: float, generator: Generator) -> dict[str, Tensor]:
    """Return masks of exactly ``round(density * n)`` entries, drawn uniformly over all layers together.

    Args:
        like: name to tensor of the wanted shape (weights or masks).
        density: fraction to keep, in (0, 1].
        generator: the stream to draw from.

    >>> masks = random_masks({"a": torch.zeros(10, 10)}, 0.07, torch.Generator().manual_seed(0))
    >>> int(masks["a"].sum())
    7
    """
    # float64: ties between draws would favour the earlier entries.
    draws = {name: torch.rand(t.shape, generator=generator, dtype=torch.float64) for name, t in like.items()}
    return top_k_masks(draws, density)


def shuffled_masks(masks: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    """Return random masks that keep in every layer as many entries as ``masks`` does there.

    Args:
        masks: name to bool mask.
        generator: the stream to draw from.

    >>> shuffled_masks({"a": torch.tensor([True, True])}, torch.Generator())
    {'a': tensor([True, True])}
    """
    return {name: shuffled(mask, generator) for name, mask in masks.items()}


def kept_fraction(masks: Mapping[str, Tensor]) -> float:
    """Return the fraction of entries that the masks keep, over all layers."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def warn_dead(masks: Mapping[str, Tensor]) -> None:
    """Warn of each layer whose mask keeps nothing: the output no longer depends on the layer's input."""
    for name, mask in masks.items():
        if not mask.any():
            warnings.warn(f"layer {name!r} is dead: its mask keeps no weight (see min_keep)", stacklevel=3)


class MaskedLayers(GatedLayers):
    """A model whose gates each have a ``mask()``; base of the handles that prune."""

    def masks(self) -> dict[str, Tensor]:
        """Binary masks, name to bool tensor of the weight's shape."""
        return {name: gate.mask() for name, gate in self.gates.items()}

    def per_layer(self) -> dict[str, float]:
        """Fraction of weights that each layer's mask keeps."""
        return {name: float(mask.float().mean()) for name, mask in self.masks().items()}

    def density(self) -> float:
        """Fraction of weights kept, over all masked layers."""
        return kept_fraction(self.masks())

    def finalize(self, sparse: bool = False) -> nn.Module:
        """Fold the masks into the weights and take the gates off; the handle is finished. Returns the plain model.

        With ``sparse`` every masked ``nn.Linear`` becomes a CSR layer for inference, see :func:`sparsify_linears`.
        """
        warn_dead(self.masks())
        names = list(self.gates)
        model = super().finalize()
        return sparsify_linears(model, names) if sparse else model


class FixedMask(nn.Module):
    """Multiply a weight by a bool mask that does not learn; applied in every forward pass, so nothing is revived."""

    def __init__(self, mask: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("keep", mask.to(dtype))  # in the weight's type: by bool is several times slower

    def forward(self, w: Tensor) -> Tensor:
        """Return the masked weight, shape of ``w``."""
        return w * self.keep

    def mask(self) -> Tensor:
        """The mask as a bool tensor of the weight's shape."""
        return self.keep > 0


class MaskHandle(MaskedLayers):
    """A model under fixed masks, made by :func:`apply_masks`; gradients and momentum cannot revive what is masked.

    >>> handle = apply_masks(nn.Linear(2, 1), {"": torch.tensor([[True, False]])})
    >>> handle.density()
    0.5
    """

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks, name to bool tensor; names and shapes must be those in use."""
        _check_masks(self.weights(), masks)
        for name, mask in masks.items():
            self.gates[name].keep.copy_(mask)  # in place: the buffer keeps its device and type

    def prune(self, density: float) -> None:
        """Keep exactly ``density`` of all weights, the largest over all layers; what is masked never comes back."""
        masks = self.masks()
        # -1 ranks masked weights below any magnitude, also below weights that are exactly zero.
        sizes = {name: w.detach().abs().where(masks[name], -1.0) for name, w in self.weights().items()}
        self.set_masks(top_k_masks(sizes, density))


def _check_masks(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Raise unless the masks fit the weights in name, type and shape."""
    if not masks or set(masks) - set(weights):
        raise ValueError(f"masks must name layers among {sorted(weights)}, got {sorted(masks)}")
    for name, mask in masks.items():
        if mask.dtype is not torch.bool:
            raise TypeError(f"mask of {name!r} must be a bool tensor, got {mask.dtype}")
        if mask.shape != weights[name].shape:
            raise ValueError(f"mask of {name!r} must have shape {tuple(weights[name].shape)}, got {tuple(mask.shape)}")


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> MaskHandle:
    """Put fixed masks on the weights of a plain model, in place, and return the handle that reads and replaces them.

    Args:
        model: any module.
        masks: layer's name to bool mask of the weight's shape.

    Raises:
        ValueError: unknown layer, wrong shape, or a weight that is parametrised already.
        TypeError: a mask that is not bool.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = apply_masks(model, {"": torch.tensor([[False, True]])})
    >>> model(torch.tensor([[1.0, 0.0]])).item()
    0.0
    """
    # Names that are not in the model stay out here, and `_check_masks` names them.
    layers = {name: layer for name, layer in model.named_modules() if name in masks}
    check_plain(layers)
    weights = {name: layer.weight for name, layer in layers.items()}
    _check_masks(weights, masks)
    warn_dead(masks)
    return MaskHandle(model, {name: FixedMask(masks[name].to(w.device), w.dtype) for name, w in weights.items()})


def gmp_sparsity(step: int, end_step: int, final: float, initial: float = 0.0, start_step: int = 0) -> float:
    r"""Return the sparsity of the cubic schedule, ``final + (initial - final) (1 - (t - t0) / (t1 - t0))^3``.

    Args:
        step: optimiser steps done, >= 0.
        end_step: step from which on the sparsity is ``final``, > ``start_step``.
        final: fraction of weights dropped at the end, in [0, 1).
        initial: fraction dropped until ``start_step``, in [0, 1).
        start_step: first step of the schedule.

    Raises:
        ValueError: a fraction or step out of range.

    Reference: zhu2018prune

    >>> [round(gmp_sparsity(t, end_step=10, final=0.8), 9) for t in (0, 5, 10, 99)]
    [0.0, 0.7, 0.8, 0.8]
    """
    check_number("step", step, ge=0)
    check_number("end_step", end_step, gt=start_step)
    check_number("final", final, ge=0, lt=1)
    check_number("initial", initial, ge=0, lt=1)
    left = 1.0 - min(max((step - start_step) / (end_step - start_step), 0.0), 1.0)
    return final + (initial - final) * left**3


class GradualPruner:
    """Gradual magnitude pruning: tightens the masks of a training model along :func:`gmp_sparsity`.

    Args:
        handle: masks on the model, at first all ones.
        density: fraction kept from ``end_step`` on, in (0, 1].
        end_step: optimiser step at which the pruning ends.
        every: steps between two prunings; the last one always happens at ``end_step``.

    Raises:
        ValueError: a number out of range.

    Reference: zhu2018prune

    >>> handle = apply_masks(nn.Linear(10, 10), {"": torch.ones(10, 10, dtype=torch.bool)})
    >>> pruner = GradualPruner(handle, density=0.2, end_step=4)
    >>> [pruner(t) for t in range(5)]
    [1.0, 0.54, 0.3, 0.21, 0.2]
    """

    def __init__(self, handle: MaskHandle, density: float, end_step: int, every: int = 1) -> None:
        check_number("density", density, gt=0, le=1)
        check_count("end_step", end_step)
        check_count("every", every)
        self.handle, self.final, self.end_step, self.every = handle, density, end_step, every

    def __call__(self, step: int) -> float:
        """Prune if it is time at ``step`` (steps done so far); return the density in use."""
        if step <= self.end_step and (step % self.every == 0 or step == self.end_step):
            self.handle.prune(1 - gmp_sparsity(step, self.end_step, 1 - self.final))
        return self.handle.density()


@dataclass(frozen=True)
class Ticket:
    """A mask and the early weights that it is trained from.

    Args:
        masks: layer's name to bool mask.
        rewind_state: plain ``state_dict`` of the whole model at the rewind epoch of round 1.
        scale: factor on the masked weights, ``1 / sigmoid(s0)`` for continuous sparsification, 1 for magnitudes.
        history: one record per round: ``round``, ``density``, ``per_layer``.

    Reference: frankle2019lottery

    >>> Ticket({"": torch.tensor([[True, False]])}, {}).density
    0.5
    """

    masks: dict[str, Tensor]
    rewind_state: dict[str, Tensor]
    scale: float = 1.0
    history: list[dict] = field(default_factory=list)

    @property
    def density(self) -> float:
        """Fraction of the maskable weights that the ticket keeps."""
        return kept_fraction(self.masks)

    @torch.no_grad()
    def install(self, model: nn.Module) -> MaskHandle:
        """Load the early weights (times ``scale``) into a plain ``model``, put the masks on; train it from there."""
        model.load_state_dict(self.rewind_state)
        handle = apply_masks(model, self.masks)
        for weight in handle.weights().values():
            weight.mul_(self.scale)  # the search trained c * w: a ticket of w alone would start c times too small
        return handle


TrainRound = Callable[[nn.Module, MaskedLayers, int], None]


def magnitude_ticket_search(
    model_fn: Callable[[], nn.Module],
    train_fn: TrainRound,
    rounds: int,
    keep_ratio: float = 0.8,
    masks: dict[str, Tensor] | None = None,
) -> Ticket:
    """Iterative magnitude pruning with rewinding (IMP): train, keep the largest weights, rewind, again.

    Args:
        model_fn: makes the plain model.
        train_fn: as in :func:`ticket_search`; the handle is a :class:`MaskHandle`.
        rounds: number of rounds, >= 1.
        keep_ratio: fraction of the *remaining* weights kept per round, in (0, 1]: density ``keep_ratio ** rounds``.
        masks: all-ones masks of the layers to prune; ``None`` for every convolution and linear layer.

    Raises:
        ValueError: ``rounds`` or ``keep_ratio`` out of range.
        RuntimeError: no checkpoint was taken.

    Reference: frankle2020linear

    >>> ticket = magnitude_ticket_search(lambda: nn.Linear(5, 5), lambda model, handle, r: handle.checkpoint(), 2)
    >>> ticket.density
    0.64
    """
    check_count("rounds", rounds)
    check_number("keep_ratio", keep_ratio, gt=0, le=1)
    model = model_fn()
    handle = apply_masks(model, masks or full_masks(model))
    history = []
    for index in range(rounds):
        train_fn(model, handle, index)
        saved = handle.saved_state
        # Of all weights, not of those left: counts that are rounded round by round would drift.
        handle.prune(keep_ratio ** (index + 1))
        history.append({"round": index, "density": handle.density(), "per_layer": handle.per_layer()})
        handle.rewind()
    return Ticket(handle.masks(), saved, 1.0, history)
