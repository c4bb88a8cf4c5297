"""What a step is told and what it is taken over: hyper-parameters, gradients that it refuses, shards of other ranks."""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnb.common import check_choice, check_number

Tensors = list[Tensor]
Scalar = float | Tensor
Gamma = float | Tensor | None


class Rule(NamedTuple):
    """What a step is told, by the names that a parameter group has for it; ``norm=None`` is Delayed Adam."""

    lr: Scalar
    betas: tuple[float, float]
    eps: float
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    norm: str | None = "current"
    first_step: str = "skip"
    foreach: bool | None = None
    fused: bool | None = None
    maximize: bool = False
    capturable: bool = False
    differentiable: bool = False
    norm_scope: str = "group"

    def check(self) -> None:
        """Raise TypeError or ValueError for a hyper-parameter out of range or paths that exclude each other."""
        if isinstance(self.lr, Tensor) and self.lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor with one element, got {self.lr}")
        if not isinstance(self.lr, Tensor) or self.lr.is_cpu:  # elsewhere a look would wait for the device
            check_number("lr", self.lr, ge=0)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        check_number("eps", self.eps, gt=0)  # a coordinate that was never touched has the rate 1 / eps
        check_number("weight_decay", self.weight_decay, ge=0)
        check_choice("norm", self.norm, ("current", "lagged", None))
        check_choice("first_step", self.first_step, ("skip", "sgd"))
        check_choice("norm_scope", self.norm_scope, ("group", "all"))
        if self.norm_scope == "all" and self.norm != "current":
            raise ValueError(f"norm_scope='all' needs norm='current', got norm={self.norm!r}")
        if self.foreach and self.fused:
            raise ValueError("foreach and fused exclude each other, got foreach=True and fused=True")
        if self.differentiable and (self.foreach or self.fused):
            paths = f"foreach={self.foreach}, fused={self.fused}"
            raise ValueError(f"differentiable=True needs the single-tensor path, got {paths}")


def check_grads(grads: list[Tensor | None], owner: str, error_if_nonfinite: bool = False) -> None:
    """Refuse sparse gradients and, on request, non-finite ones, before anything is changed."""
    for i, grad in enumerate(grads):
        if grad is not None and grad.layout != torch.strided:
            raise NotImplementedError(f"{owner} does not support sparse gradients, got {grad.layout} at parameter {i}")
        if error_if_nonfinite and grad is not None and not _whole(torch.isfinite(grad).all()):
            raise ValueError(f"gradients must be finite (error_if_nonfinite=True), got nan or inf at parameter {i}")


def dtensor() -> Any:
    """The class of sharded tensors where somebody has imported it, else a type that nothing has."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, dtensor()) else value


class Scope(NamedTuple):
    """What a normaliser runs over: entries over all ranks, and how each tensor is laid out on them, if it is."""

    count: int
    shards: list[tuple[Any, tuple] | None]

    @classmethod
    def of(cls, params: Tensors) -> "Scope":
        """The scope of these parameters; a complex entry counts as two."""
        kind = dtensor()
        shards = [(p.device_mesh, p.placements) if isinstance(p, kind) else None for p in params]
        return cls(sum(p.numel() * (1 + p.is_complex()) for p in params), shards)

    def total(self, squares: Tensor) -> Tensor:
        """The sum of one number a tensor, over the ranks too: one reduction a layout."""
        if not any(self.shards):
            return squares.sum()
        from torch.distributed.tensor import DTensor, Partial, Replicate

        parts = []
        for layout in dict.fromkeys(self.shards):
            part = squares[[i for i, shard in enumerate(self.shards) if shard == layout]].sum()
            if layout is not None:
                mesh, placements = layout
                sums = [Partial() if place.is_shard() else Replicate() for place in placements]
                part = DTensor.from_local(part, mesh, sums, run_check=False).full_tensor()
            parts.append(part)
        return torch.stack(parts).sum()


def local(tensors: Tensors, params: Tensors) -> Tensors:
    """This rank's pieces, laid out as those of the parameters."""
    kind, found = dtensor(), []
    for tensor, p in zip(tensors, params, strict=True):
        if isinstance(tensor, kind):
            same = tensor.placements == p.placements
            tensor = (tensor if same else tensor.redistribute(placements=p.placements)).to_local()
        found.append(tensor)
    return found
