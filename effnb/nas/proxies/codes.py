"""Proxies that read which ReLUs are on: NASWOT and the number of linear regions."""

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .common import Loss, pure, read_images

RELUS = frozenset(
    {F.relu, F.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.prelu, torch.relu, torch.relu_, torch.prelu}
    | {Tensor.relu, Tensor.relu_}
)
EXACT = 1 << 24  # float32 counts exactly below this


class ReluWatch(TorchFunctionMode):
    """Calls ``seen(x)`` with the input of every ReLU, before an in-place one overwrites it.

    Modules, functions and methods are all caught, and a module that is used twice is seen twice.
    """

    def __init__(self, seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in RELUS:
            self.seen((args[0] if args else kwargs["input"]).detach())
        return func(*args, **kwargs)


class CodeKernel:
    """The kernel of NASWOT, summed over ReLUs: ``K[i, j]`` counts the units that are alike on samples i and j.

    With signs ``s = +-1`` the number of equal bits is ``(units + s s^T) / 2``: one matrix product a ReLU.
    """

    def __init__(self) -> None:
        self.units = 0
        self.products: Tensor | None = None
        self.last: tuple[Any, ...] = ()

    def add(self, x: Tensor) -> None:
        """Add the units of one ReLU with input ``x`` of shape ``(batch, ...)``."""
        product = self._product(x)
        self.products = product if self.products is None else self.products + product
        self.units += x[0].numel()

    def matrix(self) -> Tensor:
        """Return ``K``, in double precision; raise if no ReLU was seen."""
        if self.products is None:
            raise ValueError("model must use a ReLU, none was seen in its forward pass")
        return self.units / 2 + 2 * self.products

    def _product(self, x: Tensor) -> Tensor:
        halves = (x.flatten(1) > 0).float().sub_(0.5)
        return sum((part @ part.T).double() for part in halves.split(EXACT, dim=1))


def log_determinant(kernel: Tensor) -> float:
    """Return ``log|det K|``, ``-inf`` if ``K`` is singular to working precision."""
    values = torch.linalg.eigvalsh(kernel)
    if values[0] <= len(values) * torch.finfo(values.dtype).eps * values[-1]:
        return -float("inf")
    return float(torch.linalg.slogdet(kernel).logabsdet)


def naswot(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    call_kernel = CodeKernel()
    x = read_images(batch, 2)
    with pure(model, seed) as call, torch.no_grad(), ReluWatch(call_kernel.add):
        call(x)
    return log_determinant(call_kernel.matrix())


def linear_regions(model: nn.Module, batch: Any, *, loss_fn: Loss = F.cross_entropy, seed: int | None = 0) -> float:
    x = read_images(batch)
    group = np.zeros(len(x), np.int64)
    seen = False

    def refine(pre: Tensor) -> None:
        nonlocal group, seen
        seen = True
        bits = np.packbits((pre.flatten(1) > 0).cpu().numpy(), axis=1)
        rows = np.concatenate([group.view(np.uint8).reshape(len(group), -1), bits], axis=1)
        rows = np.ascontiguousarray(rows).view([("", f"V{rows.shape[1]}")]).ravel()
        group = np.unique(rows, return_inverse=True)[1].astype(np.int64)

    with pure(model, seed) as call, torch.no_grad(), ReluWatch(refine):
        call(x)
    if not seen:
        raise ValueError("model must use a ReLU, none was seen in its forward pass")
    return float(group.max() + 1)
