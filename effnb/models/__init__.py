"""Networks that several chapters share."""

from effnb.models.small import SmallCNN, mlp
from effnb.models.vit import ViT

__all__ = ["SmallCNN", "ViT", "mlp"]
