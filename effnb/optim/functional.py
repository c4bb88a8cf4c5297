"""Functional forms of the optimizers of this part: no state of their own, everything is an argument."""

from effnb.optim.avagrad.functional import avagrad, delayed_adam

__all__ = ["avagrad", "delayed_adam"]
