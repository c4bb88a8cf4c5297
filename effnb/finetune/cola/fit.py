"""The loop over the links of a chain: a new optimizer and a new schedule for each."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from effnb.finetune.cola.chain import ChainOfLoRA


def linear_decay(optimizer: Optimizer, steps: int, end: float = 0.0) -> LambdaLR:
    """A schedule from the optimizer's lr down to ``end`` times it, in equal parts over ``steps``.

    Args:
        optimizer: whose lr is scheduled.
        steps: number of steps, >= 1; the first is taken at the full lr.
        end: last factor, in [0, 1], reached after ``steps`` steps.

    Returns:
        A scheduler to be stepped after every step of the optimizer.

    Raises:
        ValueError: ``steps`` below 1 or ``end`` outside [0, 1].

    Reference: xia2024chain

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> schedule = linear_decay(optimizer, 4)
    >>> [optimizer.step() or schedule.step() or schedule.get_last_lr()[0] for _ in range(4)]
    [0.75, 0.5, 0.25, 0.0]
    """
    if steps < 1 or not 0 <= end <= 1:
        raise ValueError(f"steps must be >= 1 and end in [0, 1], got {steps} and {end}")
    return LambdaLR(optimizer, lambda step: 1 - (1 - end) * min(step, steps) / steps)


def split_steps(steps: int | Sequence[int], links: int) -> list[int]:
    """Steps of each link: a total is split evenly, what remains goes to the last link.

    Args:
        steps: the total, >= ``links``, or one count >= 1 for each link.
        links: number of links.

    Returns:
        One count for each link.

    Raises:
        ValueError: fewer steps than links, a list of another length, or a link without a step.

    Reference: xia2024chain

    >>> split_steps(11, 3), split_steps([5, 4, 2], 3)
    ([3, 3, 5], [5, 4, 2])
    """
    if isinstance(steps, int):
        if steps < links:
            raise ValueError(f"steps must give each of the {links} links at least one, got {steps}")
        return [steps // links] * (links - 1) + [steps - steps // links * (links - 1)]
    counts = list(steps)
    if len(counts) != links or not all(isinstance(n, int) and n >= 1 for n in counts):
        raise ValueError(f"steps must hold a count >= 1 for each of the {links} links, got {counts}")
    return counts


def fit_chain(
    chain: ChainOfLoRA,
    step_fn: Callable[[nn.Module, int], Tensor],
    steps: int | Sequence[int],
    optimizer_factory: Callable[[list[nn.Parameter]], Optimizer],
    scheduler_factory: Callable[[Optimizer, int], LRScheduler] | None = None,
    callback: Callable[[ChainOfLoRA, int, Tensor], Any] | None = None,
    *,
    keep_head_state: bool | None = None,
    tie: bool = True,
) -> list[list[float]]:
    """Train all links of a chain that are left, from the open one on; the last one is tied too.

    Each link gets an optimizer and a schedule of its own: moments of the old factors point into the old subspace. A
    head goes on with its weights; its moments are new as well unless ``keep_head_state`` is set.

    Args:
        chain: open, that is not tied.
        step_fn: loss of a training step, ``step_fn(model, step)``; steps are counted from 0 over all links, so that the
            order of the data does not depend on the number of links.
        steps: the total (split evenly, the remainder to the last link) or one count for each link.
        optimizer_factory: for instance ``lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0)``; weight decay on
            the factors would pull at the update, not at the weights.
        scheduler_factory: ``scheduler_factory(optimizer, steps_of_the_link)``, stepped after every step, for instance
            :func:`linear_decay`; ``None`` leaves the lr as it is.
        callback: ``callback(chain, step, loss)`` after every step.
        keep_head_state: carry the optimizer state of all parameters but the factors over the knots; ``None`` does as
            the chain was made.
        tie: ``False`` never ties: the same adapter goes on with a new optimizer and schedule, which separates the
            effect of a restart from that of a new subspace.

    Returns:
        The losses, one list for each link.

    Raises:
        ValueError: fewer steps than links or a link without any, a loss that is no scalar with a gradient, a chain that
            is tied or unloaded, ``tie=False`` with ranks that differ.

    Reference: xia2024chain

    >>> model = nn.Linear(4, 4)
    >>> x, y = torch.randn(2, 64, 4)
    >>> chain = ChainOfLoRA(nn.Sequential(model), ["0"], ranks=(1, 1))
    >>> losses = fit_chain(
    ...     chain, lambda model, step: (model(x) - y).square().mean(), 11, lambda p: torch.optim.Adam(p, 0.1)
    ... )
    >>> [len(part) for part in losses], losses[-1][-1] < losses[0][0]
    ([5, 6], True)
    """
    counts = split_steps(steps, len(chain.ranks) - chain.link + 1)
    keep = chain.keep_head_state if keep_head_state is None else keep_head_state
    if not tie and len(set(chain.ranks)) > 1:
        raise ValueError(f"ranks must be equal with tie=False, got {chain.ranks}")
    chain._check_open("fit_chain")
    history: list[list[float]] = []
    done, head = 0, {}
    for count in counts:
        if history and tie:
            chain.extend()
        losses, head = _fit_link(chain, step_fn, done, count, optimizer_factory, scheduler_factory, callback, head)
        head = head if keep else {}
        history.append(losses)
        done += count
        if tie:
            chain.tie_knot()
    return history


def _fit_link(chain, step_fn, done, count, optimizer_factory, scheduler_factory, callback, head):
    optimizer = optimizer_factory(chain.parameters_to_tune())
    names = _head_names(chain)
    for parameter, name in names.items():
        if name in head:
            optimizer.state[parameter] = head[name]
    scheduler = scheduler_factory(optimizer, count) if scheduler_factory else None
    losses = []
    for step in range(done, done + count):
        loss = step_fn(chain.model, step)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"step_fn must return a scalar loss with a gradient, got {loss!r}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.detach())
        if callback:
            callback(chain, step, losses[-1])
    optimizer.zero_grad()
    return torch.stack(losses).tolist(), {name: optimizer.state[p] for p, name in names.items() if p in optimizer.state}


def _head_names(chain: ChainOfLoRA) -> dict[nn.Parameter, str]:
    factors = set(chain.adapter_parameters())
    return {p: name for name, p in chain.model.named_parameters() if p.requires_grad and p not in factors}
