"""A small vision transformer: pre-norm blocks, learned positions, mean pooling or a class token."""

import torch
from torch import Generator, Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention over ``(batch, tokens, width)`` with linear layers ``qkv`` and ``proj``.

    Reference: dosovitskiy2021image
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, width)`` to the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Written out: torch's fused attention has no per-sample form (torch.func.vmap) on every device.
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """``fc2(GELU(fc1(x)))``, from ``width`` channels by ``hidden`` ones to ``width``.

    Reference: dosovitskiy2021image
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width)`` to the same shape."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm transformer block: :class:`Attention`, then an :class:`Mlp` with ``mlp_ratio * width`` in between.

    Reference: dosovitskiy2021image
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, mlp_ratio * width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, width)`` to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer for small images; its steps :meth:`embed` and :meth:`pool` can be called one by one.

    Args:
        image_size: side of the square images, a multiple of ``patch``.
        patch: side of a patch; tokens are the patches in row-major order.
        in_channels: channels of the images.
        classes: number of outputs.
        width: channels of a token, a multiple of ``heads``.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden channels of the MLPs over ``width``.
        class_token: read out a class token (token 0) instead of the mean of all tokens.
        generator: stream for the weights, torch's global one is then left alone; ``None`` leaves the layers as torch
            initialises them and draws the embeddings from the global stream.

    Raises:
        ValueError: a count below 1, an image that is no multiple of the patch, a width that is none of the heads.

    Reference: dosovitskiy2021image

    >>> ViT(width=16, depth=1)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        image_size: int = 28,
        patch: int = 4,
        in_channels: int = 1,
        classes: int = 10,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: int = 4,
        class_token: bool = False,
        generator: Generator | None = None,
    ) -> None:
        if min(image_size, patch, in_channels, classes, width, depth, heads, mlp_ratio) < 1:
            raise ValueError("image_size, patch, in_channels, classes, width, depth, heads, mlp_ratio must be >= 1")
        if image_size % patch:
            raise ValueError(f"image_size must be a multiple of patch = {patch}, got {image_size}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads = {heads}, got {width}")
        super().__init__()
        self.grid = (image_size // patch, image_size // patch)
        with torch.random.fork_rng(devices=[], enabled=generator is not None):  # layers draw when they are made
            self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
            tokens = self.grid[0] * self.grid[1] + class_token
            self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
            self.positions = nn.Parameter(torch.empty(1, tokens, width))
            self.blocks = nn.Sequential(*(Block(width, heads, mlp_ratio) for _ in range(depth)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        nn.init.trunc_normal_(self.positions, std=0.02, generator=generator)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02, generator=generator)
        if generator is None:
            return
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight.flatten(1), generator=generator)
                nn.init.zeros_(layer.bias)

    def embed(self, x: Tensor) -> Tensor:
        """Images ``(batch, in_channels, side, side)`` to tokens ``(batch, tokens, width)``, class token first."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], dim=1)
        return tokens + self.positions

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens of the last block to features ``(batch, width)``."""
        tokens = self.norm(tokens)
        return tokens.mean(1) if self.class_token is None else tokens[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in_channels, side, side)`` to logits ``(batch, classes)``."""
        return self.head(self.pool(self.blocks(self.embed(x))))
