"""AvaGrad, AvaGradW and Delayed Adam, with what it takes to see how lr and eps interact."""

from effnb.optim.avagrad.optimizers import AvaGrad, AvaGradW, DelayedAdam
from effnb.optim.avagrad.study import AxisSearch, SweepResult, clipped_chains, lr_eps_sweep

__all__ = [
    "AvaGrad",
    "AvaGradW",
    "AxisSearch",
    "DelayedAdam",
    "SweepResult",
    "clipped_chains",
    "lr_eps_sweep",
]
