"""Fast-NTK: unlearning a parameter-efficient subset in closed form, with what it takes to judge the result."""

from effnb.unlearn.fast_ntk.closed_form import SolveCost, ntk_delta, solve_cost
from effnb.unlearn.fast_ntk.jacobian import empirical_ntk, iter_jacobian, peft_parameters, per_sample_jacobian
from effnb.unlearn.fast_ntk.metrics import (
    MembershipInference,
    RelearnTime,
    activation_distance,
    membership_inference,
    output_distance,
    parameter_distance,
    relearn_time,
    update_cosine,
)
from effnb.unlearn.fast_ntk.training import (
    PromptedViT,
    finetune,
    max_loss,
    random_label,
    retain_forget_split,
    retrain,
    zero_class_row,
)
from effnb.unlearn.fast_ntk.unlearner import NTKUnlearner

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
