"""Unlearning: remove what a model learnt from some of its samples without training it anew."""

from effnb.unlearn import fast_ntk
from effnb.unlearn.fast_ntk import *

__all__ = [*fast_ntk.__all__]
