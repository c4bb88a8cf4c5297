"""Visual prompts: learned tokens beside those of the image, the subset to fine-tune in a vision transformer."""

import torch
from torch import Generator, Tensor, nn

from effnb.models import ViT


class PromptedViT(nn.Module):
    """A vision transformer with prompt tokens behind those of the image, seen by every block.

    The positions of the image's tokens stay as they were, and a class token stays token 0. With mean pooling the
    prompts are left out of the mean.

    Args:
        vit: the transformer, kept as the submodule ``vit``.
        num_prompts: prompt tokens, >= 1.
        std: standard deviation of their initial values, >= 0.
        generator: stream for the prompts; ``None`` draws from torch's global one.

    Raises:
        TypeError: ``vit`` is no ``effnb.models.ViT``.
        ValueError: ``num_prompts`` < 1 or ``std`` < 0.

    Reference: jia2022visual

    >>> from effnb.unlearn import peft_parameters
    >>> model = PromptedViT(ViT(width=16, depth=1), num_prompts=4)
    >>> model(torch.zeros(2, 1, 28, 28)).shape, peft_parameters(model, "prompt+head")
    (torch.Size([2, 10]), ['prompt', 'vit.head.weight', 'vit.head.bias'])
    """

    def __init__(self, vit: ViT, num_prompts: int = 8, std: float = 0.02, generator: Generator | None = None) -> None:
        if not isinstance(vit, ViT):
            raise TypeError(f"vit must be an effnb.models.ViT, got {type(vit).__name__}")
        if num_prompts < 1 or std < 0:
            raise ValueError(f"num_prompts must be >= 1 and std >= 0, got {num_prompts} and {std}")
        super().__init__()
        positions = vit.positions
        values = torch.randn(num_prompts, positions.shape[-1], generator=generator) * std
        self.prompt = nn.Parameter(values.to(positions))
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in_channels, side, side)`` to logits ``(batch, classes)``."""
        tokens = self.vit.embed(x)
        count = tokens.shape[1]
        prompts = self.prompt.expand(len(x), -1, -1)
        tokens = self.vit.blocks(torch.cat([tokens, prompts], dim=1))
        return self.vit.head(self.vit.pool(tokens[:, :count]))
