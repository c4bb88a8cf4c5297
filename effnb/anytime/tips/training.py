"""Anytime training: T subnetworks of shared weights in one step, any sampler, optional distillation."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from effnb.common import check_count

Sampler = Callable[[int], np.ndarray]


class AnytimeTrainer:
    r"""Trains a supernet: each step runs T subnetworks on one batch and descends on the mean of their losses.

    With ``distill=True`` the first subnetwork, which must hold the others, learns from the labels, and the others from
    its outputs: :math:`-\sum_c p_c \log q_c` with :math:`p` detached.

    Args:
        supernet: called with ``(x, masks)``; a :class:`DagMLP` or :class:`DagConvNet`.
        optimizer: of the supernet's parameters.
        sampler: gives ``(T, n, n)`` subnetworks; one for each copy of the supernet if it has several.
        T: subnetworks of a step, >= 1.
        distill: train the others on the outputs of the first.

    Raises:
        ValueError: ``T`` below 1, a number of samplers that does not fit.

    Reference: yu2019universally.

    >>> from effnb.anytime import DagMLP, SandwichSampler, SuperGraph, UniformSampler
    >>> graph = SuperGraph(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
    >>> net = DagMLP(graph, 8, classes=2, generator=torch.Generator().manual_seed(0))
    >>> optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    >>> trainer = AnytimeTrainer(net, optimizer, SandwichSampler(UniformSampler(graph, rng=0)))
    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    >>> losses = trainer.fit(x, (x[:, 0] > 0).long(), steps=30, generator=torch.Generator().manual_seed(2))
    >>> losses.shape, bool(losses[-1].mean() < 0.7 * losses[0].mean())
    (torch.Size([30, 1, 4]), True)
    """

    def __init__(
        self,
        supernet: nn.Module,
        optimizer: Optimizer,
        sampler: Sampler | Sequence[Sampler],
        T: int = 4,
        distill: bool = False,
    ) -> None:
        check_count("T", T)
        self.samplers = list(sampler) if isinstance(sampler, Sequence) else [sampler]
        if len(self.samplers) != supernet.copies:
            raise ValueError(f"sampler must be one a copy, {supernet.copies}, got {len(self.samplers)}")
        self.supernet, self.optimizer, self.T, self.distill = supernet, optimizer, T, distill

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the losses ``(copies, T)`` of freshly sampled subnetworks, with gradients.

        Args:
            x: ``(copies, batch, ...)``, or ``(batch, ...)`` for one copy.
            y: ``(copies, batch)`` or ``(batch,)`` labels.

        Raises:
            ValueError: distillation from a first subnetwork that does not hold the others.
        """
        masks = np.stack([self.supernet.graph.masks(sampler(self.T)) for sampler in self.samplers])
        if self.distill and (masks & ~masks[:, :1]).any():
            raise ValueError("sampler must give the largest subnetwork first for distillation, got one beyond it")
        logits = self.supernet(x, torch.from_numpy(masks))
        copies, T, batch, classes = logits.shape
        hard = y.expand(copies, batch)[:, None].expand(copies, T, batch)
        target = hard.flatten()
        if self.distill:
            target = logits.detach()[:, :1].softmax(-1).repeat(1, T, 1, 1)
            target[:, 0] = F.one_hot(hard[:, 0], classes).to(target)
            target = target.flatten(0, 2)
        return F.cross_entropy(logits.flatten(0, 2), target, reduction="none").view(copies, T, batch).mean(-1)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one optimizer step and return the losses ``(copies, T)`` before it."""
        self.optimizer.zero_grad()
        losses = self.losses(x, y)
        losses.mean(1).sum().backward()  # the sum over copies: none influences another's gradient
        self.optimizer.step()
        return losses.detach()

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        *,
        steps: int,
        batch_size: int = 64,
        generator: Generator | Sequence[Generator],
        cosine: bool = True,
        on_step: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Train for a number of steps and return the losses ``(steps, copies, T)``.

        Args:
            x: ``(N, ...)`` samples.
            y: ``(N,)`` labels.
            steps: optimizer steps, >= 1.
            batch_size: samples of a batch, at most N.
            generator: stream for the order of the samples, or one for each copy.
            cosine: let the learning rate fall to 0 along a cosine.
            on_step: called with the number of the step after its backward pass and update.

        Raises:
            ValueError: ``steps`` or ``batch_size`` out of range, other numbers of labels or generators than of samples
                or copies.
        """
        streams = list(generator) if isinstance(generator, Sequence) else [generator]
        if len(streams) != len(self.samplers):
            raise ValueError(f"generator must be one a copy, {len(self.samplers)}, got {len(streams)}")
        if len(y) != len(x):
            raise ValueError(f"y must hold one label a sample, {len(x)}, got {len(y)}")
        check_count("steps", steps)
        check_count("batch_size", batch_size, le=len(x))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps) if cosine else None
        count = steps * batch_size  # permutation after permutation: every sample before any comes twice
        orders = [[torch.randperm(len(x), generator=s) for _ in range(-(-count // len(x)))] for s in streams]
        order = torch.stack([torch.cat(rounds)[:count] for rounds in orders]).to(x.device)
        history = []
        for step, index in enumerate(order.split(batch_size, 1)):
            history.append(self.step(x[index], y[index]))
            if schedule:
                schedule.step()
            if on_step:
                on_step(step)
        return torch.stack(history)


@torch.no_grad()
def anytime_accuracy(
    supernet: nn.Module, subnetworks: np.ndarray, x: Tensor, y: Tensor, *, chunk: int = 8, batch_size: int = 1024
) -> Tensor:
    """Return the accuracy of subnetworks in percent, ``(T,)`` or ``(copies, T)``; a sample with a nan logit is wrong.

    Args:
        supernet: a :class:`DagMLP` or :class:`DagConvNet`.
        subnetworks: ``(T, n, n)`` with one copy, or ``(copies, T, n, n)``.
        x: ``(N, ...)`` samples, the same for all copies.
        y: ``(N,)`` labels.
        chunk: subnetworks of a copy in one forward pass, >= 1.
        batch_size: samples in one forward pass, >= 1.

    Raises:
        ValueError: edges outside the supernet, shapes that do not fit, a chunk or batch below 1.

    >>> from effnb.anytime import DagMLP, SuperGraph
    >>> graph = SuperGraph(3, [(0, 1), (1, 2)])
    >>> anytime_accuracy(DagMLP(graph, 4), graph.adjacency[None], torch.zeros(6, 4), torch.zeros(6).long()).shape
    torch.Size([1])
    """
    check_count("chunk", chunk)
    check_count("batch_size", batch_size)
    hits = []
    for part in torch.from_numpy(supernet.graph.masks(subnetworks)).split(chunk, -2):
        right = 0
        for samples, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            logits = supernet(samples, part)
            # argmax takes a nan for the largest: a net that has diverged would be right where that is the label
            right = right + ((logits.argmax(-1) == labels) & ~logits.isnan().any(-1)).sum(-1)
        hits.append(right)
    return 100 * torch.cat(hits, -1) / len(y)
