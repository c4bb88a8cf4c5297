"""Simple baselines for unlearning: ascent on the loss, random labels, and a zeroed row of the head."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .checks import LOSSES, Batches, check_choice, check_labels, check_number, collect
from .subset import head_of
from .training import descend, finetune, mean_loss, outputs_of


def max_loss(
    model: nn.Module,
    params: str | Iterable[str],
    retain: Batches,
    forget: Batches,
    *,
    alpha: float = 1.0,
    loss: str = "mse",
    centred: bool = False,
    epochs: int = 10,
    lr: float = 0.01,
    momentum: float = 0.9,
    batch_size: int = 64,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    r"""Baseline: descend on the retained data while ascending on the rest, :math:`L_r - \alpha L_f`.

    Args:
        model: the fine-tuned model.
        params: see :func:`finetune`.
        retain: the retained data.
        forget: the samples to forget; a random batch of them goes with every batch of retained ones.
        alpha: weight of the ascent, >= 0; the objective has no minimum where it wins, so a long run diverges.
        loss: see :func:`finetune`.
        centred: see :func:`finetune`.
        epochs: passes over the retained data, >= 0.
        lr: learning rate at the start.
        momentum: of SGD, in [0, 1).
        batch_size: samples of each kind a step, >= 1.
        seed: of the order of the samples.
        **options: ``weight_decay`` and ``init_state``, see :func:`finetune`.

    Returns:
        The trained copy.

    Raises:
        ValueError: ``alpha`` < 0, or see :func:`finetune`.

    Reference: golatkar2020forgetting
    """
    check_choice("loss", loss, LOSSES)
    alpha = check_number("alpha", alpha)
    (xr, yr), (xf, yf) = collect(retain, "retain"), collect(forget, "forget")
    check_labels(torch.cat([yr, yf]), outputs_of(model, xr), "retain and forget")

    def objective(m: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        other = torch.randperm(len(xf), generator=generator)[:batch_size]
        ascent = mean_loss(m, xf[other], yf[other], loss, centred)
        return mean_loss(m, xr[index], yr[index], loss, centred) - alpha * ascent

    schedule = {"epochs": epochs, "lr": lr, "momentum": momentum, "batch_size": batch_size, "seed": seed}
    return descend(model, params, objective, len(xr), from_init=False, **schedule, **options)


def random_label(
    model: nn.Module, params: str | Iterable[str], retain: Batches, forget: Batches, *, seed: int = 0, **options: Any
) -> nn.Module:
    """Baseline: give each sample to forget a label drawn uniformly among the other classes, and fine-tune on all.

    Args:
        model: the fine-tuned model.
        params: see :func:`finetune`.
        retain: the retained data.
        forget: the samples to forget.
        seed: of the labels and of the order of the samples.
        **options: see :func:`finetune`; ``weight_decay`` and ``init_state`` are required.

    Returns:
        The trained copy.

    Raises:
        ValueError: see :func:`finetune`; or a model with one output.

    Reference: golatkar2020forgetting
    """
    (xr, yr), (xf, yf) = collect(retain, "retain"), collect(forget, "forget")
    classes = outputs_of(model, xr)
    if classes < 2:
        raise ValueError(f"model must have at least two outputs, got {classes}")
    check_labels(torch.cat([yr, yf]), classes, "retain and forget")
    other = torch.randint(1, classes, yf.shape, generator=torch.Generator().manual_seed(seed)).to(yf.device)
    data = torch.cat([xr, xf]), torch.cat([yr, (yf + other) % classes])
    return finetune(model, params, data, seed=seed, **options)


def zero_class_row(model: nn.Module, label: int) -> nn.Module:
    """Trivial baseline: a copy whose head has zeros for one class; it too scores 0 % on a forgotten class.

    Args:
        model: with a linear head (the last linear layer).
        label: the class, from 0.

    Returns:
        The copy.

    Raises:
        ValueError: no linear layer, or ``label`` outside the head's outputs.

    Reference: li2023fastntk

    >>> zero_class_row(nn.Linear(2, 3), 1).weight[1].tolist()
    [0.0, 0.0]
    """
    made = copy.deepcopy(model)
    head = head_of(made)[1]
    if not 0 <= label < head.out_features:
        raise ValueError(f"label must be from 0 to {head.out_features - 1}, got {label}")
    with torch.no_grad():
        head.weight[label] = 0
        if head.bias is not None:
            head.bias[label] = 0
    return made
