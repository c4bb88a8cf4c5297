"""What every proxy begins with: a network viewed without a trace, its batches checked, its counted weights."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from effnb.common import kind, mode_restored

LAYERS = (nn.Conv2d, nn.Linear)
Batch = tuple[Tensor, Tensor]
Call = Callable[..., Any]
Loss = Callable[[Tensor, Tensor], Tensor]


@contextlib.contextmanager
def pure(
    model: nn.Module,
    seed: int | None = 0,
    replaced: dict[str, Tensor] | None = None,
    train: bool = True,
    strict: bool = True,
) -> Iterator[Call]:
    """Yield ``call(x)``, the model's logits, and leave no trace in the model or the global generators.

    Buffers are updated on copies, modes are put back module by module, also after an exception. ``seed`` rules what the
    network draws itself, such as dropout; None takes the global state. Tensors ``replaced`` stand in for parameters and
    buffers of these names; of a shared one, one name is enough. Not ``strict`` lets logits be no tensor.
    """
    parameters, buffers = check_model(model)
    # Norms in train mode write to their buffers: let them write to copies.
    tensors = dict(replaced or {})
    tensors |= {name: buffer.clone() for name, buffer in buffers.items() if name not in tensors}
    devices = sorted({p.device.index for p in parameters.values() if p.device.type == "cuda"})

    def call(*x: Tensor) -> Any:
        output = functional_call(model, tensors, x)
        # NAS-Bench-201's own networks return (features, logits).
        output = output[-1] if isinstance(output, tuple | list) and output else output
        if strict and not isinstance(output, Tensor):
            raise TypeError(f"model must return a tensor, or a tuple that ends in one, got {type(output).__name__}")
        return output

    # Gradients are needed also where the caller has switched them off.
    with torch.random.fork_rng(devices), torch.enable_grad(), mode_restored(model, train):
        if seed is not None:
            # Not `torch.manual_seed`: it would also reseed devices that nobody forked.
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                generator.manual_seed(seed)
        yield call


def check_model(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Return the parameters and the buffers by name; raise TypeError unless ``model`` is a module of real numbers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, tensor in (parameters | buffers).items():
        if tensor.is_complex():
            raise TypeError(f"model must hold real numbers, {name} is {tensor.dtype}")
    return parameters, buffers


def check_batches(batches: Iterable[Batch]) -> list[Batch]:
    """Return the batches as a list of two or more pairs of tensors that are not empty; inputs may be of any type."""
    batches = list(batches)
    if len(batches) < 2:
        raise ValueError(f"batches must hold at least 2 batches for a standard deviation, got {len(batches)}")
    for i, batch in enumerate(batches):
        if len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
            raise TypeError(f"batches must be pairs of tensors (x, y), got {type(batch).__name__} as number {i}")
        if not len(batch[0]) or len(batch[0]) != len(batch[1]):
            sizes = [len(part) for part in batch]
            raise ValueError(f"batches must have as many targets as inputs, at least one, got {sizes} in number {i}")
    return batches


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


def read_batch(batch: Any, least: int = 1) -> Batch:
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
    if loss.numel() != 1 or not loss.isfinite():
        got = loss.item() if loss.numel() == 1 else f"shape {tuple(loss.shape)}"
        raise ValueError(f"loss_fn must return one finite number, got {got}")
    return loss


def find_layers(model: nn.Module, kinds: tuple[type[nn.Module], ...] = LAYERS) -> dict[str, nn.Module]:
    """Return the layers of these kinds by name, each module once, whose weight is a parameter; raise if none is."""
    check_model(model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    found = {name: module for name, module in found.items() if isinstance(module.weight, nn.Parameter)}
    if not found:
        raise ValueError(f"model must have a layer of {', '.join(k.__name__ for k in kinds)}, it has none")
    return found


def free_weights(model: nn.Module, kinds: tuple[type[nn.Module], ...] = LAYERS) -> dict[str, nn.Parameter]:
    """Return the trained weights of these layers by the layer's name; a shared one once for each of its layers."""
    found = {name: layer.weight for name, layer in find_layers(model, kinds).items() if layer.weight.requires_grad}
    if not found:
        raise ValueError("model must have a counted weight that requires a gradient, it has none but frozen ones")
    return found
