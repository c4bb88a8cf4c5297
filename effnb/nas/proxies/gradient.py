"""One backward pass, and the proxies that are read off it: gradient norm, SNIP, plain, Fisher; also the weights' norm."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .codes import CodeKernel, ReluWatch, log_determinant
from .common import Loss, check_model, gradients, layers, mean_loss, pure, read_batch, total, weights


class FisherWatch:
    """Collects ``F_c = mean_n g_nc^2 / 2`` of every convolution and linear output during a backward pass."""

    def __init__(self, model: nn.Module, copy: bool = False) -> None:
        self.model, self.copy, self.overwritten = model, copy, False
        self.found: dict[str, Tensor] = {}

    def __enter__(self) -> "FisherWatch":
        self.hooks = [
            layer.register_forward_hook(lambda layer, args, z, name=name: self._watch(name, z, layer))
            for name, layer in layers(self.model).items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _watch(self, name: str, z: Tensor, layer: nn.Module) -> None:
        if not z.requires_grad:
            return
        value, version, last = (z.detach().clone() if self.copy else z.detach()), z._version, isinstance(layer, nn.Linear)

        def arrived(grad: Tensor) -> None:
            # A hook on a tensor sees the gradient of the value before it was overwritten, but not that value.
            self.overwritten |= not self.copy and value._version != version
            product = value * grad
            per_channel = product.movedim(-1, 1) if last else product
            sums = per_channel.flatten(2).sum(2) if product.ndim > 2 else per_channel
            fisher = sums.square().mean(0) / 2
            self.found[name] = self.found[name] + fisher if name in self.found else fisher

        z.register_hook(arrived)

    def score(self, broadcast: bool) -> float:
        """Sum over channels, each times its number of weights if ``broadcast``."""
        per_layer = [
            self.found[name].sum(dtype=torch.float64) * (layer.weight[0].numel() if broadcast else 1)
            for name, layer in layers(self.model).items()
            if name in self.found
        ]
        return total(per_layer) if per_layer else 0.0


class GradientPass:
    """One forward and backward pass of the mean loss in train mode, which several proxies share.

    ``grads`` holds the gradient of each trainable convolution and linear weight by the layer's name.
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
        self.x, self.y = read_batch(batch, 2 if codes else 1)
        check_model(model)
        self.model, self.loss_fn, self.seed = model, loss_fn, seed
        self.weights = weights(model)
        self.codes = CodeKernel() if codes else None
        self._fisher = self._run(FisherWatch(model) if fisher else None)
        if self._fisher and self._fisher.overwritten:
            self._fisher = self._run(FisherWatch(model, copy=True))

    def _run(self, fisher: FisherWatch | None) -> FisherWatch | None:
        watch = ReluWatch(self.codes.add) if self.codes and not self.codes.units else contextlib.nullcontext()
        with pure(self.model, self.seed) as call, fisher or contextlib.nullcontext():
            with watch:
                output = call(self.x)
            loss = mean_loss(self.loss_fn, output, self.y)
            found = gradients(loss, list(self.weights.values()))
        self.grads = dict(zip(self.weights, found, strict=True))
        return fisher

    def grad_norm(self) -> float:
        """Sum of the layers' gradient norms."""
        return total(torch._foreach_norm(list(self.grads.values())))

    def snip(self) -> float:
        """Sum of ``|weight * gradient|``."""
        return total([p.abs().sum(dtype=torch.float64) for p in self._products()])

    def plain(self) -> float:
        """Sum of ``weight * gradient``."""
        return total([p.sum(dtype=torch.float64) for p in self._products()])

    def fisher(self, broadcast: bool = True) -> float:
        """Fisher score of the channels, if the pass was told to collect it."""
        return self._fisher.score(broadcast)

    def naswot(self) -> float:
        """Log-determinant of the code kernel, if the pass was told to collect it."""
        return log_determinant(self.codes.matrix())

    def _products(self) -> list[Tensor]:
        return torch._foreach_mul([w.detach() for w in self.weights.values()], list(self.grads.values()))


def grad_norm(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    return GradientPass(model, batch, loss_fn=loss_fn, seed=seed).grad_norm()


def snip(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    return GradientPass(model, batch, loss_fn=loss_fn, seed=seed).snip()


def plain(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    return GradientPass(model, batch, loss_fn=loss_fn, seed=seed).plain()


def fisher(
    model: nn.Module, batch: Any, *, broadcast: bool = True, loss_fn: Loss = F.cross_entropy, seed: int | None = 0
) -> float:
    return GradientPass(model, batch, loss_fn=loss_fn, seed=seed, fisher=True).fisher(broadcast)


def l2_norm(model: nn.Module, batch: Any = None, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    check_model(model)
    return total(torch._foreach_norm([w.detach() for w in weights(model).values()]))
