"""Proxies that only count: parameters, multiply-adds, the weights' norm, and NN-Mass."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from effnb.common import check_number
from effnb.nas.nb201 import EDGES, Cell
from effnb.nas.proxies.activations import watched
from effnb.nas.proxies.gradient import total, weights
from effnb.nas.zico.passes import Loss, check_model, pure, read_images


class SkipCell(NamedTuple):
    """What `nn_mass` needs of one cell: the share of possible skip links that it has, its width and its depth.

    >>> SkipCell(density=0.5, width=16, depth=3)
    SkipCell(density=0.5, width=16, depth=3)
    """

    density: float
    width: float
    depth: float


def count_params(
    model: nn.Module, batch: Any = None, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0
) -> float:
    """Return the number of trainable scalars; higher is better.

    Args:
        model: any module of real numbers, else TypeError.
        batch, loss_fn, seed: not used.

    >>> count_params(nn.Linear(3, 2))
    8.0
    """
    parameters, _ = check_model(model)
    return float(sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad))


def l2_norm(model: nn.Module, batch: Any = None, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    r"""Return :math:`\sum_l \lVert \theta_l \rVert_2` over convolution and linear weights; higher is better.

    Args:
        model: network of real numbers, else TypeError, with such a weight that is trainable, else ValueError.
        batch, loss_fn, seed: not used.

    Reference: abdelfattah2021zerocost.

    >>> model = nn.Linear(4, 1)
    >>> _ = nn.init.constant_(model.weight, 3.0)
    >>> l2_norm(model)
    6.0
    """
    # One call for all layers: on small networks the overhead of a call is the cost.
    return total(torch._foreach_norm([weight.detach() for weight in weights(model).values()]))


def count_macs(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    """Return the multiply-adds of one sample in convolution and linear layers; higher is better.

    Norms, pooling, additions, biases and activations count nothing. A layer that is used twice counts twice.

    Args:
        model, loss_fn, seed: as for `naswot`, which also says what raises; it needs no ReLU.
        batch: ``(x, y)`` or ``x`` alone, of which the first sample is run.

    >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(5, 3, 4, 4))  # 16 places * 8 * 27
    3456.0
    """
    check_model(model)
    x, macs = read_images(batch)[:1], []

    def count(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        # Each input element of a transposed convolution, each output element of the others meets one row of weights.
        elements = args[0] if getattr(layer, "transposed", False) else out
        macs.append(elements.numel() * layer.weight[0].numel())

    layers = [module for module in model.modules() if isinstance(module, _ConvNd | nn.Linear)]
    with pure(model, seed, train=False) as call, torch.no_grad(), watched(layers, count):
        call(x)
    return float(sum(macs))


def nn_mass(
    model: nn.Module,
    batch: Any = None,
    *,
    cells: Iterable[tuple[float, float, float]] | None = None,
    loss_fn: Loss = F.cross_entropy,
    seed: int | None = 0,
) -> float:
    r"""Return NN-Mass, :math:`\sum_c \rho_c w_c d_c` over cells of density, width and depth; higher is better.

    Only for families with skip links. `effnb.nas.nb201.Cell` is known: its skip links are the three edges that pass
    over a node, present unless the operation is ``none``; its depth is 3. For other networks give ``cells``.

    Args:
        model, loss_fn, seed: as for `naswot`.
        batch: ``(x, y)`` or ``x`` alone, to find the cells' widths; not needed with ``cells``.
        cells: triples (density, width, depth), see `SkipCell`.

    Raises:
        ValueError: no cells, or one out of range.
        TypeError: no module, or a batch of another kind.

    Reference: bhardwaj2021nnmass.

    >>> nn_mass(nn.Identity(), cells=[SkipCell(0.5, 16, 3), SkipCell(1.0, 32, 3)])
    120.0
    """
    check_model(model)
    known = [module for module in model.modules() if isinstance(module, Cell)]
    found = [SkipCell(*cell) for cell in cells or ()]
    if cells is None and known:
        # Edges that pass over a node; 1>2 and 2>3 follow 0>1 in the chain of the cell.
        skips = [pair for pair in EDGES if pair[1] - pair[0] > 1]

        def note(cell: Cell, args: tuple[Tensor, ...], out: Tensor) -> None:
            density = sum(pair in cell.ends for pair in skips) / len(skips)
            found.append(SkipCell(density, out.shape[1], max(target for _, target in EDGES)))

        x = read_images(batch)[:1]
        with pure(model, seed, train=False) as call, torch.no_grad(), watched(known, note):
            call(x)
    if not found:
        raise ValueError("model must have cells with skip links; give them as cells=[(density, width, depth), ...]")
    for cell in found:
        check_number("density of a cell", cell.density, ge=0, le=1)
        check_number("width of a cell", cell.width, gt=0)
        check_number("depth of a cell", cell.depth, gt=0)
    return float(sum(density * width * depth for density, width, depth in found))
