"""Masks of an exact size, models under a fixed mask, and gradual magnitude pruning."""

import warnings
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from effnb.common import check_count, check_number
from effnb.compress._gated import GatedLayers, check_plain, select_layers
from effnb.compress.continuous_sparsification.storage import sparsify_linears


def top_k_masks(scores: Mapping[str, Tensor], density: float, min_keep: int = 0) -> dict[str, Tensor]:
    """Return masks of the ``round(density * n)`` highest scores over all layers together; ties go to the earlier one.

    Args:
        scores: name to tensor, any shapes.
        density: fraction to keep, in (0, 1]; at least one entry is kept.
        min_keep: entries that each layer keeps in any case (within the total, unless that is too small for it).

    Returns:
        Name to bool mask of the score's shape.

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

    Returns:
        Layer's name to bool mask, for :func:`apply_masks`.

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
    """Return all-ones masks, layer's name to bool mask, of the layers that :func:`select_layers` takes.

    Args:
        model: plain model.
        **layers: ``include`` and ``exclude`` of :func:`select_layers`.

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
    orders = {name: torch.randperm(mask.numel(), generator=generator) for name, mask in masks.items()}
    return {name: mask.reshape(-1)[orders[name]].reshape(mask.shape) for name, mask in masks.items()}


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
        """Fold the masks into the weights and take the gates off; the handle is finished.

        Args:
            sparse: also turn every masked ``nn.Linear`` into a CSR layer for inference.

        Returns:
            The plain model: the same object, or the new layer where the model itself is a Linear and ``sparse``.
        """
        warn_dead(self.masks())
        names = list(self.gates)
        model = super().finalize()
        return sparsify_linears(model, names) if sparse else model


class FixedMask(nn.Module):
    """Multiply a weight by a mask that does not learn; applied in every forward pass, so nothing is revived.

    Args:
        mask: bool tensor of the weight's shape.
        dtype: type of the weight; the mask is kept in it, since multiplying by bool is several times slower.

    Raises:
        TypeError: the mask is not bool.

    >>> FixedMask(torch.tensor([True, False]))(torch.tensor([5.0, 5.0]))
    tensor([5., 0.])
    """

    def __init__(self, mask: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if mask.dtype is not torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
        self.register_buffer("keep", mask.to(dtype))

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
