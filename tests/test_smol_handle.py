"""SMOL on a model: groups, scales, the two phases, state, batch norm, activations."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.compress import (
    SmolActivation,
    apply_smol,
    quantize_pm1,
    recalibrate_batch_norm,
    s_from_bits,
    uniform_qat,
)
from effnb.compress.smol.gate import initial_scale
from effnb.compress.smol.noise import Groups
from effnb.models import SmallCNN, mlp

GRANULARITIES = ["weight", "filter", "input", "layer", ("block", 4), ("block", 5)]
F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def net(seed=0, sizes=(6, 8, 4)):
    return mlp(list(sizes), generator=rng(seed))


def scatter(handle, seed=0, low=1.2, high=6.0):
    """Limits that stand for all sorts of bits."""
    with torch.no_grad():
        for s in handle.precision_parameters():
            s.copy_(s_from_bits(low + (high - low) * torch.rand(s.shape, generator=rng(seed))))
    return handle


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(3, 4), (4, 2, 3, 3)])
def test_groups_expand_and_reduce_are_adjoint(granularity, shape):
    groups = Groups(shape, granularity)
    values = torch.randn(groups.shape, generator=rng(), dtype=F64)
    full = torch.randn(shape, generator=rng(1), dtype=F64)
    spread = groups.expand(values).expand(shape)
    torch.testing.assert_close((spread * full).sum(), (values * groups.reduce(full)).sum())
    sizes = torch.as_tensor(groups.sizes(values), dtype=F64).expand(groups.shape)
    assert float(sizes.sum()) == math.prod(shape)
    torch.testing.assert_close(groups.reduce(torch.ones(shape, dtype=F64)), sizes)


@pytest.mark.parametrize("bad", ["channel", ("block", 0), ("block", 1.5), ("block", True), ("blocks", 2), None])
def test_groups_refuse_unknown_granularities(bad):
    with pytest.raises(ValueError, match="granularity"):
        Groups((3, 4), bad)


def test_blocks_that_do_not_divide_are_refused_when_strict():
    assert Groups((3, 3), ("block", 4)).shape == (3,)
    with pytest.raises(ValueError, match="must divide"):
        apply_smol(net(), granularity=("block", 5), strict=True)
    with pytest.raises(ValueError, match="dimension"):
        Groups((3,), "input")
    empty = Groups((0, 4), "filter")
    assert empty.reduce(torch.zeros(0, 4)).shape == (0, 1) and Groups((0,), ("block", 4)).shape == (0,)


# --- a model under noise ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_model_starts_at_the_initial_bits_and_is_quiet_in_eval(granularity):
    model, x = net(), torch.randn(3, 6, generator=rng())
    handle = apply_smol(model, init_bits=5, granularity=granularity)
    assert handle.average_bits() == 5 and handle.average_bits(real=True) == pytest.approx(5, rel=1e-6)
    assert handle.histogram() == {5: 80} and set(handle.per_layer().values()) == {5.0}
    assert handle.penalty().item() == pytest.approx(80 * 4, rel=1e-5)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
    handle.sample("off")
    assert torch.equal(model(x), model.eval()(x))
    handle.sample("on")
    assert not torch.equal(model(x), model(x))
    with pytest.raises(ValueError, match="mode must be"):
        handle.sample("sometimes")


def test_initial_weights_are_clipped_to_the_range_of_the_codes():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    handle = apply_smol(model, init_bits=8)
    for name, w in handle.weights().items():
        old, a = before[f"{name}.weight"], float(before[f"{name}.weight"].std())
        assert float(handle.gates[name].scale) == pytest.approx(a)
        torch.testing.assert_close(w.detach(), old.clamp(-a * (2 - 2**-7), a * (2 - 2**-7)))


def test_scales():
    w = torch.tensor([[-1.0, 0.5], [3.0, 0.25]])
    assert float(initial_scale(w, "max", limit=0.5)) == 2.0
    assert float(initial_scale(w)) == pytest.approx(float(w.std()))
    assert float(initial_scale(w, 1.5)) == pytest.approx(1.5 * float(w.std()))
    assert initial_scale(w, torch.tensor([[1.0], [2.0]])).tolist() == [[1.0], [2.0]]
    for bad, weight in (("mad", w), (0.0, w), (-1, w), (math.nan, w), (True, w), ("std", 0 * w), ("max", 0 * w)):
        with pytest.raises(ValueError, match="scale"):
            initial_scale(weight, bad)
    with pytest.raises(ValueError, match=r"weight of shape \(2, 2\) must be finite and > 0"):
        apply_smol(nn.Sequential(nn.Linear(2, 2), zeroed(nn.Linear(2, 2))))


def zeroed(layer):
    nn.init.zeros_(layer.weight)
    return layer


def test_clip_keeps_noise_inside_the_range():
    handle = scatter(apply_smol(net(), granularity="input"))
    with torch.no_grad():
        for w in handle.weights().values():
            w.mul_(10)
    handle.clip_()
    for name, gate in handle.gates.items():
        u = handle.weights()[name].detach() / gate.scale
        assert bool((u.abs() <= (2 - gate.limits()) * (1 + 1e-6)).all())
        assert bool((handle.layers[name].weight.abs() <= 2 * gate.scale * (1 + 1e-6)).all())


@pytest.mark.parametrize("noise", ["uniform", "rademacher"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fused_penalty_equals_the_penalty_in_the_loss(granularity, noise):
    """lam in apply_smol and lam * penalty() in the loss give one gradient; Rademacher noise costs three times."""
    x, grads = torch.randn(5, 6, generator=rng()), []
    for lam in (0.0, 0.02):
        handle = scatter(apply_smol(net(), granularity=granularity, lam=lam, noise=noise, generator=rng(7)))
        loss = handle.model(x).square().sum()
        if not lam:
            loss = loss + 0.02 * (3 if noise == "rademacher" else 1) * handle.penalty()
        loss.backward()
        grads.append([p.grad for p in handle.precision_parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_penalty_counts_weights_not_groups():
    bits = {g: scatter(apply_smol(net(), granularity=g), low=3, high=3).penalty().item() for g in GRANULARITIES}
    assert all(value == pytest.approx(160, rel=1e-5) for value in bits.values()), bits


def test_plain_learning_rates_are_divided_by_the_squared_scale_by_construction():
    """SGD on w = a u with lr is SGD on u with lr / a^2."""
    handle = apply_smol(net())
    handle.sample("off")
    x = torch.randn(4, 6, generator=rng())
    gate, w = handle.gates["1"], handle.weights()["1"]
    a, before = gate.scale.clone(), w.detach().clone()
    handle.model(x).square().sum().backward()
    u = (before / a).requires_grad_()
    plain = net()
    other = handle.weights()["3"].detach()
    weights = {"1.weight": a * u, "3.weight": other}
    (grad_u,) = torch.autograd.grad(torch.func.functional_call(plain, weights, x).square().sum(), u)
    torch.optim.SGD([w], lr=0.01).step()
    torch.testing.assert_close(w.detach(), a * (u.detach() - 0.01 / a**2 * grad_u), rtol=1e-4, atol=1e-6)


def test_parameters_are_split_and_decay_on_limits_warns():
    handle = apply_smol(net())
    s, w = handle.precision_parameters(), handle.weight_parameters()
    assert len(s) == 2 and len(w) == 4 and not {map(id, s)} & {map(id, w)}
    assert sum(p.numel() for p in handle.model.parameters()) == sum(p.numel() for p in s + w)

    def one_step(groups):
        handle.model(torch.ones(1, 6)).sum().backward()
        torch.optim.SGD(groups, lr=0.0, weight_decay=1e-4).step()

    with pytest.warns(UserWarning, match="weight_decay=0.0001"):
        one_step(handle.model.parameters())
    handle = apply_smol(net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(handle.param_groups(0.1, weight_decay=1e-4))


# --- bits, freezing, finishing ---------------------------------------------------------------------------------------


def test_bit_rule():
    handle = apply_smol(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        handle.precision_parameters()[0].copy_(s_from_bits(torch.tensor([[1.2, 2.6, 3.0, 11.0]])))
    assert handle.bits()[""].tolist() == [[1, 3, 3, 8]]
    up = copy.deepcopy(handle.gates[""]).group_bits("ceil")
    assert up.tolist() == [[2, 3, 3, 8]]  # a learned 3 stays 3 in spite of rounding
    assert handle.freeze(p_min=2, p_max=7) == (pytest.approx((2 + 3 + 3 + 7) / 4), 1, 1)
    assert handle.average_bits(real=True) == handle.average_bits() and handle.histogram() == {2: 1, 3: 2, 7: 1}


@given(st.integers(0, 20))
@settings(max_examples=10)
def test_ceil_keeps_the_error_within_the_learned_limit(seed):
    handle = scatter(apply_smol(net(seed)), seed, high=7.9)
    limits = {name: gate.limits() for name, gate in handle.gates.items()}
    handle.clip_()
    handle.freeze("ceil")
    for name, gate in handle.gates.items():
        u = handle.weights()[name].detach() / gate.scale
        assert bool(((u - quantize_pm1(u, gate.weight_bits())).abs() <= limits[name] * (1 + 1e-4)).all())


def test_phases_in_order():
    handle = scatter(apply_smol(net()))
    with pytest.raises(RuntimeError, match="call freeze"):
        handle.finalize()
    for bad in ({"rounding": "floor"}, {"p_min": 0}, {"p_max": 9}, {"p_min": 3, "p_max": 2}, {"p_min": 1.5}):
        with pytest.raises(ValueError, match=r"rounding|p_min|p_max"):
            handle.freeze(**bad)
    handle.freeze()
    with pytest.raises(RuntimeError, match="once"):
        handle.freeze()
    x, model = torch.randn(3, 6, generator=rng()), handle.model
    quantised = model.train()(x)
    assert torch.equal(quantised, model.eval()(x))  # no noise in phase II
    bits, scales = handle.bits(), {name: gate.scale.clone() for name, gate in handle.gates.items()}
    assert not any(p.requires_grad for p in handle.precision_parameters())
    plain = handle.finalize()
    assert set(plain.state_dict()) == set(net().state_dict()) and torch.equal(plain(x), quantised)
    for name, p in bits.items():
        u = plain.get_submodule(name).weight / scales[name]
        torch.testing.assert_close(u, quantize_pm1(u, p), rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="finished"):
        handle.average_bits()
    with pytest.raises(ValueError, match="at least one layer"):
        apply_smol(nn.ReLU())


@pytest.mark.parametrize("init_bits", [1.0, 0.0, 16.1, math.nan, math.inf])
def test_init_bits_must_be_above_one(init_bits):
    with pytest.raises(ValueError, match="init_bits must be finite, > 1 and <= 16"):
        apply_smol(net(), init_bits=init_bits)


def test_bad_lam_and_noise():
    with pytest.raises(ValueError, match="lam must be"):
        apply_smol(net(), lam=-1e-6)
    with pytest.raises(ValueError, match="noise must be"):
        apply_smol(net(), noise="gaussian")


def test_average_bits_weigh_weights_not_layers():
    handle = uniform_qat(net(), {"1": 2, "3": 5})
    assert handle.average_bits() == pytest.approx((48 * 2 + 32 * 5) / 80)
    assert handle.cost().index == 0 and handle.cost().total == handle.average_bits()


def test_fine_tuning_trains_only_codes():
    handle = scatter(apply_smol(net()))
    handle.freeze()
    optimizer = torch.optim.SGD(handle.weight_parameters(), lr=0.05)
    x, y = torch.randn(64, 6, generator=rng()), torch.arange(64) % 4
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(handle.model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, gate in handle.gates.items():
        u = handle.layers[name].weight.detach() / gate.scale
        torch.testing.assert_close(u, quantize_pm1(u, gate.weight_bits()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_state_dict_round_trip(frozen):
    first = scatter(apply_smol(net(0), granularity=("block", 3), lam=0.5, noise="rademacher"))
    if frozen:
        first.freeze()
    second = apply_smol(net(1), granularity=("block", 3))
    second.model.load_state_dict(first.model.state_dict())
    x = torch.randn(3, 6, generator=rng())
    assert torch.equal(first.model.eval()(x), second.model.eval()(x))
    assert second.is_frozen == frozen and second.gates["1"].noise == "rademacher" and second.gates["1"].lam == 1.5
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    twin = copy.deepcopy(first.model)
    assert torch.equal(twin(x), first.model(x))


def test_double_models_keep_an_fp32_scale():
    handle = scatter(apply_smol(net()))
    handle.freeze()
    scale = handle.gates["1"].scale.clone()
    handle.model.double()
    assert torch.equal(handle.gates["1"].scale, scale) and scale.dtype == torch.float32
    assert handle.model(torch.zeros(1, 6, dtype=F64)).dtype == F64


def test_runs_with_one_seed_are_equal_and_the_global_stream_is_left_alone():
    model = net()

    def run():
        handle = apply_smol(copy.deepcopy(model), lam=1e-2, generator=rng(4))
        optimizer = torch.optim.Adam(handle.param_groups(1e-2, 0.1))
        for _ in range(5):
            optimizer.zero_grad()
            handle.model(torch.ones(2, 6)).square().sum().backward()
            optimizer.step()
            handle.clip_()
        return torch.cat([p.detach().reshape(-1) for p in handle.model.parameters()])

    before = torch.get_rng_state()
    assert torch.equal(run(), run()) and torch.equal(torch.get_rng_state(), before)


def test_more_price_fewer_bits():
    x = torch.randn(256, 8, generator=rng())
    y = (x.sum(1) > 0).long()
    x[:, 4:] *= 0.03  # half of the inputs are faint: noise on their weights hurts nobody
    found = []
    for lam in (1e-4, 1e-3, 1e-2):
        handle = apply_smol(net(sizes=(8, 16, 2)), lam=lam, generator=rng())
        optimizer = torch.optim.Adam(handle.param_groups(1e-2, 0.1))
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(handle.model(x), y).backward()
            optimizer.step()
            handle.clip_()
        found.append(handle)
    averages = [handle.average_bits(real=True) for handle in found]
    assert averages == sorted(averages, reverse=True) and averages[-1] < 2.5
    first = found[0].bits()["1"].float()
    assert float(first[:, :4].mean()) > float(first[:, 4:].mean()) + 0.2


# --- batch norm and activations --------------------------------------------------------------------------------------


def test_batch_norm_is_recalibrated_and_everything_else_left_alone():
    model, x = SmallCNN(widths=(4, 8), generator=rng()), torch.rand(50, 1, 28, 28, generator=rng())
    model.features[1].eval()
    modes = [m.training for m in model.modules()]
    parameters = [p.clone() for p in model.parameters()]
    assert recalibrate_batch_norm(model, x, batch_size=25) == 2
    assert [m.training for m in model.modules()] == modes and model.features[1].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    halves = [model.features[0](half) for half in x.split(25)]
    torch.testing.assert_close(
        model.features[1].running_mean, torch.stack([h.mean((0, 2, 3)) for h in halves]).mean(0), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="x must hold examples"):
        recalibrate_batch_norm(model, x[:0])
    with pytest.raises(RuntimeError):
        recalibrate_batch_norm(model, torch.zeros(2, 3))
    assert model.features[1].momentum == 0.1 and [m.training for m in model.modules()] == modes


def test_recalibration_draws_no_noise():
    handle = apply_smol(SmallCNN(widths=(4,), generator=rng()), init_bits=2)
    x, found = torch.rand(20, 1, 8, 8, generator=rng()), []
    for _ in range(2):
        recalibrate_batch_norm(handle.model, x)
        found.append(handle.model.features[1].running_mean.clone())
    assert torch.equal(*found)


def test_activations_learn_limits_per_channel():
    x = torch.rand(32, 3, 4, 4, generator=rng())
    layer = SmolActivation(3, init_bits=3, lam=0.25, generator=rng())
    out = layer.train()(x)
    assert float(layer.scale) == pytest.approx(float(x.max()) / 2) and int(layer.count) == 16
    assert bool(((out - x.clamp(max=2 * float(layer.scale) * 0.875)).abs() <= float(layer.scale) * 0.25 + 1e-6).all())
    assert layer.penalty().item() == pytest.approx(3 * 16 * 2, rel=1e-5)
    (out * 0).sum().backward()  # only the penalty, per example
    expected = -0.25 * 16 / math.log(2) * (1 - 0.25)
    torch.testing.assert_close(layer.s.grad, torch.full((3,), expected), rtol=1e-5, atol=1e-6)
    layer.freeze(torch.tensor([1, 2, 3]))
    codes = [len(layer(x)[:, c].unique()) for c in range(3)]
    assert codes[0] == 1 and codes[1] <= 2 and codes[2] <= 4  # non-negative: the upper half of the codes
    with pytest.raises(ValueError, match="3 channels"):
        layer(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="set the scale"):
        SmolActivation(2)(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="channels must be"):
        SmolActivation(0)
    last = SmolActivation(3, dim=-1, generator=rng())
    assert torch.equal(last(x.movedim(1, -1)), SmolActivation(3, dim=3, generator=rng())(x.movedim(1, -1)))


def test_activations_of_a_model_share_the_handle():
    model, x = net(), torch.randn(9, 6, generator=rng())
    handle = apply_smol(model, activations={"2": 8}, lam=1e-3, generator=rng())
    model(x).square().sum().backward()
    assert len(handle.precision_parameters()) == 3 and all(p.grad is not None for p in handle.precision_parameters())
    assert handle.penalty().item() == pytest.approx(80 * 7 + 8 * 7, rel=1e-5)
    handle.freeze()
    frozen = model.eval()(x)
    assert torch.equal(handle.finalize()(x), frozen)
    assert handle.activations["2"].is_frozen
    untouched = net()
    for bad, message in (({"7": 3}, "activations must name"), ({"2": 0}, "channels must be")):
        with pytest.raises(ValueError, match=message):
            apply_smol(untouched, activations=bad)
    assert set(untouched.state_dict()) == set(net().state_dict())


def test_per_filter_scales_search_freeze_and_finish():
    model = net()
    scale = model[1].weight.detach().std(1, keepdim=True)
    handle = uniform_qat(model, 2, exclude=["3"], scale={"1": scale})
    u = model[1].weight.detach() / scale
    torch.testing.assert_close(u, quantize_pm1(u, 2), rtol=1e-5, atol=1e-6)
    handle.model(torch.ones(2, 6)).sum().backward()
    assert handle.weights()["1"].grad is not None
