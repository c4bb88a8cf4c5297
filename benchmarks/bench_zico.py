"""ZiCo against the official procedure: statistics, whole score, memory, and the short skeleton.

The official code copies the gradients of every batch to NumPy, stacks them, and takes mean and deviation of the stack;
`OfficialMoments` restates it. Both sides see the same gradients, or the same network and batches.
"""

import importlib.util
import math
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnb.lab.measure import cost
from effnb.lab.measure.timing import paired_ratio
from effnb.models import mlp
from effnb.nas.nanobench import build_net
from effnb.nas.nb201 import build_cell_net
from effnb.nas.zico import GradientMoments, zico

Batch = tuple[Tensor, Tensor]


class OfficialMoments:
    """Every gradient copied to NumPy; mean, deviation and score from the stack."""

    def __init__(self) -> None:
        self.stacks: dict[str, list[np.ndarray]] = {}

    def update(self, grads: dict[str, Tensor]) -> None:
        for name, grad in grads.items():
            # A copy, as `.cpu()` makes one of a gradient on a GPU.
            self.stacks.setdefault(name, []).append(grad.reshape(-1).numpy().copy())

    def score(self) -> float:
        total = 0.0
        for stack in self.stacks.values():
            g = np.array(stack)
            std = np.std(g, axis=0)
            kept = np.nonzero(std)[0]
            value = np.sum(np.mean(np.abs(g), axis=0)[kept] / std[kept])
            total += math.log(value) if value else 0.0
        return total


def ours_of(sets: Sequence[dict[str, Tensor]]) -> float:
    """Score of given gradients by streaming moments."""
    moments = GradientMoments()
    for grads in sets:
        moments.update(grads)
    return math.fsum(math.log(total) for total in moments.sums("code").values())


def official_of(sets: Sequence[dict[str, Tensor]]) -> float:
    """Score of given gradients by stacks."""
    moments = OfficialMoments()
    for grads in sets:
        moments.update(grads)
    return moments.score()


def official_zico(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The whole procedure on a network in training mode."""
    moments = OfficialMoments()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        moments.update({name: layer.weight.grad for name, layer in layers.items()})
    return moments.score()


def gradient_sets(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    """Gradients of the size of a network's weights."""
    g = torch.Generator().manual_seed(0)
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return [{n: torch.randn(w.shape, generator=g) for n, w in weights.items()} for _ in range(count)]


def row(name: str, slow: Callable, fast: Callable, target: float | None, quick: bool, detail: str) -> dict:
    """Speed-up of ours over the official procedure."""
    ratio = paired_ratio(slow, fast, pairs=7, min_block=0.005 if quick else 0.1)
    names = {"ours": "streaming moments", "peer": "official procedure", "better": "higher", "unit": "x"}
    return names | {"name": name, "ratio": ratio, "target": target, "detail": detail}


def statistics_rows(model: nn.Module, name: str, quick: bool) -> list[dict]:
    """From given gradients to the score."""
    rows = []
    for count, target in ((2, 1.7), (8, 2.0)):
        sets = gradient_sets(model, count)
        assert math.isclose(ours_of(sets), official_of(sets), rel_tol=1e-5)
        label = f"statistics, N = {count}, {name}"
        slow, fast = (lambda s=sets: official_of(s)), (lambda s=sets: ours_of(s))
        rows.append(row(label, slow, fast, target, quick, "from gradients in memory to the score"))
    return rows


def images(shape: tuple[int, ...], count: int, classes: int = 10) -> list[Batch]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=g), torch.randint(classes, shape[:1], generator=g)) for _ in range(count)]


def whole_rows(model: nn.Module, shape: tuple[int, ...], name: str, targets: Sequence, quick: bool) -> list[dict]:
    """Passes and statistics on equal settings; the passes are the same on both sides and bound the gain."""
    rows = []
    for count, target in zip((2, 8), targets, strict=True):
        batches = images(shape, count)
        model.train()
        slow, fast = (lambda b=batches: official_zico(model, b)), (lambda b=batches: zico(model, b))
        assert math.isclose(slow(), fast(), rel_tol=1e-4)
        rows.append(row(f"whole score, N = {count}, {name}", slow, fast, target, quick, "equal settings"))
    return rows


def layout_row(model: nn.Module, shape: tuple[int, ...], name: str, quick: bool) -> dict:
    """What the chapter's script does: weights and batches in channels-last memory, which the official code does not."""
    batches = images(shape, 2)
    last = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    twin = build_cell_net("333333", 16, 1).to(memory_format=torch.channels_last)
    twin.load_state_dict(model.state_dict())
    label = f"whole score, N = 2, {name}, channels-last against the default layout"
    return row(label, lambda: official_zico(model, batches), lambda: zico(twin, last), None, quick, "memory layout")


def memory_rows(model: nn.Module, name: str) -> list[dict]:
    """Bytes that the statistics keep between batches, over those of the weights: the lower the better."""
    rows = []
    for count, target in ((2, 2.0), (8, 3.0)):
        sets = gradient_sets(model, count)
        size = sum(grad.nbytes for grad in sets[0].values())
        moments = GradientMoments()
        for grads in sets:
            moments.update(grads)
        kept = moments.nbytes() / size
        tracemalloc.start()
        official_of(sets)
        peer = tracemalloc.get_traced_memory()[1] / size
        tracemalloc.stop()
        base = {"ours": "streaming moments", "peer": "official procedure", "better": "lower", "unit": "x weights"}
        detail = f"official procedure: {peer:.1f}x (peak of NumPy's allocations); ours works in 1 MB more, at any size"
        rows.append(base | {"name": f"memory, N = {count}, {name}", "ratio": kept, "target": target, "detail": detail})
    return rows


def skeleton_rows(edges: str, batch: int, quick: bool) -> list[dict]:
    """One cell a stage, and nano-bench's network, against five cells a stage: what makes scoring cheap."""
    pair = images((batch, 3, 32, 32), 2), images((batch, 1, 14, 14), 2)
    full = build_cell_net(edges, 16, 5)
    flops = cost.count_flops(full, pair[0][0][0][:1]).total
    shorter = {"one cell a stage": (build_cell_net(edges, 16, 1), pair[0]), "nano-bench": (build_net(edges), pair[1])}
    rows = []
    for name, (net, batches) in shorter.items():
        slow, fast = (lambda: zico(full, pair[0])), (lambda net=net, batches=batches: zico(net, batches))
        times = flops / cost.count_flops(net, batches[0][0][:1]).total
        detail = f"forward FLOPs {times:.1f}x; what it costs in Spearman: chapter 08, section Cost"
        found = row(f"short skeleton, cell {edges}, {name}", slow, fast, 5, quick, detail)
        rows.append(found | {"ours": name, "peer": "five cells a stage"})
    return rows


def zoo_rows(quick: bool) -> list[dict]:
    """Rows of the other proxies, which have a file of their own beside this one."""
    path = Path(__file__).with_name("nas_zoo.py")
    if not path.is_file():
        return []
    spec = importlib.util.spec_from_file_location("nas_zoo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rows(quick)


def run(quick: bool = False) -> list[dict]:
    """All rows; ``quick`` takes small networks only."""
    if quick:
        net, small = build_cell_net("333333", 4, 1), mlp([196, 64, 10])
        rows = statistics_rows(net, "0.02 M weights", True) + memory_rows(net, "0.02 M weights")
        rows += whole_rows(small, (16, 1, 14, 14), "MLP of 0.01 M", (None, None), True)
        return [*rows, *skeleton_rows("130432", 2, True), *zoo_rows(True)]
    net, dense = build_cell_net("333333"), mlp([784, 1000, 1000, 10])
    rows = statistics_rows(net, "1.5 M weights in 98 layers", quick) + statistics_rows(
        dense, "1.8 M in 3 layers", quick
    )
    rows += memory_rows(net, "1.5 M weights")
    rows += whole_rows(dense, (64, 1, 28, 28), "MLP of 1.8 M, batch 64", (1.15, 2.0), quick)
    rows += whole_rows(net, (16, 3, 32, 32), "all-3x3 cells of 1.5 M, batch 16", (1.15, 2.0), quick)
    short = build_cell_net("333333", 16, 1)
    rows += [layout_row(short, (64, 3, 32, 32), "all-3x3 cells, one a stage, batch 64", quick)]
    for edges in ("333333", "130432"):
        rows += skeleton_rows(edges, 32, quick)
    return rows + zoo_rows(quick)
