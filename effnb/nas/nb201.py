"""The cell space of NAS-Bench-201: 6 edges, 5 operations, 15,625 cells.

A cell has four nodes; each edge ``i > j`` carries one operation, and a node is the sum of its edges. We write a cell as
six digits, one an edge in the order of `EDGES`, each an index into `OPERATIONS`; anything else raises ValueError.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Generator, Tensor, nn

from effnb.common import check_count
from effnb.models.small import initialize

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))


def check_edges(edges: str) -> str:
    """Return ``edges`` if it names a cell, else raise ValueError."""
    if not isinstance(edges, str) or len(edges) != len(EDGES) or not set(edges) <= set("01234"):
        order = " ".join(f"{source}>{target}" for source, target in EDGES)
        raise ValueError(f"edges must be a string of six digits 0..4 (operations of {order}), got {edges!r}")
    return edges


def all_cells() -> Iterator[str]:
    """Yield the 15,625 cells in lexicographic order of their digits.

    >>> sum(1 for _ in all_cells())
    15625
    """
    return map("".join, product("01234", repeat=len(EDGES)))


def edges_from_arch_str(arch: str) -> str:
    """Return the six digits of an architecture string of the official API.

    Args:
        arch: such as ``|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|``.

    Raises:
        ValueError: if the string has another shape, a source out of order or an unknown operation.

    Reference: dong2020nasbench201.

    >>> edges_from_arch_str("|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|")
    '301004'
    """
    nodes = [[item.split("~") for item in node.strip("|").split("|")] for node in str(arch).split("+")]
    sources = [[item[1:] for item in node] for node in nodes]
    if sources != [[["0"]], [["0"], ["1"]], [["0"], ["1"], ["2"]]]:
        raise ValueError(f"arch must look like |op~0|+|op~0|op~1|+|op~0|op~1|op~2|, got {arch!r}")
    names = [item[0] for node in nodes for item in node]
    if unknown := [name for name in names if name not in OPERATIONS]:
        raise ValueError(f"arch holds unknown operations {unknown}; known are {', '.join(OPERATIONS)}")
    return "".join(str(OPERATIONS.index(name)) for name in names)


def arch_str_from_edges(edges: str) -> str:
    """Return the official API's architecture string of six digits; inverse of `edges_from_arch_str`.

    Reference: dong2020nasbench201.

    >>> arch_str_from_edges("301004")
    '|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|'
    """
    items = [f"{OPERATIONS[int(digit)]}~{source}" for digit, (source, _) in zip(check_edges(edges), EDGES, strict=True)]
    return "+".join(f"|{'|'.join(items[k:n])}|" for k, n in ((0, 1), (1, 3), (3, 6)))


def is_connected(edges: str) -> bool:
    """Return whether any path of operations other than ``none`` leads from the cell's input to its output.

    >>> is_connected("100001"), is_connected("001011"), sum(not is_connected(cell) for cell in all_cells())
    (False, False, 341)
    """
    # Edges are in the order of their targets, so that it is known of a source whether it is reached.
    reached = {0}
    for digit, (source, target) in zip(check_edges(edges), EDGES, strict=True):
        if digit != "0" and source in reached:
            reached.add(target)
    return 3 in reached


def iso_class(edges: str) -> str:
    """Return the official API's unique string of a cell; cells that share it compute the same function.

    A skip becomes its source, an operation on a lone zero a zero, and the terms of a sum are sorted: 6,466 strings for
    15,625 cells. Zeros inside longer sums stay, as in the official code; without them 5,390 functions are left. The
    string is the output node as an expression of the input ``0`` and the zero ``#``.

    Reference: dong2020nasbench201.

    >>> iso_class("000300"), iso_class("200300"), len(set(map(iso_class, all_cells())))
    ('#+#+(0)@nor_conv_3x3', '#+#+(0)@nor_conv_3x3', 6466)
    """
    nodes, digits = ["0"], iter(check_edges(edges))
    for _ in range(3):
        terms = []
        for source, digit in zip(nodes, digits, strict=False):
            zero = digit == "0" or source == "#"
            terms.append("#" if zero else source if digit == "1" else f"({source})@{OPERATIONS[int(digit)]}")
        nodes.append("+".join(sorted(terms)))
    return nodes[3]


def relu_conv_bn(fan_in: int, fan_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return ReLU, convolution without bias (same padding) and batch normalisation."""
    conv = nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(fan_out))


def operation(digit: str, channels: int) -> nn.Module:
    """Return the module of one edge that is not ``none``."""
    if digit == "1":
        return nn.Identity()
    if digit == "4":
        return nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    return relu_conv_bn(channels, channels, 1 if digit == "2" else 3)


class Cell(nn.Module):
    """A cell at a fixed width; ``(batch, channels, h, w)`` in and out.

    Every edge but ``none`` is computed, also one that leads nowhere: its weights and ReLUs count, as officially.

    Args:
        edges: six digits 0..4.
        channels: width, >= 1.

    Reference: dong2020nasbench201.

    >>> Cell("100100", 4)(torch.ones(1, 4, 2, 2)).shape
    torch.Size([1, 4, 2, 2])
    """

    def __init__(self, edges: str, channels: int) -> None:
        super().__init__()
        live = [(d, e) for d, e in zip(check_edges(edges), EDGES, strict=True) if d != "0"]
        self.edges = edges
        self.ends = [ends for _, ends in live]
        self.operations = nn.ModuleList(operation(digit, channels) for digit, _ in live)

    def forward(self, x: Tensor) -> Tensor:
        nodes: list[Tensor | None] = [x, None, None, None]
        for op, (source, target) in zip(self.operations, self.ends, strict=True):
            # A node that no edge enters is zero; what leaves it is computed all the same.
            value = op(torch.zeros_like(x) if nodes[source] is None else nodes[source])
            nodes[target] = value if nodes[target] is None else nodes[target] + value
        return torch.zeros_like(x) if nodes[3] is None else nodes[3]


class Reduction(nn.Module):
    """The residual block between stages: two 3x3 convolutions with stride 2, and a pooled 1x1 shortcut."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(relu_conv_bn(fan_in, fan_out, 3, 2), relu_conv_bn(fan_out, fan_out, 3))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(fan_in, fan_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


def cell_network(
    edges: str,
    widths: Sequence[int],
    depth: int,
    reduction: Callable[[int, int], nn.Module],
    inputs: int,
    outputs: int,
    generator: Generator | None,
) -> nn.Sequential:
    """Return stem, one stage of ``depth`` cells a width with ``reduction(fan_in, fan_out)`` between them, and head."""
    # Every layer draws weights from the global stream when it is made; with a generator that must leave no trace.
    with contextlib.nullcontext() if generator is None else torch.random.fork_rng(devices=[]):
        layers: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0])]
        for i, width in enumerate(widths):
            layers += [reduction(widths[i - 1], width)] if i else []
            layers += [Cell(edges, width) for _ in range(depth)]
        head = [nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        network = nn.Sequential(*layers, *head, nn.Linear(widths[-1], outputs))
    return initialize(network, generator)


def build_cell_net(
    edges: str,
    channels: int = 16,
    cells: int = 5,
    num_classes: int = 10,
    in_channels: int = 3,
    generator: Generator | None = None,
) -> nn.Sequential:
    """Return the network of NAS-Bench-201 around one cell: three stages of widths C, 2C, 4C, ``cells`` cells each.

    Args:
        edges: six digits 0..4.
        channels: width C of the first stage, >= 1.
        cells: cells a stage, >= 1.
        num_classes: outputs, >= 1.
        in_channels: channels of the images, >= 1.
        generator: stream for Kaiming-normal weights; ``None`` keeps torch's default initialisation, drawn globally.

    Returns:
        A module from ``(batch, in_channels, h, w)`` to ``(batch, num_classes)``; ``h`` and ``w`` multiples of 4.

    Raises:
        ValueError: if ``edges`` is not six digits 0..4 or a size is below 1.

    Reference: dong2020nasbench201.

    >>> sum(p.numel() for p in build_cell_net("000000").parameters())
    73306
    """
    check_edges(edges)
    sizes = {"channels": channels, "cells": cells, "num_classes": num_classes, "in_channels": in_channels}
    for name, size in sizes.items():
        check_count(name, size)
    widths = [channels, 2 * channels, 4 * channels]
    return cell_network(edges, widths, cells, Reduction, in_channels, num_classes, generator)
