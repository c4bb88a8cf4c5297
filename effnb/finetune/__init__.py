"""Fine-tuning: adapters, chains of them and cheaper backward passes."""

from effnb.finetune.cola import LoRALinear, inject_lora
from effnb.finetune.lbp_wht import (
    WalshLowRankConv1x1,
    WalshLowRankLinear,
    apply_walsh_backprop,
    dense_backward_cost,
    lora_backward_cost,
    lowrank_backprop_conv1x1,
    lowrank_backprop_linear,
    num_tiles,
    token_projector,
    walsh_backward_cost,
    walsh_bases,
    walsh_matrix,
    walsh_positions,
)

__all__ = [
    "LoRALinear",
    "WalshLowRankConv1x1",
    "WalshLowRankLinear",
    "apply_walsh_backprop",
    "dense_backward_cost",
    "inject_lora",
    "lora_backward_cost",
    "lowrank_backprop_conv1x1",
    "lowrank_backprop_linear",
    "num_tiles",
    "token_projector",
    "walsh_backward_cost",
    "walsh_bases",
    "walsh_matrix",
    "walsh_positions",
]
