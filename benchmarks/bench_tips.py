"""The chain, the important path and the stacked forward pass against the ways one would otherwise take."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnb.anytime import (
    AnytimeTrainer,
    DagMLP,
    JointSampler,
    SandwichSampler,
    SuperGraph,
    UniformSampler,
    hyper_adjacency,
    layered_graph,
    most_important_path,
    stationary_distribution,
    topological_scores,
    transition_matrix,
)
from effnb.lab.measure.timing import measure, paired_ratio


class LoopSupernet(nn.Module):
    """The obvious supernet: one ``nn.Linear`` an operation, subnetworks and active operations one after the other."""

    def __init__(self, net: DagMLP) -> None:
        super().__init__()
        self.graph, self.layers = net.graph, nn.ModuleList()
        of_edge = {e: ops.weight[0, k].detach() for ops in net.groups for k, e in enumerate(ops.edges)}
        for _, both in sorted(of_edge.items()):
            self.layers.append(nn.Linear(len(both) - 1, both.shape[1]))
            self.layers[-1].load_state_dict({"weight": both[:-1].T, "bias": both[-1]})

    def forward(self, x: Tensor, masks: list[list[bool]]) -> Tensor:
        return torch.stack([self.one(x, mask) for mask in masks])

    def one(self, x: Tensor, mask: list[bool]) -> Tensor:
        terms: dict[int, list[Tensor]] = {}
        values = {0: x}
        for (i, j), layer, active in zip(self.graph.edges, self.layers, mask, strict=True):
            if not active:
                continue
            if i not in values:  # edges are sorted by source: all its operations are done
                mean = torch.stack(terms[i]).mean(0)
                values[i] = F.relu(F.layer_norm(mean, mean.shape[-1:]))
            terms.setdefault(j, []).append(layer(values[i]))
        return torch.stack(terms[self.graph.n - 1]).mean(0)


def enumerate_best(graph: SuperGraph, tas: np.ndarray) -> tuple[float, list[int]]:
    """The path of highest score by visiting all of them, with running sums."""
    following = [[j for i, j in graph.edges if i == v] for v in range(graph.n)]
    scores, best = tas.tolist(), (-1.0, [])
    stack = [(scores[0], [0])]
    while stack:
        score, path = stack.pop()
        if path[-1] == graph.n - 1:
            best = max(best, (score, path))
            continue
        stack.extend((score + scores[j], [*path, j]) for j in following[path[-1]])
    return best


def row(name: str, ours: str, peer: str, ratio, target: float | None, detail: str, unit="x", better="higher") -> dict:
    fields = {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "target": target}
    return fields | {"better": better, "unit": unit, "detail": detail}


def chain_rows(quick: bool, block: float) -> list[dict]:
    """Scores of 8 subnetworks with 200 nodes: 18 layers of 11."""
    layers, width = (4, 5) if quick else (18, 11)
    adjs = [layered_graph(layers, width, 0.6, rng=k).adjacency for k in range(8)]
    n, states = len(adjs[0]), 8 * len(adjs[0])

    def ours() -> np.ndarray:
        return topological_scores(adjs).tas

    def lazy() -> np.ndarray:
        return stationary_distribution(transition_matrix(*hyper_adjacency(adjs, 1.0)), "lazy", tol=1e-12)

    P = transition_matrix(*hyper_adjacency(adjs, 1.0))
    assert abs(stationary_distribution(P, "lazy", tol=1e-12) @ P - stationary_distribution(P)).max() < 1e-9
    size = f"n = {n}, T = 8, {states} states, float64"
    dense = [np.triu(np.random.default_rng(k).random((n, n)) < 0.6, 1) | np.eye(n, k=1, dtype=bool) for k in range(8)]
    worst = measure(lambda: topological_scores(dense), block)
    worst = row("chain, almost complete graphs, seconds", "sparse LU", "-", worst, 0.5, size, "s", "lower")
    seconds = row("chain, seconds", "sparse LU", "-", measure(ours, block), 0.5, size, "s", "lower")
    against = paired_ratio(lazy, ours, min_block=block)
    note = f"{size}; plain power iteration would not converge without coupling"
    return [
        seconds,
        worst,
        row("chain, against iteration", "sparse LU", "lazy power iteration, dense", against, None, note),
    ]


def path_row(quick: bool, block: float) -> dict:
    """The important path where more than a million exist (quick: four thousand)."""
    graph = layered_graph(6 if quick else 10, 4)
    tas = np.random.default_rng(0).random(graph.n)
    adjacency, best = graph.adjacency, enumerate_best(graph, tas)
    assert most_important_path(adjacency, tas) == best[1]
    ratio = paired_ratio(
        lambda: enumerate_best(graph, tas), lambda: most_important_path(adjacency, tas), min_block=block
    )
    target = None if quick else 1000.0
    detail = f"{graph.count_paths():,} paths, all visited, running sums; same path found"
    return row("important path", "dynamic programming", "enumeration", ratio, target, detail)


def stacked_rows(block: float) -> list[dict]:
    """Four subnetworks of a sandwich step on a batch of 64, 16 features a node; sixteen different steps in turn."""
    graph, stream = layered_graph(4, 3, 0.6, min_edges=20, rng=0), torch.Generator().manual_seed(0)
    net, sampler = DagMLP(graph, 64, generator=stream), SandwichSampler(UniformSampler(graph, rng=0))
    loop, steps = LoopSupernet(net), [graph.masks(sampler(4)) for _ in range(16)]
    listed = [masks.tolist() for masks in steps]
    x, y = torch.rand(64, 64, generator=stream), torch.arange(64) % 10
    assert torch.allclose(net(x, steps[0]), loop(x, listed[0]), atol=1e-5)

    def each(forward: Callable) -> Callable:
        return lambda: [forward(k) for k in range(16)]

    def trained(forward: Callable, model: nn.Module) -> Callable:
        def step(k: int) -> None:
            model.zero_grad()
            F.cross_entropy(forward(k).flatten(0, 1), y.repeat(4)).backward()

        return each(step)

    stacked, looped = (lambda k: net(x, steps[k])), (lambda k: loop(x, listed[k]))
    mean = sum(masks.sum() for masks in steps) / 16
    size = f"T = 4, 16 features, batch 64, {mean:.0f} active operations of {4 * graph.num_edges} a step"
    with torch.no_grad():
        plain = paired_ratio(each(looped), each(stacked), min_block=block)
        single = each(lambda k: [net(x, steps[k][t : t + 1]) for t in range(4)])
        alone = paired_ratio(single, each(stacked), min_block=block)
    both = paired_ratio(trained(looped, loop), trained(stacked, net), min_block=block)
    peer = "loop over active operations"
    return [
        row("forward of T subnetworks", "stacked masks", peer, plain, 2.0, size),
        row("forward and backward of T subnetworks", "stacked masks", peer, both, 2.0, size),
        row("forward of T subnetworks, one by one", "stacked masks", "the same code with T = 1", alone, None, size),
    ]


def copies_row(quick: bool, block: float) -> dict:
    """Training steps of several supernets at once against one after the other."""
    layout, count = layered_graph(4, 3), 4 if quick else 16
    x, y = torch.rand(count, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10
    fixed = SandwichSampler(UniformSampler(layout, rng=0))(4)

    def trainer(copies: int) -> AnytimeTrainer:
        net = DagMLP(layout, 64, copies=copies)
        return AnytimeTrainer(net, torch.optim.Adam(net.parameters(), lr=1e-5), [JointSampler(fixed)] * copies)

    together, single = trainer(count), [trainer(1) for _ in range(count)]
    ratio = paired_ratio(
        lambda: [job.step(x[k], y) for k, job in enumerate(single)],
        lambda: together.step(x, y.expand(count, 64)),
        min_block=block,
    )
    name, detail = f"training step of {count} supernets", "T = 4, Adam, batch 64, the same updates"
    return row(name, "one batched supernet", "one supernet after the other", ratio, None, detail)


def run(quick: bool = False) -> list[dict]:
    """All rows; ``quick`` takes small graphs."""
    block = 0.005 if quick else 0.1
    rows = [*chain_rows(quick, block), path_row(quick, block)]
    return [*rows, *stacked_rows(block), copies_row(quick, block)]
