"""Functional forms of AvaGrad and Delayed Adam: everything they read or write is an argument."""

import torch
from torch import Tensor

from effnb.optim.avagrad.eager import foreach_step, single_step
from effnb.optim.avagrad.fused import check_fusable, fused_step
from effnb.optim.avagrad.rule import Rule, Scalar

_ONE = torch.tensor(1.0, device="cpu")


def check_grads(grads: list[Tensor | None], owner: str, error_if_nonfinite: bool = False) -> None:
    """Refuse sparse gradients and, on request, non-finite ones, before anything is changed."""
    for i, grad in enumerate(grads):
        if grad is not None and grad.layout != torch.strided:
            raise NotImplementedError(f"{owner} does not support sparse gradients, got {grad.layout} at parameter {i}")
    if error_if_nonfinite:
        for i, grad in enumerate(grads):
            if grad is not None and not torch.isfinite(grad).all():
                raise ValueError(f"gradients must be finite (error_if_nonfinite=True), got nan or inf at parameter {i}")


def check_paths(foreach: bool | None, fused: bool | None, differentiable: bool) -> None:
    """Refuse combinations of execution paths that exclude each other."""
    if foreach and fused:
        raise ValueError("foreach and fused exclude each other, got foreach=True and fused=True")
    if differentiable and (foreach or fused):
        raise ValueError(f"differentiable=True needs the single-tensor path, got foreach={foreach}, fused={fused}")


def choose_path(params: list[Tensor], foreach: bool | None, fused: bool | None, differentiable: bool) -> str:
    """``"fused"``, ``"foreach"`` (the default for plain tensors on one device) or ``"single"``."""
    check_paths(foreach, fused, differentiable)
    if fused:
        check_fusable(params)
        return "fused"
    plain = all(type(p) in (Tensor, torch.nn.Parameter) for p in params) and len({p.device for p in params}) == 1
    wanted = plain and not differentiable if foreach is None else foreach
    return "foreach" if wanted else "single"


def _real(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def _run(rule, tensors, steps, gamma, carries, path) -> Scalar:
    """Advance the counters and take one step on real views."""
    # a tensor on the host, lest the slow path wraps the number once for each counter
    torch._foreach_add_(steps, _ONE if steps[0].is_cpu else 1.0)
    if any(p.is_complex() for p in tensors[0]):
        tensors = tuple(map(_real, tensors))
    params, grads, means, squares = tensors
    carries = [{} for _ in params] if carries is None else carries
    if path == "fused":
        return fused_step(params, grads, means, squares, steps, rule, gamma, carries)
    for carry in carries:  # a sum of the fused path describes a state that this step changes
        carry.clear()
    return (foreach_step if path == "foreach" else single_step)(params, grads, means, squares, steps, rule, gamma)


def avagrad(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 0.1,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    norm: str | None = "current",
    first_step: str = "skip",
    gamma: float | Tensor | None = None,
    carries: list[dict] | None = None,
    foreach: bool | None = None,
    fused: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
) -> float | Tensor | None:
    r"""Take one AvaGrad step in place and return the normaliser ``gamma``.

    .. math::
        \eta_t = \frac{1}{\sqrt{v_{t-1}/(1-\beta_2^{t-1})} + \epsilon}, \quad
        w_t = w_{t-1} - \gamma_t\, lr\; \eta_t \frac{m_t}{1-\beta_1^t}, \quad
        \gamma_t = \frac{\sqrt d}{\lVert \eta_t \rVert_2}

    Args:
        params: tensors of any shape, changed in place.
        grads: gradients, one per parameter, of the same shapes; never written to.
        exp_avgs: running means ``m`` of the same shapes, changed in place.
        exp_avg_sqs: running means of squares ``v`` of the same shapes, changed in place.
        state_steps: one 0-d tensor per parameter, the number of steps so far, changed in place.
        lr: learning rate.
        betas: decay rates of ``m`` and ``v``.
        eps: adaptability; added after the bias correction and the square root.
        weight_decay: L2 penalty, or decoupled shrinkage ``lr * weight_decay``.
        decoupled_weight_decay: which of the two.
        norm: ``"current"``, ``"lagged"`` (as in the official code), or ``None`` (no normaliser).
        first_step: ``"skip"`` or ``"sgd"``; see :class:`effnb.optim.AvaGrad`.
        gamma: what the previous call returned; used by ``norm="lagged"`` only.
        carries: one dictionary per parameter in which the fused path keeps the next step's sums; ``None``
            computes them anew in each call.
        foreach: batched path; ``None`` takes it wherever it applies.
        fused: compiled path.
        maximize: ascend instead of descend.
        capturable: keep counters and normaliser as tensors.
        differentiable: let autograd see the step.

    Returns:
        ``gamma`` of this step (``"current"``), of the next (``"lagged"``), or ``None`` without parameters.

    Raises:
        NotImplementedError: a gradient is sparse.
        ValueError: lists of different lengths, or paths that exclude each other.

    Reference: savarese2021avagrad.

    >>> w, m, v, t = torch.ones(2), torch.zeros(2), torch.full((2,), 4e-3), torch.tensor(1.)
    >>> gamma = avagrad([w], [torch.ones(2)], [m], [v], [t], lr=0.1, betas=(0.0, 0.999), eps=1.0)
    >>> round(gamma, 4)  # eta = 1/3 everywhere
    3.0
    >>> w
    tensor([0.9000, 0.9000])
    """
    lengths = [len(x) for x in (params, grads, exp_avgs, exp_avg_sqs, state_steps)]
    if len(set(lengths)) > 1:
        raise ValueError(f"params, grads, exp_avgs, exp_avg_sqs and state_steps must have one length, got {lengths}")
    check_grads(grads, "avagrad")
    path = choose_path(params, foreach, fused, differentiable)
    if not sum(p.numel() for p in params):
        return gamma
    lr = lr if capturable or differentiable else float(lr)
    options = (decoupled_weight_decay, norm, first_step, maximize, capturable, differentiable)
    rule = Rule(lr, *betas, eps, weight_decay, *options)
    return _run(rule, (params, grads, exp_avgs, exp_avg_sqs), state_steps, gamma, carries, path)


def delayed_adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **options,
) -> None:
    r"""Take one Delayed Adam step in place: Adam whose rate comes from the second moment *before* this gradient.

    .. math:: w_t = w_{t-1} - \frac{lr}{\sqrt{v_{t-1}/(1-\beta_2^{t-1})} + \epsilon} \frac{m_t}{1-\beta_1^t}

    Args:
        params: tensors of any shape, changed in place; ``grads``, ``exp_avgs`` and ``exp_avg_sqs`` have their shapes.
        grads: gradients; never written to.
        exp_avgs: running means, changed in place.
        exp_avg_sqs: running means of squares, changed in place.
        state_steps: 0-d counters, changed in place.
        lr: learning rate.
        betas: decay rates.
        eps: added after the bias correction and the square root.
        **options: ``weight_decay``, ``decoupled_weight_decay``, ``first_step``, ``foreach``, ``fused``, ``maximize``,
            ``capturable``, ``differentiable`` as in :func:`avagrad`.

    Raises:
        NotImplementedError: a gradient is sparse.
        TypeError: an option that Delayed Adam does not have, such as ``norm``.
        ValueError: lists of different lengths, or paths that exclude each other.

    Reference: savarese2021avagrad.

    >>> w, m, v, t = torch.ones(1), torch.zeros(1), torch.full((1,), 4e-3), torch.tensor(1.)
    >>> delayed_adam([w], [torch.ones(1)], [m], [v], [t], lr=0.1, betas=(0.0, 0.999))
    >>> w  # 1 - 0.1 / 2
    tensor([0.9500])
    """
    unknown = {"norm", "gamma", "carries"} & options.keys()
    if unknown:
        raise TypeError(f"delayed_adam has no normaliser, got {sorted(unknown)}")
    avagrad(params, grads, exp_avgs, exp_avg_sqs, state_steps, lr=lr, betas=betas, eps=eps, norm=None, **options)
