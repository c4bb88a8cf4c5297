"""The ``torch.optim.Optimizer`` that AvaGrad, AvaGradW and Delayed Adam share: state, checks, checkpoints."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from effnb.optim.avagrad.functional import avagrad, check_grads, check_paths
from effnb.optim.avagrad.fused import check_fusable

STATE = ("step", "exp_avg", "exp_avg_sq")
DEFAULTS = {
    "weight_decay": 0.0,
    "decoupled_weight_decay": False,
    "norm": "current",
    "first_step": "skip",
    "gamma": None,
    "foreach": None,
    "fused": None,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "error_if_nonfinite": False,
}


def require(condition: bool, name: str, rule: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {value}")


def _check_group(group: dict[str, Any]) -> None:
    """Validate the hyper-parameters of one group (also of groups added later)."""
    lr, betas = group["lr"], group["betas"]
    require(not isinstance(lr, Tensor) or lr.numel() == 1, "lr", "a number or a tensor with one element", lr)
    require(0 <= float(lr) < float("inf"), "lr", ">= 0 and finite", lr)
    require(0 < group["eps"] < float("inf"), "eps", "> 0 and finite", group["eps"])
    require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "betas", "two numbers in [0, 1)", betas)
    require(0 <= group["weight_decay"] < float("inf"), "weight_decay", ">= 0 and finite", group["weight_decay"])
    require(group["norm"] in ("current", "lagged", None), "norm", "'current' or 'lagged'", repr(group["norm"]))
    require(group["first_step"] in ("skip", "sgd"), "first_step", "'skip' or 'sgd'", repr(group["first_step"]))
    check_paths(group["foreach"], group["fused"], group["differentiable"])


class DelayedRate(Optimizer):
    """What the three optimizers share: the rate of a step comes from the second moment before its gradient."""

    def __init__(self, params: Iterable, **options: Any) -> None:
        super().__init__(params, {**DEFAULTS, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with the same checks as in the constructor.

        Args:
            param_group: ``"params"`` and any hyper-parameters that differ from the defaults.

        Raises:
            ValueError: a hyper-parameter out of range.

        Reference: savarese2021avagrad.
        """
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in DEFAULTS.items():
                group.setdefault(name, self.defaults.get(name, value))
        for entry in self.state.values():
            if "step" in entry and not isinstance(entry["step"], Tensor):  # as the official code stores it
                entry["step"] = torch.tensor(float(entry["step"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state; also reads checkpoints of the official code.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError: the state belongs to another optimizer (an entry of ``step``, ``exp_avg``, ``exp_avg_sq``
                is missing).

        Reference: savarese2021avagrad.
        """
        for index, entry in state_dict["state"].items():
            missing = [name for name in STATE if name not in entry]
            if missing:
                name = type(self).__name__
                raise ValueError(f"state_dict must come from {name}: parameter {index} has no {', '.join(missing)}")
        super().load_state_dict(state_dict)

    def _fill_state(self, p: Tensor, capturable: bool) -> None:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), device=p.device if capturable else None)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["carry"] = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: recomputes the loss (with gradients enabled) and returns it.

        Returns:
            The loss of ``closure``, or ``None`` without one.

        Raises:
            NotImplementedError: a gradient is sparse.
            ValueError: a gradient is not finite and ``error_if_nonfinite`` is set, or ``fused`` meets a dtype that it
                does not support. No group has been changed then.

        Reference: savarese2021avagrad.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # check all groups before changing the first
            check_grads([p.grad for p in group["params"]], type(self).__name__, group["error_if_nonfinite"])
            if group["fused"]:
                check_fusable([p for p in group["params"] if p.grad is not None])
        with torch.set_grad_enabled(any(group["differentiable"] for group in self.param_groups)):
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if "carry" not in self.state[p]:
                self._fill_state(p, group["capturable"])
        states = [self.state[p] for p in params]
        names = [name for name in DEFAULTS if name != "error_if_nonfinite"]
        group["gamma"] = avagrad(
            params,
            [p.grad for p in params],
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            carries=[state["carry"] for state in states],
            **{name: group[name] for name in names},
        )
