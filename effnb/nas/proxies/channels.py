"""What the Fisher proxy collects: how much the loss depends on every channel of every convolution and linear output."""

import torch
from torch import Tensor, nn

from .common import layers, total


class FisherWatch:
    """Collects ``F_c = mean_n g_nc^2 / 2`` of every convolution and linear output during a backward pass.

    ``overwritten`` tells that an output was changed in place (an in-place ReLU, a ``+=``) before its gradient came;
    the values are wrong then, and the pass must be repeated with ``copy=True``, which costs a copy of each output.
    """

    def __init__(self, model: nn.Module, copy: bool = False) -> None:
        self.layers, self.copy, self.overwritten = layers(model), copy, False
        self.found: dict[str, Tensor] = {}

    def __enter__(self) -> "FisherWatch":
        self.hooks = [
            layer.register_forward_hook(lambda layer, args, z, name=name: self._watch(name, layer, z))
            for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _watch(self, name: str, layer: nn.Module, z: Tensor) -> None:
        if not z.requires_grad:
            return
        value, version = (z.detach().clone() if self.copy else z.detach()), z._version

        def arrived(grad: Tensor) -> None:
            # A hook on a tensor sees the gradient of what it was before it was overwritten, but not that value.
            self.overwritten |= not self.copy and value._version != version
            fisher = channel_fisher(value, grad, -1 if isinstance(layer, nn.Linear) else 1)
            self.found[name] = self.found[name] + fisher if name in self.found else fisher

        z.register_hook(arrived)

    def score(self, broadcast: bool) -> float:
        """Return the sum over channels, each times its number of weights if ``broadcast``."""
        sums = [
            self.found[name].sum(dtype=torch.float64) * (layer.weight[0].numel() if broadcast else 1)
            for name, layer in self.layers.items()
            if name in self.found
        ]
        return total(sums) if sums else 0.0


def channel_fisher(z: Tensor, grad: Tensor, channel: int) -> Tensor:
    """Return ``mean_n (sum over places of z * grad)^2 / 2`` for each channel."""
    product = (z * grad).movedim(channel, 1)
    sums = product.flatten(2).sum(2) if product.ndim > 2 else product
    return sums.square().mean(0) / 2
