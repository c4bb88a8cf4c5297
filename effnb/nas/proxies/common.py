"""What every proxy shares: a pure view of a network, checks of its batch, and its counted weights."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

LAYERS = (nn.Conv2d, nn.Linear)
Call = Callable[..., Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@contextlib.contextmanager
def pure(
    model: nn.Module, seed: int | None = 0, replaced: dict[str, Tensor] | None = None, train: bool = True
) -> Iterator[Call]:
    """Yield ``call(x)``, the model's logits, and leave no trace in the model or the global generators.

    Buffers are updated on copies, the mode is put back module by module (a frozen norm stays frozen), also after an
    exception. ``replaced`` stands in for parameters and buffers of these names.
    """
    check_model(model)
    tensors = {name: buffer.clone() for name, buffer in model.named_buffers()} | (replaced or {})
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        if seed is not None:
            # Not `torch.manual_seed`: it would also reseed devices that nobody forked.
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                generator.manual_seed(seed)
        try:
            model.train(train)
            yield lambda *x: logits(functional_call(model, tensors, x))
        finally:
            for module, mode in modes:
                module.training = mode


def logits(output: Any) -> Tensor:
    """Return the last entry of a tuple ``(features, logits)``, as NAS-Bench-201's own networks return it."""
    output = output[-1] if isinstance(output, tuple | list) and output else output
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return a tensor, or a tuple that ends in one, got {type(output).__name__}")
    return output


def check_model(model: nn.Module) -> None:
    """Raise TypeError unless ``model`` is a module of real numbers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_complex():
            raise TypeError(f"model must hold real numbers, {name} is {tensor.dtype}")


def read_images(batch: Any, least: int = 1) -> Tensor:
    """Return ``x`` of ``(x, y)``, or of ``x`` alone, with at least ``least`` finite real samples."""
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor) or x.ndim < 2:
        raise TypeError(f"batch must be a tensor (samples, ...) or a pair of such a tensor and labels, got {kind(x)}")
    if not x.is_floating_point():
        raise TypeError(f"batch must hold real floating-point inputs, got {x.dtype}")
    if len(x) < least:
        raise ValueError(f"batch must hold at least {least} sample{'s' * (least > 1)}, got {len(x)}")
    if not x.isfinite().all():
        raise ValueError("batch must hold finite inputs, got NaN or infinity")
    return x.detach()


def read_batch(batch: Any, least: int = 1) -> tuple[Tensor, Tensor]:
    """Return ``(x, y)`` with as many labels as samples."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(f"batch must be a pair (inputs, labels), got {kind(batch)}")
    x, y = read_images(batch, least), batch[1]
    if not isinstance(y, Tensor) or y.ndim < 1 or len(y) != len(x):
        raise ValueError(f"batch must hold one label a sample: {len(x)} samples, labels {kind(y)}")
    return x, y


def mean_loss(loss_fn: Loss, output: Tensor, y: Tensor) -> Tensor:
    """Return the loss of a batch; raise if a class label does not exist or the loss is no finite number."""
    if loss_fn is F.cross_entropy and not y.is_floating_point() and output.ndim > 1:
        classes, low, high = output.shape[1], int(y.min()), int(y.max())
        if low < 0 or high >= classes:
            raise ValueError(f"labels must be in 0..{classes - 1} for {classes} outputs, got {low}..{high}")
    loss = loss_fn(output, y)
    if loss.ndim or not loss.isfinite():
        got = loss.item() if not loss.ndim else f"shape {tuple(loss.shape)}"
        raise ValueError(f"loss_fn must return one finite number, got {got}")
    return loss


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolution and linear layers by name, each module once; their weights are parameters."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    return {name: module for name, module in found.items() if isinstance(module.weight, nn.Parameter)}


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable weights of convolution and linear layers by the layer's name, a tied weight once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, layer in layers(model).items():
        if layer.weight.requires_grad:
            found.setdefault(id(layer.weight), (name, layer.weight))
    if not found:
        raise ValueError("model must have a Conv2d or Linear weight that requires a gradient, it has none")
    return dict(found.values())


def gradients(output: Tensor | list[Tensor], inputs: list[Tensor], zeros: bool = True, **options: Any) -> list:
    """Return gradients; zeros, or else None, for inputs that ``output`` does not depend on."""
    outputs = [output] if isinstance(output, Tensor) else output
    if any(tensor.requires_grad for tensor in outputs):
        return list(torch.autograd.grad(outputs, inputs, allow_unused=True, materialize_grads=zeros, **options))
    return [torch.zeros_like(tensor) if zeros else None for tensor in inputs]


def total(values: list[Tensor]) -> float:
    """Return the sum of scalars, added in double precision."""
    return float(torch.stack([value.double() for value in values]).sum())


def kind(value: Any) -> str:
    """Return how an error message names a value: a tensor by its shape, anything else by its type."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
