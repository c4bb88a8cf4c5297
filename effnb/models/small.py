"""Two small networks for 1- or 3-channel images, initialised from an explicit generator."""

import itertools
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn


def initialize(module: nn.Module, generator: Generator | None = None) -> nn.Module:
    """Draw all convolution and linear weights anew (He, fan-in, for ReLU), biases zero; return ``module`` itself.

    Args:
        module: any module; normalisation layers keep their defaults.
        generator: the stream to draw from; ``None`` leaves ``module`` as torch initialised it.

    Reference: he2015delving.

    >>> a = initialize(nn.Linear(3, 2), torch.Generator().manual_seed(0))
    >>> b = initialize(nn.Linear(3, 2), torch.Generator().manual_seed(0))
    >>> torch.equal(a.weight, b.weight)
    True
    """
    if generator is None:
        return module
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def mlp(sizes: Sequence[int], generator: Generator | None = None) -> nn.Sequential:
    """A multi-layer perceptron with ReLU between its linear layers and a ``Flatten`` in front.

    Args:
        sizes: widths from input to output, at least two, all >= 1.
        generator: stream for the weights (see :func:`initialize`); torch's global one is then left alone.

    Raises:
        ValueError: fewer than two sizes, or a size below 1.

    Reference: he2015delving.

    >>> mlp([784, 64, 10])(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 10])
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must hold at least two widths >= 1, got {list(sizes)}")
    layers: list[nn.Module] = [nn.Flatten()]
    with torch.random.fork_rng(devices=[], enabled=generator is not None):  # layers draw weights when they are made
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            layers += [nn.ReLU()] * (i > 0) + [nn.Linear(fan_in, fan_out)]
    return initialize(nn.Sequential(*layers), generator)


class SmallCNN(nn.Module):
    """3x3 convolution, batch norm, ReLU for each width, 2x2 max pooling in between, global mean, linear head.

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        widths: channels of each convolution, at least one.
        generator: as in :func:`mlp`.

    Raises:
        ValueError: no width, or a count below 1.

    Reference: he2015delving.

    >>> SmallCNN(widths=(4, 8))(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 10,
        widths: Sequence[int] = (16, 32, 64),
        generator: Generator | None = None,
    ) -> None:
        if not widths or min(in_channels, classes, *widths) < 1:
            raise ValueError(f"in_channels, classes and widths must be >= 1, got {in_channels}, {classes}, {widths}")
        super().__init__()
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[], enabled=generator is not None):
            for i, (fan_in, fan_out) in enumerate(itertools.pairwise((in_channels, *widths))):
                layers += [nn.MaxPool2d(2)] * (i > 0)
                layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
            self.features = nn.Sequential(*layers)
            self.head = nn.Linear(widths[-1], classes)
        initialize(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in_channels, height, width)`` to logits ``(batch, classes)``."""
        return self.head(self.features(x).mean(dim=(2, 3)))
