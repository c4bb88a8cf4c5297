"""Proxies that only count: parameters, multiply-adds, and NN-Mass."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..nb201 import Cell
from .common import LAYERS, Loss, check_model, pure, read_images

CONVOLUTIONS = (nn.modules.conv._ConvNd,)


class SkipCell(NamedTuple):
    """What NN-Mass needs of one cell: the share of its possible skip links that it has, its width and its depth."""

    density: float
    width: float
    depth: float


def count_params(model, batch=None, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    check_model(model)
    return float(sum(p.numel() for p in model.parameters() if p.requires_grad))


def count_macs(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    x = read_images(batch)
    found = 0

    def count(layer, args, out):
        nonlocal found
        positions = args[0].numel() / layer.in_channels if getattr(layer, "transposed", False) else out.numel() / layer.weight.shape[0]
        found += positions * layer.weight.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    try:
        with pure(model, seed) as call, torch.no_grad():
            model.eval()
            call(x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return float(found)


def nn_mass(model, batch=None, *, cells: Iterable[SkipCell] | None = None, loss_fn: Loss = F.cross_entropy, seed=0) -> float:
    found = list(cells) if cells is not None else [skip_cell(m) for m in model.modules() if isinstance(m, Cell)]
    if not found:
        raise ValueError("model must have cells with skip links; give them as cells=[(density, width, depth), ...]")
    return float(sum(density * width * depth for density, width, depth in found))


def skip_cell(cell: Cell) -> SkipCell:
    return SkipCell(0.0, 1.0, 3.0)
