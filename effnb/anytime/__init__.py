"""Anytime networks: supernets whose subnetworks share weights, and the paths that matter for training them."""

from effnb.anytime import tips
from effnb.anytime.tips import *

__all__ = [*tips.__all__]
