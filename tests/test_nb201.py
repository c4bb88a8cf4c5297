"""The cells of NAS-Bench-201 and the networks of nano-bench: counts, functions and strings against the benchmark."""

import zlib
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from effnb.lab.measure import data
from effnb.nas import nanobench
from effnb.nas.nb201 import (
    EDGES,
    OPERATIONS,
    Cell,
    all_cells,
    arch_str_from_edges,
    build_cell_net,
    edges_from_arch_str,
    is_connected,
    iso_class,
)

needs_table = pytest.mark.skipif(not data.available("nas-bench-201"), reason="needs EFFNB_DATA with NAS-Bench-201")
CELLS = list(all_cells())


def some(count, seed=0):
    return [CELLS[i] for i in np.random.default_rng(seed).choice(len(CELLS), count, replace=False)]


# Strings and counts


def test_all_cells_in_order():
    assert len(CELLS) == len(set(CELLS)) == 15_625 and sorted(CELLS) == CELLS
    assert (CELLS[0], CELLS[-1]) == ("000000", "444444")


def test_architecture_strings_come_back():
    for cell in some(200):
        assert edges_from_arch_str(arch_str_from_edges(cell)) == cell


def test_edges_are_in_the_order_of_the_benchmark():
    arch = "|nor_conv_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|none~0|avg_pool_3x3~1|nor_conv_3x3~2|"
    assert edges_from_arch_str(arch) == "321043"
    assert EDGES == ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))


@pytest.mark.parametrize(
    "arch",
    [
        "",
        "|none~0|",
        "|none~1|+|none~0|none~1|+|none~0|none~1|none~2|",
        "|none~0|+|none~1|none~0|+|none~0|none~1|none~2|",
        "|conv~0|+|none~0|none~1|+|none~0|none~1|none~2|",
        None,
    ],
)
def test_bad_architecture_strings(arch):
    with pytest.raises(ValueError, match="arch "):
        edges_from_arch_str(arch)


@pytest.mark.parametrize("edges", ["", "33333", "3333333", "333335", "33333a", 333333, None])
@pytest.mark.parametrize(
    "call", [arch_str_from_edges, is_connected, iso_class, build_cell_net, nanobench.build_net, lambda e: Cell(e, 4)]
)
def test_bad_edges(call, edges):
    with pytest.raises(ValueError, match="six digits"):
        call(edges)


@pytest.mark.parametrize("name", ["channels", "cells", "num_classes", "in_channels"])
def test_bad_sizes(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        build_cell_net("333333", **{name: 0})


# Function of a cell


def brute_force_connected(edges):
    """Whether one of the four paths from node 0 to node 3 has no ``none``."""
    operation = dict(zip(EDGES, edges, strict=True))
    paths = [((0, 3),), ((0, 1), (1, 3)), ((0, 2), (2, 3)), ((0, 1), (1, 2), (2, 3))]
    return any(all(operation[e] != "0" for e in path) for path in paths)


def test_connected_is_what_the_paths_say():
    assert all(is_connected(cell) == brute_force_connected(cell) for cell in CELLS)
    assert sum(not is_connected(cell) for cell in CELLS) == 341


def test_there_are_6466_classes():
    assert len(set(map(iso_class, CELLS))) == 6_466


def naive_cell(cell, x):
    """Nodes one after the other from the operations' own modules."""
    nodes = [x]
    operations = iter(cell.operations)
    found = {ends: digit for ends, digit in zip(EDGES, cell.edges, strict=True)}
    modules = {ends: next(operations) for ends in EDGES if found[ends] != "0"}
    for target in (1, 2, 3):
        terms = [modules[s, target](nodes[s]) for s in range(target) if (s, target) in modules]
        nodes.append(sum(terms, torch.zeros_like(x)))
    return nodes[3]


@pytest.mark.parametrize("edges", ["333333", "000000", "123404", "004001", "420410", "111111"])
def test_a_node_is_the_sum_of_its_edges(edges):
    torch.manual_seed(0)
    cell, x = Cell(edges, 3).eval(), torch.randn(2, 3, 5, 5)
    assert torch.allclose(cell(x), naive_cell(cell, x), atol=1e-6)


def test_the_function_depends_on_the_class_only():
    """Cells of one class give equal outputs when equal expressions have equal weights."""

    def evaluate(edges, x):
        nodes, names = [x], ["x"]
        for target in (1, 2, 3):
            total, terms = torch.zeros_like(x), []
            for (_, end), digit, source in zip(EDGES, edges, [s for s, _ in EDGES], strict=True):
                if end != target or digit == "0":
                    continue
                g = torch.Generator().manual_seed(zlib.crc32(f"{names[source]} {digit}".encode()))
                weight = torch.randn(3, 3, generator=g)
                value = nodes[source] if digit == "1" else torch.tanh(weight @ nodes[source])
                zero = not nodes[source].any()
                total = total + (torch.zeros_like(x) if zero else value)
                terms.append("#" if zero else names[source] if digit == "1" else f"({names[source]})@{digit}")
            nodes.append(total)
            names.append("+".join(sorted(t for t in terms if t != "#")))
        return nodes[3]

    x, outputs = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), {}
    for cell in some(1500):
        found = evaluate(cell, x)
        assert torch.allclose(outputs.setdefault(iso_class(cell), found), found, atol=1e-5), cell


# Networks


def test_operations():
    cell = Cell("123400", 4)
    skip, one, three, pool = cell.operations
    assert isinstance(skip, nn.Identity) and isinstance(pool, nn.AvgPool2d)
    assert [type(m).__name__ for m in one] == ["ReLU", "Conv2d", "BatchNorm2d"]
    assert one[1].kernel_size == (1, 1) and three[1].kernel_size == (3, 3) and three[1].bias is None
    ones = torch.ones(1, 4, 3, 3)
    assert torch.equal(pool(ones), ones), "padding must not count"
    assert OPERATIONS[int("4")] == "avg_pool_3x3"


def test_the_smallest_and_the_largest_network():
    for edges, params in (("000000", 73_306), ("333333", 1_531_546)):
        assert sum(p.numel() for p in build_cell_net(edges).parameters()) == params


def test_shapes_and_widths():
    net = build_cell_net("123404", channels=4, cells=2, num_classes=7, in_channels=1)
    assert net(torch.zeros(3, 1, 16, 16)).shape == (3, 7)
    assert sum(isinstance(m, Cell) for m in net.modules()) == 6
    nano = nanobench.build_net("123404", (6, 12), 2)
    assert nano(torch.zeros(3, 1, 14, 14)).shape == (3, 10) and sum(isinstance(m, Cell) for m in nano.modules()) == 4


@pytest.mark.parametrize("build", [build_cell_net, nanobench.build_net])
def test_a_generator_fixes_the_weights(build):
    nets = [build("333333", generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    first, again, other = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("build", [build_cell_net, nanobench.build_net])
def test_with_a_generator_the_global_stream_is_left_alone(build):
    before = torch.get_rng_state()
    build("333333", generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    build("333333")
    assert not torch.equal(torch.get_rng_state(), before), "without one, weights are torch's own draws"


def test_a_disconnected_cell_cannot_see_its_input():
    net = nanobench.build_net("100001").eval()
    x = torch.randn(4, 1, 14, 14)
    assert torch.allclose(net(x)[0], net(x)[3], atol=1e-6)


# Against the real table


@needs_table
def test_parameters_and_macs_of_the_real_table():
    from effnb.nas.proxies import count_macs, count_params

    table = data.load("nas-bench-201").table.set_index("edges")
    for edges in [*some(12), "000000", "333333"]:
        net = build_cell_net(edges)
        assert count_params(net) == table.params[edges], edges
        assert count_macs(net, torch.zeros(1, 3, 32, 32)) == table.macs[edges], edges


@needs_table
def test_classes_of_the_real_table():
    """Two cells share an `iso_class` if and only if they share that of the benchmark."""
    table = data.load("nas-bench-201").table
    ours = [iso_class(edges) for edges in table.edges]
    pairs = set(zip(ours, table.iso_class, strict=True))
    assert len(pairs) == len(set(ours)) == table.iso_class.nunique() == 6_466


@needs_table
def test_disconnected_cells_of_the_real_table_are_at_chance():
    table = data.load("nas-bench-201").table
    connected = table.edges.map(is_connected)
    assert (table.cifar10_test[~connected].round(6) == 10).all() and (table.cifar10_test[connected] > 10).mean() > 0.99


# nano-bench


def test_images_are_pooled_and_standardised():
    x = torch.rand(3, 1, 28, 28)
    expected = (x.reshape(3, 1, 14, 2, 14, 2).mean((3, 5)) - 0.2860) / 0.3530
    assert torch.allclose(nanobench.images(x), expected, atol=1e-6)
    with pytest.raises(ValueError, match="shape"):
        nanobench.images(torch.zeros(3, 28, 28))


def test_the_sample_is_fixed_and_of_distinct_classes():
    cells = nanobench.sample_cells()
    assert len({iso_class(cell) for cell in cells}) == len(cells) == 400
    assert nanobench.sample_cells() == cells and nanobench.sample_cells(seed=1) != cells
    for count in (0, 6467):
        with pytest.raises(ValueError, match="count must be from 1 to 6466"):
            nanobench.sample_cells(count)


@pytest.mark.parametrize(("widths", "depth"), [((0, 4), 1), ((4, 4), 0), ((4, 4, 4), 1)])
def test_bad_nano_networks(widths, depth):
    with pytest.raises(ValueError, match="depth must be >= 1, got 0" if depth == 0 else "widths must be"):
        nanobench.build_net("333333", widths, depth)


def test_training_lowers_the_loss_and_is_repeatable():
    x = torch.randn(64, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2, 3)) > 0).long()
    runs = []
    for _ in range(2):
        net = nanobench.build_net("130432", generator=torch.Generator().manual_seed(0))
        runs.append(nanobench.train_net(net, x, y, seed=0, epochs=4, batch_size=16))
    assert runs[0] == runs[1] and len(runs[0]) == 4 and runs[0][-1] < runs[0][0]


def test_training_puts_modes_and_streams_back():
    net, x = nanobench.build_net("130432").eval(), torch.zeros(8, 1, 14, 14)
    net[1].train()
    modes, drawn = [module.training for module in net.modules()], torch.get_rng_state()
    nanobench.train_net(net, x, torch.zeros(8, dtype=torch.long), 0, epochs=1, batch_size=4)
    with pytest.raises(RuntimeError):
        nanobench.train_net(net, x.squeeze(1), torch.zeros(8, dtype=torch.long), 0, epochs=1, batch_size=4)
    assert [module.training for module in net.modules()] == modes and torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"batch_size": 1}, {"lr": 0.0}, {"batch_size": 9}])
def test_bad_training(options):
    x, y = torch.zeros(8, 1, 14, 14), torch.zeros(8, dtype=torch.long)
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        nanobench.train_net(nanobench.build_net("333333"), x, y, 0, **options)


@pytest.mark.skipif(not data.available("nano-bench"), reason="nano-bench is not there yet")
def test_the_committed_table_fits_the_networks():
    cells, widths = data.load("nano-bench").table, data.load("nano-width").table
    assert list(cells.edges) == nanobench.sample_cells() and len(widths) == 50
    for row in [*cells.head(5).itertuples(), *widths.head(5).itertuples(), *widths.tail(2).itertuples()]:
        net = nanobench.build_net(row.edges, (row.width1, row.width2), row.depth)
        assert sum(p.numel() for p in net.parameters()) == row.params
        assert row.connected == is_connected(row.edges)
    seeds = cells[["acc_seed0", "acc_seed1", "acc_seed2"]]
    assert np.allclose(seeds.mean(axis=1), cells.acc_mean, atol=1e-3) and seeds.to_numpy().max() < 100


def test_product_of_operations_is_the_space():
    assert set(CELLS) == {"".join(p) for p in product("01234", repeat=6)}
