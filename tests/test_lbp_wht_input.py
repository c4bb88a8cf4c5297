"""LBP-WHT: bad input and the cost model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effnb.finetune import (
    WalshLowRankConv1x1,
    WalshLowRankLinear,
    dense_backward_cost,
    lora_backward_cost,
    lowrank_backprop_conv1x1,
    lowrank_backprop_linear,
    num_tiles,
    token_projector,
    walsh_backward_cost,
    walsh_bases,
    walsh_matrix,
    walsh_positions,
)
from effnb.lab.measure import cost


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(c_in=6, c_out=5, **options):
    return WalshLowRankLinear.from_linear(nn.Linear(c_in, c_out, dtype=torch.float64), **options)


def backward(layer, x, grad):
    """Gradients of x, weight and bias of a layer."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)


# --- bad input -------------------------------------------------------------------------------------------------------


def tokens(*shape):
    return torch.zeros(shape), torch.zeros(5, 6)


@pytest.mark.parametrize("order", [0, 3, 6, 12, -8])
def test_orders_that_are_no_power_of_two(order):
    for fn in (walsh_matrix, walsh_bases, walsh_positions, lambda o: WalshLowRankLinear(6, 5, order=o)):
        with pytest.raises(ValueError, match="order must be a power of two"):
            fn(order)
    with pytest.raises(TypeError, match="order must be an int"):
        walsh_matrix(8.0)


def test_counts_that_are_no_integers():
    for options in ({"k": 1.5}, {"positions": [(0.5, 1)]}):
        with pytest.raises(TypeError, match="float"):
            walsh_positions(8, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k must be in \[1, 15\]"),
        ({"k": 16}, r"k must be in \[1, 15\]"),
        ({"order": 4, "k": 8}, r"k must be in \[1, 7\]"),
        ({"selection": "linf", "k": 9}, r"k must be in \[1, 8\]"),
        ({"selection": "l2"}, "selection must be one of 'l1', 'linf'"),
        ({"positions": [(0, 8)]}, r"positions must lie in \[0, 7\]"),
        ({"positions": [(-1, 0)]}, r"positions must lie in \[0, 7\]"),
        ({"positions": [(0, 1), (0, 1)]}, r"positions must not repeat, got \[\(0, 1\)\]"),
        ({"positions": []}, "positions must hold at least one"),
        ({"padding": "replicate"}, "padding must be one of 'reflect', 'zero', 'orthonormal', got 'replicate'"),
    ],
)
def test_settings_out_of_range(options, message):
    calls = [
        lambda: lowrank_backprop_linear(*tokens(1, 49, 6), **options),
        lambda: lowrank_backprop_conv1x1(torch.zeros(1, 6, 7, 7), torch.zeros(5, 6, 1, 1), **options),
        lambda: WalshLowRankLinear(6, 5, **options),
        lambda: WalshLowRankConv1x1(6, 5, **options),
        lambda: token_projector((7, 7), **options),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 48, 6), {}, "not a square, got 48"),
        ((1, 49, 6), {"num_extra_tokens": 1}, "not a square, got 48"),
        ((1, 0, 6), {}, "not a square, got 0"),
        ((1, 49, 6), {"grid": (7, 8)}, "must match x, got 49 tokens"),
        ((1, 49, 6), {"grid": (7, 7), "num_extra_tokens": 1}, "must match x, got 49 tokens"),
        ((1, 49, 6), {"grid": (0, 49)}, "both >= 1"),
        ((1, 49, 6), {"grid": (49,)}, r"grid must be \(height, width\)"),
        ((1, 49, 6), {"num_extra_tokens": -1}, "num_extra_tokens must be >= 0"),
        ((49, 6), {}, "3 or 4 dimensions"),
        ((1, 1, 7, 7, 6), {}, "3 or 4 dimensions"),
        ((1, 7, 7, 6), {"grid": (49, 1)}, "grid must be the shape of the image"),
        ((1, 7, 7, 6), {"num_extra_tokens": 1}, "num_extra_tokens must be 0"),
        ((1, 49, 7), {}, "x must have 6 channels"),
    ],
)
def test_tokens_that_do_not_fit(shape, options, message):
    with pytest.raises(ValueError, match=message):
        lowrank_backprop_linear(*tokens(*shape), **options)


@pytest.mark.parametrize(("grid", "order"), [((8, 4), 16), ((3, 8), 8), ((1, 8), 8), ((4, 4), 16)])
def test_reflection_on_too_small_a_grid_recommends_zero(grid, order):
    x, weight = tokens(1, grid[0] * grid[1], 6)
    weight.requires_grad_()
    with pytest.raises(ValueError, match="padding must be 'zero'"):
        lowrank_backprop_linear(x, weight, grid=grid, order=order)
    for padding in ("zero", "orthonormal"):
        lowrank_backprop_linear(x, weight, grid=grid, order=order, padding=padding).sum().backward()


@pytest.mark.parametrize("name", ["kernel_size", "stride", "groups"])
def test_convolutions_that_see_neighbours(name):
    with pytest.raises(ValueError, match=f"{name} must be 1"):
        WalshLowRankConv1x1(4, 4, **{name: 2})
    with pytest.raises(ValueError, match=f"{name} must be 1"):
        WalshLowRankConv1x1.from_linear(nn.Conv2d(4, 4, **({"kernel_size": 1} | {name: 2})))


def test_layers_of_another_kind():
    with pytest.raises(ValueError, match="padding of conv must be 0"):
        WalshLowRankConv1x1.from_linear(nn.Conv2d(4, 4, 1, padding=1))
    with pytest.raises(TypeError, match=r"conv must be an nn.Conv2d"):
        WalshLowRankConv1x1.from_linear(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"linear must be an nn.Linear"):
        WalshLowRankLinear.from_linear(nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match="plain parameter"):
        WalshLowRankLinear.from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="num_extra_tokens must be >= 0"):
        WalshLowRankLinear(4, 4, num_extra_tokens=-1)


def test_images_that_do_not_fit_the_convolution():
    weight = torch.zeros(5, 6, 1, 1)
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        lowrank_backprop_conv1x1(torch.zeros(6, 7, 7), weight)
    with pytest.raises(ValueError, match="weight must have shape"):
        lowrank_backprop_conv1x1(torch.zeros(1, 5, 7, 7), weight)
    with pytest.raises(ValueError, match="weight must have shape"):
        lowrank_backprop_conv1x1(torch.zeros(1, 6, 7, 7), torch.zeros(5, 6, 3, 3))


# --- cost ------------------------------------------------------------------------------------------------------------


def test_costs_are_the_formulas():
    assert dense_backward_cost(49, 448, 1792) == 4 * 49 * 448 * 1792
    assert dense_backward_cost(49, 448, 1792, needs_input_grad=False) == 2 * 49 * 448 * 1792
    assert lora_backward_cost(49, 448, 1792, 8) == 2 * 49 * 448 * 1792 + 6 * 49 * 8 * (448 + 1792)
    assert walsh_backward_cost(196, 224, 896, 8, 6, 4) == 4 * 4 * 6 * 224 * 896 + 4 * 6 * 64 * (2 * 224 + 896)
    first = walsh_backward_cost(196, 224, 896, 8, 6, 4, needs_input_grad=False)
    assert first == 2 * 4 * 6 * 224 * 896 + 4 * 6 * 64 * (224 + 896)


@pytest.mark.parametrize(("k", "ratio"), [(1, 49), (2, 16.3), (3, 8.2), (4, 4.9), (6, 2.333), (8, 1.36)])
def test_ratios_of_the_products(k, ratio):
    for side in (7, 14):
        m, tiles = len(walsh_positions(8, "l1", k)), num_tiles((side, side))
        dense = dense_backward_cost(side**2, 448, 1792)
        found = dense / walsh_backward_cost(side**2, 448, 1792, 8, m, tiles, transforms=False)
        assert found == pytest.approx(ratio, rel=0.01)


def test_lora_counts_what_torch_counts():
    """Dense ``grad_x``, four thin products backward; the formula adds the adapter's forward pass."""
    x, weight, a, b = draw(2, 49, 64), draw(96, 64), draw(4, 64).requires_grad_(), draw(96, 4).requires_grad_()
    plain = 2 * 2 * 49 * 64 * 96
    for needs_input_grad in (True, False):
        counted = cost.count_flops(
            lambda x: F.linear(x, weight) + F.linear(F.linear(x, a), b),
            x.detach().requires_grad_(needs_input_grad),
            backward=True,
        )
        formula = lora_backward_cost(49, 64, 96, 4, needs_input_grad)
        assert counted.matmul_conv - plain == 2 * formula


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dense_backward_cost(0, 1, 1), "L must be >= 1"),
        (lambda: dense_backward_cost(1, 0, 1), "c_in must be >= 1"),
        (lambda: lora_backward_cost(1, 1, 1, 0), "rank must be >= 1"),
        (lambda: walsh_backward_cost(49, 4, 4, m=0), "m must be >= 1"),
        (lambda: walsh_backward_cost(49, 4, 4, m=65), "m must be at most"),
        (lambda: walsh_backward_cost(49, 4, 4, order=6), "power of two"),
        (lambda: walsh_backward_cost(65, 4, 4), "tiles must hold all tokens"),
        (lambda: num_tiles((0, 7)), "height must be >= 1"),
    ],
)
def test_costs_of_nothing(call, message):
    with pytest.raises(ValueError, match=message):
        call()
