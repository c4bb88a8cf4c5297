"""Fine-tuning of a subset of parameters in eval mode, with decay towards the start."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checks import LOSSES, Batches, check_choice, check_labels, check_model, check_number, collect
from .losses import loss_per_sample
from .state import initial_values
from .subset import resolve


def _trainable_copy(model: nn.Module, names: list[str]) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy in which only the named parameters take gradients, and those parameters."""
    made = copy.deepcopy(model).requires_grad_(False)
    known = dict(made.named_parameters())
    return made, [known[name].requires_grad_() for name in names]


def mean_loss(model: nn.Module, x: Tensor, y: Tensor, loss: str, centred: bool) -> Tensor:
    """Mean over the samples of the loss."""
    return loss_per_sample(model(x), y, loss, centred).mean()


@torch.enable_grad()
def descend(
    model: nn.Module,
    params: str | Iterable[str],
    objective: Callable[[nn.Module, Tensor, torch.Generator], Tensor],
    n: int,
    *,
    weight_decay: float,
    init_state: Mapping[str, Tensor] | nn.Module,
    from_init: bool,
    epochs: int,
    lr: float,
    momentum: float,
    batch_size: int,
    seed: int,
) -> nn.Module:
    """SGD with a cosine schedule on ``objective(model, batch of indices) + weight_decay / 2 |w - w0|^2``."""
    check_model(model)
    names = resolve(model, params)
    lam, lr = check_number("weight_decay", weight_decay), check_number("lr", lr)
    if epochs < 0 or batch_size < 1 or not 0 <= momentum < 1:
        rule = "epochs must be >= 0, batch_size >= 1, momentum in [0, 1)"
        raise ValueError(f"{rule}, got {epochs}, {batch_size}, {momentum}")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    made, leaves = _trainable_copy(model, names)
    anchors = [value.to(p) for value, p in zip(initial_values(model, names, init_state).values(), leaves, strict=True)]
    if from_init:
        torch._foreach_copy_([p.data for p in leaves], anchors)
    optimizer = torch.optim.SGD(leaves, lr=lr, momentum=momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * -(-n // batch_size)))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(n, generator=generator).split(batch_size):
            optimizer.zero_grad(set_to_none=False)
            objective(made, index, generator).backward()
            for p, anchor in zip(leaves, anchors, strict=True):
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.grad.add_(p.data - anchor, alpha=lam)  # decay towards w0: towards zero the closed form is wrong
            optimizer.step()
            schedule.step()
    made.zero_grad()
    for name, p in made.named_parameters():
        p.requires_grad_(flags[name])
    return made


def finetune(
    model: nn.Module,
    params: str | Iterable[str],
    data: Batches,
    *,
    weight_decay: float,
    init_state: Mapping[str, Tensor] | nn.Module,
    loss: str = "mse",
    epochs: int = 60,
    lr: float = 0.1,
    momentum: float = 0.9,
    batch_size: int = 64,
    seed: int = 0,
    centred: bool = False,
    from_init: bool = False,
) -> nn.Module:
    r"""Fine-tune a copy on some data: mean loss :math:`+ \lambda/2\,|w - w_0|^2` over the named parameters.

    The copy stays in eval mode, so running statistics are frozen; SGD with momentum and a cosine schedule down to
    zero. On the retained data this is the baseline *fine-tune*; on all data, with ``from_init``, it makes the
    original model.

    Args:
        model: in eval mode; where training starts unless ``from_init``. It is not changed.
        params: names of the parameters to train, or a subset for :func:`peft_parameters`.
        data: ``(x, y)`` tensors, or a loader that is read once.
        weight_decay: ``lam`` >= 0, towards ``init_state``.
        init_state: values ``w0`` before fine-tuning, a state dict or a model.
        loss: ``"mse"`` (half the squared distance to one-hot targets) or ``"ce"``.
        epochs: passes over the data, >= 0.
        lr: learning rate at the start, >= 0.
        momentum: of SGD, in [0, 1).
        batch_size: samples a step, >= 1.
        seed: of the order of the samples.
        centred: targets one-hot minus ``1 / K`` (mse only).
        from_init: start from ``init_state`` instead of the model's own values.

    Returns:
        The trained copy.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range, no data, labels outside ``0..K-1``, or a model not in eval mode.

    Reference: li2023fastntk

    >>> model, data = nn.Linear(2, 2).eval(), (torch.eye(2), torch.tensor([0, 1]))
    >>> tuned = finetune(model, "head", data, weight_decay=0.0, init_state=model, epochs=200)
    >>> tuned(torch.eye(2)).argmax(1)
    tensor([0, 1])
    """
    check_choice("loss", loss, LOSSES)
    x, y = collect(data, "data")
    check_labels(y, outputs_of(model, x), "data")
    schedule = {"epochs": epochs, "lr": lr, "momentum": momentum, "batch_size": batch_size, "seed": seed}
    start = {"weight_decay": weight_decay, "init_state": init_state, "from_init": from_init}
    return descend(model, params, lambda m, i, _: mean_loss(m, x[i], y[i], loss, centred), len(x), **start, **schedule)


def outputs_of(model: nn.Module, x: Tensor) -> int:
    """Number of outputs, from one sample."""
    check_model(model)
    with torch.no_grad():
        return model(x[:1]).shape[1]


def retrain(model: nn.Module, params: str | Iterable[str], retain: Batches, **options: Any) -> nn.Module:
    """Fine-tune anew from ``init_state`` on the retained data: what unlearning should come close to.

    Args:
        model: any model of the same architecture whose parameters outside ``params`` are the pre-trained ones.
        params: see :func:`finetune`.
        retain: the retained data.
        **options: see :func:`finetune`; ``weight_decay`` and ``init_state`` are required. Take the schedule and the
            seed of the original model.

    Returns:
        The trained copy.

    Raises:
        ValueError: see :func:`finetune`.

    Reference: li2023fastntk
    """
    return finetune(model, params, retain, **options, from_init=True)
