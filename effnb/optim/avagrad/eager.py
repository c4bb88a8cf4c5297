"""The single-tensor and the foreach path of AvaGrad and Delayed Adam."""

import torch
from torch import Tensor

from effnb.optim.avagrad.rule import Rule, Scalar, Scalars, accumulation_dtype, inverse_rms, step_scalars

HALF = (torch.float16, torch.bfloat16)


def normaliser(squares: Tensor, params: list[Tensor], rule: Rule) -> Scalar:
    """``gamma = sqrt(d) / ||eta||`` over all entries that have a gradient in this step."""
    return inverse_rms(squares, sum(p.numel() for p in params), rule.capturable or rule.differentiable)


def chosen_gamma(fresh: Scalar | None, stored: Scalar | None, rule: Rule, device: torch.device) -> Scalar:
    """The normaliser used in this step: its own, or (lagged) the one left behind by the previous step."""
    if rule.norm is None:
        return 1.0
    if rule.norm == "current":
        return fresh
    gamma = rule.eps if stored is None else stored  # no previous step: eta is 1/eps everywhere
    return gamma.to(device) if isinstance(gamma, Tensor) else gamma


# ---------------------------------------------------------------- single tensor


def _safe_sqrt(v: Tensor) -> Tensor:
    """sqrt whose gradient at 0 is 0 instead of inf, so that a zero gradient entry does not give nan."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, torch.ones_like(v)).sqrt(), torch.zeros_like(v))


def _single_rate(v: Tensor, root: Scalar, rule: Rule) -> Tensor:
    v = v.float() if v.dtype in HALF else v
    return 1 / ((_safe_sqrt(v) if rule.differentiable else v.sqrt()) * root + rule.eps)


def _sum_squares(tensors: list[Tensor]) -> Tensor:
    dtype, device = accumulation_dtype(tensors), tensors[0].device
    return torch.stack([t.to(dtype).square().sum().to(device) for t in tensors]).sum()


def _single_apply(p: Tensor, m: Tensor, eta: Tensor, factor: Scalar, decay: Scalar | None) -> None:
    if decay is not None:
        p.mul_(decay)
    p.add_((m * eta * factor).to(p.dtype))


def single_step(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    rule: Rule,
    gamma: Scalar | None,
) -> Scalar:
    """One step, a Python loop over tensors; the only path with ``differentiable``. Returns the next gamma."""
    scalars = step_scalars(steps, rule)
    grads = [_decayed(g, p, rule) for g, p in zip(grads, params, strict=True)]
    for m, g in zip(means, grads, strict=True):
        m.lerp_(g, 1 - rule.beta1)
    etas = [_single_rate(v, root, rule) for v, root in zip(squares, scalars.root, strict=True)]
    fresh = normaliser(_sum_squares(etas), params, rule) if rule.norm == "current" else None
    used = chosen_gamma(fresh, gamma, rule, params[0].device)
    if rule.norm is None:
        etas = [eta * (1 - f) + f for eta, f in zip(etas, scalars.first, strict=True)]
    for p, m, eta, mean, moved in zip(params, means, etas, scalars.mean, scalars.moved, strict=True):
        if isinstance(moved, float) and moved == 0.0:
            continue
        decay = 1 - rule.lr * rule.weight_decay * moved if rule.decoupled and rule.weight_decay else None
        scale = used.to(p.device) if isinstance(used, Tensor) else used
        # autograd keeps m, which the next step changes in place
        _single_apply(p, m.clone() if rule.differentiable else m, eta, -rule.lr * scale * mean, decay)
    if rule.norm == "lagged":
        lagged = [_single_rate(v, root, rule) for v, root in zip(squares, scalars.next_root, strict=True)]
        used = normaliser(_sum_squares(lagged), params, rule)
    for v, g in zip(squares, grads, strict=True):
        v.mul_(rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
    return used


def _decayed(grad: Tensor, param: Tensor, rule: Rule) -> Tensor:
    """The gradient that enters the moments; a new tensor whenever it differs from ``param.grad``."""
    grad = -grad if rule.maximize else grad
    coupled = rule.weight_decay and not rule.decoupled
    return grad.add(param, alpha=rule.weight_decay) if coupled else grad


# ---------------------------------------------------------------- foreach


def _shared(values: list[Scalar]) -> Scalar | list[Scalar]:
    """One number instead of a list of equal ones, for which the foreach operations are faster."""
    first = values[0]
    return first if not isinstance(first, Tensor) and values.count(first) == len(values) else values


def _foreach_rates(squares: list[Tensor], root: list[Scalar], eps: float) -> tuple[list[Tensor], list[Scalar]]:
    """Rates ``eta`` as ``gain * etas``, in one temporary of the size of the parameters (float32 for half).

    ``1 / (root sqrt(v) + eps) = gain / (sqrt(v) + gain eps)`` with ``gain = 1 / root`` saves one pass over memory.
    """
    etas = torch._foreach_sqrt([v.float() if v.dtype in HALF else v for v in squares])
    if isinstance(root[0], Tensor):  # root may be zero, and nobody may look
        torch._foreach_mul_(etas, root)
        gains: list[Scalar] = [1.0] * len(root)
        offsets = [eps] * len(root)
    else:
        gains = [1 / r if r else 1.0 for r in root]  # r = 0: no second moment yet, sqrt(v) = 0
        offsets = [gain * eps for gain in gains]
    torch._foreach_add_(etas, _shared(offsets))
    torch._foreach_reciprocal_(etas)
    return etas, gains


def _foreach_sum_squares(etas: list[Tensor], gains: list[float]) -> Tensor:
    norms = torch._foreach_norm(etas, 2, dtype=accumulation_dtype(etas))
    total = torch.stack(norms if len({n.device for n in norms}) == 1 else [n.to(norms[0].device) for n in norms])
    total = total.double() if total.device.type == "cpu" else total
    return (total * torch.tensor(gains, dtype=total.dtype, device=total.device)).square().sum()


def _foreach_apply(
    params: list[Tensor], means: list[Tensor], etas: list[Tensor], factor: list[Scalar], gamma: Scalar
) -> None:
    """``p += factor * gamma * m * eta``; ``etas`` are used up."""
    if isinstance(gamma, Tensor):
        torch._foreach_mul_(etas, gamma.to(etas[0].dtype))
        gamma = 1.0
    factor = _shared([f * gamma for f in factor])
    tensors = isinstance(factor, list) and any(isinstance(f, Tensor) for f in factor)
    if tensors or params[0].dtype != etas[0].dtype or any(p.dtype in HALF for p in params):
        torch._foreach_mul_(etas, factor)
        torch._foreach_mul_(etas, means)
        torch._foreach_add_(params, etas)
    elif isinstance(factor, list):
        torch._foreach_addcmul_(params, means, etas, factor)
    else:
        torch._foreach_addcmul_(params, means, etas, value=factor)


def _foreach_update(
    params: list[Tensor],
    means: list[Tensor],
    etas: list[Tensor],
    gains: list[float],
    scalars: Scalars,
    gamma: Scalar,
    rule: Rule,
) -> None:
    moved, mean = scalars.moved, scalars.mean
    moving = [i for i, m in enumerate(moved) if isinstance(m, Tensor) or m]
    if len(moving) < len(moved):
        params, means, etas, gains, moved, mean = (
            [values[i] for i in moving] for values in (params, means, etas, gains, moved, mean)
        )
    if not moving:
        return
    if rule.decoupled and rule.weight_decay:
        torch._foreach_mul_(params, _shared([1 - rule.lr * rule.weight_decay * m for m in moved]))
    factor = [-rule.lr * a * gain for a, gain in zip(mean, gains, strict=True)]
    _foreach_apply(params, means, etas, factor, gamma)


def foreach_step(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    rule: Rule,
    gamma: Scalar | None,
) -> Scalar:
    """One step with ``torch._foreach_*`` over all tensors of the group. Returns the next gamma."""
    scalars = step_scalars(steps, rule)
    if rule.maximize:
        grads = torch._foreach_neg(grads)
    if rule.weight_decay and not rule.decoupled:
        grads = torch._foreach_add(grads, params, alpha=rule.weight_decay)
    torch._foreach_lerp_(means, grads, 1 - rule.beta1)
    etas, gains = _foreach_rates(squares, scalars.root, rule.eps)
    fresh = normaliser(_foreach_sum_squares(etas, gains), params, rule) if rule.norm == "current" else None
    used = chosen_gamma(fresh, gamma, rule, params[0].device)
    if rule.norm is None and rule.first_step == "sgd":
        torch._foreach_mul_(etas, [1 - f for f in scalars.first])
        torch._foreach_add_(etas, scalars.first)
    _foreach_update(params, means, etas, gains, scalars, used, rule)
    if rule.norm == "lagged":
        del etas
        lagged, gains = _foreach_rates(squares, scalars.next_root, rule.eps)
        used = normaliser(_foreach_sum_squares(lagged, gains), params, rule)
    torch._foreach_mul_(squares, rule.beta2)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - rule.beta2)
    return used
