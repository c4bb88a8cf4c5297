"""Part I, solvers: sparse recovery by iterations that were unrolled into networks."""

from effnb.solvers.unrolled_solvers import *  # noqa: F403
from effnb.solvers.unrolled_solvers import __all__ as __all__
