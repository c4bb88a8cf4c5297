"""What is left of the forgotten samples: relearning, membership inference, distances to the retrained model."""

import copy
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .checks import LOSSES, Batches, check_choice, check_labels, check_number, collect
from .losses import loss_per_sample
from .subset import flatten, resolve


@contextmanager
def _eval(model: nn.Module):
    """Eval mode inside, every submodule's own mode afterwards."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in before.items():
            module.training = mode


@torch.no_grad()
def outputs_in_eval(model: nn.Module, x: Tensor, batch_size: int = 1024) -> Tensor:
    """Outputs ``(n, K)`` in eval mode and without gradients."""
    with _eval(model):
        return torch.cat([model(part) for part in x.split(batch_size)])


def _ratio(new: Tensor, target: Tensor, old: Tensor) -> float:
    base = torch.linalg.vector_norm(old - target)
    if base == 0:
        raise ValueError("original and retrained must differ, got a distance of 0")
    return float(torch.linalg.vector_norm(new - target) / base)


def activation_distance(model: nn.Module, retrained: nn.Module, x: Tensor) -> float:
    """Mean over samples of the L1 distance between the softmax outputs of two models, in [0, 2].

    Args:
        model: maps ``(n, ...)`` to logits ``(n, K)``; used in eval mode, its own mode is restored.
        retrained: the model to compare with.
        x: inputs ``(n, ...)``, at least one.

    Raises:
        ValueError: no input.

    Reference: golatkar2020forgetting

    >>> activation_distance(nn.Identity(), nn.Identity(), torch.eye(3))
    0.0
    """
    if len(x) == 0:
        raise ValueError("x must hold at least one sample, got none")
    difference = outputs_in_eval(model, x).softmax(1) - outputs_in_eval(retrained, x).softmax(1)
    return float(difference.abs().sum(1).mean())


def parameter_distance(
    model: nn.Module, retrained: nn.Module, original: nn.Module, params: str | Iterable[str] = "all"
) -> float:
    """How much of the way to the retrained weights is left: ``|w_new - w_retrain| / |w - w_retrain|``.

    Args:
        model: after unlearning.
        retrained: trained without the forgotten samples.
        original: before unlearning.
        params: the parameters to compare, names or a subset for :func:`peft_parameters`.

    Returns:
        0 at the retrained weights, 1 for the original ones.

    Raises:
        ValueError: original and retrained weights agree, or unknown names.

    Reference: golatkar2020forgetting

    >>> a, b, c = (nn.Linear(1, 1, bias=False) for _ in range(3))
    >>> for m, value in ((a, 1.0), (b, 2.0), (c, 0.0)):
    ...     _ = m.weight.data.fill_(value)
    >>> parameter_distance(a, b, c)
    0.5
    """
    names = resolve(model, params)
    vectors = (flatten(dict(m.named_parameters()), names) for m in (model, retrained, original))
    return _ratio(*vectors)


def output_distance(model: nn.Module, retrained: nn.Module, original: nn.Module, x: Tensor) -> float:
    """The same ratio as :func:`parameter_distance` for the logits on some inputs.

    Args:
        model: after unlearning; all models are used in eval mode, their own mode is restored.
        retrained: trained without the forgotten samples.
        original: before unlearning.
        x: inputs ``(n, ...)``, usually the forgotten ones.

    Returns:
        0 at the retrained model's logits, 1 for the original ones.

    Raises:
        ValueError: the logits of the original and the retrained model agree.

    Reference: golatkar2020forgetting
    """
    return _ratio(*(outputs_in_eval(m, x).double() for m in (model, retrained, original)))


def update_cosine(
    model: nn.Module, retrained: nn.Module, original: nn.Module, params: str | Iterable[str] = "all"
) -> float:
    """Cosine of the angle between the step taken and the step to the retrained weights; 0 if either is zero.

    Args:
        model: after unlearning.
        retrained: trained without the forgotten samples.
        original: before unlearning.
        params: the parameters to compare.

    Reference: golatkar2020forgetting
    """
    names = resolve(model, params)
    new, target, old = (flatten(dict(m.named_parameters()), names) for m in (model, retrained, original))
    return float(torch.nn.functional.cosine_similarity(new - old, target - old, dim=0))


class RelearnTime(int):
    """Epochs until the forgotten samples are known again; ``censored`` if that did not happen within the cap.

    Reference: golatkar2020forgetting

    >>> str(RelearnTime(100, censored=True)), RelearnTime(3) + 1
    ('>= 100', 4)
    """

    censored: bool

    def __new__(cls, epochs: int, censored: bool = False) -> "RelearnTime":
        """An integer with a flag."""
        made = super().__new__(cls, epochs)
        made.censored = censored
        return made

    def __str__(self) -> str:
        return f">= {int(self)}" if self.censored else str(int(self))


@torch.enable_grad()
def relearn_time(
    model: nn.Module,
    data: Batches,
    forget: Batches,
    original: nn.Module | float,
    *,
    params: str | Iterable[str] = "all",
    loss: str = "ce",
    lr: float = 0.01,
    batch_size: int = 128,
    draws: int = 500,
    cap: int = 100,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> RelearnTime:
    """Epochs of SGD on all data until the loss on the forgotten samples is back at the original model's.

    Plain SGD in eval mode without weight decay; an epoch has up to ``draws`` samples, drawn with replacement. The
    loss is looked at before each epoch, so a model that still knows the samples needs 0.

    Args:
        model: after unlearning; a copy of it is trained.
        data: all data, ``(x, y)`` tensors or a loader that is read once.
        forget: the forgotten samples.
        original: the model before unlearning, or its mean loss on ``forget``.
        params: the parameters to train, all of them in the official code.
        loss: ``"ce"`` or ``"mse"``.
        lr: learning rate.
        batch_size: samples a step, >= 1.
        draws: samples an epoch; at most as many as there are.
        cap: epochs after which to stop, >= 0.
        tolerance: added to the original model's loss.
        seed: of the draws.

    Returns:
        An integer; ``censored``, and printed as ``>= cap``, if the cap was reached.

    Raises:
        ValueError: an argument out of range, no data, or labels outside ``0..K-1``.

    Reference: golatkar2020forgetting
    """
    check_choice("loss", loss, LOSSES)
    if min(batch_size, draws) < 1 or cap < 0:
        raise ValueError(f"batch_size and draws must be >= 1, cap >= 0, got {batch_size}, {draws}, {cap}")
    (x, y), (xf, yf) = collect(data, "data"), collect(forget, "forget")
    made = copy.deepcopy(model).eval()
    names = set(resolve(made, params))
    for name, p in made.named_parameters():
        p.requires_grad_(name in names)

    def forgotten(m: nn.Module) -> float:
        out = outputs_in_eval(m, xf)
        check_labels(torch.cat([y, yf]), out.shape[1], "data and forget")
        return float(loss_per_sample(out, yf, loss).mean())

    goal = (original if isinstance(original, int | float) else forgotten(original)) + tolerance
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=check_number("lr", lr))
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(cap):
        if forgotten(made) <= goal:
            return RelearnTime(epoch)
        for index in torch.randint(len(x), (min(draws, len(x)),), generator=generator).split(batch_size):
            optimizer.zero_grad()
            loss_per_sample(made(x[index]), y[index], loss).mean().backward()
            optimizer.step()
    return RelearnTime(cap, censored=forgotten(made) > goal)
