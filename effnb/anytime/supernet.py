"""Supernets that run many subnetworks in one forward pass: masks are stacked, weights shared, products batched.

Node value: ReLU of the normalised mean of its active operations; the output is the plain mean. Normalisation is over
the features of one sample and has no parameters, so that subnetworks share no statistics.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from effnb.anytime.graph import SuperGraph

Masks = Tensor | np.ndarray


class Level(NamedTuple):
    """Nodes at the same longest distance from the input, and the edges into them."""

    nodes: list[int]
    stem: list[int]  # edges from the input
    stem_at: list[int]  # position in ``nodes`` of each
    edges: list[int]  # edges from other nodes
    sources: list[int]  # their sources, sorted, without repeats
    slots: list[int]  # position of each edge in the (sources x nodes) table


def levels_of(graph: SuperGraph) -> list[Level]:
    """All levels but the input's, in order; the output is a level of its own. Edges on no path are left out."""
    on_path = graph.prune(np.ones((1, graph.num_edges), bool))[0]
    edges = [(e, i, j) for e, (i, j) in enumerate(graph.edges) if on_path[e]]
    depth = [0] * graph.n
    for _, i, j in edges:  # sorted by source: the depth of i is final
        depth[j] = max(depth[j], depth[i] + 1)
    depth[-1] = max(depth) + 1
    levels = []
    for d in sorted({depth[j] for _, _, j in edges}):
        into = [edge for edge in edges if depth[edge[2]] == d]
        nodes, sources = sorted({j for _, _, j in into}), sorted({i for _, i, _ in into if i})
        stem, inner = ([edge for edge in into if (edge[1] == 0) == first] for first in (True, False))
        slots = [sources.index(i) * len(nodes) + nodes.index(j) for _, i, j in inner]
        at = [nodes.index(j) for _, _, j in stem]
        levels.append(Level(nodes, [e for e, _, _ in stem], at, [e for e, _, _ in inner], sources, slots))
    return levels


class Operations(nn.Module):
    """Weights ``(copies, edges, in, out, *kernel)`` and biases ``(copies, edges, out)`` of operations of one shape."""

    def __init__(self, copies: int, edges: list[int], fan: tuple[int, int], kernel: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.edges, self.bound = edges, (fan[0] * int(np.prod(kernel))) ** -0.5
        self.weight = nn.Parameter(torch.empty(copies, len(edges), *fan, *kernel))
        self.bias = nn.Parameter(torch.empty(copies, len(edges), fan[1]))


class StackedSupernet(nn.Module):
    """What the linear and the convolutional supernet share: weights, masks, the output layer."""

    def __init__(self, graph: SuperGraph, widths: tuple[int, int, int], copies: int, kernel: tuple[int, ...]) -> None:
        if min(*widths, copies) < 1:
            raise ValueError(f"inputs, width, classes and copies must be >= 1, got {(*widths, copies)}")
        super().__init__()
        self.graph, self.copies, self.widths = graph, copies, widths
        *self.levels, self.out = levels_of(graph)
        inputs, width, classes = widths
        self.stems = nn.ModuleList(Operations(copies, v.stem, (inputs, width), kernel) for v in self.levels)
        self.hidden = nn.ModuleList(Operations(copies, v.edges, (width, width), kernel) for v in self.levels)
        self.head = Operations(copies, self.out.edges, (width, classes))
        self.direct = Operations(copies, self.out.stem, (inputs, classes))
        same_target = torch.from_numpy(graph.ends[1][:, None] == graph.ends[1])
        self.register_buffer("same_target", same_target.float(), persistent=False)

    @property
    def operations(self) -> list[Operations]:
        """All groups of operations, from the input to the output."""
        return [*self.stems, *self.hidden, self.head, self.direct]

    def reset_parameters(self, generator: Generator | Sequence[Generator] | None = None) -> None:
        """Draw all weights anew, uniform within ``1 / sqrt(fan_in)``; one stream, or one for each copy."""
        streams = list(generator) if isinstance(generator, Sequence) else [generator] * self.copies
        if len(streams) != self.copies:
            raise ValueError(f"generator must be one or {self.copies}, got {len(streams)}")
        with torch.no_grad():
            for copy, stream in enumerate(streams):
                for ops in self.operations:
                    ops.weight[copy].uniform_(-ops.bound, ops.bound, generator=stream)
                    ops.bias[copy].uniform_(-ops.bound, ops.bound, generator=stream)

    def gradient_norms(self) -> Tensor:
        """``(copies, E)`` norms of the gradients of the operations, weight and bias together."""
        out = self.same_target.new_zeros(self.copies, self.graph.num_edges)
        for ops in self.operations:
            if ops.edges and ops.weight.grad is not None:
                out[:, ops.edges] = ops.weight.grad.square().flatten(2).sum(2) + ops.bias.grad.square().sum(2)
        return out.sqrt()

    def _scales(self, masks: Masks) -> Tensor:
        """Masks over the number of active operations of their target, ``(copies, T, E)``."""
        m = torch.as_tensor(masks).to(self.same_target)
        m = m[None] if m.dim() == 2 and self.copies == 1 else m
        if m.dim() != 3 or (m.shape[0], m.shape[2]) != (self.copies, self.graph.num_edges):
            wanted = f"({self.copies}, T, {self.graph.num_edges})"
            raise ValueError(
                f"masks must have shape {wanted}, the first may be missing for 1 copy, got {tuple(m.shape)}"
            )
        return m / (m @ self.same_target).clamp(min=1)

    def _per_copy(self, x: Tensor, dims: int) -> Tensor:
        """Samples ``(copies, batch, ...)``, from one batch for all copies or from one for each."""
        x = x[None].expand(self.copies, *x.shape) if x.dim() == dims else x
        if x.dim() != dims + 1 or len(x) != self.copies:
            raise ValueError(f"x must have {dims} dimensions, or {dims + 1} with {self.copies} copies, got {x.shape}")
        return x

    def _table(self, ops: Operations, level: Level, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Masked weights ``(copies T, sources, nodes, in, out, *kernel)``, mean biases ``(copies T, nodes, out)``."""
        s, kernel = scales[:, :, level.edges], ops.weight.shape[4:]
        weight = ops.weight[:, None] * s.view(*s.shape, 1, 1, *[1] * len(kernel))
        bias = ops.bias[:, None] * s[..., None]
        count = len(level.sources) * len(level.nodes)
        if len(level.edges) < count:  # some pairs of nodes have no operation
            slots = torch.tensor(level.slots, device=s.device)
            weight, bias = (
                t.new_zeros(*t.shape[:2], count, *t.shape[3:]).index_copy(2, slots, t) for t in (weight, bias)
            )
        weight, bias = (t.view(-1, len(level.sources), len(level.nodes), *t.shape[3:]) for t in (weight, bias))
        return weight, bias.sum(1)

    def _linear(self, ops: Operations, level: Level, inputs: list[Tensor], scales: Tensor) -> Tensor:
        """Means of the active linear operations, ``(copies T, batch, nodes out)``; inputs ``(copies T, batch, in)``."""
        weight, bias = self._table(ops, level, scales)
        blocks = weight.transpose(2, 3).flatten(3).flatten(1, 2)  # (copies T, sources in, nodes out)
        return torch.baddbmm(bias.flatten(1)[:, None], torch.cat(inputs, -1), blocks)

    def _logits(self, sources: list[Tensor], x: Tensor, masks: Masks, scales: Tensor) -> Tensor:
        """Output from its sources ``(copies T, batch, width)`` and the flat input ``(copies, batch, inputs)``."""
        logits = x.new_zeros(*scales.shape[:2], x.shape[1], self.widths[2])
        if sources:
            logits = logits + self._linear(self.head, self.out, sources, scales).view_as(logits)
        if self.out.stem:
            response = torch.baddbmm(self.direct.bias, x, self.direct.weight[:, 0])
            logits = logits + response[:, None] * scales[:, :, self.out.stem, None]
        return logits[0] if masks.ndim == 2 else logits


class DagMLP(StackedSupernet):
    """A supernet of linear operations, with ``width`` features in every node.

    All T subnetworks of all copies run in one batched product a level; the operations on the input are computed once
    for all T.

    Args:
        graph: operations and feature maps.
        inputs: size of a flattened sample.
        width: features of a node.
        classes: number of outputs.
        copies: independent supernets with weights of their own, which run and train side by side.
        generator: stream for the weights, or one for each copy; ``None`` uses torch's global one.

    Raises:
        ValueError: a size below 1, a number of generators that does not fit.

    Reference: li2023tips.

    >>> graph = SuperGraph(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
    >>> DagMLP(graph, 64)(torch.zeros(5, 64), graph.masks(graph.adjacency[None])).shape
    torch.Size([1, 5, 10])
    """

    def __init__(
        self,
        graph: SuperGraph,
        inputs: int,
        width: int = 16,
        classes: int = 10,
        copies: int = 1,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> None:
        super().__init__(graph, (inputs, width, classes), copies, ())
        self.reset_parameters(generator)

    def edge_flops(self) -> np.ndarray:
        """``(E,)`` FLOPs of each operation for one sample, two a multiply-add."""
        inputs, width, classes = self.widths
        starts, ends = self.graph.ends
        return 2 * np.where(starts == 0, inputs, width) * np.where(ends == self.graph.n - 1, classes, width)

    def forward(self, x: Tensor, masks: Masks) -> Tensor:
        """Logits of all subnetworks.

        Args:
            x: ``(batch, inputs)`` for all copies alike, or ``(copies, batch, inputs)``.
            masks: ``(T, E)`` with one copy, or ``(copies, T, E)``; pruned.

        Returns:
            ``(T, batch, classes)`` or ``(copies, T, batch, classes)``, as ``masks``.
        """
        scales, x = self._scales(masks), self._per_copy(x, 2)
        states: dict[int, Tensor] = {}
        for level, stem, hidden in zip(self.levels, self.stems, self.hidden, strict=True):
            shape = (*scales.shape[:2], x.shape[1], len(level.nodes), self.widths[1])
            total = self._stem(stem, level, x, scales, shape)
            if level.edges:
                inputs = [states[u] for u in level.sources]
                total = total + self._linear(hidden, level, inputs, scales).view(shape)
            values = F.relu(F.layer_norm(total, shape[-1:])).flatten(0, 1)
            states.update(zip(level.nodes, values.unbind(2), strict=True))
        return self._logits([states[u] for u in self.out.sources], x, masks, scales)

    def _stem(self, ops: Operations, level: Level, x: Tensor, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Contribution of the input to a level, computed once for all T: ``shape``."""
        if not level.stem:
            return x.new_zeros(1)
        response = torch.einsum("sbi,seio->sbeo", x, ops.weight) + ops.bias[:, None]
        scaled = response[:, None] * scales[:, :, None, level.stem, None]
        if len(level.stem) == len(level.nodes):
            return scaled
        return x.new_zeros(shape).index_copy(3, torch.tensor(level.stem_at, device=x.device), scaled)
