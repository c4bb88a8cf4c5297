"""Proxies that watch forward passes: NASWOT and linear regions by which ReLUs are on, Zen-score by the last map."""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from effnb.common import check_choice, check_count
from effnb.nas.zico.passes import LAYERS, Call, Loss, check_model, pure, read_images

RELUS = frozenset(
    {F.relu, F.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.prelu, torch.relu, torch.relu_, torch.prelu}
    | {Tensor.relu, Tensor.relu_, Tensor.prelu}
)
EXACT = 2**24  # float32 counts halves exactly up to here
STEP = 0.01


@contextlib.contextmanager
def watched(modules: Iterable[nn.Module], hook: Callable[..., None], before: bool = False) -> Iterator[None]:
    """Call ``hook`` after, or with ``before`` ahead of, every forward of these modules."""
    handles = [m.register_forward_pre_hook(hook) if before else m.register_forward_hook(hook) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ReluWatch(TorchFunctionMode):
    """Calls ``seen(x)`` with the input of every ReLU, before an in-place one overwrites it.

    Modules, functions and methods are all caught, and a module that is used twice is seen twice.
    """

    def __init__(self, seen: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in RELUS:
            self.seen(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


class CodeKernel:
    """The kernel of NASWOT, summed over ReLUs: ``K[i, j]`` counts the units that are alike on samples i and j.

    With ``h = +-1/2`` for on and off, the number of equal units is ``units / 2 + 2 h h^T``: one matrix product a ReLU
    in the place of two. A tensor that feeds several ReLUs, as the edges of a cell, is multiplied once.
    """

    def __init__(self) -> None:
        self.units = 0
        self.products: Tensor | None = None
        self.known: dict[int, tuple[weakref.ref, int, Tensor]] = {}

    def add(self, x: Tensor) -> None:
        """Add the units of one ReLU with input ``x`` of shape ``(batch, ...)``."""
        reference, version, product = self.known.get(id(x), (None, None, None))
        # The same object with the same contents; an id alone may have been given to a new tensor.
        if reference is None or reference() is not x or version != x._version:
            halves = (x.flatten(1) > 0).float().sub_(0.5)
            narrow = halves.shape[1] <= EXACT
            product = halves @ halves.T if narrow else sum((p @ p.T).double() for p in halves.split(EXACT, dim=1))
            self.known[id(x)] = weakref.ref(x), x._version, product
        self.products = product.double() if self.products is None else self.products + product
        self.units += x[0].numel()

    def matrix(self) -> Tensor:
        """Return ``K`` in double precision; raise if no ReLU was seen."""
        if self.products is None:
            raise ValueError("model must use a ReLU, none was seen in its forward pass")
        return self.units / 2 + 2 * self.products


def log_determinant(kernel: Tensor) -> float:
    """Return ``log|det K|`` of a symmetric ``K``; ``-inf`` if it is singular to working precision."""
    values = torch.linalg.eigvalsh(kernel)
    if values[0] <= len(values) * torch.finfo(values.dtype).eps * values[-1]:
        return -float("inf")
    return float(torch.linalg.slogdet(kernel).logabsdet)


def code_kernel(model: nn.Module, batch: Any, seed: int | None = 0) -> Tensor:
    """Return the kernel ``K`` of `naswot`, ``(batch, batch)`` in double precision."""
    kernel, x = CodeKernel(), read_images(batch, 2)
    with pure(model, seed) as call, torch.no_grad(), ReluWatch(kernel.add):
        call(x)
    return kernel.matrix()


def naswot(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    r"""Return NASWOT, :math:`\log |\det K|` of the kernel of binary ReLU codes; higher is better.

    :math:`K = \sum c c^\top + (1-c)(1-c)^\top` over all ReLUs, with the row :math:`c_i` of sample i one where the
    input of the ReLU is positive: :math:`K_{ij}` is the number of units minus the Hamming distance of two samples. One
    forward pass in train mode. Every ReLU that is computed counts, be it a module, a function or a method, leaky or
    clipped too; the official code leaves out those that no gradient reaches. ``-inf`` if K is singular, as with two
    equal samples.

    Args:
        model: network with ReLUs; it stays as it was.
        batch: ``(x, y)`` or ``x`` alone, two samples or more.
        loss_fn: not used.
        seed: of what the network draws itself, such as dropout; ``None`` takes the global state.

    Raises:
        ValueError: too few samples, inputs that are not finite, or a network without a ReLU.
        TypeError: complex numbers, or a batch of another kind.

    Reference: mellor2021naswot.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> _ = nn.init.eye_(model[0].weight)
    >>> round(naswot(model, torch.tensor([[1.0, 1.0], [1.0, -1.0]])), 4)  # K = [[2, 1], [1, 2]]
    1.0986
    """
    return log_determinant(code_kernel(model, batch, seed))


def linear_regions(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    """Return the number of different ReLU codes over the samples of a batch; higher is better.

    The original takes 1000 samples of 3 x 3 pixels, in train mode.

    Args:
        model, loss_fn, seed: as for `naswot`.
        batch: ``(x, y)`` or ``x`` alone.

    Raises:
        ValueError, TypeError: as `naswot`; one sample is enough.

    Reference: chen2021tenas.

    >>> linear_regions(nn.ReLU(), torch.tensor([[1.0, 1.0], [2.0, 2.0], [1.0, -1.0]]))
    2.0
    """
    x = read_images(batch)
    group, seen = np.zeros(len(x), np.int64), False

    def refine(x: Tensor) -> None:
        # Only the group of each sample is kept, not its codes: they are as many as all activations together.
        nonlocal group, seen
        bits = np.packbits((x.flatten(1) > 0).cpu().numpy(), axis=1)
        rows = np.concatenate([group.view(np.uint8).reshape(len(bits), -1), bits], axis=1)
        keys = rows.view(np.dtype((np.void, rows.shape[1]))).ravel()
        group, seen = np.unique(keys, return_inverse=True)[1].astype(np.int64), True

    with pure(model, seed) as call, torch.no_grad(), ReluWatch(refine):
        call(x)
    if not seen:
        raise ValueError("model must use a ReLU, none was seen in its forward pass")
    return float(group.max() + 1)


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
        model, loss_fn: as for `naswot`.
        batch: ``(x, y)`` or ``x`` alone, of which only the shape is used.
        variance: ``"running"`` as the official code, or ``"batch"`` for the variance of the batch x.
        repeats: draws to average over, >= 1 (official 32, the survey 1).
        seed: of weights and images, as after ``torch.manual_seed(seed)``; ``None`` takes the global seed.

    Returns:
        The score; ``-inf`` for a network whose feature map does not depend on the input.

    Raises:
        ValueError: no 4-D feature map, an unknown ``variance``, ``repeats < 1``, or an empty batch.
        TypeError: as `naswot`.

    Reference: lin2021zen.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> zen_score(model, torch.zeros(2, 1, 8, 8)) == zen_score(model, torch.ones(2, 1, 8, 8))
    True
    """
    check_choice("variance", variance, ("running", "batch"))
    check_count("repeats", repeats)
    parameters, buffers = check_model(model)
    names = {id(tensor): name for name, tensor in (parameters | buffers).items()}
    like = read_images(batch)
    generator = Generator(like.device).manual_seed(torch.initial_seed() if seed is None else seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    measured, scores = [], []

    def measure(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        measured.append(args[0].var((0, 2, 3)))  # unbiased, as in the running variance

    for _ in range(repeats):
        state = {}
        for module in model.modules():
            norm = isinstance(module, nn.BatchNorm2d | nn.GroupNorm)
            if norm or isinstance(module, LAYERS):
                statistics = getattr(module, "running_mean", None), getattr(module, "running_var", None)
                for tensor, value in zip((module.weight, module.bias, *statistics), (1.0, 0.0, 0.0, 1.0), strict=True):
                    if tensor is not None:
                        state[names[id(tensor)]] = torch.full_like(tensor, value, requires_grad=False)
                if not norm:
                    state[names[id(module.weight)]].normal_(generator=generator)
        draw = {"generator": generator, "device": like.device, "dtype": like.dtype}
        x, direction = torch.randn(like.shape, **draw), torch.randn(like.shape, **draw)
        measured.clear()
        with pure(model, seed, state) as call, torch.no_grad():
            with watched(norms, measure, before=True):
                before = feature_map(call, x)
            after = feature_map(call, x + STEP * direction)
        # The norms have updated their running variance in `state`, in place.
        running = [value for name, value in state.items() if name.split(".")[-1] == "running_var"]
        scales = [value.mean().log() / 2 for value in (running if variance == "running" else measured)]
        scores.append(float((before - after).abs().sum((1, 2, 3)).mean().log() + sum(scales)))
    return math.fsum(scores) / repeats


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
