"""AvaGrad and Delayed Adam, from gradient to weight: everything that a step reads or writes is an argument.

``avagrad`` and ``delayed_adam`` are the functional forms. ``take_step``, which the optimizer classes call too, picks
one of three paths: ``_single_step`` (read it first), ``_foreach_step`` (the default), ``_fused_step`` (one compiled
pass). Each holds the whole rule; m is ``exp_avg``, v ``exp_avg_sq``, eta the rates, gamma = sqrt(d) / ||eta||.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effnb.optim.avagrad.fused import can_compile, check_fusable, fused_update
from effnb.optim.avagrad.rule import Gamma, Rule, Scalar, Scope, Tensors, check_grads, local

HALF = (torch.float16, torch.bfloat16)
_ONE = torch.tensor(1.0, dtype=torch.float32, device="cpu")


def avagrad(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    state_steps: Tensors,
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
    """Take one step of :class:`effnb.optim.AvaGrad` in place and return its normaliser ``gamma``.

    Args:
        params: tensors of any shape, changed in place.
        grads: gradients, one per parameter, of the same shapes; never written to.
        exp_avgs: running means ``m`` of the same shapes, changed in place.
        exp_avg_sqs: running means of squares ``v`` of the same shapes, changed in place.
        state_steps: one 0-d tensor per parameter, the number of steps so far, changed in place.
        lr, betas, eps, weight_decay, decoupled_weight_decay, first_step: as :class:`effnb.optim.AvaGrad`.
        norm: ``"current"``, ``"lagged"``, or ``None`` (no normaliser).
        gamma: what the previous call returned; used by ``norm="lagged"`` only.
        carries: one dictionary per parameter in which the fused path leaves the sum that the next step needs; ``None``
            computes it anew in each call.
        foreach, fused, maximize, capturable, differentiable: as :class:`effnb.optim.AvaGrad`.

    Returns:
        ``gamma`` of this step (``"current"``), of the next (``"lagged"``), or as given without parameters.

    Raises:
        NotImplementedError: a gradient is sparse.
        TypeError: ``lr``, ``eps`` or ``weight_decay`` is no number.
        ValueError: lists of different lengths, a hyper-parameter out of range, an unknown ``norm`` or ``first_step``,
            paths that exclude each other, or a dtype that ``fused`` does not support.

    Reference: savarese2021avagrad.

    >>> w, m, v, t = torch.ones(2), torch.zeros(2), torch.full((2,), 4e-3), torch.tensor(1.)
    >>> gamma = avagrad([w], [torch.ones(2)], [m], [v], [t], lr=0.1, betas=(0.0, 0.999), eps=1.0)
    >>> round(gamma, 4)  # eta = 1/3 everywhere
    3.0
    >>> w
    tensor([0.9000, 0.9000])
    """
    options = (decoupled_weight_decay, norm, first_step, foreach, fused, maximize, capturable, differentiable)
    rule = Rule(lr, betas, eps, weight_decay, *options)
    rule.check()
    lengths = [len(x) for x in (params, grads, exp_avgs, exp_avg_sqs, state_steps)]
    if len(set(lengths)) > 1:
        raise ValueError(f"params, grads, exp_avgs, exp_avg_sqs and state_steps must have one length, got {lengths}")
    check_grads(grads, "avagrad")
    return take_step(params, grads, exp_avgs, exp_avg_sqs, state_steps, rule, gamma, carries)


def delayed_adam(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    state_steps: Tensors,
    *,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **options,
) -> None:
    """Take one step of :class:`effnb.optim.DelayedAdam` in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, state_steps: as :func:`avagrad`.
        lr, betas, eps: as :class:`effnb.optim.DelayedAdam`.
        **options: of :func:`avagrad`, except ``norm``, ``gamma`` and ``carries``.

    Raises:
        NotImplementedError: a gradient is sparse.
        TypeError: an option that Delayed Adam does not have, such as ``norm``.
        ValueError: as :func:`avagrad`.

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


def take_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    rule: Rule,
    gamma: Gamma,
    carries: list[dict] | None,
) -> Gamma:
    """Count the step and take it on the path that ``rule`` asks for; returns the next ``gamma``."""
    if rule.fused:
        check_fusable(params)
    scope = Scope.of(params)
    if not scope.count:
        return gamma
    if torch.compiler.is_compiling():  # a counter's value read to the host would cut the graph
        rule = rule._replace(capturable=True)
    if not (rule.capturable or rule.differentiable):
        rule = rule._replace(lr=float(rule.lr))
    # A tensor on the host, lest the slow path of foreach wraps the number once for each counter.
    torch._foreach_add_(steps, _ONE if steps[0].is_cpu else 1.0)
    tensors = [params, grads, exp_avgs, exp_avg_sqs]
    if any(scope.shards):  # entry by entry all is local but the norm
        tensors = [local(group, params) for group in tensors]
    foreach = rule.foreach
    if foreach is None:  # subclasses of tensors may not know the foreach operations
        plain = all(type(p) in (Tensor, nn.Parameter) for p in tensors[0]) and len({p.device for p in params}) == 1
        foreach = plain and not rule.differentiable
    if any(p.is_complex() for p in params):
        tensors = [[torch.view_as_real(t) if t.is_complex() else t for t in group] for group in tensors]
    if rule.fused and can_compile():
        return _fused_step(*tensors, steps, rule, gamma, scope, [{} for _ in params] if carries is None else carries)
    _forget(carries or [])
    return (_foreach_step if foreach or rule.fused else _single_step)(*tensors, steps, rule, gamma, scope)


def joint_gamma(groups: Sequence[tuple[Tensors, Tensors, Tensors, Rule]]) -> Scalar:
    """The normaliser of the coming step over all groups, each as params, exp_avg_sqs, state_steps and rule."""
    squares, params = [], []
    for group, exp_avg_sqs, steps, rule in groups:
        scales = _corrections([step + 1 for step in steps], rule).v_scale
        for v, scale in zip(local(exp_avg_sqs, group), scales, strict=True):
            v = torch.view_as_real(v) if v.is_complex() else v
            squares.append(_rate(v, scale, rule).to(_sum_dtype([v])).square().sum().to(group[0].device))
        params += group
    return _inverse_rms(torch.stack([s.to(squares[0]) for s in squares]), Scope.of(params), groups[0][3])


# ---------------------------------------------------------------- what the three paths share


class Corrections(NamedTuple):
    """Factors of one step, one a parameter: floats, or 0-d tensors when the counters stay on the device."""

    v_scale: list[Scalar]  # 1 / sqrt(1 - beta2^(t-1)), of the root of v before this step; 0 at t = 1
    next_v_scale: list[Scalar]  # the same one step later
    m_scale: list[Scalar]  # moves / (1 - beta1^t)
    moves: list[Scalar]  # 0 where the first update is skipped, else 1


def _bias_correction(beta: float, step: Tensor) -> Tensor:
    """``1 - beta^step`` without the cancellation that costs four digits in float32 at small steps."""
    if beta == 0:
        return (step > 0).to(step.dtype)
    return -torch.expm1(step * math.log(beta))


def _corrections(steps: Tensors, rule: Rule) -> Corrections:
    """The factors of this step; ``steps`` are the counters after their increment."""
    (beta1, beta2), skip = rule.betas, rule.first_step == "skip"
    rows: list[tuple[Scalar, ...]] = []
    if rule.capturable:  # no branch on a counter's value, no host synchronisation
        for step in steps:
            first = (step == 1).to(step.dtype)
            moves = 1 - first if skip else torch.ones_like(step)
            # The clamp only keeps the branch that `where` drops finite.
            before = _bias_correction(beta2, step - 1).clamp_min(1e-30).rsqrt()
            v_scale = torch.where(step > 1, before, first - first)
            next_v_scale = _bias_correction(beta2, step).rsqrt()
            rows.append((v_scale, next_v_scale, moves / _bias_correction(beta1, step), moves))
    else:
        known: dict[float, tuple[float, ...]] = {}  # nearly always one value for all parameters
        for t in [step.item() for step in steps]:
            if t not in known:
                moves = 0.0 if t == 1 and skip else 1.0
                v_scale = 1 / math.sqrt(1 - beta2 ** (t - 1)) if t > 1 else 0.0
                known[t] = (v_scale, 1 / math.sqrt(1 - beta2**t), moves / (1 - beta1**t), moves)
            rows.append(known[t])
    return Corrections(*map(list, zip(*rows, strict=True)))


def _inverse_rms(squares: Tensor, scope: Scope, rule: Rule) -> Scalar:
    """``sqrt(d / sum)`` of one sum of squared rates a tensor; read to the host where that costs no waiting."""
    rate_sum = scope.total(squares)
    if rule.capturable or rule.differentiable or not rate_sum.is_cpu:
        return (rate_sum / scope.count).rsqrt()
    return 1 / math.sqrt(rate_sum.item() / scope.count)


def _given_gamma(gamma: Gamma, params: Tensors, rule: Rule) -> Scalar:
    """The normaliser where it is not this step's own: none, that of all groups, or what the step before left behind."""
    if rule.norm is None:
        return 1.0
    if gamma is None:  # no step before: eta is 1 / eps everywhere
        return rule.eps
    return gamma.to(params[0].device) if isinstance(gamma, Tensor) else gamma


def _sum_dtype(tensors: Tensors) -> torch.dtype:
    """float64 if any tensor has it, else float32: half precision overflows in a sum of squared rates."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


# ---------------------------------------------------------------- one tensor after the other


def _single_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    rule: Rule,
    gamma: Gamma,
    scope: Scope,
) -> Scalar:
    """One step, a Python loop over tensors; the only path with ``differentiable``. Returns the next gamma."""
    beta1, beta2 = rule.betas
    scales = _corrections(steps, rule)
    # Never into p.grad, which belongs to the caller: accumulation and logging go on with it.
    grads = [-g for g in grads] if rule.maximize else grads
    if rule.weight_decay and not rule.decoupled_weight_decay:
        grads = [g.add(p, alpha=rule.weight_decay) for g, p in zip(grads, params, strict=True)]
    for m, g in zip(exp_avgs, grads, strict=True):
        m.lerp_(g, 1 - beta1)

    # The rates come from v BEFORE this gradient; from the updated v it would be Adam with a norm.
    etas = [_rate(v, scale, rule) for v, scale in zip(exp_avg_sqs, scales.v_scale, strict=True)]
    used = _single_gamma(etas, scope, rule) if rule.norm == "current" else _given_gamma(gamma, params, rule)
    if rule.norm is None:
        etas = [eta.masked_fill(v == 0, _untouched(rule)) for eta, v in zip(etas, exp_avg_sqs, strict=True)]
    for p, m, eta, m_scale, moves in zip(params, exp_avgs, etas, scales.m_scale, scales.moves, strict=True):
        if isinstance(moves, float) and moves == 0.0:  # lest 0 * inf of a first gradient gives nan
            continue
        if rule.decoupled_weight_decay and rule.weight_decay:
            p.mul_(1 - rule.lr * rule.weight_decay * moves)
        factor = -rule.lr * (used.to(p.device) if isinstance(used, Tensor) else used) * m_scale
        m = m.clone() if rule.differentiable else m  # autograd keeps m, which the next step changes in place
        p.add_((m * eta * factor).to(p.dtype))

    if rule.norm == "lagged":  # the official slip: v of this step with the bias correction of the next
        lagged = [_rate(v, scale, rule) for v, scale in zip(exp_avg_sqs, scales.next_v_scale, strict=True)]
        used = _single_gamma(lagged, scope, rule)
    for v, g in zip(exp_avg_sqs, grads, strict=True):
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return used


def _rate(v: Tensor, scale: Scalar, rule: Rule) -> Tensor:
    """``1 / (scale sqrt(v) + eps)``, in float32 for half precision."""
    v = v.float() if v.dtype in HALF else v
    root = v.sqrt()
    if rule.differentiable:  # the gradient at 0 is to be 0, not inf: a zero gradient entry would give nan
        positive = v > 0
        root = torch.where(positive, torch.where(positive, v, torch.ones_like(v)).sqrt(), torch.zeros_like(v))
    return 1 / (root * scale + rule.eps)


def _untouched(rule: Rule) -> float:
    """The rate of an entry that has no second moment yet where nothing normalises: 1 / eps would explode."""
    return float(rule.first_step == "sgd")


def _single_gamma(etas: Tensors, scope: Scope, rule: Rule) -> Scalar:
    """The normaliser over all entries of the group that have a gradient in this step, never one a tensor."""
    dtype, device = _sum_dtype(etas), etas[0].device
    return _inverse_rms(torch.stack([e.to(dtype).square().sum().to(device) for e in etas]), scope, rule)


# ---------------------------------------------------------------- all tensors at once


def _foreach_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    rule: Rule,
    gamma: Gamma,
    scope: Scope,
) -> Scalar:
    """One step with ``torch._foreach_*`` over all tensors of the group. Returns the next gamma."""
    beta1, beta2 = rule.betas
    scales = _corrections(steps, rule)
    if rule.maximize:
        grads = torch._foreach_neg(grads)
    if rule.weight_decay and not rule.decoupled_weight_decay:
        grads = torch._foreach_add(grads, params, alpha=rule.weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)

    etas, gains = _foreach_rates(exp_avg_sqs, scales.v_scale, rule.eps)
    used = _foreach_gamma(etas, gains, scope, rule) if rule.norm == "current" else _given_gamma(gamma, params, rule)
    if rule.norm is None:
        for eta, v, gain in zip(etas, exp_avg_sqs, gains, strict=True):
            eta.masked_fill_(v == 0, _untouched(rule) / gain)

    moving = [i for i, moves in enumerate(scales.moves) if isinstance(moves, Tensor) or moves]
    if moving:
        p, m, eta = ([tensors[i] for i in moving] for tensors in (params, exp_avgs, etas))
        if rule.decoupled_weight_decay and rule.weight_decay:
            torch._foreach_mul_(p, _shared([1 - rule.lr * rule.weight_decay * scales.moves[i] for i in moving]))
        factor = [-rule.lr * scales.m_scale[i] * gains[i] for i in moving]
        if isinstance(used, Tensor):  # one more pass over memory, but no waiting for the device
            torch._foreach_mul_(eta, used.to(eta[0].dtype))
        else:
            factor = [f * used for f in factor]
        factor = _shared(factor)
        on_device = isinstance(factor, list) and any(isinstance(f, Tensor) for f in factor)
        if on_device or p[0].dtype != eta[0].dtype or any(t.dtype in HALF for t in p):
            torch._foreach_mul_(eta, factor)
            torch._foreach_mul_(eta, m)
            torch._foreach_add_(p, eta)
        elif isinstance(factor, list):
            torch._foreach_addcmul_(p, m, eta, factor)
        else:
            torch._foreach_addcmul_(p, m, eta, value=factor)
        del eta

    if rule.norm == "lagged":
        del etas  # of the size of the parameters; the next line makes as much again
        lagged, gains = _foreach_rates(exp_avg_sqs, scales.next_v_scale, rule.eps)
        used = _foreach_gamma(lagged, gains, scope, rule)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    return used


def _shared(values: list[Scalar]) -> Scalar | list[Scalar]:
    """One number instead of a list of equal ones, for which the foreach operations are faster."""
    first = values[0]
    return first if not isinstance(first, Tensor) and values.count(first) == len(values) else values


def _foreach_rates(exp_avg_sqs: Tensors, scales: list[Scalar], eps: float) -> tuple[Tensors, list[Scalar]]:
    """Rates as ``gain * eta``, in one temporary of the size of the parameters (float32 for half precision).

    ``1 / (scale sqrt(v) + eps) = gain / (sqrt(v) + gain eps)`` with ``gain = 1 / scale`` saves one pass over memory.
    """
    etas = torch._foreach_sqrt([v.float() if v.dtype in HALF else v for v in exp_avg_sqs])
    if isinstance(scales[0], Tensor):  # it may be zero, and nobody may look
        torch._foreach_mul_(etas, scales)
        gains: list[Scalar] = [1.0] * len(scales)
    else:
        gains = [1 / scale if scale else 1.0 for scale in scales]  # scale = 0: no second moment yet, sqrt(v) = 0
    torch._foreach_add_(etas, _shared([gain * eps for gain in gains]))
    torch._foreach_reciprocal_(etas)
    return etas, gains


def _foreach_gamma(etas: Tensors, gains: list[float], scope: Scope, rule: Rule) -> Scalar:
    """The normaliser over all entries of the group that have a gradient in this step."""
    norms = torch._foreach_norm(etas, 2, dtype=_sum_dtype(etas))
    total = torch.stack(norms if len({n.device for n in norms}) == 1 else [n.to(norms[0].device) for n in norms])
    total = total.double() if total.is_cpu else total
    weights = torch.tensor(gains, dtype=total.dtype, device=total.device)
    return _inverse_rms((total * weights).square(), scope, rule)


# ---------------------------------------------------------------- one compiled pass


def _fused_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    rule: Rule,
    gamma: Gamma,
    scope: Scope,
    carries: list[dict],
) -> Scalar:
    """One step in one compiled pass over memory, which also sums the next step's squared rates; returns next gamma.

    ``carries`` holds the sums, one dictionary a parameter: flat, because it is the state of an optimizer, and states
    that nest break sharded checkpoints.
    """
    (beta1, beta2), eps = rule.betas, rule.eps
    scales = _corrections(steps, rule)
    if rule.norm == "current":
        sums = []
        for v, scale, carry in zip(exp_avg_sqs, scales.v_scale, carries, strict=True):
            known = "rate_sum" in carry and (carry["rate_eps"], carry["rate_beta2"]) == (eps, beta2)
            rate_sum = carry["rate_sum"] if known else (1 / (v.sqrt() * scale + eps)).square().sum()
            sums.append(rate_sum.to(params[0].device))
        used = _inverse_rms(torch.stack(sums), scope, rule)
    else:
        used = _given_gamma(gamma, params, rule)
    decay = rule.lr * rule.weight_decay if rule.decoupled_weight_decay else 0.0
    rows = []
    for v_scale, next_v_scale, m_scale, moves in zip(*scales, strict=True):
        rows.append((v_scale, next_v_scale, -rule.lr * used * m_scale, 1 - decay * moves))

    hyper = (1 - beta1, beta2, eps, rule.weight_decay, -1.0 if rule.maximize else 1.0, _untouched(rule))
    coupled = bool(rule.weight_decay) and not rule.decoupled_weight_decay
    sums = fused_update(params, grads, exp_avgs, exp_avg_sqs, rows, hyper, coupled, rule.norm)
    if sums is None:  # nothing can be compiled here; nothing has been changed yet
        _forget(carries)
        return _foreach_step(params, grads, exp_avgs, exp_avg_sqs, steps, rule, gamma, scope)
    for carry, rate_sum in zip(carries, sums.unbind(), strict=True):
        carry.update(rate_sum=rate_sum, rate_eps=eps, rate_beta2=beta2)
    return _inverse_rms(sums, scope, rule) if rule.norm == "lagged" else used


def _forget(carries: list[dict]) -> None:
    """Drop the sums of the fused path: they describe a second moment that another path is about to change."""
    for carry in carries:
        for name in ("rate_sum", "rate_eps", "rate_beta2"):
            carry.pop(name, None)
