"""Low-rank back-propagation: both gradient products of a linear layer on Walsh coefficients of the token grid."""

from effnb.finetune.lbp_wht.layers import (
    WalshLowRankConv1x1,
    WalshLowRankLinear,
    apply_walsh_backprop,
    lowrank_backprop_conv1x1,
    lowrank_backprop_linear,
    token_projector,
)
from effnb.finetune.lbp_wht.walsh import (
    WalshBasis,
    dense_backward_cost,
    lora_backward_cost,
    num_tiles,
    walsh_backward_cost,
    walsh_bases,
    walsh_matrix,
    walsh_positions,
)

__all__ = [
    "WalshBasis",
    "WalshLowRankConv1x1",
    "WalshLowRankLinear",
    "apply_walsh_backprop",
    "dense_backward_cost",
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
