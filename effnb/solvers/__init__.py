"""Part I, solvers: sparse recovery by iterations that were unrolled into networks."""

from effnb.solvers import unrolled_solvers
from effnb.solvers.unrolled_solvers import *

__all__ = [*unrolled_solvers.__all__]
