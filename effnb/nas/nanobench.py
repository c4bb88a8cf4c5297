"""nano-bench: NAS-Bench-201's cells in a network small enough to be trained in seconds on one core."""

from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from effnb.common import check_count, check_number, mode_restored
from effnb.nas.nb201 import all_cells, cell_network, check_edges, iso_class, relu_conv_bn

MEAN, STD = 0.2860, 0.3530


def images(x: Tensor) -> Tensor:
    """Return Fashion-MNIST as nano-bench sees it: pooled to 14 x 14 and standardised.

    Args:
        x: ``(batch, 1, 28, 28)`` in [0, 1]; another shape raises ValueError.

    >>> images(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 1, 14, 14])
    """
    if x.ndim != 4 or x.shape[1:] != (1, 28, 28):
        raise ValueError(f"x must have the shape (batch, 1, 28, 28), got {tuple(x.shape)}")
    return (F.avg_pool2d(x, 2) - MEAN) / STD


def sample_cells(count: int = 400, seed: int = 20240601) -> list[str]:
    """Return cells drawn without replacement, one from each of ``count`` classes of equal function.

    Args:
        count: number of cells, 1 .. 6466, else ValueError.
        seed: of ``numpy.random.default_rng``.

    >>> len({iso_class(cell) for cell in sample_cells(10)})
    10
    """
    first: dict[str, str] = {}
    # One of each class: cells of equal function would count one network several times.
    for cell in all_cells():
        first.setdefault(iso_class(cell), cell)
    check_count("count", count, 1, len(first))
    return np.random.default_rng(seed).choice(list(first.values()), count, replace=False).tolist()


def build_net(
    edges: str, widths: tuple[int, int] = (8, 16), depth: int = 1, generator: Generator | None = None
) -> nn.Sequential:
    """Return the two-stage network of nano-bench around one cell.

    Args:
        edges, generator: as for `effnb.nas.nb201.build_cell_net`.
        widths: channels of the two stages, >= 1; (8, 16) in the main table.
        depth: cells a stage, >= 1.

    Returns:
        A module from ``(batch, 1, 14, 14)`` to ``(batch, 10)``.

    Raises:
        ValueError: if ``edges`` is not six digits 0..4, or a width or the depth is below 1.

    >>> build_net("333333")(torch.zeros(2, 1, 14, 14)).shape
    torch.Size([2, 10])
    """
    check_edges(edges)
    if len(widths) != 2:
        raise ValueError(f"widths must be two numbers, got {widths}")
    for name, size in (("widths", widths[0]), ("widths", widths[1]), ("depth", depth)):
        check_count(name, size)
    return cell_network(edges, widths, depth, partial(relu_conv_bn, kernel=3, stride=2), 1, 10, generator)


def train_net(
    net: nn.Module, x: Tensor, y: Tensor, seed: int, epochs: int = 3, batch_size: int = 128, lr: float = 0.1
) -> list[float]:
    """Train in place by nano-bench's recipe, its mode put back; return the mean loss of each epoch.

    SGD with Nesterov momentum 0.9 and weight decay 5e-4, one cycle of the learning rate (20 % warm-up) up to ``lr``.

    Args:
        net: from `build_net`.
        x: images ``(n, 1, 14, 14)``, from `images`.
        y: labels ``(n,)``.
        seed: of the order of the samples.
        epochs: passes over the data, >= 1.
        batch_size: >= 2; a last smaller batch is left out.
        lr: peak learning rate, > 0.

    Raises:
        ValueError: if there is less than one batch, or a setting is out of range.

    >>> x, y = torch.randn(8, 1, 14, 14), torch.arange(8)
    >>> len(train_net(build_net("100000"), x, y, seed=0, epochs=2, batch_size=4))
    2
    """
    check_count("epochs", epochs)
    check_number("lr", lr, gt=0)
    check_count("batch_size", batch_size, 2, len(x))
    order = Generator().manual_seed(seed)
    # Equal batches only: the schedule counts steps, and batch norm needs more than a sample.
    steps = len(x) // batch_size
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * steps, pct_start=0.2)
    losses = []
    with mode_restored(net, train=True):
        for _ in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(x), generator=order)[: steps * batch_size].split(batch_size):
                loss = F.cross_entropy(net(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
            losses.append(total / steps)
    return losses
