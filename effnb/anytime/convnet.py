"""The convolutional supernet: the same stacked forward pass, with grouped convolutions as batched products."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Generator, Tensor

from effnb.anytime.graph import SuperGraph
from effnb.anytime.supernet import Active, Masks, StackedSupernet, linear


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
        super().__init__(graph, (inputs, width, classes), copies, pixels=9)
        self.halves = [int(level > len(self.levels) // 2 - 1 and level > 0) for level in range(len(self.levels))]
        self.reset_parameters(generator)

    def edge_flops(self, size: int = 14) -> np.ndarray:
        """``(E,)`` FLOPs of each operation for one image of ``size`` x ``size`` pixels, two a multiply-add."""
        _, width, classes = self.sizes
        flops = np.zeros(self.graph.num_edges, int)
        for ops in self.groups:
            pixels = (size // 2 ** self.halves[ops.target]) ** 2
            last = ops.target == len(self.levels) - 1
            flops[ops.edges] = 2 * (width * classes if last else ops.fan_in * width * pixels)
        return flops

    def forward(self, x: Tensor, masks: Masks) -> Tensor:
        """Logits of all subnetworks.

        Args:
            x: ``(batch, inputs, height, width)`` for all copies alike, or ``(copies, batch, ...)``; even sides.
            masks: ``(T, E)`` with one copy, or ``(copies, T, E)``; pruned.

        Returns:
            ``(T, batch, classes)`` or ``(copies, T, batch, classes)``, as ``masks``.
        """
        masks, values = self._checked(masks), [self._per_copy(x, 4).transpose(0, 1)]  # (batch, rows, channels, h, w)
        _, *steps, head = self._plan(masks)
        for level, step in enumerate(steps, start=1):
            total = None
            for part in step.parts:
                halve = self.halves[level] - self.halves[part.ops.source]
                out = _convolve(part, _halved(values[part.ops.source], halve))
                total = out.new_zeros(len(out), step.rows, *out.shape[2:]) if total is None else total
                total.index_add_(1, part.outputs, out)
            values.append(F.layer_norm(total, total.shape[-3:]).relu_())
        logits = x.new_zeros(head.rows, values[0].shape[0], self.sizes[2])
        for part in head.parts:
            pooled = values[part.ops.source].mean((-2, -1)).transpose(0, 1)
            logits.index_add_(0, part.outputs, linear(part, pooled))
        return logits.view(*masks.shape[:-1], *logits.shape[1:])


def _convolve(part: Active, x: Tensor) -> Tensor:
    """Scaled responses ``(batch, active, out, h, w)`` of the convolutions to values ``(batch, rows, in, h, w)``."""
    weight, inputs = part.chosen(), x.index_select(1, part.inputs)
    if not len(weight):  # no groups of convolutions; the sum keeps the gradient, which is zero
        return x.new_zeros(len(x), 0, weight.shape[-1], *x.shape[-2:]) + weight.sum()
    kernels = weight[:, :-1].unflatten(1, (-1, 3, 3)).movedim(-1, 1).flatten(0, 1)  # (active out, in, 3, 3)
    out = F.conv2d(inputs.flatten(1, 2), kernels, weight[:, -1].flatten(), padding=1, groups=len(weight))
    return out.unflatten(1, (len(weight), -1))


def _halved(x: Tensor, times: int) -> Tensor:
    """Average over 2x2 pixels, ``times`` 0 or 1, whatever the leading dimensions."""
    return F.avg_pool2d(x.flatten(0, -4), 2).view(*x.shape[:-2], x.shape[-2] // 2, -1) if times else x
