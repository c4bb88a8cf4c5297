"""Compression: learned sparsity, mixed precision, and cheap weight structures."""

from effnb.compress import continuous_sparsification, smol
from effnb.compress.continuous_sparsification import *
from effnb.compress.smol import *

__all__ = [*continuous_sparsification.__all__, *smol.__all__]
