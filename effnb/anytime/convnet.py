"""The convolutional supernet: the same stacked forward pass, with grouped convolutions as batched products."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from effnb.anytime.graph import SuperGraph
from effnb.anytime.supernet import Level, Masks, Operations, StackedSupernet


class DagConvNet(StackedSupernet):
    """A supernet of 3x3 convolutions in two stages, the second at half the resolution.

    Levels up to the middle work at the resolution of the images, the others at half of it; whatever enters the second
    stage from the first is averaged over 2x2 pixels. The output takes the global mean of its sources. Nodes are
    normalised over all features of a sample, without parameters and without batch statistics.

    Args:
        graph: operations and feature maps; no operation may lead from the input to the output.
        inputs: channels of the images.
        width: channels of a node.
        classes: number of outputs.
        copies: independent supernets with weights of their own.
        generator: stream for the weights, or one for each copy; ``None`` uses torch's global one.

    Raises:
        ValueError: a size below 1, an edge from input to output, a number of generators that does not fit.

    Reference: li2023tips.

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
        super().__init__(graph, (inputs, width, classes), copies, (3, 3))
        middle = (len(self.levels) + 1) // 2
        self.stage = {0: 0} | {v: int(k >= middle) for k, level in enumerate(self.levels) for v in level.nodes}
        self.reset_parameters(generator)

    def edge_flops(self, size: int = 14) -> np.ndarray:
        """``(E,)`` FLOPs of each operation for one image of ``size`` x ``size`` pixels, two a multiply-add."""
        inputs, width, classes = self.widths
        pixels = [(size // 2 ** self.stage[j]) ** 2 if j in self.stage else 0 for _, j in self.graph.edges]
        fan_in = np.where(self.graph.ends[0] == 0, inputs, width)
        return np.where(np.array(pixels) > 0, 2 * 9 * fan_in * width * np.array(pixels), 2 * width * classes)

    def forward(self, x: Tensor, masks: Masks) -> Tensor:
        """Logits of all subnetworks.

        Args:
            x: ``(batch, inputs, height, width)`` for all copies alike, or ``(copies, batch, ...)``; even sides.
            masks: ``(T, E)`` with one copy, or ``(copies, T, E)``; pruned.

        Returns:
            ``(T, batch, classes)`` or ``(copies, T, batch, classes)``, as ``masks``.
        """
        scales, x = self._scales(masks), self._per_copy(x, 4)
        groups, images = scales.shape[0] * scales.shape[1], x.transpose(0, 1)  # (batch, copies, inputs, h, w)
        states: dict[int, Tensor] = {}
        for level, stem, hidden in zip(self.levels, self.stems, self.hidden, strict=True):
            to = self.stage[level.nodes[0]]
            total = self._stem(stem, level, _halved(images, to), scales)
            if level.edges:
                inputs = [_halved(states[u], to - self.stage[u]) for u in level.sources]
                total = total + self._convolve(hidden, level, torch.cat(inputs, 2), scales)
            values = F.relu(F.layer_norm(total, total.shape[-3:]))
            values = values.view(len(values), groups, len(level.nodes), *values.shape[-3:])
            states.update(zip(level.nodes, values.unbind(2), strict=True))
        pooled = [states[u].mean((-2, -1)).transpose(0, 1) for u in self.out.sources]
        return self._logits(pooled, x.flatten(2), masks, scales)

    def _stem(self, ops: Operations, level: Level, images: Tensor, scales: Tensor) -> Tensor:
        """Contribution of the input, ``(batch, copies T, nodes, width, h, w)``, convolved once for all T."""
        if not level.stem:
            return images.new_zeros(1)
        weight = ops.weight.transpose(2, 3).flatten(0, 2)  # (copies edges width, inputs, 3, 3)
        out = F.conv2d(images.flatten(1, 2), weight, ops.bias.flatten(), padding=1, groups=self.copies)
        out = out.view(len(images), self.copies, 1, len(level.stem), self.widths[1], *out.shape[-2:])
        out = (out * scales[:, :, level.stem, None, None, None]).flatten(1, 2)
        if len(level.stem) == len(level.nodes):
            return out
        full = out.new_zeros(*out.shape[:2], len(level.nodes), *out.shape[3:])
        return full.index_copy(2, torch.tensor(level.stem_at, device=out.device), out)

    def _convolve(self, ops: Operations, level: Level, inputs: Tensor, scales: Tensor) -> Tensor:
        """Means of the active convolutions; inputs ``(batch, copies T, sources width, h, w)``."""
        weight, bias = self._table(ops, level, scales)
        weight = weight.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 4).flatten(0, 2)  # out: copies T nodes width
        out = F.conv2d(inputs.flatten(1, 2), weight, bias.flatten(), padding=1, groups=inputs.shape[1])
        return out.view(len(inputs), inputs.shape[1], len(level.nodes), self.widths[1], *out.shape[-2:])


def _halved(x: Tensor, times: int) -> Tensor:
    """Average over 2x2 pixels, ``times`` 0 or 1, whatever the leading dimensions."""
    return F.avg_pool2d(x.flatten(0, -4), 2).view(*x.shape[:-2], x.shape[-2] // 2, -1) if times else x
