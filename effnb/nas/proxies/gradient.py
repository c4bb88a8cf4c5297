"""One backward pass, and the proxies that are read off it: gradient norm, SNIP, plain and Fisher."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .channels import FisherWatch
from .codes import CodeKernel, ReluWatch, log_determinant
from .common import Loss, check_model, gradients, mean_loss, pure, read_batch, total, weights


class GradientPass:
    """One forward and backward pass of the mean loss in train mode, from which several proxies are read.

    ``grads`` holds the gradient of each trainable convolution and linear weight by the name of its layer, zeros where
    the loss does not depend on it; ``reached`` tells whether it depends on any. ``loss`` is the mean loss. The
    model stays as it was.

    Args:
        model: network from ``x`` to logits, or to a tuple that ends in them.
        batch: ``(x, y)``.
        loss_fn: mean loss of a batch.
        seed: of what the network draws itself, such as dropout; ``None`` takes the global state.
        fisher: also collect what `fisher` needs.
        codes: also collect what `naswot` needs; wants two samples or more.

    Raises:
        ValueError: an empty batch, labels out of range, inputs or a loss that are not finite, no trainable weight.
        TypeError: complex numbers, or a batch of another kind.

    Reference: abdelfattah2021zerocost.

    >>> model, batch = nn.Linear(3, 2), (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    >>> step = GradientPass(model, batch)
    >>> step.snip() >= abs(step.plain()), step.snip() == snip(model, batch)
    (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        loss_fn: Loss = F.cross_entropy,
        seed: int | None = 0,
        fisher: bool = False,
        codes: bool = False,
    ) -> None:
        check_model(model)
        self.x, self.y = read_batch(batch, 2 if codes else 1)
        self.model, self.loss_fn, self.seed = model, loss_fn, seed
        self.weights = weights(model)
        self.codes = CodeKernel() if codes else None
        self.channels = self._run(FisherWatch(model) if fisher else None, self.codes)
        if fisher and self.channels.overwritten:
            self.channels = self._run(FisherWatch(model, copy=True), None)

    def _run(self, channels: FisherWatch | None, codes: CodeKernel | None) -> FisherWatch | None:
        nothing = contextlib.nullcontext()
        with pure(self.model, self.seed) as call, channels or nothing:
            with ReluWatch(codes.add) if codes else nothing:
                output = call(self.x)
            loss = mean_loss(self.loss_fn, output, self.y)
            found = gradients(loss, list(self.weights.values()), zeros=False)
        self.loss = float(loss.detach())
        self.reached = any(grad is not None for grad in found)
        grads = [torch.zeros_like(w) if g is None else g for w, g in zip(self.weights.values(), found, strict=True)]
        self.grads = dict(zip(self.weights, grads, strict=True))
        return channels

    def grad_norm(self) -> float:
        """Sum of the layers' gradient norms."""
        return total(list(torch._foreach_norm(list(self.grads.values()))))

    def snip(self) -> float:
        """Sum of ``|weight * gradient|``."""
        return total([product.abs().sum(dtype=torch.float64) for product in self._products()])

    def plain(self) -> float:
        """Sum of ``weight * gradient``."""
        return total([product.sum(dtype=torch.float64) for product in self._products()])

    def fisher(self, broadcast: bool = True) -> float:
        """Fisher score of the channels; the pass must have been told to collect it."""
        return self.channels.score(broadcast)

    def naswot(self) -> float:
        """Log-determinant of the code kernel; the pass must have been told to collect it."""
        return log_determinant(self.codes.matrix())

    def _products(self) -> list[Tensor]:
        return [weight.detach() * grad for weight, grad in zip(self.weights.values(), self.grads.values(), strict=True)]


def grad_norm(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    r"""Return :math:`\sum_l \lVert \partial L / \partial \theta_l \rVert_2`; higher is better.

    The sum of the layers' norms, not the norm of all gradients; convolution and linear weights only.

    Args:
        model: network; it stays as it was.
        batch: ``(x, y)``.
        loss_fn: mean loss of a batch.
        seed: of what the network draws itself, such as dropout; ``None`` takes the global state.

    Returns:
        The score.

    Raises:
        ValueError: see `GradientPass`.
        TypeError: see `GradientPass`.

    Reference: abdelfattah2021zerocost.

    >>> model, batch = nn.Linear(1, 2, bias=False), (torch.ones(1, 1), torch.tensor([0]))
    >>> with torch.no_grad():
    ...     _ = model.weight.zero_()
    >>> round(grad_norm(model, batch), 4)  # gradient (-1/2, 1/2)
    0.7071
    """
    return GradientPass(model, batch, loss_fn=loss_fn, seed=seed).grad_norm()


def snip(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    r"""Return SNIP, :math:`\sum |\theta \, \partial L / \partial \theta|`; higher is better.

    Args:
        model: network; it stays as it was.
        batch: ``(x, y)``.
        loss_fn: mean loss of a batch.
        seed: of what the network draws itself, such as dropout; ``None`` takes the global state.

    Returns:
        The score, over convolution and linear weights.

    Raises:
        ValueError: see `GradientPass`.
        TypeError: see `GradientPass`.

    Reference: lee2019snip.

    >>> model, batch = nn.Linear(1, 2, bias=False), (torch.ones(1, 1), torch.tensor([0]))
    >>> with torch.no_grad():
    ...     _ = model.weight.fill_(3.0)
    >>> snip(model, batch)  # gradient (-1/2, 1/2)
    3.0
    """
    return GradientPass(model, batch, loss_fn=loss_fn, seed=seed).snip()


def plain(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    r"""Return :math:`\sum \theta \, \partial L / \partial \theta`; higher is better.

    Weights that a batch norm follows add nothing: the loss does not change with their scale.

    Args:
        model: network; it stays as it was.
        batch: ``(x, y)``.
        loss_fn: mean loss of a batch.
        seed: of what the network draws itself, such as dropout; ``None`` takes the global state.

    Returns:
        The score, over convolution and linear weights.

    Raises:
        ValueError: see `GradientPass`.
        TypeError: see `GradientPass`.

    Reference: abdelfattah2021zerocost.

    >>> model, batch = nn.Linear(1, 2, bias=False), (torch.ones(1, 1), torch.tensor([0]))
    >>> with torch.no_grad():
    ...     _ = model.weight.fill_(3.0)
    >>> plain(model, batch)
    0.0
    """
    return GradientPass(model, batch, loss_fn=loss_fn, seed=seed).plain()


def fisher(
    model: nn.Module, batch: Any, *, broadcast: bool = True, loss_fn: Loss = F.cross_entropy, seed: int | None = 0
) -> float:
    r"""Return the Fisher score, :math:`\sum_l \sum_c F_c`; higher is better.

    :math:`F_c = \frac12 \operatorname{mean}_n g_{nc}^2` for each channel of the output z of a convolution or linear
    layer, with :math:`g_{nc}` the sum over places of :math:`z \, \partial L / \partial z`. The official code gives
    :math:`F_c` to every weight of the channel before it sums; so does this by default.

    Args:
        model: network; it stays as it was.
        batch: ``(x, y)``.
        broadcast: multiply each channel by its number of weights, as the official code.
        loss_fn: mean loss of a batch.
        seed: of what the network draws itself, such as dropout; ``None`` takes the global state.

    Returns:
        The score; a layer that is used several times counts each use.

    Raises:
        ValueError: see `GradientPass`.
        TypeError: see `GradientPass`.

    Reference: turner2020blockswap, abdelfattah2021zerocost.

    >>> model, batch = nn.Linear(1, 2, bias=False), (torch.ones(1, 1), torch.tensor([0]))
    >>> with torch.no_grad():
    ...     _ = model.weight.fill_(2.0)
    >>> fisher(model, batch)  # z = (2, 2), gradient (-1/2, 1/2)
    1.0
    """
    return GradientPass(model, batch, loss_fn=loss_fn, seed=seed, fisher=True).fisher(broadcast)
