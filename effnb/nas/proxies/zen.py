"""The Zen-score: how far a small step of the input moves the last feature map of a network of Gaussian weights."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .common import LAYERS, Loss, pure, read_images

STEP = 0.01


class MapWatch(TorchFunctionMode):
    """Remembers the last feature map ``(batch, channels, h, w)`` that was pooled or flattened, or else returned."""

    def __init__(self) -> None:
        super().__init__()
        self.map: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        source = next((a for a in args if isinstance(a, Tensor)), None)
        is_map = source is not None and source.ndim == 4
        out = func(*args, **(kwargs or {}))
        if is_map and isinstance(out, Tensor) and _area(source) > 1 and (out.ndim < 4 or _area(out) == 1):
            self.map = source
        return out


def _area(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def zen_score(
    model: nn.Module,
    batch: Any,
    *,
    variance: str = "running",
    repeats: int = 1,
    loss_fn: Loss = F.cross_entropy,
    seed: int | None = 0,
) -> float:
    if variance not in ("running", "batch"):
        raise ValueError(f"variance must be 'running' or 'batch', got {variance!r}")
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    x = read_images(batch)
    generator = Generator(x.device)
    generator.manual_seed(torch.initial_seed() if seed is None else seed)
    return math.fsum(one_zen(model, x, variance, generator) for _ in range(repeats)) / repeats


def one_zen(model, x, variance, generator):
    state = gaussian_state(model, generator)
    first, second = (torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype) for _ in range(2))
    with pure(model, 0, state) as call, torch.no_grad():
        with batch_variances(model) as measured:
            before = feature_map(call, first)
        after = feature_map(call, first + STEP * second)
    distance = (before - after).abs().sum((1, 2, 3)).mean()
    names = {id(m): name for name, m in model.named_modules()}
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    del names
    values = []
    for name, m in norms:
        if variance == "batch":
            values += measured.get(name, [])
        elif m.track_running_stats and m.running_var is not None:
            values.append(state[f"{name}.running_var".lstrip(".")])
    logs = [0.5 * v.mean().log() for v in values]
    return float(distance.log() + sum(logs))


def feature_map(call, x):
    with MapWatch() as watch:
        out = call(x)
    found = watch.map if watch.map is not None else out
    if found.ndim != 4:
        raise ValueError(f"model must make a feature map (batch, channels, h, w), got an output of {tuple(found.shape)}")
    return found


def gaussian_state(model: nn.Module, generator: Generator) -> dict[str, Tensor]:
    state = {}
    for name, m in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(m, LAYERS):
            state[prefix + "weight"] = torch.empty_like(m.weight, requires_grad=False).normal_(generator=generator)
            if m.bias is not None:
                state[prefix + "bias"] = torch.zeros_like(m.bias)
        elif isinstance(m, nn.BatchNorm2d | nn.GroupNorm):
            if m.weight is not None:
                state[prefix + "weight"], state[prefix + "bias"] = torch.ones_like(m.weight), torch.zeros_like(m.bias)
            if getattr(m, "running_var", None) is not None:
                state[prefix + "running_mean"] = torch.zeros_like(m.running_mean)
                state[prefix + "running_var"] = torch.ones_like(m.running_var)
    return state


@contextlib.contextmanager
def batch_variances(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    found: dict[str, list[Tensor]] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(name, []).append(args[0].var((0, 2, 3))))
        for name, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
