"""A tiny causal transformer over characters, whose linear layers have names that adapters can be aimed at."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


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
