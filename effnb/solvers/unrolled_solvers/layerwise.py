"""Layer-wise training of the LISTA family."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from effnb.solvers.unrolled_solvers._check import check_count, check_number
from effnb.solvers.unrolled_solvers.frame import Unrolled

Sampler = Callable[[int], tuple[Tensor, Tensor]]
STAGES = ((100, 1.0), (40, 0.2), (20, 0.02))  # steps and factor on lr; the papers' stages end by patience instead


def _groups(net: Unrolled, layer: int, first: int, lr: float, decay: float, readout: nn.Module | None) -> list[dict]:
    """Parameter groups of layers ``first..layer``; a shared parameter counts as the newest layer's."""
    seen: set[int] = set()
    groups = [{"params": list(readout.parameters()), "lr": lr}] if readout is not None else []
    for k in range(layer, first - 1, -1):
        fresh = [p for p in net.layer_parameters(k) if id(p) not in seen]
        seen.update(map(id, fresh))
        if fresh:
            groups.append({"params": fresh, "lr": lr * decay ** (layer - k)})
    return groups


def _loss(estimate: Tensor, target: Tensor, readout: nn.Module | None) -> Tensor:
    return ((estimate if readout is None else readout(estimate)) - target).square().sum(-1).mean()


class _Best:
    """Keeps the best validated parameters of a stage."""

    def __init__(self, groups: list[dict], measure: Callable[[], float] | None):
        self.params, self.measure = [p for g in groups for p in g["params"]], measure
        self.score, self.since = (measure() if measure else float("nan")), 0
        self.saved = [p.detach().clone() for p in self.params] if measure else None

    def update(self, steps: int) -> None:
        score = self.measure()
        if score < self.score:
            self.score, self.since = score, 0
            self.saved = [p.detach().clone() for p in self.params]
        else:
            self.since += steps

    @torch.no_grad()
    def restore(self) -> None:
        for p, old in zip(self.params, self.saved or [], strict=False):
            p.copy_(old)


def train_layerwise(
    net: Unrolled,
    sampler: Sampler,
    stages: Sequence[tuple[int, float]] = STAGES,
    *,
    lr: float = 5e-4,
    batch: int = 64,
    decay: float = 0.3,
    validation: tuple[Tensor, Tensor] | None = None,
    check_every: int = 10,
    patience: int | None = None,
    readout: nn.Module | None = None,
    warm_start: bool = True,
) -> list[float]:
    r"""Train the layers one after the other, each in stages, on :math:`\|x_{k+1}-x^*\|^2`.

    Stage 1 trains the newest layer alone, the others all layers up to it, with smaller steps (Adam). With a
    validation set the best state of a stage is kept, so that no stage makes the network worse on it.

    Args:
        net: one of the LISTA family.
        sampler: ``sampler(batch)`` returns fresh targets ``(batch, n)`` and measurements ``(batch, m)``.
        stages: steps and learning-rate factor of each stage.
        lr: learning rate; the official TensorFlow code uses 5e-4, the PyTorch code 0.1.
        batch: instances a step.
        decay: factor on the learning rate for each layer further back (stages 2 on).
        validation: targets and measurements on which states are compared.
        check_every: steps between two looks at the validation set.
        patience: end a stage after so many steps without improvement.
        readout: applied to the estimate before the loss and trained with it (targets then have its width).
        warm_start: start a layer from its predecessor.

    Returns:
        Loss of every layer after its stages: on the validation set, or on the last batch.

    Raises:
        TypeError: if ``net`` is not of the LISTA family.
        ValueError: for settings outside their ranges.

    Reference: chen2018theoretical

    >>> from effnb.solvers import ALISTA, SparseProblem
    >>> problem = SparseProblem(20, 40)
    >>> losses = train_layerwise(ALISTA(problem.A, layers=2), problem.sample, stages=[(20, 1.0)], lr=0.01)
    >>> losses[1] < losses[0]
    True
    """
    if not isinstance(net, Unrolled):
        raise TypeError(f"net must be of the LISTA family, got {type(net).__name__}")
    check_number(lr, "lr", 0, strict=True)
    check_number(decay, "decay", 0)
    check_count(batch, "batch")
    check_count(check_every, "check_every")
    return [
        _train_layer(net, k, sampler, stages, lr, batch, decay, validation, check_every, patience, readout, warm_start)
        for k in range(net.layers)
    ]


def _train_layer(net, k, sampler, stages, lr, batch, decay, validation, check_every, patience, readout, warm_start):
    """Run all stages of layer ``k``; return its loss."""
    if warm_start and k:
        net.warm_start(k)

    @torch.no_grad()
    def measure() -> float:
        target, b = validation
        return float(_loss(net(b, n_layers=k + 1), target, readout))

    final = float("nan")
    for index, (steps, factor) in enumerate(stages):
        first = k if index == 0 else 0
        groups = _groups(net, k, first, lr * factor, decay, readout)
        optimizer, best = torch.optim.Adam(groups), _Best(groups, measure if validation is not None else None)
        for step in range(steps):
            target, b = sampler(batch)
            loss = _loss(net.iterate(b, k + 1, first)[-1], target, readout)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            final = float(loss.detach())
            if validation is not None and ((step + 1) % check_every == 0 or step + 1 == steps):
                best.update(check_every)
                if patience is not None and best.since >= patience:
                    break
        best.restore()
        net.zero_grad(set_to_none=True)
        final = best.score if validation is not None else final
    return final
