"""Adapters into a model: which layers, whether they may be changed, and back to plain layers."""

import difflib
import re
from collections.abc import Sequence

import torch
from torch import Generator, nn

from effnb.finetune.cola.lora import LoRALinear, check_options, check_rank
from effnb.finetune.cola.merge import AdapterError, check_base


def inject_lora(
    model: nn.Module,
    target_modules: str | Sequence[str],
    r: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    *,
    init: str = "kaiming",
    modules_to_save: Sequence[str] = (),
    generator: Generator | None = None,
    master_dtype: torch.dtype | None = None,
    merge_on_eval: bool = True,
    allow_tied: bool = False,
) -> list[str]:
    """Put a :class:`LoRALinear` in the place of every target layer, in place, and freeze the rest of the model.

    Args:
        model: changed in place; nothing is changed where an argument is refused.
        target_modules: endings of module names (``["q", "attn.v"]``), or a string: a regular expression that matches
            the full name, or one ending.
        r: rank of every adapter.
        alpha: the scale is ``alpha / r``; ``None`` means a scale of 1.
        dropout: on the adapters' inputs while training, in [0, 1).
        init: see :class:`LoRALinear`.
        modules_to_save: endings of the names of modules that go on training in full, such as a task head.
        generator: stream for the factors ``A``.
        master_dtype: see :class:`LoRALinear`.
        merge_on_eval: see :class:`LoRALinear`.
        allow_tied: accept a target whose weight another parameter shares; a merge then changes both.

    Returns:
        Names of the adapted layers, in the order of ``model.named_modules()``.

    Raises:
        ValueError: an option outside its range, a target without a module (near names are listed), a tied or quantised
            weight.
        TypeError: a target that is no ``nn.Linear`` (the error is a ``ValueError`` as well).

    Reference: hu2022lora

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> inject_lora(model, ["0"], r=2, modules_to_save=["2"])
    ['0']
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.A', '0.B', '2.weight', '2.bias']
    """
    check_options(alpha, dropout, init, master_dtype)
    names = find_modules(model, target_modules, "target_modules")
    kept = find_modules(model, modules_to_save, "modules_to_save") if modules_to_save else []
    check_targets(model, names, r, allow_tied)
    if clash := sorted(set(names) & set(kept)):
        raise ValueError(f"target_modules and modules_to_save must not overlap, got {clash} in both")
    model.requires_grad_(False)
    for name in kept:
        model.get_submodule(name).requires_grad_(True)
    wrapped: dict[nn.Module, LoRALinear] = {}
    for name in names:
        layer = model.get_submodule(name)
        if layer not in wrapped:
            wrapped[layer] = LoRALinear(layer, r, alpha, dropout, init, generator, master_dtype, merge_on_eval)
        model.set_submodule(name, wrapped[layer])
    return names


def remove_lora(model: nn.Module) -> nn.Module:
    """Put the frozen layers back in the place of their adapters, which are lost unless merged before."""
    adapters = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoRALinear)]
    for name, layer in adapters:
        model.set_submodule(name, layer.base)
    return model


def find_modules(model: nn.Module, patterns: str | Sequence[str], argument: str) -> list[str]:
    """Names of the modules that match, in the order of the model; every pattern must match one."""
    listed = [patterns] if isinstance(patterns, str) else list(patterns or ())
    if not listed or not all(isinstance(p, str) and p for p in listed):
        raise ValueError(f"{argument} must name at least one module, got {patterns!r}")
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    hits = {p: [n for n in names if _matches(n, p, isinstance(patterns, str))] for p in listed}
    for pattern, found in hits.items():
        if not found:
            near = (
                difflib.get_close_matches(pattern, names + [n.rpartition(".")[2] for n in names], 3, 0.4) or names[:5]
            )
            raise ValueError(f"{argument} must match a module, got {pattern!r}; near names: {near}")
    return [name for name in names if any(name in found for found in hits.values())]


def _matches(name: str, pattern: str, regular: bool) -> bool:
    ending = name == pattern or name.endswith("." + pattern)
    return ending or (regular and re.fullmatch(pattern, name) is not None)


def check_targets(model: nn.Module, names: list[str], r: int, allow_tied: bool) -> None:
    """Every target is a plain linear layer of sufficient size whose weight nobody else uses."""
    for name in names:
        check_base(model.get_submodule(name), name)
        check_rank(r, model.get_submodule(name))
    if not allow_tied:
        check_untied(model, [f"{name}.weight" for name in names])


def check_untied(model: nn.Module, weights: list[str]) -> None:
    """Refuse weights whose memory another parameter or buffer shares, in whole or in part."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    spans = {name: (t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in tensors if t.nbytes and t.data_ptr()}
    for weight in filter(spans.__contains__, weights):
        start, end = spans[weight]
        shared = [name for name, (a, b) in spans.items() if name != weight and a < end and start < b]
        if shared:
            raise AdapterError(
                f"{weight} is tied to {shared[0]}: a merge would change both, allow_tied=True accepts that"
            )
