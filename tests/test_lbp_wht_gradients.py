"""LBP-WHT: gradients of any strides, second derivatives, dtypes and autocast."""

import copy

import pytest
import torch
from lbp_wht_oracles import masked_backward
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effnb.finetune import (
    WalshLowRankConv1x1,
    WalshLowRankLinear,
    walsh_bases,
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


LAYERS = {
    "linear": (lambda **o: WalshLowRankLinear(6, 5, **o), nn.Linear(6, 5), (2, 49, 6)),
    "conv": (lambda **o: WalshLowRankConv1x1(6, 5, **o), nn.Conv2d(6, 5, 1), (2, 6, 7, 7)),
}


# --- gradients of every shape ----------------------------------------------------------------------------------------


def expanded_gradients(batch, tokens, channels):
    pooled = draw(batch, 1, channels, seed=3, dtype=torch.float64)
    return {
        "pooling": pooled.expand(batch, tokens, channels),
        "sum": draw(1, 1, 1, seed=3, dtype=torch.float64).expand(batch, tokens, channels),
        "batch": pooled[:1].expand(batch, tokens, channels),
        "same batch": draw(1, tokens, channels, seed=3, dtype=torch.float64).expand(batch, tokens, channels),
        "transposed": draw(batch, channels, tokens, seed=3, dtype=torch.float64).transpose(1, 2),
        "slice": draw(batch, tokens + 3, 2 * channels, seed=3, dtype=torch.float64)[:, 2:-1, ::2],
        "channels": draw(batch, tokens, 1, seed=3, dtype=torch.float64).expand(batch, tokens, channels),
    }


@pytest.mark.parametrize("kind", expanded_gradients(1, 1, 1))
@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (5, 9)])
@pytest.mark.parametrize("padding", ["reflect", "zero", "orthonormal"])
def test_gradients_of_any_strides(kind, grid, padding):
    layer = linear(grid=grid, padding=padding, k=3)
    tokens = grid[0] * grid[1]
    x, grad = draw(3, tokens, 6, dtype=torch.float64), expanded_gradients(3, tokens, 5)[kind]
    assert not grad.is_contiguous()
    for a, b in zip(backward(layer, x, grad), backward(layer, x, grad.contiguous()), strict=True):
        torch.testing.assert_close(a, b)


class LargestOutput(TorchDispatchMode):
    """Remembers the most bytes that any operation wrote."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        written = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not func.is_view]
        self.nbytes = max([self.nbytes, *(t.untyped_storage().nbytes() for t in written)])
        return out


def test_gradients_of_pooling_are_not_copied():
    layer = WalshLowRankLinear(16, 256)
    x = draw(8, 49, 16).requires_grad_()
    y = layer(x).sum(1) / 49
    with LargestOutput() as seen:
        y.sum().backward()
    assert seen.nbytes == x.nbytes  # the gradient of x; that of y would be 16 times as large
    flop = cost.count_flops(lambda x: layer(x).sum(1) / 49, x, backward=True).matmul_conv
    forward, transform, products = 2 * 8 * 49 * 16 * 256, 2 * 8 * 49 * 3 * 16, 2 * 2 * 8 * 16 * 256
    assert flop - forward - transform - products < 0.1 * products


def test_inputs_of_any_strides():
    layer = linear(grid=(9, 14), k=3)
    base = draw(3, 6, 126, dtype=torch.float64).transpose(1, 2)
    grad = draw(3, 126, 5, seed=1, dtype=torch.float64)
    for a, b in zip(backward(layer, base, grad), backward(layer, base.contiguous(), grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("grid", [(7, 7), (14, 14)])
def test_small_batches(batch, grid):
    layer = WalshLowRankLinear(6, 5, grid=grid)
    layer(draw(batch, grid[0] * grid[1], 6).requires_grad_()).sum().backward()
    assert layer.weight.grad.shape == (5, 6)
    assert bool(layer.weight.grad.any()) == bool(batch)


def test_no_bias():
    layer = WalshLowRankLinear(6, 5, bias=False, grid=(14, 14))
    x, grad = draw(2, 196, 6), draw(2, 196, 5, seed=1)
    expected = masked_backward(x, layer.weight, grad, (14, 14), walsh_bases())
    for a, b in zip(backward(layer, x, grad), expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_refused():
    layer = WalshLowRankLinear(6, 5)
    x = draw(1, 49, 6).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_weights_changed_before_backward_are_noticed():
    layer = WalshLowRankLinear(6, 5)
    y = layer(draw(1, 49, 6).requires_grad_())
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- dtypes and autocast ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["reflect", "orthonormal"])
@pytest.mark.parametrize("grid", [(7, 7), (14, 14)])
def test_operators_follow_the_dtype(padding, grid):
    x, grad = draw(4, grid[0] * grid[1], 16), draw(4, grid[0] * grid[1], 8, seed=1)
    reference = None
    for dtype, tolerance in ((torch.float64, 0), (torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        layer = nn.Linear(16, 8).requires_grad_(True)
        with torch.no_grad():
            layer.weight.copy_(draw(8, 16, seed=2))
        layer = WalshLowRankLinear.from_linear(layer.to(dtype), padding=padding, k=3, grid=grid)
        found = backward(layer, x.to(dtype), grad.to(dtype))
        assert {t.dtype for t in found} == {dtype}
        reference = reference or found
        for a, b in zip(found, reference, strict=True):
            assert (a.double() - b).norm() <= tolerance * b.norm()


def test_operators_follow_the_device():
    """The meta device stands for any other: tables made for it must not be found on the CPU."""
    for device in ("meta", "cpu"):
        layer = WalshLowRankLinear(6, 5, device=device, k=7, grid=(14, 14))
        x = torch.zeros(2, 196, 6, device=device).requires_grad_()
        layer(x).sum().backward()
        assert x.grad.device.type == layer.weight.grad.device.type == device


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_casts_as_for_the_plain_layer(kind):
    make, plain, shape = LAYERS[kind]
    layer = type(make()).from_linear(plain, k=15)
    x = draw(*shape).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), plain(x)
        assert y.dtype == expected.dtype == torch.bfloat16
        y.float().square().sum().backward()  # inside the region, as some loops do
    assert torch.equal(y, expected)
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    assert cost.saved_activation_bytes(make(k=2), draw(*shape)) == 2 * 3 * 6 * 4
    with torch.autocast("cpu", torch.bfloat16):
        doubled = copy.deepcopy(layer).double()
        assert doubled(x.double()).dtype == torch.float64
