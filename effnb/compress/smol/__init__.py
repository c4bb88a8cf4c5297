"""SMOL: per-weight mixed precision learned by trainable noise, its baselines, and real bit-packing."""

from .activation import SmolActivation, add_activations
from .baselines import greedy_layer_bits, layer_average_bits, shuffled_bits, uniform_qat
from .digits import bits_from_s, codebook, quantize_pm1, s_from_bits
from .gate import SmolGate, initial_scale
from .groups import Groups
from .guard import warn_of_decay
from .handle import Frozen, SmolHandle, apply_smol
from .noise import draw_noise, perturb
from .norm import recalibrate_batch_norm
from .packed import PackedModel, gated_tensors, pack
from .planes import pack_planes, unpack_planes
from .quantized import QuantizedTensor
from .rans import decode_levels, encode_levels
from .storage_cost import BitCost, map_entropy
from .theory import expected_noise_loss, fisher_diagonal, optimal_bits, optimal_limits

__all__ = [
    "BitCost",
    "Frozen",
    "Groups",
    "PackedModel",
    "QuantizedTensor",
    "SmolActivation",
    "SmolGate",
    "SmolHandle",
    "add_activations",
    "apply_smol",
    "bits_from_s",
    "codebook",
    "decode_levels",
    "draw_noise",
    "encode_levels",
    "expected_noise_loss",
    "fisher_diagonal",
    "gated_tensors",
    "greedy_layer_bits",
    "initial_scale",
    "layer_average_bits",
    "map_entropy",
    "optimal_bits",
    "optimal_limits",
    "pack",
    "pack_planes",
    "perturb",
    "quantize_pm1",
    "recalibrate_batch_norm",
    "s_from_bits",
    "shuffled_bits",
    "uniform_qat",
    "unpack_planes",
    "warn_of_decay",
]
