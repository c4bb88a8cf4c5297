"""The training loop that all chapters share: seeded, quiet, and leaving everything but the weights as it was."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnb.common import mode_restored


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int = 128,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    scheduler: Any = None,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train ``model`` on ``(x, y)`` held in memory and return the mean loss over the examples of each epoch.

    ``generator`` drives the shuffling and, through a forked global stream, the model's own noise such as dropout:
    the run depends on nothing else and leaves the global random state untouched. A diverging loss is returned as it
    is (``nan`` or ``inf``), for a heat map must show it.

    Args:
        model: maps ``(batch, ...)`` to what ``loss`` takes; trained in place, every submodule's mode is restored.
        x: inputs ``(n, ...)``.
        y: targets ``(n, ...)``.
        optimizer: holds the parameters to train.
        epochs: passes over the data, >= 0.
        batch_size: examples a step, >= 1; the last batch of an epoch may be smaller.
        loss: ``loss(output, target)``, the mean over the batch.
        scheduler: stepped after every batch, not every epoch.
        generator: CPU stream for the order of the examples and for the model's noise.
        on_step: called with the step's number (from 0 over all epochs) and its loss, after the optimizer's step.

    Raises:
        TypeError: ``generator`` or ``optimizer`` is of another type.
        ValueError: ``x`` and ``y`` differ in length or are empty; ``epochs`` or ``batch_size`` out of range.

    >>> model, x = nn.Linear(2, 2), torch.eye(2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    >>> losses = fit(model, x, torch.tensor([0, 1]), optimizer=optimizer, epochs=5,
    ...              generator=torch.Generator().manual_seed(0))
    >>> losses[-1] < losses[0]
    True
    """
    _check_data(x, y, batch_size)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if epochs < 0:
        raise ValueError(f"epochs must be >= 0, got {epochs}")
    losses, step = [], 0
    seed = int(torch.randint(2**31, (), generator=generator))
    with mode_restored(model, train=True), torch.random.fork_rng([x.device] if x.is_cuda else []):
        # The global stream follows `generator`, for dropout can draw from nowhere else.
        torch.default_generator.manual_seed(seed)
        if x.is_cuda:
            with torch.cuda.device(x.device):
                torch.cuda.manual_seed(seed)
        for _ in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
                value = loss(model(x[batch]), y[batch])
                optimizer.zero_grad()
                value.backward()
                value = value.detach()
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                if on_step is not None:
                    on_step(step, float(value))
                total += value * len(batch)
                step += 1
            losses.append(float(total) / len(x))
    return losses


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1024) -> float:
    """Percentage of examples whose largest output is the label's, in eval mode and without gradients.

    Args:
        model: maps ``(batch, ...)`` to logits ``(batch, classes)``; every submodule's mode is restored.
        x: inputs ``(n, ...)``.
        y: int64 labels ``(n,)``.
        batch_size: examples at once, >= 1.

    Raises:
        ValueError: as :func:`fit`.

    >>> accuracy(nn.Identity(), torch.eye(4), torch.tensor([0, 1, 2, 0]))
    75.0
    """
    _check_data(x, y, batch_size)
    with mode_restored(model, train=False), torch.no_grad():
        pairs = zip(x.split(batch_size), y.split(batch_size), strict=True)
        hits = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in pairs)
    return 100.0 * hits / y.numel()


def _check_data(x: Tensor, y: Tensor, batch_size: int) -> None:
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x and y must be of one length >= 1, got {len(x)} and {len(y)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
