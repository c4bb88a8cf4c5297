"""Compression: learned sparsity, mixed precision, and cheap weight structures."""

from effnb.compress import continuous_sparsification, smol
from effnb.compress.continuous_sparsification import *  # noqa: F403
from effnb.compress.smol import *  # noqa: F403

__all__ = [*continuous_sparsification.__all__, *smol.__all__]
