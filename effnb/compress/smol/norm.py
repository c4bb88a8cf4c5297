"""Batch norm statistics that were collected under noise belong to another network: collect them again."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, x: Tensor, batch_size: int = 256) -> int:
    """Estimate all running means and variances anew on ``x``; call it after ``freeze()``.

    Everything else runs in eval mode, so that neither noise nor dropout is drawn. Each batch counts alike.

    Args:
        model: any module; modes and momenta are restored.
        x: inputs ``(n, ...)``, from the training data.
        batch_size: examples at once, >= 1.

    Returns:
        Number of normalisation layers found.

    Raises:
        ValueError: no input, or ``batch_size`` below 1.

    Reference: savarese2022bits

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> recalibrate_batch_norm(model, torch.randn(10, 2))
    1
    """
    if len(x) == 0 or batch_size < 1:
        raise ValueError(f"x must hold examples and batch_size be >= 1, got {len(x)} and {batch_size}")
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if norms:
        with _collecting(model, norms):
            for batch in x.split(batch_size):
                model(batch)
    return len(norms)


@contextmanager
def _collecting(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    modes, momenta = {m: m.training for m in model.modules()}, {m: m.momentum for m in norms}
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm in norms:
            norm.momentum = momenta[norm]
