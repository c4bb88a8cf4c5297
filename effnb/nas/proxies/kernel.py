"""Proxies on the gradient of every sample: condition of the tangent kernel, GradSign and KNAS."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import Loss, gradients, mean_loss, pure, read_batch, read_images, total, weights


def per_sample(outputs: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Return the gradient of each entry of ``outputs`` ``(batch,)``: one backward pass over the identity."""
    one_hot = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
    if not outputs.requires_grad:
        return [p.new_zeros(len(outputs), *p.shape) for p in parameters]
    return gradients(outputs, parameters, grad_outputs=one_hot, is_grads_batched=True)


def named_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return all trainable parameters with ``weight`` in their name, those of norms included."""
    found = [p for name, p in model.named_parameters() if "weight" in name and p.requires_grad]
    if not found:
        raise ValueError("model must have a parameter named weight that requires a gradient, it has none")
    return found


def ntk_condition(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    x = read_images(batch, 2)
    with pure(model, seed) as call:
        rows = per_sample(call(x).flatten(1).sum(1), named_weights(model))
    kernel = sum(g.flatten(1).double() @ g.flatten(1).double().T for g in rows)
    if not kernel.isfinite().all() or not kernel.any():
        return 1e5
    values = torch.linalg.eigvalsh(kernel)
    return float(values[-1] / values[0].clamp(min=0))


def grad_sign(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    x, y = read_batch(batch)
    with pure(model, seed) as call:
        output = call(x)
        mean_loss(loss_fn, output, y)
        losses = torch.stack([loss_fn(output[i : i + 1], y[i : i + 1]) for i in range(len(x))])
        rows = per_sample(losses, list(weights(model).values()))
    return total([g.sign().sum(0).abs().sum() for g in rows])


def knas(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    x = read_images(batch)
    with pure(model, seed) as call:
        grads = gradients(call(x).sum() / len(x), named_weights(model))
    return total([g.square().sum(dtype=torch.float64) for g in grads])
