"""Small networks initialised from an explicit generator: two for images, and a causal transformer over characters."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
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


class TransformerBlock(nn.Module):
    """Pre-norm block: causal self-attention by ``q``, ``k``, ``v``, ``o``, then ``f1`` (to ``hidden``), GELU, ``f2``.

    Reference: vaswani2017attention

    >>> TransformerBlock(8, 2, 32)(torch.zeros(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.f1, self.f2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, width)`` to the same shape."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        return x + self.f2(F.gelu(self.f1(self.norm2(x))))


class CharTransformer(nn.Module):
    """Logits of the next character: token and position embeddings, causal blocks, a linear head of its own.

    Args:
        vocabulary: number of characters.
        width: features of a token, a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        context: longest text that it reads.
        generator: stream for the weights, torch's global one is then left alone; ``None`` draws from that.

    Raises:
        ValueError: a count below 1, or a width that the heads do not divide; from ``forward``, a text longer than the
            context.

    Reference: vaswani2017attention

    >>> model = CharTransformer(generator=torch.Generator().manual_seed(0))
    >>> model(torch.zeros(2, 48, dtype=torch.long)).shape, sum(p.numel() for p in model.parameters())
    (torch.Size([2, 48, 32]), 107296)
    """

    def __init__(
        self,
        vocabulary: int = 32,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        context: int = 48,
        generator: Generator | None = None,
    ) -> None:
        if min(vocabulary, width, depth, heads, context) < 1 or width % heads:
            raise ValueError(
                "vocabulary, width, depth, heads and context must be >= 1 and heads divide width, "
                f"got {vocabulary}, {width}, {depth}, {heads}, {context}"
            )
        super().__init__()
        self.context = context
        with torch.random.fork_rng(devices=[], enabled=generator is not None):  # layers draw when they are made
            self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
            self.blocks = nn.Sequential(*(TransformerBlock(width, heads, 4 * width) for _ in range(depth)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                scale = (2 * depth) ** -0.5 if name.endswith((".o", ".f2")) else 1.0
                nn.init.normal_(layer.weight, std=scale * layer.in_features**-0.5, generator=generator)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=0.5, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, length)`` of integers to ``(batch, length, vocabulary)``."""
        length = tokens.shape[-1]
        if length > self.context:
            raise ValueError(f"tokens must be at most {self.context} long, got {length}")
        x = self.embed(tokens) + self.position(torch.arange(length, device=tokens.device))
        return self.head(self.norm(self.blocks(x)))
