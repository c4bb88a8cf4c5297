"""Which parameters are fine-tuned and unlearned, by name; and those parameters as one vector."""

import inspect
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
INSTANCE_NORMS = (nn.modules.instancenorm._InstanceNorm,)
NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def head_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """The classifier head: the last linear layer in the order of registration, with its name."""
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError("model must have a linear layer to have a head, got none")
    return linear[-1]


def _owned(model: nn.Module, kinds: tuple[type, ...]) -> set[int]:
    modules = (m for m in model.modules() if isinstance(m, kinds))
    return {id(p) for m in modules for p in m.parameters(recurse=False)}


def _batch_norm_only(model: nn.Module) -> set[int]:
    return _owned(model, BATCH_NORMS) - _owned(model, INSTANCE_NORMS)


SUBSETS: dict[str, Callable[[nn.Module], set[int]]] = {
    "bn": _batch_norm_only,
    "norm": lambda model: _owned(model, NORMS),
    "head": lambda model: {id(p) for p in head_of(model)[1].parameters()},
    "prompt": lambda model: {id(p) for n, p in model.named_parameters() if n.split(".")[-1].startswith("prompt")},
    "all": lambda model: {id(p) for p in model.parameters()},
}


def _matches(which: Callable[..., bool], name: str, p: nn.Parameter) -> bool:
    required = [q for q in inspect.signature(which).parameters.values() if q.default is q.empty]
    return bool(which(name) if len(required) == 1 else which(name, p))


def peft_parameters(model: nn.Module, which: str | Callable[..., bool] = "bn+head") -> list[str]:
    """Names of a parameter-efficient subset, in the order of ``model.named_parameters()``.

    Args:
        model: any module.
        which: ``"bn"`` (affine parameters of batch norms), ``"norm"`` (of batch, layer, group, instance and RMS
            norms), ``"head"`` (the last linear layer), ``"prompt"`` (parameters whose own name starts with
            ``prompt``), ``"all"``, several of them joined by ``+`` such as ``"bn+head"``, or a predicate
            ``which(name, parameter)``.

    Returns:
        At least one name.

    Raises:
        TypeError: ``which`` is neither a string nor callable.
        ValueError: an unknown subset, or one that is empty for this model.

    Reference: li2023fastntk

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    >>> peft_parameters(model, "bn+head")
    ['1.weight', '1.bias', '2.weight', '2.bias']
    """
    named = list(model.named_parameters())
    if callable(which):
        names = [name for name, p in named if _matches(which, name, p)]
    elif isinstance(which, str):
        parts = which.split("+")
        unknown = [part for part in parts if part not in SUBSETS]
        if unknown:
            raise ValueError(f"which must be one of {', '.join(SUBSETS)}, joined by +, got {which!r}")
        chosen = [SUBSETS[part](model) for part in parts]
        empty = [part for part, ids in zip(parts, chosen, strict=True) if not ids]
        if empty:
            raise ValueError(f"which must select parameters of the model, got none for {empty[0]!r}")
        names = [name for name, p in named if id(p) in set().union(*chosen)]
    else:
        raise TypeError(f"which must be a string or a predicate, got {type(which).__name__}")
    if not names:
        raise ValueError(f"which must select at least one parameter, got none for {which!r}")
    return names


def resolve(model: nn.Module, params: str | Callable[..., bool] | Iterable[str]) -> list[str]:
    """A checked list of names from a list of names or anything that :func:`peft_parameters` takes."""
    known = dict(model.named_parameters())
    names = peft_parameters(model, params) if isinstance(params, str) or callable(params) else list(params)
    if not names:
        raise ValueError("params must name at least one parameter, got none")
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"params must be names of model.named_parameters(), got {missing[0]!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"params must be distinct, got {names}")
    kinds = {known[name].dtype for name in names}
    if not all(kind.is_floating_point for kind in kinds) or len(kinds) > 1:
        raise TypeError(f"params must be real floating-point parameters of one dtype, got {sorted(map(str, kinds))}")
    return names


def flatten(values: Mapping[str, Tensor], names: list[str], dtype: torch.dtype = torch.float64) -> Tensor:
    """The named tensors as one detached vector ``(P,)``."""
    return torch.cat([values[name].detach().reshape(-1).to(dtype) for name in names])


def unflatten(vector: Tensor, like: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """A vector ``(P,)`` as named tensors with the shapes and dtypes of ``like``."""
    parts = vector.split([like[name].numel() for name in names])
    return {name: part.view_as(like[name]).to(like[name]) for name, part in zip(names, parts, strict=True)}


def write(model: nn.Module, names: list[str], vector: Tensor) -> nn.Module:
    """Overwrite the named parameters by a vector ``(P,)``; returns ``model``."""
    known = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in unflatten(vector, known, names).items():
            known[name].copy_(value)
    return model
