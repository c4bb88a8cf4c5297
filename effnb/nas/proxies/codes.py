"""Proxies that read which ReLUs are on: NASWOT and the number of linear regions."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .common import Loss, pure, read_images

RELUS = frozenset(
    {F.relu, F.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.prelu, torch.relu, torch.relu_, torch.prelu}
    | {Tensor.relu, Tensor.relu_, Tensor.prelu}
)
EXACT = 2**24  # float32 counts halves exactly up to here


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
        if self.products is None:
            self.products = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
        self.products += self._product(x)
        self.units += x[0].numel()

    def matrix(self) -> Tensor:
        """Return ``K`` in double precision; raise if no ReLU was seen."""
        if self.products is None:
            raise ValueError("model must use a ReLU, none was seen in its forward pass")
        return self.units / 2 + 2 * self.products

    def _product(self, x: Tensor) -> Tensor:
        reference, version, product = self.known.get(id(x), (None, None, None))
        # The same object with the same contents; an id alone may have been given to a new tensor.
        if reference is None or reference() is not x or version != x._version:
            product = halves_product(x)
            self.known[id(x)] = weakref.ref(x), x._version, product
        return product


def halves_product(x: Tensor) -> Tensor:
    """Return ``h h^T`` without rounding, ``h = +1/2`` where ``x > 0`` and ``-1/2`` elsewhere."""
    halves = (x.flatten(1) > 0).float().sub_(0.5)
    if halves.shape[1] <= EXACT:
        return halves @ halves.T
    return sum((part @ part.T).double() for part in halves.split(EXACT, dim=1))


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

    Returns:
        The score.

    Raises:
        ValueError: fewer than two samples, inputs that are not finite, or a network without a ReLU.
        TypeError: complex numbers, or a batch of another kind.

    Reference: mellor2021naswot.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.eye(2))
    >>> round(naswot(model, torch.tensor([[1.0, 1.0], [1.0, -1.0]])), 4)  # K = [[2, 1], [1, 2]]
    1.0986
    """
    return log_determinant(code_kernel(model, batch, seed))


class RegionCount:
    """Groups samples by their ReLU codes, layer by layer, and keeps the group of each sample only."""

    def __init__(self, samples: int) -> None:
        self.group, self.seen = np.zeros(samples, np.int64), False

    def refine(self, x: Tensor) -> None:
        """Split groups by the code of one more ReLU with input ``x``."""
        bits = np.packbits((x.flatten(1) > 0).cpu().numpy(), axis=1)
        rows = np.concatenate([self.group.view(np.uint8).reshape(len(bits), -1), bits], axis=1)
        keys = rows.view(np.dtype((np.void, rows.shape[1]))).ravel()
        self.group, self.seen = np.unique(keys, return_inverse=True)[1].astype(np.int64), True


def linear_regions(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    """Return the number of different ReLU codes over the samples of a batch; higher is better.

    The original takes 1000 samples of 3 x 3 pixels, in train mode.

    Args:
        model: network with ReLUs; it stays as it was.
        batch: ``(x, y)`` or ``x`` alone.
        loss_fn: not used.
        seed: of what the network draws itself, such as dropout; ``None`` takes the global state.

    Returns:
        A whole number between 1 and the number of samples.

    Raises:
        ValueError: an empty batch, inputs that are not finite, or a network without a ReLU.
        TypeError: complex numbers, or a batch of another kind.

    Reference: chen2021tenas.

    >>> linear_regions(nn.ReLU(), torch.tensor([[1.0, 1.0], [2.0, 2.0], [1.0, -1.0]]))
    2.0
    """
    x = read_images(batch)
    count = RegionCount(len(x))
    with pure(model, seed) as call, torch.no_grad(), ReluWatch(count.refine):
        call(x)
    if not count.seen:
        raise ValueError("model must use a ReLU, none was seen in its forward pass")
    return float(count.group.max() + 1)
