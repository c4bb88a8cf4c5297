"""Networks that several chapters share."""

from effnb.models.small import SmallCNN, mlp

__all__ = ["SmallCNN", "mlp"]
