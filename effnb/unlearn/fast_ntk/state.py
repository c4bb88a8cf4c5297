"""Where a model started and whether it has changed since: guards against stale sums and leaking statistics."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> Tensor:
    """Three float64 numbers for each parameter and buffer that change with any realistic change of the values."""
    marks = []
    for value in [*model.parameters(), *model.buffers()]:
        flat = value.detach().double().reshape(-1)
        ramp = torch.linspace(1, 2, len(flat), dtype=torch.float64, device=flat.device)
        marks.append(torch.stack([flat.sum(), flat @ flat, flat @ ramp]).cpu())
    return torch.stack(marks)


def same_fingerprint(a: Tensor, b: Tensor) -> bool:
    """Whether two fingerprints agree but for the order of summation on another machine."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def as_mapping(state: Mapping[str, Tensor] | nn.Module) -> Mapping[str, Tensor]:
    """A state dict from a state dict or a model."""
    if isinstance(state, nn.Module):
        return state.state_dict()
    if not isinstance(state, Mapping):
        raise TypeError(f"init_state must be a state dict or a model, got {type(state).__name__}")
    return state


def initial_values(
    model: nn.Module, names: list[str], init_state: Mapping[str, Tensor] | nn.Module
) -> dict[str, Tensor]:
    """The values of the named parameters before fine-tuning, checked against the model."""
    state, known = as_mapping(init_state), dict(model.named_parameters())
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"init_state must hold every name of params, got none for {missing[0]!r}")
    for name in names:
        if state[name].shape != known[name].shape:
            wrong = f"{tuple(state[name].shape)} for {name!r}"
            raise ValueError(f"init_state must have the shapes of the model {tuple(known[name].shape)}, got {wrong}")
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"init_state must be finite, got NaN or infinity in {name!r}")
    return {name: state[name].detach().to(known[name].device) for name in names}


def check_frozen(model: nn.Module, names: list[str], init_state: Mapping[str, Tensor] | nn.Module) -> None:
    """Warn if something outside ``names`` differs from ``init_state``: it may have been learnt from the data."""
    state, skip = as_mapping(init_state), set(names)
    for name, value in model.state_dict().items():
        if name not in skip and name in state and not torch.equal(value, state[name].to(value)):
            warnings.warn(
                f"{name!r} is not in params, but differs between model and init_state: what it learnt from the data "
                "cannot be removed (running statistics have to stay frozen while fine-tuning)",
                stacklevel=4,
            )
            return


def check_state(state: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raise unless a saved state has the entries, settings, model and starting values of ``mine``."""
    missing = sorted(set(mine) - set(state))
    if missing:
        raise ValueError(f"state must come from NTKUnlearner.state_dict(), got none of {', '.join(missing)}")
    for name in ("params", "settings"):
        if state[name] != mine[name]:
            raise ValueError(f"state must have the {name} {mine[name]}, got {state[name]}")
    if not torch.equal(state["init"], mine["init"]) or not same_fingerprint(state["mark"], mine["mark"]):
        raise ValueError("state must belong to this model and init_state, got values of another one")
