"""SMOL: per-weight mixed precision learned by trainable noise, its baselines, and real bit-packing."""

from effnb.compress.smol.baselines import (
    fisher_diagonal,
    greedy_layer_bits,
    layer_average_bits,
    optimal_bits,
    optimal_limits,
    shuffled_bits,
    uniform_qat,
)
from effnb.compress.smol.codec import decode_levels, encode_levels
from effnb.compress.smol.gate import SmolActivation, SmolGate
from effnb.compress.smol.handle import (
    BitCost,
    Frozen,
    SmolHandle,
    apply_smol,
    map_entropy,
    recalibrate_batch_norm,
    warn_of_decay,
)
from effnb.compress.smol.noise import bits_from_s, codebook, draw_noise, perturb, quantize_pm1, s_from_bits
from effnb.compress.smol.packed import PackedModel, QuantizedTensor, pack

__all__ = [
    "BitCost",
    "Frozen",
    "PackedModel",
    "QuantizedTensor",
    "SmolActivation",
    "SmolGate",
    "SmolHandle",
    "apply_smol",
    "bits_from_s",
    "codebook",
    "decode_levels",
    "draw_noise",
    "encode_levels",
    "fisher_diagonal",
    "greedy_layer_bits",
    "layer_average_bits",
    "map_entropy",
    "optimal_bits",
    "optimal_limits",
    "pack",
    "perturb",
    "quantize_pm1",
    "recalibrate_batch_norm",
    "s_from_bits",
    "shuffled_bits",
    "uniform_qat",
    "warn_of_decay",
]
