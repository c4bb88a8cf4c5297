"""Masks of an exact size: by score, by magnitude, at random; and models with a fixed mask on their weights."""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from .gate import FixedMask
from .layers import GatedLayers, check_plain, select_layers, warn_dead


def check_density(density: float, name: str = "density") -> None:
    """Raise ``ValueError`` unless ``density`` lies in (0, 1].

    Args:
        density: the value to check.
        name: what the message calls it.

    Reference: savarese2020winning

    >>> check_density(0.5)
    """
    if not 0 < density <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {density}")


def top_k_masks(scores: Mapping[str, Tensor], density: float, min_keep: int = 0) -> dict[str, Tensor]:
    """Keep the ``round(density * n)`` entries of highest score over all layers together; ties go to the earlier one.

    Args:
        scores: name to tensor, any shapes.
        density: fraction to keep, in (0, 1]; at least one entry is kept.
        min_keep: entries that each layer keeps in any case (within the total, unless that is too small for it).

    Returns:
        Name to bool mask of the score's shape.

    Raises:
        ValueError: no scores, ``density`` out of range, ``min_keep`` negative, or a score is NaN.

    Reference: frankle2019lottery

    >>> top_k_masks({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.0])}, density=0.5)
    {'a': tensor([ True, False]), 'b': tensor([ True, False])}
    """
    check_density(density)
    if min_keep < 0:
        raise ValueError(f"min_keep must be >= 0, got {min_keep}")
    if not scores:
        raise ValueError("scores must name at least one tensor, got none")
    flat = torch.cat([score.detach().reshape(-1) for score in scores.values()])
    if flat.isnan().any():
        raise ValueError("scores must not hold NaN")
    if min_keep:
        sizes = [score.numel() for score in scores.values()]
        for part in flat.split(sizes):
            part[part.argsort(descending=True, stable=True)[:min_keep]] = torch.inf
    count = max(1, round(density * flat.numel()), int((flat == torch.inf).sum()) if min_keep else 0)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    keep = flat > threshold
    ties = (flat == threshold).nonzero().flatten()
    keep[ties[: count - int(keep.sum())]] = True
    parts = keep.split([score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def global_magnitude_mask(model: nn.Module, sparsity: float, **layers) -> dict[str, Tensor]:
    """Masks that drop the fraction ``sparsity`` of smallest absolute weights over all chosen layers.

    Args:
        model: plain model.
        sparsity: fraction to drop, in [0, 1).
        **layers: ``include`` and ``exclude`` of :func:`select_layers`.

    Returns:
        Layer's name to bool mask, for :func:`apply_masks`.

    Raises:
        ValueError: ``sparsity`` out of range, or no layer matches.

    Reference: frankle2019lottery

    >>> layer = nn.Linear(2, 1)
    >>> layer.weight.data = torch.tensor([[0.1, -3.0]])
    >>> global_magnitude_mask(layer, 0.5)
    {'': tensor([[False,  True]])}
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    chosen = select_layers(model, **layers)
    return top_k_masks({name: layer.weight.detach().abs() for name, layer in chosen.items()}, 1 - sparsity)


def random_masks(like: Mapping[str, Tensor], density: float, generator: Generator) -> dict[str, Tensor]:
    """Masks of exactly ``round(density * n)`` entries, drawn uniformly over all layers together.

    Args:
        like: name to tensor of the wanted shape (weights or masks).
        density: fraction to keep, in (0, 1].
        generator: the stream to draw from.

    Returns:
        Name to bool mask.

    Raises:
        ValueError: ``density`` out of range.

    Reference: frankle2019lottery

    >>> masks = random_masks({"a": torch.zeros(10, 10)}, 0.07, torch.Generator().manual_seed(0))
    >>> int(masks["a"].sum())
    7
    """
    draws = {name: torch.rand(t.shape, generator=generator, dtype=torch.float64) for name, t in like.items()}
    return top_k_masks(draws, density)


def shuffled_masks(masks: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    """Random masks that keep in every layer as many entries as ``masks`` does there.

    Args:
        masks: name to bool mask.
        generator: the stream to draw from.

    Returns:
        Name to bool mask of the same counts per layer.

    Reference: frankle2019lottery

    >>> shuffled_masks({"a": torch.tensor([True, True])}, torch.Generator())
    {'a': tensor([True, True])}
    """
    orders = {name: torch.randperm(mask.numel(), generator=generator) for name, mask in masks.items()}
    return {name: mask.reshape(-1)[orders[name]].reshape(mask.shape) for name, mask in masks.items()}


class MaskHandle(GatedLayers):
    """A model under fixed masks, made by :func:`apply_masks`; gradients and momentum cannot revive what is masked.

    Reference: frankle2019lottery

    >>> handle = apply_masks(nn.Linear(2, 1), {"": torch.tensor([[True, False]])})
    >>> handle.density()
    0.5
    """

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks, name to bool tensor; names and shapes must be those in use."""
        self._alive()
        _check_masks(self.weights(), masks)
        for name, mask in masks.items():
            self.gates[name].keep.copy_(mask)


def _check_masks(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    if not masks or set(masks) - set(weights):
        raise ValueError(f"masks must name layers among {sorted(weights)}, got {sorted(masks)}")
    for name, mask in masks.items():
        if mask.dtype is not torch.bool:
            raise TypeError(f"mask of {name!r} must be a bool tensor, got {mask.dtype}")
        if mask.shape != weights[name].shape:
            raise ValueError(f"mask of {name!r} must have shape {tuple(weights[name].shape)}, got {tuple(mask.shape)}")


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> MaskHandle:
    """Put fixed masks on the weights of a plain model, in place.

    Args:
        model: any module.
        masks: layer's name to bool mask of the weight's shape.

    Returns:
        The handle that reads, replaces or folds the masks.

    Raises:
        ValueError: unknown layer, wrong shape, or a weight that is parametrised already.
        TypeError: a mask that is not bool.

    Reference: frankle2019lottery

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = apply_masks(model, {"": torch.tensor([[False, True]])})
    >>> model(torch.tensor([[1.0, 0.0]])).item()
    0.0
    """
    layers = {name: layer for name, layer in model.named_modules() if name in masks}
    check_plain(layers)
    weights = {name: layer.weight for name, layer in layers.items()}
    _check_masks(weights, masks)
    warn_dead(dict(masks))
    return MaskHandle(model, {name: FixedMask(masks[name].to(w.device), w.dtype) for name, w in weights.items()})
