"""Fast-NTK: unlearning a parameter-efficient subset in closed form, with what it takes to judge the result."""

from .baselines import max_loss, random_label, zero_class_row
from .checks import retain_forget_split
from .closed_form import SolveCost, ntk_delta, solve_cost
from .jacobian import iter_jacobian, per_sample_jacobian
from .kernel import empirical_ntk
from .membership import MembershipInference, membership_inference
from .metrics import (
    RelearnTime,
    activation_distance,
    output_distance,
    parameter_distance,
    relearn_time,
    update_cosine,
)
from .prompt import PromptedViT
from .subset import peft_parameters
from .training import finetune, retrain
from .unlearner import NTKUnlearner

__all__ = [
    "MembershipInference",
    "NTKUnlearner",
    "PromptedViT",
    "RelearnTime",
    "SolveCost",
    "activation_distance",
    "empirical_ntk",
    "finetune",
    "iter_jacobian",
    "max_loss",
    "membership_inference",
    "ntk_delta",
    "output_distance",
    "parameter_distance",
    "peft_parameters",
    "per_sample_jacobian",
    "random_label",
    "relearn_time",
    "retain_forget_split",
    "retrain",
    "solve_cost",
    "update_cosine",
    "zero_class_row",
]
