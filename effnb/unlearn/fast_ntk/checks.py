"""Input checks: a model that treats its samples one by one, labelled batches, numbers."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .subset import BATCH_NORMS, INSTANCE_NORMS

LOSSES = ("mse", "ce")
FORMS = ("newton-diff", "golatkar", "newton", "influence")
DROPOUTS = (nn.modules.dropout._DropoutNd,)
Batches = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: Any, low: float = 0.0) -> float:
    """``value`` as a float; raise unless it is a finite number >= ``low``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < low:
        raise ValueError(f"{name} must be finite and >= {low:g}, got {value}")
    return float(value)


def check_settings(loss: str, form: str, hessian: str | None, at: str, dtype: torch.dtype, centred: bool) -> None:
    """Raise unless the choices of an unlearner exist and go together."""
    check_choice("loss", loss, LOSSES)
    check_choice("form", form, FORMS)
    check_choice("hessian", hessian, ("identity", "ggn", None))
    check_choice("at", at, ("final", "init"))
    check_choice("dtype", dtype, (torch.float32, torch.float64))
    if centred not in (True, False) or (centred and loss != "mse"):
        raise ValueError(f"centred must be False unless the loss is 'mse', got {centred} with {loss!r}")


def check_model(model: nn.Module) -> None:
    """Raise unless ``model`` is in eval mode throughout and no layer mixes the samples of a batch."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and not isinstance(module, INSTANCE_NORMS) and module.running_mean is None:
            raise ValueError(f"model must have running statistics in its batch norms, {name!r} has none")
        if module.training:
            kind = "active dropout" if isinstance(module, DROPOUTS) else "a module in train mode"
            raise ValueError(f"model must be in eval mode (call model.eval()), got {kind}: {name or 'the model'!r}")
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.is_floating_point() and not torch.isfinite(p).all():
            raise ValueError(f"model must be finite, got NaN or infinity in {name!r}")


def check_inputs(x: Any) -> None:
    """Raise unless ``x`` is a tensor with at least one sample."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.ndim < 1 or len(x) == 0:
        raise ValueError(f"x must hold at least one sample, got shape {tuple(x.shape)}")


def batches(data: Batches, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The non-empty batches of a loader, or the one batch of a pair of tensors, with their shapes checked."""
    pair = isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    for batch in [data] if pair else data:
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(p, Tensor) for p in batch):
            raise TypeError(f"{name} must be (x, y) tensors or yield such pairs, got {type(batch).__name__}")
        x, y = batch
        if y.ndim != 1 or len(x) != len(y):
            raise ValueError(f"{name} must pair n inputs with n labels, got {tuple(x.shape)} and {tuple(y.shape)}")
        if y.dtype not in (torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8):
            raise TypeError(f"{name} must have integer labels, got {y.dtype}")
        if len(x):
            yield x, y.long()


def collect(data: Batches, name: str) -> tuple[Tensor, Tensor]:
    """All batches of a loader as one pair of tensors; raises if there is none."""
    found = list(batches(data, name))
    if not found:
        raise ValueError(f"{name} must hold at least one sample, got none")
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def check_labels(y: Tensor, outputs: int, name: str) -> None:
    """Raise unless all labels are in ``0..outputs - 1``."""
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < outputs:
        wrong = int(y.min()) if int(y.min()) < 0 else int(y.max())
        raise ValueError(f"{name} must have labels from 0 to {outputs - 1}, got {wrong}")


def retain_forget_split(x: Tensor, y: Tensor, forget: Tensor | list[int]) -> tuple[tuple, tuple]:
    """Split a data set by the indices of the samples to forget: ``((x_r, y_r), (x_f, y_f))``.

    Args:
        x: inputs ``(n, ...)``.
        y: labels ``(n,)``.
        forget: distinct indices from 0 to ``n - 1``; none and all of them are both legal.

    Returns:
        The retained pair in the order of the data, and the forgotten pair in the order of ``forget``.

    Raises:
        TypeError: ``forget`` does not hold integers.
        ValueError: ``x`` and ``y`` differ in length or are empty; an index outside the data or given twice.

    Reference: golatkar2020forgetting

    >>> (_, kept), (_, gone) = retain_forget_split(torch.zeros(4, 1), torch.tensor([0, 1, 2, 3]), [2])
    >>> kept.tolist(), gone.tolist()
    ([0, 1, 3], [2])
    """
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x and y must be of one length >= 1, got {len(x)} and {len(y)}")
    index = torch.as_tensor(forget)
    if index.numel() and (index.dtype.is_floating_point or index.dtype in (torch.bool, torch.complex64)):
        raise TypeError(f"forget must hold integer indices, got {index.dtype}")
    index = index.long().reshape(-1).to(y.device)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(y):
        raise ValueError(f"forget must hold indices from 0 to {len(y) - 1}, got {int(index.min())}..{int(index.max())}")
    if index.unique().numel() < index.numel():
        raise ValueError("forget must hold distinct indices, got one twice")
    keep = torch.ones(len(y), dtype=torch.bool, device=y.device).index_fill_(0, index, False)
    return (x[keep], y[keep]), (x[index], y[index])
