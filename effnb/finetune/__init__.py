"""Fine-tuning: adapters, chains of them and cheaper backward passes."""

from effnb.finetune.cola import LoRALinear, inject_lora

__all__ = ["LoRALinear", "inject_lora"]
