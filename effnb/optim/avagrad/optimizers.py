"""AvaGrad, AvaGradW and Delayed Adam as ``torch.optim.Optimizer`` classes."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from effnb.optim.avagrad.base import DEFAULTS, DelayedRate, require


class AvaGrad(DelayedRate):
    r"""Adam-like steps whose rates come from the past and are rescaled to a root mean square of ``lr``.

    .. math::
        \eta_t = \frac{1}{\sqrt{v_{t-1}/(1-\beta_2^{t-1})} + \epsilon}, \quad
        w_t = w_{t-1} - lr\,\frac{\sqrt d\;\eta_t}{\lVert\eta_t\rVert_2}\,\frac{m_t}{1-\beta_1^t}

    The norm runs over all ``d`` entries of a parameter group that have a gradient in this step, hence ``lr`` means the
    same whatever ``eps`` is: search one, then the other. ``param_groups[i]["gamma"]`` holds
    :math:`\sqrt d / \lVert\eta_t\rVert_2` after a step, for plots.

    * ``eps`` is added *after* the bias correction and the square root, and its default, 0.1, is meant: a small ``eps``
      makes the method adapt more.
    * Weight decay is an L2 penalty by default (it enters both moments, never ``p.grad``); decoupled decay shrinks by
      ``lr * weight_decay`` (as ``torch.optim.AdamW``) and is not divided by the adaptive rates.
    * At the first step of a parameter its second moment is still zero. ``first_step="skip"`` only fills the moments
      (as the official code does, decoupled decay included), ``"sgd"`` takes the plain step ``w - lr * g`` of the paper.
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
        fused: one compiled in-place sweep per step, float32 or float64; the first step compiles (seconds to a minute),
            and falls back to foreach where there is no compiler.
        maximize: ascend instead of descend.
        capturable: keep counters and normaliser as tensors on the device, so that a graph can be captured.
        differentiable: let autograd see the steps.
        error_if_nonfinite: raise before a step with nan or inf in a gradient.

    Raises:
        ValueError: a hyper-parameter out of range, an unknown ``norm`` or ``first_step``, ``foreach`` with ``fused``.

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
    ) -> None:
        require(norm in ("current", "lagged"), "norm", "'current' or 'lagged'", repr(norm))
        options = {name: value for name, value in locals().items() if name in DEFAULTS}
        super().__init__(params, lr=lr, betas=betas, eps=eps, **options)


class AvaGradW(AvaGrad):
    """AvaGrad with decoupled weight decay: weights shrink by ``lr * weight_decay`` besides the adaptive step.

    Args:
        params: tensors or dictionaries of parameter groups.
        lr: learning rate >= 0.
        betas: decay rates of the two moments, in [0, 1).
        eps: adaptability, > 0.
        weight_decay: >= 0; 0 by default, as in the official code.
        **options: as :class:`AvaGrad`, except ``decoupled_weight_decay``.

    Raises:
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
    without the normaliser; at its first step, where there is no second moment yet, it takes no step (``"skip"``) or
    ``w - lr * g`` (``"sgd"``).

    Args:
        params: tensors or dictionaries of parameter groups.
        lr: learning rate >= 0.
        betas: decay rates of the two moments, in [0, 1).
        eps: > 0, added after the bias correction and the square root.
        weight_decay: >= 0.
        decoupled_weight_decay: decay as in AdamW.
        first_step: ``"skip"`` or ``"sgd"``.
        foreach: batched path, the default wherever it applies.
        fused: one compiled in-place sweep per step.
        maximize: ascend instead of descend.
        capturable: keep counters as tensors on the device.
        differentiable: let autograd see the steps.
        error_if_nonfinite: raise before a step with nan or inf in a gradient.

    Raises:
        ValueError: a hyper-parameter out of range, an unknown ``first_step``, ``foreach`` with ``fused``.

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
        options = {name: value for name, value in locals().items() if name in DEFAULTS}
        super().__init__(params, lr=lr, betas=betas, eps=eps, norm=None, **options)
