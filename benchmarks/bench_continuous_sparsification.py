"""Continuous sparsification against what a user would otherwise pick: official layer, plain training, dense files."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from effnb import compress as cs
from effnb.lab.measure import cost, timing
from effnb.models import SmallCNN, mlp

SIZES = [784, 300, 100, 10]


class OfficialGate(nn.Module):
    """The published layer's expression as a parametrisation: scaled mask kept alive for the penalty's sum."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.scores, self.beta = nn.Parameter(torch.zeros(shape)), 1.0

    def forward(self, w: Tensor) -> Tensor:
        self.mask = 2.0 * torch.sigmoid(self.beta * self.scores)
        return w * self.mask


def official(model: nn.Module) -> list[OfficialGate]:
    """Put the official expression on every convolution and linear layer."""
    gates = []
    for layer in list(cs.select_layers(model).values()):
        gates.append(OfficialGate(layer.weight.shape))
        parametrize.register_parametrization(layer, "weight", gates[-1])
    return gates


def training_step(model: nn.Module, x: Tensor, groups: list, penalty: Callable[[], Tensor | float] = float) -> Callable:
    """A function that does one optimiser step on a fixed batch."""
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, nesterov=True)
    y = torch.arange(len(x)) % 10

    def step() -> None:
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + penalty()).backward()
        optimizer.step()

    return step


def gate_pair() -> tuple[Callable, Callable]:
    """Gate and penalty, forward and backward, on a 784 x 300 weight: official expression and fused node."""
    g = torch.Generator().manual_seed(0)
    w, s = (torch.randn(300, 784, generator=g).mul_(0.1).requires_grad_() for _ in range(2))
    upstream = torch.randn(300, 784, generator=g)

    def naive() -> None:
        mask = 2.0 * torch.sigmoid(3.0 * s)
        torch.autograd.grad([w * mask, 1e-4 * mask.sum()], [w, s], [upstream, torch.ones(())])

    def fused() -> None:
        torch.autograd.grad(cs.soft_gate(w, s, 3.0, 0.0, 1e-4), [w, s], upstream)

    return naive, fused


def steps_of(make: Callable[[], nn.Module], x: Tensor) -> dict[str, Callable]:
    """Training steps of the plain network, of ours and of the official expression on it."""
    plain, ours, theirs = make(), make(), make()
    handle, gates = cs.apply_cs(ours, lam=1e-5), official(theirs)
    return {
        "plain": training_step(plain, x, [{"params": plain.parameters()}]),
        "ours": training_step(ours, x, handle.param_groups(1e-3)),
        "official": training_step(
            theirs, x, [{"params": theirs.parameters()}], lambda: 1e-5 * sum(gate.mask.sum() for gate in gates)
        ),
    }


def masked_steps(x: Tensor) -> tuple[Callable, Callable]:
    """Training under a fixed 5 % mask: torch.nn.utils.prune and ours."""
    theirs, ours = mlp(SIZES), mlp(SIZES)
    masks = cs.global_magnitude_mask(ours, 0.95)
    for name, mask in masks.items():
        prune.custom_from_mask(theirs.get_submodule(name), "weight", mask)
    cs.apply_masks(ours, masks)
    return tuple(training_step(m, x, [{"params": m.parameters()}]) for m in (theirs, ours))


def inference_pair(density: float, sizes: list[int]) -> tuple[Callable, Callable]:
    """One image through a network (or a single layer): dense and CSR."""
    dense = mlp(sizes, torch.Generator().manual_seed(0))
    dense = cs.apply_masks(dense, cs.global_magnitude_mask(dense, 1 - density)).finalize().eval()
    sparse, x = cs.sparsify_linears(copy.deepcopy(dense)), torch.rand(1, 784)

    def call(model: nn.Module) -> Callable:
        def forward() -> None:
            with torch.inference_mode():
                model(x)

        return forward

    return call(dense), call(sparse)


def sizes_on_disk(density: float) -> tuple[int, int]:
    """Bytes of the network: dense by torch.save, and ours at a density."""
    model = mlp(SIZES, torch.Generator().manual_seed(0))
    dense = cost.stored_bytes(model)
    cs.apply_masks(model, cs.global_magnitude_mask(model, 1 - density)).finalize()
    with tempfile.TemporaryDirectory() as folder:
        return dense, cs.save_sparse(model, Path(folder) / "net.cs")


def saved_bytes(fused: bool) -> int:
    """Bytes that autograd keeps for gate and penalty of a 784 x 300 weight (parameters left out)."""
    gate = cs.ContinuousGate((300, 784), lam=1e-4) if fused else OfficialGate(torch.Size((300, 784)))
    w = nn.Parameter(torch.randn(300, 784))
    return cost.saved_activation_bytes(lambda: gate(w) if fused else (gate(w), 1e-4 * gate.mask.sum())[0])


def row(name: str, ours: str, peer: str, ratio, target: float | None, detail: str, better: str = "higher") -> dict:
    """One line of the performance page."""
    fields = {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "target": target}
    return fields | {"better": better, "unit": "x", "detail": detail}


def run(quick: bool = False) -> list[dict]:
    """All rows; ``quick`` takes fewer and shorter blocks."""
    torch.set_num_threads(1)
    options = {"pairs": 7, "min_block": 0.01} if quick else {"pairs": 15, "min_block": 0.1}
    images = torch.rand(128, 1, 28, 28)
    dense, conv = steps_of(lambda: mlp(SIZES), images), steps_of(SmallCNN, images)

    def ratio(f: Callable, g: Callable) -> timing.Ratio:
        return timing.paired_ratio(f, g, **options)

    rows = [
        row("gate, forward and backward", "fused node", "official expression", ratio(*gate_pair()), 1.4, "784 x 300"),
        row(
            "training step, MLP", "with gates", "plain", ratio(dense["ours"], dense["plain"]), 1.5,
            "784-300-100-10, batch 128: time with gates over time without", "lower",
        ),
        row(
            "training step, conv net", "with gates", "plain", ratio(conv["ours"], conv["plain"]), 1.08,
            "3x3 convolutions 16-32-64 on 28 x 28, batch 128: time with gates over time without", "lower",
        ),
        row(
            "training step, MLP, either gate", "fused node", "official expression",
            ratio(dense["official"], dense["ours"]), None, "784-300-100-10, batch 128, penalty included",
        ),
        row("step under a fixed mask", "apply_masks", "torch.nn.utils.prune", ratio(*masked_steps(images)), None, ""),
    ]  # fmt: skip
    for density in (0.05, 0.01):
        for sizes, target in (([784, 300], 1.0), (SIZES, None)):
            found, shape = ratio(*inference_pair(density, sizes)), "-".join(map(str, sizes))
            name = f"one image, {shape}, {100 * density:g} % kept"
            rows.append(row(name, "CSR layers", "dense layers", found, target, "batch of one"))
    for density in (0.05, 0.01):
        full, small = sizes_on_disk(density)
        rows.append(
            row(f"file, {100 * density:g} % kept", "save_sparse", "torch.save", full / small, None, f"{small} bytes")
        )
    kept = saved_bytes(fused=True), saved_bytes(fused=False)
    detail = f"{kept[0]} bytes for a 784 x 300 weight: one tensor of its size"
    rows.append(row("memory kept for backward", "fused node", "official expression", kept[1] / kept[0], None, detail))
    return rows
