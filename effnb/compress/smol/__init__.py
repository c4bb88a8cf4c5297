"""SMOL: per-weight mixed precision learned by trainable noise, its baselines, and real bit-packing."""

from effnb.compress.smol import baselines, codec, gate, handle, noise, packed
from effnb.compress.smol.baselines import *
from effnb.compress.smol.codec import *
from effnb.compress.smol.gate import *
from effnb.compress.smol.handle import *
from effnb.compress.smol.noise import *
from effnb.compress.smol.packed import *

__all__ = [*baselines.__all__, *codec.__all__, *gate.__all__, *handle.__all__, *noise.__all__, *packed.__all__]
