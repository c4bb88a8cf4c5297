"""The Zen-score: how far a small step of the input moves the last feature map of a network of Gaussian weights."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .common import LAYERS, Call, Loss, check_model, pure, read_images

STEP = 0.01


def zen_score(
    model: nn.Module,
    batch: Any,
    *,
    variance: str = "running",
    repeats: int = 1,
    loss_fn: Loss = F.cross_entropy,
    seed: int | None = 0,
) -> float:
    r"""Return the Zen-score; higher is better.

    :math:`\log \operatorname{mean}_n \sum_{chw} |f(x) - f(x + 0.01 x')| + \sum_{\text{norms}} \log
    \sqrt{\operatorname{mean} \sigma^2}`, with f the last feature map before it is pooled or flattened, x and x'
    standard Gaussian images of the batch's shape, convolution and linear weights standard Gaussian (not scaled by
    fan-in), biases 0 and norms new. Without batch norms there is no second term.

    The official :math:`\sigma^2` is the running variance after the two passes, :math:`0.81 + 0.09 v + 0.1 v'` for
    batch variances v, v' and the default momentum, and goes on from there in the next repeat; here every repeat
    begins anew.

    Args:
        model: network of images; it stays as it was.
        batch: ``(x, y)`` or ``x`` alone, of which only the shape is used.
        variance: ``"running"`` as the official code, or ``"batch"`` for the variance of the batch x.
        repeats: draws to average over, >= 1 (official 32, the survey 1).
        loss_fn: not used.
        seed: of weights and images, as after ``torch.manual_seed(seed)``; ``None`` takes the global seed.

    Returns:
        The score; ``-inf`` for a network whose feature map does not depend on the input.

    Raises:
        ValueError: no 4-D feature map, an unknown ``variance``, ``repeats < 1``, or an empty batch.
        TypeError: complex numbers, or a batch of another kind.

    Reference: lin2021zen.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> zen_score(model, torch.zeros(2, 1, 8, 8)) == zen_score(model, torch.ones(2, 1, 8, 8))
    True
    """
    if variance not in ("running", "batch"):
        raise ValueError(f"variance must be 'running' or 'batch', got {variance!r}")
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    check_model(model)
    x = read_images(batch)
    generator = Generator(x.device).manual_seed(torch.initial_seed() if seed is None else seed)
    return math.fsum(one_draw(model, x, variance, generator, seed) for _ in range(repeats)) / repeats


def one_draw(model: nn.Module, like: Tensor, variance: str, generator: Generator, seed: int | None) -> float:
    """Return the score of one draw of weights and images."""
    state = gaussian_state(model, generator)
    draw = {"generator": generator, "device": like.device, "dtype": like.dtype}
    x, direction = torch.randn(like.shape, **draw), torch.randn(like.shape, **draw)
    with pure(model, seed, state) as call, torch.no_grad():
        with batch_variances(model) as measured:
            before = feature_map(call, x)
        after = feature_map(call, x + STEP * direction)
    distance = (before - after).abs().sum((1, 2, 3)).mean()
    running = [value for name, value in state.items() if name.split(".")[-1] == "running_var"]
    scales = [value.mean().log() / 2 for value in (running if variance == "running" else measured)]
    return float(distance.log() + sum(scales))


def gaussian_state(model: nn.Module, generator: Generator) -> dict[str, Tensor]:
    """Return the official initialisation by name: Gaussian layers, new norms; drawn in the order of the modules."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {}

    def put(parameter: Tensor | None, value: float | None) -> None:
        if parameter is not None:
            fresh = torch.empty_like(parameter, requires_grad=False)
            state[names[id(parameter)]] = fresh.normal_(generator=generator) if value is None else fresh.fill_(value)

    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            put(module.weight, None)
            put(module.bias, 0.0)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            put(module.weight, 1.0)
            put(module.bias, 0.0)
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            prefix = f"{name}." if name else ""
            state[f"{prefix}running_mean"] = torch.zeros_like(module.running_mean)
            state[f"{prefix}running_var"] = torch.ones_like(module.running_var)
    return state


@contextlib.contextmanager
def batch_variances(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the variance of each channel at the input of each batch norm, unbiased as in the running variance."""
    found: list[Tensor] = []
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [m.register_forward_pre_hook(lambda _, args: found.append(args[0].var((0, 2, 3)))) for m in norms]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class MapWatch(TorchFunctionMode):
    """Remembers the last feature map ``(batch, channels, h, w)`` that was pooled to one place, flattened or reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.map: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        source = next((arg for arg in args if isinstance(arg, Tensor)), None)
        # Asked before the call: an in-place call may change the source.
        spread = source is not None and source.ndim == 4 and source.shape[2] * source.shape[3] > 1
        out = func(*args, **(kwargs or {}))
        if spread and isinstance(out, Tensor) and (out.ndim < 4 or out.shape[2] * out.shape[3] == 1):
            self.map = source
        return out


def feature_map(call: Call, x: Tensor) -> Tensor:
    """Return the last feature map of a forward pass; raise if there is none."""
    with MapWatch() as watch:
        output = call(x)
    found = output if watch.map is None else watch.map
    if found.ndim != 4:
        raise ValueError(f"model must make a feature map (batch, channels, h, w), its output is {tuple(found.shape)}")
    return found
