"""Networks that several chapters share."""

from effnb.models.small import SmallCNN, mlp
from effnb.models.transformer import CharTransformer
from effnb.models.vit import ViT

__all__ = ["CharTransformer", "SmallCNN", "ViT", "mlp"]
