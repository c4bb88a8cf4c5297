"""Proxies with passes of their own: GraSP, SynFlow and the correlation of input Jacobians."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from .common import Loss, gradients, layers, mean_loss, pure, read_batch, read_images, total, weights

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def grasp(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    x, y = read_batch(batch)
    with pure(model, seed) as call:
        theta = list(weights(model).values())
        loss = mean_loss(loss_fn, call(x), y)
        grads = gradients(loss, theta, create_graph=True)
        curved = gradients(grads, theta, grad_outputs=[g.detach() for g in grads])
    return -total([(w.detach() * h).sum(dtype=torch.float64) for w, h in zip(theta, curved, strict=True)])


def synflow(
    model: nn.Module, batch: Any, *, bn: str = "identity", loss_fn: Loss = F.cross_entropy, seed: int | None = 0
) -> float:
    if bn not in ("identity", "keep"):
        raise ValueError(f"bn must be 'identity' or 'keep', got {bn!r}")
    x = read_images(batch)
    with torch.no_grad():
        positive = {name: as_double(t).abs() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    wanted = [positive[f"{name}.weight".lstrip(".")] for name in layers(model)]
    with pure(model, seed, positive) as call, without_norms(model) if bn == "identity" else contextlib.nullcontext():
        for weight in wanted:
            weight.requires_grad_()
        flow = call(torch.ones_like(x[:1], dtype=torch.float64)).sum()
        grads = gradients(flow, wanted)
    return total([(w.detach() * g).abs().sum() for w, g in zip(wanted, grads, strict=True)])


def as_double(tensor: Tensor) -> Tensor:
    """Return floating numbers in double precision, others as they are; never the same memory."""
    return tensor.detach().to(torch.float64, copy=True) if tensor.is_floating_point() else tensor.clone()


@contextlib.contextmanager
def without_norms(model: nn.Module) -> Iterator[None]:
    """Let every normalisation layer pass its input through."""
    norms = [(m, m.__dict__.get("forward")) for m in model.modules() if isinstance(m, NORMS)]
    try:
        for module, _ in norms:
            module.forward = lambda x, *args, **kwargs: x
        yield
    finally:
        for module, own in norms:
            del module.forward
            if own is not None:
                module.forward = own


def jacob_cov(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    x = read_images(batch, 2).clone().requires_grad_()
    with pure(model, seed) as call:
        (jacobian,) = gradients(call(x).sum(), [x])
    rows = jacobian.flatten(1).double()
    rows = rows - rows.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not norms.all():
        warnings.warn("jacob_cov: the Jacobian of a sample is constant, the score is -inf", stacklevel=2)
        return -float("inf")
    rows = rows / norms
    values = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0) + 1e-5
    return -float((values.log() + 1 / values).sum())
