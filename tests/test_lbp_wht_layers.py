"""LBP-WHT: layers as drop-in replacements, what they store, and whole models."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from lbp_wht_oracles import masked_backward
from torch import nn

from effnb.finetune import (
    WalshLowRankConv1x1,
    WalshLowRankLinear,
    apply_walsh_backprop,
    inject_lora,
    walsh_backward_cost,
    walsh_bases,
    walsh_positions,
)
from effnb.lab.measure import cost
from effnb.models import ViT


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(c_in=6, c_out=5, **options):
    return WalshLowRankLinear.from_linear(nn.Linear(c_in, c_out, dtype=torch.float64), **options)


def backward(layer, x, grad):
    """Gradients of x, weight and bias of a layer."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)


def saved_tensors(fn):
    """Every tensor that autograd keeps while ``fn`` runs."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fn()
    return kept


LAYERS = {
    "linear": (lambda **o: WalshLowRankLinear(6, 5, **o), nn.Linear(6, 5), (2, 49, 6)),
    "conv": (lambda **o: WalshLowRankConv1x1(6, 5, **o), nn.Conv2d(6, 5, 1), (2, 6, 7, 7)),
}


# --- layers as drop-in replacements ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_eval_mode_is_the_plain_layer_bit_for_bit(kind):
    make, plain, shape = LAYERS[kind]
    layer = type(make()).from_linear(plain).eval()
    x = draw(*shape)
    found = backward(layer, x, torch.ones_like(layer(x)))
    expected = backward(plain, x, torch.ones_like(plain(x)))
    assert torch.equal(layer(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "WalshBackward" not in str(layer(x).grad_fn)


@pytest.mark.parametrize("kind", LAYERS)
def test_training_changes_the_backward_pass_only(kind):
    make, plain, shape = LAYERS[kind]
    layer = type(make()).from_linear(plain, k=1).train()
    x = draw(*shape)
    assert torch.equal(layer(x), plain(x))
    assert "WalshBackward" in str(layer(x).grad_fn.name())
    found, expected = (backward(m, x, draw(*plain(x).shape)) for m in (layer, plain))
    assert not torch.allclose(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2])


@pytest.mark.parametrize("kind", LAYERS)
def test_no_gradient_no_projection(kind):
    make, _, shape = LAYERS[kind]
    layer = make()
    with torch.no_grad():
        assert layer(draw(*shape)).grad_fn is None
    layer.requires_grad_(False)
    assert not layer(draw(*shape)).requires_grad
    with torch.inference_mode():
        layer(draw(*shape))
    layer.requires_grad_(True)(draw(*shape)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("kind", LAYERS)
def test_state_dicts_copies_and_pickles(kind):
    make, plain, shape = LAYERS[kind]
    layer = make(k=3, padding="zero")
    layer.load_state_dict(plain.state_dict())
    assert list(layer.state_dict()) == list(plain.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(draw(*shape)), layer(draw(*shape)))
        assert (twin.basis.positions, twin.basis.padding) == (layer.basis.positions, "zero")
    assert "m=6, padding='zero'" in repr(layer)


def test_from_linear_shares_parameters_mode_and_draws_nothing():
    plain = nn.Linear(6, 5).eval()
    before = torch.get_rng_state()
    layer = WalshLowRankLinear.from_linear(plain)
    assert layer.weight is plain.weight and layer.bias is plain.bias and not layer.training
    assert torch.equal(before, torch.get_rng_state())
    assert WalshLowRankLinear.from_linear(nn.Linear(6, 5, bias=False)).bias is None
    conv = nn.Conv2d(6, 5, 1, bias=False)
    assert WalshLowRankConv1x1.from_conv(conv).weight is conv.weight


def test_the_grid_is_that_of_each_batch():
    layer = linear()
    for side in (7, 8, 7, 14):
        x, grad = draw(2, side**2, 6, dtype=torch.float64), draw(2, side**2, 5, seed=1, dtype=torch.float64)
        expected = masked_backward(x, layer.weight, grad, (side, side), walsh_bases(dtype=torch.float64))
        for a, b in zip(backward(layer, x, grad), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_tokens_run_along_rows():
    """A 5x9 grid is not a 9x5 grid: row-major order matters."""
    x, grad = draw(2, 45, 6, dtype=torch.float64), draw(2, 45, 5, seed=1, dtype=torch.float64)
    layer = nn.Linear(6, 5, dtype=torch.float64)
    wide, tall = (
        backward(WalshLowRankLinear.from_linear(layer, grid=g, positions=[(0, 1)]), x, grad)[1]
        for g in ((5, 9), (9, 5))
    )
    assert not torch.allclose(wide, tall)


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "k", "rows"), [((7, 7), 1, 1), ((7, 7), 2, 3), ((7, 7), 4, 10), ((14, 14), 2, 12)])
@pytest.mark.parametrize("padding", ["reflect", "zero", "orthonormal"])
@pytest.mark.parametrize("layout", ["tokens", "nchw"])
def test_only_the_projected_input_is_kept(grid, k, rows, padding, layout):
    batch, c_in = 4, 12
    if layout == "tokens":
        layer = WalshLowRankLinear(c_in, 24, grid=grid, k=k, padding=padding)
        x = draw(batch, grid[0] * grid[1], c_in, seed=1)
    else:
        layer = WalshLowRankConv1x1(c_in, 24, k=k, padding=padding)
        x = draw(batch, c_in, *grid, seed=1)
    assert cost.saved_activation_bytes(layer, x) == 4 * rows * batch * c_in
    kept = saved_tensors(lambda: layer(x.requires_grad_()))
    assert not any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in kept)
    assert sum(t.untyped_storage().nbytes() for t in kept) == layer.weight.nbytes + 4 * rows * batch * c_in


def test_extra_tokens_are_kept_as_they_are_without_the_rest():
    layer = WalshLowRankLinear(12, 24, num_extra_tokens=2)
    assert cost.saved_activation_bytes(layer, draw(4, 51, 12)) == 4 * (3 + 2) * 4 * 12


def test_frozen_parts_keep_and_compute_nothing():
    x = draw(2, 49, 6)
    layer = WalshLowRankLinear(6, 5)
    layer.weight.requires_grad_(False)
    kept = saved_tensors(lambda: layer(x.clone().requires_grad_()))
    assert [t.shape for t in kept] == [layer.weight.shape]
    assert saved_tensors(lambda: layer(x)) == []
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((5,), 98.0))
    layer.weight.requires_grad_(True)
    assert [t.shape for t in saved_tensors(lambda: layer(x))] == [(3 * 2, 6)]


def flops(c_in, c_out, x_needs_grad, **options):
    layer = WalshLowRankLinear(c_in, c_out, bias=False, **options)
    x = draw(2, 49, c_in).requires_grad_(x_needs_grad)
    both = cost.count_flops(layer, x, backward=True).matmul_conv
    return both - cost.count_flops(nn.Linear(c_in, c_out), x.detach()).matmul_conv


@pytest.mark.parametrize("k", [1, 2, 4])
def test_counted_operations_are_the_products_and_thin_transforms(k):
    m = len(walsh_positions(8, "l1", k))
    products = 2 * walsh_backward_cost(49, 64, 96, m=m, transforms=False)
    assert flops(64, 96, True, k=k) == products + 2 * 2 * 49 * m * (64 + 96 + 64)
    first = 2 * walsh_backward_cost(49, 64, 96, m=m, transforms=False, needs_input_grad=False)
    assert flops(64, 96, False, k=k) == first + 2 * 2 * 49 * m * (64 + 96)


# --- models ----------------------------------------------------------------------------------------------------------


def vit(**options):
    return ViT(width=16, depth=2, heads=2, generator=torch.Generator().manual_seed(0), **options)


def gradient(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("class_token", [False, True])
def test_a_whole_model_with_the_full_basis_is_exact(class_token):
    model, x = vit(class_token=class_token).double(), draw(3, 1, 28, 28, dtype=torch.float64)
    expected = gradient(model, x)
    names = apply_walsh_backprop(model, k=15, padding="zero", num_extra_tokens=int(class_token))
    assert names == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    for name, found in gradient(model, x).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-9)


def test_apply_keeps_parameters_optimisers_and_state():
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    apply_walsh_backprop(model)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    model(draw(2, 1, 28, 28)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    plain = vit()
    plain.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(plain(draw(2, 1, 28, 28)), model.eval()(draw(2, 1, 28, 28)))


def test_ties_stay_tied():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    model = nn.Sequential()
    for name, layer in {"fc1": first, "fc2": second, "act": nn.Identity(), "proj": first}.items():
        model.add_module(name, layer)
    assert apply_walsh_backprop(model) == ["fc1", "fc2", "proj"]
    assert model.fc1 is model.proj and model.fc1.weight is model.fc2.weight
    x, grad = draw(2, 49, 6), draw(2, 49, 6, seed=1)
    weight = torch.autograd.grad(model(x), model.fc1.weight, grad)[0]
    parts, inputs = [], [x, model.fc1(x), model.fc2(model.fc1(x))]
    for layer, value in zip((model.proj, model.fc2, model.fc1), reversed(inputs), strict=True):
        grad, part, _ = backward(layer, value.detach(), grad)
        parts.append(part)
    torch.testing.assert_close(weight, sum(parts), rtol=1e-4, atol=1e-4)


def test_which_layers_apply_takes():
    model = nn.ModuleDict(
        {
            "proj": nn.Conv2d(3, 4, 2, stride=2),
            "mlp": nn.ModuleDict({"fc1": nn.Conv2d(4, 8, 1), "fc2": nn.Linear(8, 4), "myfc1": nn.Linear(4, 4)}),
            "fc1": nn.ReLU(),
        }
    )
    assert apply_walsh_backprop(model, grid=(7, 7), num_extra_tokens=1) == ["mlp.fc1", "mlp.fc2"]
    assert isinstance(model["mlp"]["fc1"], WalshLowRankConv1x1)
    assert model["mlp"]["fc2"].grid == (7, 7)
    assert apply_walsh_backprop(model, "mlp.fc2", k=5) == ["mlp.fc2"]  # new settings for a layer replaced before
    assert len(model["mlp"]["fc2"].basis.positions) == 15 and model["mlp"]["fc2"].grid is None
    embedding = nn.ModuleDict({"embed": nn.ModuleDict({"proj": nn.Conv2d(3, 4, 2), "act": nn.ReLU()})})
    with pytest.raises(ValueError, match="kernel_size must be 1"):
        apply_walsh_backprop(embedding, ["embed.proj"])
    with pytest.raises(TypeError, match=r"embed.act must be a linear layer"):
        apply_walsh_backprop(embedding, ["embed.act"])
    with pytest.raises(ValueError, match=r"near names: .*fc2"):
        apply_walsh_backprop(model, ["fc3"])
    with pytest.raises(ValueError, match="near"):
        apply_walsh_backprop(nn.Linear(3, 3))


def test_nothing_is_changed_where_an_option_is_refused():
    model = vit()
    with pytest.raises(ValueError, match="k must be"):
        apply_walsh_backprop(model, k=16)
    assert not any(isinstance(m, WalshLowRankLinear) for m in model.modules())


def test_lora_of_the_part_and_walsh_in_one_model():
    """The two are complementary: adapters on attention, low-rank products in the MLPs."""
    model = vit()
    inject_lora(model, ["qkv", "proj"], r=2)
    assert apply_walsh_backprop(model) == [f"blocks.{i}.mlp.{n}" for i in (0, 1) for n in ("fc1", "fc2")]
    model(draw(2, 1, 28, 28)).sum().backward()
    assert model.blocks[0].attn.qkv.B.grad is not None


def test_a_few_steps_learn():
    """Direction only: with six functions of 49 a two-class problem of low frequency is learnt."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(64) % 2
    x = torch.randn(64, 1, 28, 28, generator=generator) * 0.5
    x[:, :, :14] += y[:, None, None, None]
    model = vit(classes=2)
    apply_walsh_backprop(model, k=3, padding="orthonormal")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
