"""Optimisers: adaptive methods whose hyper-parameters mean what they say."""

from effnb.optim import functional
from effnb.optim.avagrad import (
    AvaGrad,
    AvaGradW,
    AxisSearch,
    DelayedAdam,
    SweepResult,
    clipped_chains,
    lr_eps_sweep,
)

__all__ = [
    "AvaGrad",
    "AvaGradW",
    "AxisSearch",
    "DelayedAdam",
    "SweepResult",
    "clipped_chains",
    "functional",
    "lr_eps_sweep",
]
