"""Supernets, linear and convolutional, that run many subnetworks in one forward pass, level by level.

Only active operations are computed, in one batched product (or grouped convolution) for each pair of levels. The value
of a node is the ReLU of the normalised mean of its active operations; the output is the plain mean. Normalisation is
over the features of one sample and has no parameters, so that subnetworks share no statistics.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from effnb.anytime.tips.graph import SuperGraph
from effnb.common import check_count

Masks = Tensor | np.ndarray


class Operations(nn.Module):
    """Operations from one level to another: weights ``(copies, edges, fan_in + 1, out)``, the bias in the last row."""

    def __init__(self, copies: int, source: int, target: int, edges: list[int], fan_in: int, out: int) -> None:
        super().__init__()
        self.source, self.target, self.edges, self.fan_in = source, target, edges, fan_in
        self.weight = nn.Parameter(torch.empty(copies, len(edges), fan_in + 1, out))


class Active(NamedTuple):
    """Operations of one group that are active in some subnetwork: rows of weights, inputs and outputs, and a scale."""

    ops: Operations
    weights: Tensor  # copy and edge
    inputs: Tensor  # source, as a row of its level's values
    outputs: Tensor  # target, as a row of its level's values
    scale: Tensor  # 1 / number of active operations of the target, (active, 1, 1)

    def chosen(self) -> Tensor:
        """Scaled weights and biases, ``(active, fan_in + 1, out)``."""
        return self.ops.weight.flatten(0, 1).index_select(0, self.weights) * self.scale

    def linear(self, x: Tensor) -> Tensor:
        """Scaled responses ``(active, batch, out)`` of linear operations to values ``(rows, batch, in)``."""
        weight = self.chosen()
        return torch.baddbmm(weight[:, -1:], x.index_select(0, self.inputs), weight[:, :-1])


class StackedSupernet(nn.Module):
    """What the linear and the convolutional supernet share: weights, and the plan of a forward pass."""

    def __init__(self, graph: SuperGraph, sizes: tuple[int, int, int], copies: int, pixels: int = 1) -> None:
        for name, value in zip(("inputs", "width", "classes", "copies"), (*sizes, copies), strict=True):
            check_count(name, value)
        super().__init__()
        self.graph, self.copies, self.sizes = graph, copies, sizes
        depth, on_path = {0: 0}, graph.on_paths  # of a node: its longest distance from the input
        for i, j in graph.edges:  # sorted by source: the depth of i is final
            if i in on_path and j in on_path:
                depth[j] = max(depth.get(j, 0), depth[i] + 1)
        depth[graph.n - 1] = max(depth.values()) + 1  # the output alone at the end
        self.levels = [sorted(v for v in depth if depth[v] == d) for d in sorted(set(depth.values()))]
        level_of = {v: level for level, nodes in enumerate(self.levels) for v in nodes}
        last, spans = len(self.levels) - 1, {}
        for e, (i, j) in enumerate(graph.edges):
            if i in level_of and j in level_of:
                spans.setdefault((level_of[j], level_of[i]), []).append(e)
        self.groups = nn.ModuleList()
        for (target, source), edges in sorted(spans.items()):
            fan_in = sizes[0 if source == 0 else 1]
            shape = (fan_in, sizes[2]) if target == last else (fan_in * pixels, sizes[1])
            self.groups.append(Operations(copies, source, target, edges, *shape))
        # Constant tables of the plan: nodes in the order of the levels, edges in the order of the groups.
        nodes, place = list(level_of), np.zeros(graph.n, int)
        place[nodes] = np.arange(len(nodes))
        widths, counts = [len(level) for level in self.levels], [len(ops.edges) for ops in self.groups]
        self._order = np.concatenate([ops.edges for ops in self.groups])
        self._group, self._count = np.repeat([np.arange(len(counts)), counts], counts, axis=1)
        self._local = np.concatenate([np.arange(count) for count in counts])
        self._start, self._end = (place[ends[self._order]] for ends in graph.ends)
        self._into = (graph.ends[1] == np.array(nodes)[:, None]).astype(np.float32)
        self._level, self._last = np.repeat(np.arange(len(widths)), widths), np.cumsum(widths) - 1  # its last node
        self._once = self._level <= int(len(widths) > 2)  # nodes that depend on the input alone
        self._starts_once, self._ends_once = self._once[self._start], self._once[self._end]

    def reset_parameters(self, generator: Generator | Sequence[Generator] | None = None) -> None:
        """Draw all weights anew, uniform within ``1 / sqrt(fan_in)``; one stream, or one for each copy."""
        streams = list(generator) if isinstance(generator, Sequence) else [generator] * self.copies
        if len(streams) != self.copies:
            raise ValueError(f"generator must be one or {self.copies}, got {len(streams)}")
        with torch.no_grad():
            for copy, stream in enumerate(streams):
                for ops in self.groups:
                    ops.weight[copy].uniform_(-(ops.fan_in**-0.5), ops.fan_in**-0.5, generator=stream)

    def gradient_norms(self) -> Tensor:
        """Return the norms ``(copies, E)`` of the gradients of the operations, weight and bias together."""
        out = self.groups[0].weight.new_zeros(self.copies, self.graph.num_edges)
        for ops in self.groups:
            if ops.weight.grad is not None:
                out[:, ops.edges] = ops.weight.grad.flatten(2).norm(dim=2)
        return out

    def _plan(self, masks: Masks) -> list[tuple[int, list[Active]]]:
        """For each level its number of rows of values, and the operations into it; found in NumPy on the host.

        Only nodes that are present get a row. The first level depends on the input alone and is computed once for all
        subnetworks of a copy. This costs more than the products of a small net.
        """
        given = np.asarray(masks.cpu() if isinstance(masks, Tensor) else masks)
        m = given.astype(bool, copy=False)
        if given.dtype != bool and not (given == m).all():
            raise ValueError(f"masks must be binary, got the value {given[given != m].flat[0]}")
        leads = [(), (1,)] if self.copies == 1 else [(self.copies,)]
        if m.ndim < 2 or m.shape[:-2] not in leads or m.shape[-1] != self.graph.num_edges:
            wanted = f"({self.copies}, T, {self.graph.num_edges})"
            raise ValueError(f"masks must have shape {wanted}, or two dimensions for one copy, got {m.shape}")
        T, m = m.shape[-2], m.reshape(-1, m.shape[-1])  # subnetwork t of copy c is row c T + t
        # Where the subnetworks of a copy share a value, the first rows stand for the copies, one each.
        copies = np.arange(len(m)) < self.copies
        degree = self._into @ m.T.astype(np.float32)  # active operations into a node, (n, copies T)
        present = degree > 0
        present[self._once], present[-1] = copies, True
        row = present.cumsum().reshape(present.shape)
        upto = row[self._last, -1]  # rows of all levels up to each
        count = upto.copy()
        count[1:] -= upto[:-1]
        row -= (1 + upto - count)[self._level, None]  # now counted within its level
        active = m.T[self._order]
        active[self._ends_once] = copies
        k, subnet = np.nonzero(active)
        copy = np.where(self._ends_once[k], subnet, subnet // T)
        start, end = self._start[k], self._end[k]
        if not (degree[-1].all() and (degree[start, subnet] + (start == 0)).all()):
            raise ValueError("masks must be pruned subnetworks, got an operation without input or no path")
        index = np.empty((3, len(k)), np.int64)
        index[0] = copy * self._count[k] + self._local[k]
        index[1] = row[start, np.where(self._starts_once[k], copy, subnet)]
        index[2] = row[end, subnet]
        like, sizes = self.groups[0].weight, np.bincount(self._group[k], minlength=len(self.groups)).tolist()
        scale = torch.from_numpy(1 / np.maximum(degree[end, subnet], 1)[:, None, None]).to(like)
        tensors = (*torch.from_numpy(index).to(like.device).unbind(), scale)  # one transfer for all indices
        steps = [(rows, []) for rows in count.tolist()]
        for ops, *part in zip(self.groups, *(t.split(sizes) for t in tensors), strict=True):
            steps[ops.target][1].append(Active(ops, *part))
        return steps

    def _per_copy(self, x: Tensor, dims: int) -> Tensor:
        """Samples ``(copies, batch, ...)``, from one batch for all copies or from one for each."""
        x = x[None].expand(self.copies, *x.shape) if x.dim() == dims else x
        if x.dim() != dims + 1 or len(x) != self.copies:
            raise ValueError(f"x must have {dims} dimensions, or {dims + 1} with {self.copies} copies, got {x.shape}")
        return x


class DagMLP(StackedSupernet):
    """A supernet of linear operations, with ``width`` features in every node.

    Args:
        graph: operations and feature maps.
        inputs: size of a flattened sample.
        width: features of a node.
        classes: number of outputs.
        copies: independent supernets with weights of their own, which run and train side by side.
        generator: stream for the weights, or one for each copy; ``None`` uses torch's global one.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size below 1, a number of generators that does not fit.

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
        super().__init__(graph, (inputs, width, classes), copies)
        self.reset_parameters(generator)

    def edge_flops(self) -> np.ndarray:
        """Return the FLOPs ``(E,)`` of each operation for one sample, two a multiply-add."""
        inputs, width, classes = self.sizes
        starts, ends = self.graph.ends
        return 2 * np.where(starts == 0, inputs, width) * np.where(ends == self.graph.n - 1, classes, width)

    def forward(self, x: Tensor, masks: Masks) -> Tensor:
        """Return logits of all subnetworks, ``(T, batch, classes)`` or ``(copies, T, batch, classes)`` as ``masks``.

        Args:
            x: ``(batch, inputs)`` for all copies alike, or ``(copies, batch, inputs)``.
            masks: ``(T, E)`` with one copy, or ``(copies, T, E)``; pruned.
        """
        (_, *steps), values = self._plan(masks), [self._per_copy(x, 2)]
        for level, (rows, parts) in enumerate(steps, start=1):
            last = level == len(steps)
            total = x.new_zeros(rows, values[0].shape[1], self.sizes[2 if last else 1])
            for part in parts:
                total.index_add_(0, part.outputs, part.linear(values[part.ops.source]))
            values.append(total if last else F.layer_norm(total, total.shape[-1:]).relu_())
        return values[-1].view(*np.shape(masks)[:-1], *values[-1].shape[1:])


class DagConvNet(StackedSupernet):
    """A supernet of 3x3 convolutions in two stages, the second at half the resolution.

    Levels up to the middle work at the resolution of the images, the others at half of it; whatever enters the second
    stage from the first is averaged over 2x2 pixels. The output takes the global mean of its sources. Nodes are
    normalised over all features of a sample, without parameters and without batch statistics.

    Args:
        graph: operations and feature maps; no operation may lead from the input to the output.
        inputs: channels of the images.
        width: channels of a node.
        classes, copies, generator: as in :class:`DagMLP`.

    Raises:
        ValueError: an edge from input to output; see :class:`DagMLP`.

    >>> graph = SuperGraph(4, [(0, 1), (0, 2), (1, 2), (2, 3)])
    >>> DagConvNet(graph)(torch.zeros(5, 1, 14, 14), graph.masks(graph.adjacency[None])).shape
    torch.Size([1, 5, 10])
    """

    def __init__(
        self,
        graph: SuperGraph,
        inputs: int = 1,
        width: int = 8,
        classes: int = 10,
        copies: int = 1,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> None:
        if (0, graph.n - 1) in graph.edges:
            raise ValueError(f"graph must have no operation from the input to the output, got (0, {graph.n - 1})")
        super().__init__(graph, (inputs, width, classes), copies, pixels=9)
        self.halves = [int(level > len(self.levels) // 2 - 1 and level > 0) for level in range(len(self.levels))]
        self.reset_parameters(generator)

    def edge_flops(self, size: int = 14) -> np.ndarray:
        """Return the FLOPs ``(E,)`` of each operation for one image of ``size`` x ``size`` pixels."""
        _, width, classes = self.sizes
        flops = np.zeros(self.graph.num_edges, int)
        for ops in self.groups:
            pixels = (size // 2 ** self.halves[ops.target]) ** 2
            last = ops.target == len(self.levels) - 1
            flops[ops.edges] = 2 * (width * classes if last else ops.fan_in * width * pixels)
        return flops

    def forward(self, x: Tensor, masks: Masks) -> Tensor:
        """Return the logits of all subnetworks, as :meth:`DagMLP.forward`.

        Args:
            x: ``(batch, inputs, height, width)`` for all copies alike, or ``(copies, batch, ...)``; even sides.
            masks: as there.
        """
        _, *steps, (rows_out, heads) = self._plan(masks)
        values = [self._per_copy(x, 4).transpose(0, 1)]  # (batch, rows, channels, height, width)
        for level, (rows, parts) in enumerate(steps, start=1):
            total = None
            for part in parts:
                source = values[part.ops.source]
                if self.halves[level] > self.halves[part.ops.source]:
                    halved = F.avg_pool2d(source.flatten(0, -4), 2)
                    source = halved.view(*source.shape[:-2], source.shape[-2] // 2, -1)
                weight, inputs = part.chosen(), source.index_select(1, part.inputs)
                if len(weight):
                    kernels = weight[:, :-1].unflatten(1, (-1, 3, 3)).movedim(-1, 1).flatten(0, 1)
                    bias = weight[:, -1].flatten()  # kernels are (active out, in, 3, 3): one group an operation
                    out = F.conv2d(inputs.flatten(1, 2), kernels, bias, padding=1, groups=len(weight))
                    out = out.unflatten(1, (len(weight), -1))
                else:  # there is no convolution of no groups; the sum keeps the gradient, which is zero
                    out = source.new_zeros(len(source), 0, weight.shape[-1], *source.shape[-2:]) + weight.sum()
                total = out.new_zeros(len(out), rows, *out.shape[2:]) if total is None else total
                total.index_add_(1, part.outputs, out)
            values.append(F.layer_norm(total, total.shape[-3:]).relu_())
        logits = x.new_zeros(rows_out, values[0].shape[0], self.sizes[2])
        for part in heads:
            pooled = values[part.ops.source].mean((-2, -1)).transpose(0, 1)
            logits.index_add_(0, part.outputs, part.linear(pooled))
        return logits.view(*np.shape(masks)[:-1], *logits.shape[1:])
