"""Low-rank adapters, chains of them, and the Frank-Wolfe view."""

from effnb.finetune.cola.inject import inject_lora
from effnb.finetune.cola.lora import LoRALinear

__all__ = ["LoRALinear", "inject_lora"]
