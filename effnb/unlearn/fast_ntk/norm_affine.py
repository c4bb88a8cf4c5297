"""Per-sample Jacobians of norm layers and the head without per-sample graphs: one forward, K backward passes."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .subset import BATCH_NORMS, INSTANCE_NORMS, NORMS, head_of


class Layer(NamedTuple):
    """One layer whose parameters are wanted: their column ranges in the Jacobian, ``None`` where not wanted."""

    module: nn.Module
    weight: slice | None
    bias: slice | None


def plan(model: nn.Module, names: list[str]) -> list[Layer]:
    """The layers behind ``names``; raises if one is neither a norm's affine parameter nor part of the head."""
    columns, start = {}, 0
    sizes = dict(model.named_parameters())
    for name in names:
        columns[name] = slice(start, start := start + sizes[name].numel())
    head = head_of(model)[1] if any(isinstance(m, nn.Linear) for m in model.modules()) else None
    layers, seen = [], set()
    for prefix, module in model.named_modules():
        if isinstance(module, NORMS) or module is head:
            own = {k: columns.get(f"{prefix}.{k}" if prefix else k) for k in ("weight", "bias")}
            seen |= {f"{prefix}.{k}" if prefix else k for k, v in own.items() if v}
            if any(own.values()):
                layers.append(Layer(module, own["weight"], own["bias"]))
    other = [name for name in names if name not in seen]
    if other:
        raise ValueError(f"norm_affine needs parameters of norm layers and the head only, got {other[0]!r}")
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    tied = [name for name in names if owners.count(id(sizes[name])) > 1]
    if tied:
        raise ValueError(f"norm_affine needs parameters that no other layer shares, got {tied[0]!r}")
    return layers


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """What a norm layer multiplies by its weight."""
    if isinstance(module, INSTANCE_NORMS):
        own = not module.track_running_stats
        return F.instance_norm(x, module.running_mean, module.running_var, use_input_stats=own, eps=module.eps)
    if isinstance(module, BATCH_NORMS):
        return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)
    return F.layer_norm(x, module.normalized_shape, eps=module.eps)


def per_sample(module: nn.Module, values: Tensor) -> Tensor:
    """Sum over everything but samples and the norm's own axes, flat: ``(n, channels)``."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        first = values.ndim - len(module.normalized_shape)
        return values.sum(tuple(range(1, first))).flatten(1) if first > 1 else values.flatten(1)
    return values.sum(tuple(range(2, values.ndim))) if values.ndim > 2 else values


def _record(records: list, layer: Layer, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
    """Forward hook: keep the output (its gradient is wanted) and what the gradient has to be multiplied with."""
    x = args[0].detach()
    factor = (normalised(module, x) if isinstance(module, NORMS) else x) if layer.weight else None
    out = out if out.requires_grad else out.detach().requires_grad_()
    records.append((layer, factor, out))
    return out.clone()  # the network may go on in place (ReLU(inplace=True), out += shortcut)


def _fill(rows: Tensor, layer: Layer, factor: Tensor | None, grad: Tensor) -> None:
    """Add one layer's part to the rows ``(n, P)`` of one output."""
    if isinstance(layer.module, nn.Linear):
        weight = grad.unsqueeze(2) * factor.unsqueeze(1) if layer.weight else None
        bias = grad
    else:
        weight = per_sample(layer.module, grad * factor) if layer.weight else None
        bias = per_sample(layer.module, grad) if layer.bias else None
    if layer.weight:
        rows[:, layer.weight] += weight.flatten(1)
    if layer.bias:
        rows[:, layer.bias] += bias


def norm_affine(model: nn.Module, names: list[str], values: dict[str, Tensor]) -> Callable[[Tensor], tuple]:
    """A function from inputs ``(n, ...)`` to outputs ``(n, K)`` and Jacobian ``(n, K, P)``.

    In eval mode samples do not interact, so the gradient of ``outputs[:, k].sum()`` at a layer's output holds each
    sample's own gradient; a product with the normalised input turns it into the row of that sample.
    """
    layers = plan(model, names)
    size = sum(values[name].numel() for name in names)

    @torch.enable_grad()
    def chunk(x: Tensor) -> tuple[Tensor, Tensor]:
        records: list = []
        handles = [layer.module.register_forward_hook(partial(_record, records, layer)) for layer in layers]
        try:
            out = functional_call(model, values, (x,))
        finally:
            for handle in handles:
                handle.remove()
        for layer, _, recorded in records:
            wanted = 2 if isinstance(layer.module, nn.Linear) else 1
            if len(recorded) != len(x) or (wanted == 2 and recorded.ndim != 2):
                raise ValueError(f"norm_affine needs layers that see one row a sample, got {tuple(recorded.shape)}")
        jac = torch.zeros(len(x), out.shape[1], size, dtype=out.dtype, device=out.device)
        targets = [recorded for *_, recorded in records]
        for k in range(out.shape[1]):
            more = k + 1 < out.shape[1]
            grads = torch.autograd.grad(out[:, k].sum(), targets, retain_graph=more, allow_unused=True)
            for (layer, factor, _), grad in zip(records, grads, strict=True):
                if grad is not None:
                    _fill(jac[:, k], layer, factor, grad)
        return out.detach(), jac

    return chunk
