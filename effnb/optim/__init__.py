"""Optimisers: adaptive methods whose hyper-parameters mean what they say."""

from effnb.optim import avagrad, functional
from effnb.optim.avagrad import *  # noqa: F403

__all__ = [*avagrad.__all__, "functional"]
