"""Continuous sparsification: learned deterministic gates, ticket search, and the baselines at equal density."""

from effnb.compress._gated import check_optimizer, select_layers
from effnb.compress.continuous_sparsification import cs, gates, masks, storage
from effnb.compress.continuous_sparsification.cs import *
from effnb.compress.continuous_sparsification.gates import *
from effnb.compress.continuous_sparsification.masks import *
from effnb.compress.continuous_sparsification.storage import *

__all__ = [*cs.__all__, *gates.__all__, *masks.__all__, *storage.__all__, "check_optimizer", "select_layers"]
