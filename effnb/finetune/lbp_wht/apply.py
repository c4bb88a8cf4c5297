"""Low-rank backward passes into a model that exists: which layers, and nothing copied."""

import difflib
from collections.abc import Iterable
from typing import Any

from torch import nn

from .layers import WalshLowRankConv1x1, WalshLowRankLinear

LINEAR_ONLY = ("grid", "num_extra_tokens")


def apply_walsh_backprop(
    model: nn.Module, include: Iterable[str] = ("qkv", "proj", "fc1", "fc2"), **options: Any
) -> list[str]:
    """Replace linear layers and 1x1 convolutions of ``model`` by their twins with a low-rank backward pass.

    Parameters are shared, not copied: an optimiser made before stays valid and tied weights stay tied. Layers of
    another kind whose name ends so (a patch embedding called ``proj``) are left alone, unless their full name is given.

    Args:
        model: changed in place.
        include: endings of names (``"fc1"``, ``"attn.proj"``), or full names (``"blocks.0.mlp.fc1"``).
        **options: as for :class:`WalshLowRankLinear`; a convolution does not look at ``grid`` and has no extra tokens.

    Returns:
        Names of the layers replaced, in the model's order.

    Raises:
        ValueError: nothing matches, or an option is out of range.
        TypeError: a layer given by its full name is of another kind.

    Reference: yang2023efficient

    >>> from effnb.models import ViT
    >>> len(apply_walsh_backprop(ViT(depth=2), k=2))
    8
    """
    wanted = (include,) if isinstance(include, str) else tuple(include)
    found: dict[str, nn.Module] = {}
    twins: dict[int, nn.Module] = {}  # a module used in two places stays one module
    for name, module in model.named_modules(remove_duplicate=False):
        if name and any(name == ending or name.endswith("." + ending) for ending in wanted):
            twin = twins.get(id(module)) or _twin(module, name, options, by_full_name="." in name and name in wanted)
            if twin is not None:
                found[name] = twins[id(module)] = twin
    if not found:
        names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and name]
        near = [n for w in sorted(wanted) for n in difflib.get_close_matches(w, names, cutoff=0.3)] or names[:5]
        raise ValueError(f"include must match a linear layer or 1x1 convolution, got {sorted(wanted)}; near: {near}")
    for name, twin in found.items():
        model.set_submodule(name, twin)
    return list(found)


def _twin(module: nn.Module, name: str, options: dict[str, Any], by_full_name: bool) -> nn.Module | None:
    if isinstance(module, nn.Linear):
        return WalshLowRankLinear.from_linear(module, **options)
    if isinstance(module, nn.Conv2d) and (module.kernel_size == (1, 1) or by_full_name):
        return WalshLowRankConv1x1.from_linear(module, **{k: v for k, v in options.items() if k not in LINEAR_ONLY})
    if by_full_name:
        raise TypeError(f"{name} must be a linear layer or a 1x1 convolution, got {type(module).__name__}")
    return None
