"""The fused path: one compiled in-place sweep that also sums the squared rates of the next step."""

import functools
import types
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from effnb.optim.avagrad.eager import chosen_gamma, foreach_step, normaliser
from effnb.optim.avagrad.rule import Rule, Scalar, step_scalars

DTYPES = (torch.float32, torch.float64)
_compiled: dict[tuple, Callable] = {}
_ready: set[tuple] = set()
_unavailable: str | None = None


def _sweep(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    table: Tensor,
    hyper: Tensor,
    coupled: bool,
    lagged: bool,
) -> Tensor:
    """Update everything in one pass over memory; returns the sums of squared rates, one per tensor."""
    keep1, beta2, eps, decay, sign = hyper.unbind()
    sums = []
    for i, (p, g, m, v) in enumerate(zip(params, grads, means, squares, strict=True)):
        root, next_root, factor, shrink, unit = table[i].unbind()
        g = g * sign + p * decay if coupled else g * sign
        mean = m + (g - m) * keep1
        before = v.sqrt()
        eta = 1 / (before * root + eps)
        p.copy_(p * shrink + mean * (eta * (1 - unit) + unit) * factor)
        m.copy_(mean)
        after = v * beta2 + (1 - beta2) * g * g
        v.copy_(after)
        rate = 1 / ((before if lagged else after.sqrt()) * next_root + eps)
        sums.append((rate * rate).sum())
    return torch.stack(sums)


def compile_sweep(key: tuple) -> Callable:
    """A compiled sweep of its own for each list of shapes.

    torch.compile counts recompilations per code object and gives up after a few, hence the copy of the code.
    """
    if key not in _compiled:
        code = _sweep.__code__.replace(co_name=f"avagrad_sweep_{len(_compiled)}")
        function = types.FunctionType(code, _sweep.__globals__, code.co_name)
        _compiled[key] = torch.compile(function, fullgraph=True, dynamic=False)
    return _compiled[key]


def _signature(params: list[Tensor], rule: Rule) -> tuple:
    """Shapes, dtype and device; torch.compile itself guards the strides."""
    flags = bool(rule.weight_decay) and not rule.decoupled, rule.norm == "lagged"
    return tuple([p.shape for p in params]), params[0].dtype, params[0].device, *flags


def _table(steps: list[Tensor], rule: Rule, gamma: Scalar, like: Tensor) -> Tensor:
    """``(tensors, 5)``: root, next root, -lr gamma / bias correction, decoupled shrinkage, unit rate."""
    scalars = step_scalars(steps, rule)
    decay = rule.lr * rule.weight_decay if rule.decoupled else 0.0
    unit = scalars.first if rule.norm is None else [0.0] * len(steps)
    columns = zip(*scalars[:2], scalars.mean, scalars.moved, unit, strict=True)
    rows = [(a, b, -rule.lr * gamma * mean, 1 - decay * moved, u) for a, b, mean, moved, u in columns]
    if any(isinstance(x, Tensor) for x in rows[0]):
        entries = [torch.as_tensor(x, dtype=like.dtype, device=like.device) for row in rows for x in row]
        return torch.stack(entries).view(-1, 5)
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


@functools.lru_cache(maxsize=64)
def _hyper(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What rarely changes between steps, as a tensor, so that a change compiles nothing anew."""
    *numbers, maximize = values
    return torch.tensor([*numbers, -1.0 if maximize else 1.0], dtype=dtype, device=device)


def _initial_sum(square: Tensor, root: Scalar, eps: float) -> Tensor:
    """The sum of squared rates from scratch: the first step, or after a change of eps or beta2."""
    return (1 / (square.sqrt() * root + eps)).square().sum()


def carried_squares(
    squares: list[Tensor], steps: list[Tensor], carries: list[dict], rule: Rule, device: torch.device
) -> Tensor:
    """Sum of squared rates of this step from what the last sweep left behind, recomputed where it is stale."""
    key = (rule.eps, rule.beta2)
    roots: list[Scalar] | None = None
    parts = []
    for i, (v, carry) in enumerate(zip(squares, carries, strict=True)):
        if carry.get("key") == key:
            parts.append(carry["sum"].to(device))
            continue
        roots = step_scalars(steps, rule).root if roots is None else roots
        parts.append(_initial_sum(v, roots[i], rule.eps).to(device))
    return torch.stack(parts).sum()


def fused_step(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    rule: Rule,
    gamma: Scalar | None,
    carries: list[dict],
) -> Scalar:
    """One step in one compiled sweep; falls back to foreach where nothing can be compiled. Returns the next gamma.

    ``carries`` holds one dictionary per parameter, ``{"key": (eps, beta2), "sum": 0-d tensor}`` or empty.
    """
    key = _signature(params, rule)
    sweep = _sweep_or_none(key)
    if sweep is None:
        return _fall_back(params, grads, means, squares, steps, rule, gamma, carries)
    fresh = None
    if rule.norm == "current":
        fresh = normaliser(carried_squares(squares, steps, carries, rule, params[0].device), params, rule)
    used = chosen_gamma(fresh, gamma, rule, params[0].device)
    table = _table(steps, rule, used, params[0])
    hyper = _hyper((1 - rule.beta1, rule.beta2, rule.eps, rule.weight_decay, rule.maximize), *key[1:3])
    try:
        sums = sweep(params, grads, means, squares, table, hyper, *key[-2:])
    except Exception as error:  # compilation failed: nothing has been changed yet
        _give_up(error, key)
        return _fall_back(params, grads, means, squares, steps, rule, gamma, carries)
    _ready.add(key)
    for carry, value in zip(carries, sums.unbind(), strict=True):
        carry.update(key=(rule.eps, rule.beta2), sum=value)
    return normaliser(sums.sum(), params, rule) if rule.norm == "lagged" else used


def _sweep_or_none(key: tuple) -> Callable | None:
    return None if _unavailable else compile_sweep(key)


def _give_up(error: Exception, key: tuple) -> None:
    """Remember that nothing can be compiled here; an error of a sweep that ran before is a real one."""
    global _unavailable
    if key in _ready:
        raise error
    _unavailable = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    warnings.warn(f"fused=True falls back to foreach, torch.compile failed ({_unavailable})", stacklevel=4)


def _fall_back(params, grads, means, squares, steps, rule, gamma, carries) -> Scalar:
    for carry in carries:
        carry.clear()
    return foreach_step(params, grads, means, squares, steps, rule, gamma)


def check_fusable(params: list[Tensor]) -> None:
    """Raise ValueError unless every tensor is float32 or float64 (or complex of these), on one device, one dtype."""
    real = [torch.view_as_real(p) if p.is_complex() else p for p in params]
    for p, r in zip(params, real, strict=True):
        if r.dtype not in DTYPES:
            raise ValueError(f"fused=True needs float32 or float64 parameters, got {p.dtype}")
    if len({(r.dtype, r.device) for r in real}) > 1:
        raise ValueError(
            f"fused=True needs one dtype and device per group, got {sorted({str(p.dtype) for p in params})}"
        )
