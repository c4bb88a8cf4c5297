"""AvaGrad, AvaGradW and Delayed Adam as ``torch.optim.Optimizer``; the steps stand in ``effnb.optim.functional``."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from effnb.common import check_choice
from effnb.optim.avagrad.fused import check_fusable
from effnb.optim.avagrad.rule import Rule, check_grads
from effnb.optim.functional import joint_gamma, take_step

STATE = ("exp_avg", "exp_avg_sq", "step")


class DelayedRate(Optimizer):
    """What the three optimizers share: state, checks, checkpoints, and the loop over parameter groups."""

    def __init__(self, params: Iterable, rule: Rule, error_if_nonfinite: bool) -> None:
        super().__init__(params, {**rule._asdict(), "gamma": None, "error_if_nonfinite": error_if_nonfinite})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with the same checks as in the constructor.

        Args:
            param_group: ``"params"`` and any hyper-parameters that differ from the defaults.

        Raises:
            TypeError: a hyper-parameter that must be a number and is none.
            ValueError: a hyper-parameter out of range.
        """
        group = {**self.defaults, **param_group}
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].cpu()  # looked at once, here: in a step that would wait for the device
        Rule(**{name: group[name] for name in Rule._fields}).check()
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for entry in self.state.values():
            if "step" in entry and not isinstance(entry["step"], Tensor):  # as the official code stores it
                entry["step"] = torch.tensor(float(entry["step"]), dtype=torch.float32)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state; also reads checkpoints of the official code.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError: the state belongs to another optimizer (an entry of ``step``, ``exp_avg``, ``exp_avg_sq``
                is missing).
        """
        for index, entry in state_dict["state"].items():
            missing = [name for name in ("step", "exp_avg", "exp_avg_sq") if name not in entry]
            if missing:
                name = type(self).__name__
                raise ValueError(f"state_dict must come from {name}: parameter {index} has no {', '.join(missing)}")
        super().load_state_dict(state_dict)

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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # all groups before the first is changed
            check_grads([p.grad for p in group["params"]], type(self).__name__, group["error_if_nonfinite"])
            if group["fused"]:
                check_fusable([p for p in group["params"] if p.grad is not None])
        with torch.set_grad_enabled(any(group["differentiable"] for group in self.param_groups)):
            work = []  # per group with a gradient: the group, its rule, and what a step reads and writes
            for group in self.param_groups:
                if params := [p for p in group["params"] if p.grad is not None]:
                    states = [self._state_of(p, group["capturable"]) for p in params]
                    columns = [[state[name] for state in states] for name in STATE]
                    rule = Rule(**{name: group[name] for name in Rule._fields})
                    work.append((group, rule, params, columns, states))
            jointly = [(p, columns[1], columns[2], rule) for _, rule, p, columns, _ in work if rule.norm_scope == "all"]
            if jointly:
                gamma = joint_gamma(jointly)
            for group, rule, params, columns, states in work:
                if rule.norm_scope == "all":
                    group["gamma"], rule = gamma, rule._replace(norm="given")
                grads = [p.grad for p in params]
                group["gamma"] = take_step(params, grads, *columns, rule, group["gamma"], carries=states)
        return loss

    def _state_of(self, p: Tensor, capturable: bool) -> dict[str, Any]:
        """The state of a parameter, made at its first gradient: its bias corrections count its own steps."""
        state = self.state[p]
        if "step" not in state:
            # float32 whatever the default is: a bfloat16 counter stops at 256.
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if capturable else "cpu")
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


class AvaGrad(DelayedRate):
    r"""Adam-like steps whose rates come from the past and are rescaled to a root mean square of ``lr``.

    .. math::
        \eta_t = \frac{1}{\sqrt{v_{t-1}/(1-\beta_2^{t-1})} + \epsilon}, \quad
        w_t = w_{t-1} - lr\,\gamma_t\,\eta_t\,\frac{m_t}{1-\beta_1^t}, \quad
        \gamma_t = \frac{\sqrt d}{\lVert\eta_t\rVert_2}

    The norm runs over all ``d`` entries of a parameter group that have a gradient in this step, hence ``lr`` means the
    same whatever ``eps`` is: search one, then the other. ``param_groups[i]["gamma"]`` holds :math:`\gamma_t` after a
    step, for plots.

    * ``eps`` is added *after* the bias correction and the square root, and its default, 0.1, is meant: a small ``eps``
      makes the method adapt more.
    * Weight decay is an L2 penalty by default (it enters both moments, never ``p.grad``); decoupled decay shrinks by
      ``lr * weight_decay`` (as ``torch.optim.AdamW``) and is not divided by the adaptive rates.
    * At the first step of a parameter its second moment is still zero. ``first_step="skip"`` only fills the moments
      (as the official code does, decoupled decay included), ``"sgd"`` takes the plain step ``w - lr * g`` of the paper.
    * ``norm_scope="all"`` takes the norm over all parameter groups together, so that groups made for weight decay alone
      (biases and norms without it) leave the method what it was. It costs one more pass over the second moments.
    * An entry that had no gradient yet, such as the row of an embedding that is seen for the first time, has the rate
      ``1 / eps``, far above the others where ``eps`` is small.
    * Sharded parameters (``DTensor``: ``fully_shard``, tensor parallelism) have one norm over all ranks. The older
      ``FullyShardedDataParallel`` and ``ZeroRedundancyOptimizer`` hand each rank plain pieces, of which nobody can tell
      the whole: ``gamma`` is then each rank's own.
    * ``norm="lagged"`` reproduces the official code to rounding: it normalises with a ``gamma`` left behind by the step
      before, from a second moment that is one step too old for its bias correction. For comparison only.

    Args:
        params: tensors or dictionaries of parameter groups.
        lr: learning rate >= 0, a number or a tensor with one element.
        betas: decay rates of the two moments, in [0, 1).
        eps: adaptability, > 0.
        weight_decay: >= 0.
        decoupled_weight_decay: decay as in AdamW.
        norm: ``"current"`` or ``"lagged"``.
        first_step: ``"skip"`` or ``"sgd"``.
        foreach: batched path, the default wherever it applies.
        fused: one compiled in-place pass per step, float32 or float64; the first step compiles (seconds to a minute),
            and falls back to foreach where there is no compiler.
        maximize: ascend instead of descend.
        capturable: keep counters and normaliser as tensors on the device, so that a graph can be captured.
        differentiable: let autograd see the steps.
        error_if_nonfinite: raise before a step with nan or inf in a gradient.
        norm_scope: ``"group"``, a normaliser for each parameter group, or ``"all"``, one for all; the choice is a
            group's own.

    Raises:
        TypeError: ``lr``, ``eps`` or ``weight_decay`` is no number.
        ValueError: a hyper-parameter out of range, an unknown ``norm``, ``norm_scope`` or ``first_step``, ``foreach``
            with ``fused``, or ``norm="lagged"`` over all groups.

    Reference: savarese2021avagrad.

    >>> w = nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = AvaGrad([w], lr=0.1)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     w.square().sum().backward()
    ...     optimizer.step()
    >>> bool(w.abs().max() < 0.05)
    True
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 0.1,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        norm: str = "current",
        first_step: str = "skip",
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        error_if_nonfinite: bool = False,
        norm_scope: str = "group",
    ) -> None:
        check_choice("norm", norm, ("current", "lagged"))
        options = (decoupled_weight_decay, norm, first_step, foreach, fused, maximize, capturable, differentiable)
        super().__init__(params, Rule(lr, betas, eps, weight_decay, *options, norm_scope), error_if_nonfinite)


class AvaGradW(AvaGrad):
    """AvaGrad with decoupled weight decay: weights shrink by ``lr * weight_decay`` besides the adaptive step.

    Args:
        params, lr, betas, eps: as :class:`AvaGrad`.
        weight_decay: >= 0; 0 by default, as in the official code.
        **options: as :class:`AvaGrad`, except ``decoupled_weight_decay``.

    Raises:
        TypeError: as :class:`AvaGrad`.
        ValueError: as :class:`AvaGrad`.

    Reference: savarese2021avagrad.

    >>> AvaGradW([nn.Parameter(torch.ones(2))], weight_decay=1e-2).param_groups[0]["decoupled_weight_decay"]
    True
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 0.1,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=True, **options)


class DelayedAdam(DelayedRate):
    r"""Adam whose rate is computed from the second moment before the current gradient.

    .. math:: w_t = w_{t-1} - \frac{lr}{\sqrt{v_{t-1}/(1-\beta_2^{t-1})} + \epsilon} \frac{m_t}{1-\beta_1^t}

    Rate and gradient are then independent given the past, which restores the convergence rate of SGD. It is AvaGrad
    without the normaliser. An entry without a second moment yet, at the first step or at its first gradient other than
    zero, takes no step (``"skip"``) or ``w - lr * g`` (``"sgd"``): the formula's ``lr / eps`` would throw it far away.
    For the same reason take a larger ``eps`` than Adam's where entries see their gradients rarely.

    Args:
        params, lr, betas, weight_decay, decoupled_weight_decay, first_step: as :class:`AvaGrad`.
        eps: > 0, added after the bias correction and the square root.
        foreach, fused, maximize, capturable, differentiable, error_if_nonfinite: as :class:`AvaGrad`.

    Raises:
        TypeError: as :class:`AvaGrad`.
        ValueError: as :class:`AvaGrad`.

    Reference: savarese2021avagrad.

    >>> w = nn.Parameter(torch.tensor([3.0]))
    >>> optimizer = DelayedAdam([w], lr=0.1)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     w.square().sum().backward()
    ...     optimizer.step()
    >>> bool(w < 3)
    True
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        first_step: str = "skip",
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        options = (decoupled_weight_decay, None, first_step, foreach, fused, maximize, capturable, differentiable)
        super().__init__(params, Rule(lr, betas, eps, weight_decay, *options), error_if_nonfinite)
