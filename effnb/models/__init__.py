"""Networks that several chapters share."""

from effnb.models.minilm import MiniLM, MiniLMClassifier, hidden_states, load_minilm
from effnb.models.small import CharTransformer, SmallCNN, mlp
from effnb.models.vit import ViT

__all__ = ["CharTransformer", "MiniLM", "MiniLMClassifier", "SmallCNN", "ViT", "hidden_states", "load_minilm", "mlp"]
