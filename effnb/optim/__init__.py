"""Optimisers: adaptive methods whose hyper-parameters mean what they say."""

from effnb.optim import avagrad, functional
from effnb.optim.avagrad import *

__all__ = [*avagrad.__all__, "functional"]
