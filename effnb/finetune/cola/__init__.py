"""Low-rank adapters, chains of them, and the Frank-Wolfe view."""

from effnb.finetune.cola.chain import ChainOfLoRA, ChainStateError, fit_chain, linear_decay, split_steps
from effnb.finetune.cola.frank_wolfe import FrankWolfeResult, frank_wolfe_low_rank, greedy_rank_one
from effnb.finetune.cola.lora import AdapterError, LoRALinear, inject_lora

__all__ = [
    "AdapterError",
    "ChainOfLoRA",
    "ChainStateError",
    "FrankWolfeResult",
    "LoRALinear",
    "fit_chain",
    "frank_wolfe_low_rank",
    "greedy_rank_one",
    "inject_lora",
    "linear_decay",
    "split_steps",
]
