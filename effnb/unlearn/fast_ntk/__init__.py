"""Fast-NTK: unlearning a parameter-efficient subset in closed form, with what it takes to judge the result."""

from effnb.unlearn.fast_ntk import closed_form, jacobian, metrics, training, unlearner
from effnb.unlearn.fast_ntk.closed_form import *
from effnb.unlearn.fast_ntk.jacobian import *
from effnb.unlearn.fast_ntk.metrics import *
from effnb.unlearn.fast_ntk.training import *
from effnb.unlearn.fast_ntk.unlearner import *

__all__ = [*closed_form.__all__, *jacobian.__all__, *metrics.__all__, *training.__all__, *unlearner.__all__]
