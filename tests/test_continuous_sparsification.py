"""Continuous sparsification: identities of the gate, its penalty, the schedule, the resets, and folding."""

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.compress import (
    Annealer,
    BetaSchedule,
    ContinuousGate,
    apply_cs,
    check_optimizer,
    fit_s0,
    hard_gate,
    soft_gate,
)
from effnb.compress.continuous_sparsification.gates import gate_scale, soft_gates
from effnb.models import SmallCNN, mlp

scores0 = st.floats(-3, 3)
betas = st.floats(0.1, 300)


def naive_gate(w, s, beta, s0):
    """The published layer's expression, the oracle for the fused gate."""
    scaling = 1.0 / torch.sigmoid(torch.tensor(s0, dtype=w.dtype)) if s0 is not None else 1.0
    return w * (scaling * torch.sigmoid(beta * s))


def tensors(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))


def net(seed=0):
    return mlp([6, 8, 4], generator=torch.Generator().manual_seed(seed))


def scatter_scores(handle, seed=0, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for scores in handle.gate_parameters():
            scores.copy_(torch.randn(scores.shape, generator=generator) * size)
    return handle


# --- the gate as a function ------------------------------------------------------------------------------------------


@given(st.integers(0, 50), betas, st.one_of(st.none(), scores0))
@settings(max_examples=40, deadline=None)
def test_soft_gate_equals_the_published_expression(seed, beta, s0):
    w, s = tensors(seed, 3, 4)
    torch.testing.assert_close(soft_gate(w, s, beta, s0), naive_gate(w, s, beta, s0), rtol=1e-10, atol=1e-12)


@given(st.integers(0, 50), st.floats(0.1, 50), scores0, st.floats(0, 10))
@settings(max_examples=40, deadline=None)
def test_fused_gradients_are_those_of_loss_plus_penalty(seed, beta, s0, lam):
    w, s = tensors(seed, 3, 4)
    target = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    fused = torch.autograd.grad(((soft_gate(w, s, beta, s0, lam) - target) ** 2).sum(), [w, s])
    loss = ((naive_gate(w, s, beta, s0) - target) ** 2).sum()
    penalty = lam * (torch.sigmoid(beta * s) / torch.sigmoid(torch.tensor(s0, dtype=torch.float64))).sum()
    for ours, theirs in zip(fused, torch.autograd.grad(loss + penalty, [w, s]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 20), st.floats(0.5, 5), scores0)
@settings(max_examples=10, deadline=None)
def test_gradcheck(seed, beta, s0):
    w, s = tensors(seed, 2, 3)
    assert torch.autograd.gradcheck(lambda w, s: soft_gate(w, s, beta, s0), (w, s))


def test_many_layers_at_once_equal_one_by_one():
    pairs = [tuple(tensors(i, 2 + i, 3, dtype=torch.float32)) for i in range(3)]
    weights, scores = [w for w, _ in pairs], [s for _, s in pairs]
    together = soft_gates(weights, scores, 3.0, -0.1, 0.2)
    alone = [soft_gate(w, s, 3.0, -0.1, 0.2) for w, s in pairs]
    grads = [torch.autograd.grad(sum(o.sin().sum() for o in outs), weights + scores) for outs in (together, alone)]
    for a, b in zip((*together, *grads[0]), (*alone, *grads[1]), strict=True):
        assert torch.equal(a, b)
    assert soft_gates([], [], 1.0) == ()


@given(scores0, st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_a_fresh_gate_changes_nothing(s0, seed):
    w, _ = tensors(seed, 4, 3)
    s = torch.full_like(w, s0)
    torch.testing.assert_close(soft_gate(w, s, 1.0, s0), w, rtol=1e-14, atol=0)


@given(st.integers(0, 50), scores0)
@settings(max_examples=30, deadline=None)
def test_high_temperature_limit_is_the_hard_gate(seed, s0):
    w, s = tensors(seed, 4, 3)
    limit = soft_gate(w, s, 1e9, s0)
    torch.testing.assert_close(limit, hard_gate(w, s, s0), rtol=1e-12, atol=1e-12)


def test_score_zero_counts_as_pruned():
    w = torch.ones(3)
    assert hard_gate(w, torch.tensor([-1.0, 0.0, 1e-30])).tolist() == [0, 0, 2]


def test_gradients_vanish_where_the_gate_underflows():
    w = torch.ones(2, requires_grad=True)
    s = torch.tensor([-1.0, 1.0], requires_grad=True)
    soft_gate(w, s, 200.0).sum().backward()
    assert w.grad.tolist() == [0.0, 2.0]
    assert s.grad.abs().max() < 1e-20


@given(st.floats(-1, 1), st.floats(0.5, 20), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=40, deadline=None)
def test_one_sgd_step_of_the_penalty_alone_has_its_closed_form(s0, beta, lam, lr):
    gate = ContinuousGate((5,), s0=s0, lam=lam, dtype=torch.float64)
    gate.beta = beta
    (gate(torch.ones(5, dtype=torch.float64)) * 0).sum().backward()
    torch.optim.SGD(gate.parameters(), lr=lr).step()
    sig = 1 / (1 + math.exp(-beta * s0))
    expected = s0 - lr * lam * beta * sig * (1 - sig) * (1 + math.exp(-s0))
    torch.testing.assert_close(
        gate.scores.detach(), torch.full((5,), expected, dtype=torch.float64), rtol=1e-10, atol=0
    )


def test_a_large_penalty_lowers_every_gate_monotonically():
    gate = ContinuousGate((4,), s0=0.2, lam=5.0)
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.01)
    path = []
    for _ in range(20):
        optimizer.zero_grad()
        (gate(torch.ones(4)) * 0).sum().backward()
        optimizer.step()
        path.append(gate.scores.detach().clone())
    assert all((after < before).all() for before, after in itertools.pairwise(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_are_kept(dtype):
    gate = ContinuousGate((2,), dtype=dtype)
    assert gate(torch.ones(2, dtype=dtype)).dtype == gate.scores.dtype == dtype


# --- schedule and search for s0 ------------------------------------------------------------------------------------


@given(st.integers(2, 300), st.floats(1, 1e4))
@settings(max_examples=60, deadline=None)
def test_epoch_schedule_runs_from_one_to_the_end_in_equal_ratios(total, final):
    values = [BetaSchedule(total, final)(k) for k in range(total)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(final, rel=1e-6)
    ratios = [b / a for a, b in itertools.pairwise(values)]
    assert ratios == pytest.approx([final ** (1 / (total - 1))] * (total - 1), rel=1e-9)


def test_step_schedule_reaches_the_end_after_the_last_step():
    schedule = BetaSchedule(50, granularity="step")
    assert (schedule(0), schedule(50)) == (1.0, 200.0)
    assert schedule(25) == pytest.approx(200**0.5)


@given(st.floats(0.05, 0.9))
@settings(max_examples=30, deadline=None)
def test_fit_s0_finds_the_density_of_a_monotone_run(target):
    result = fit_s0(lambda s0: 1 / (1 + math.exp(-20 * s0)), target, rtol=0.05, max_runs=20)
    assert result.density == pytest.approx(target, rel=0.05)
    assert (result.s0, result.density) in result.tried


def test_fit_s0_stops_at_max_runs_with_the_best_so_far():
    result = fit_s0(lambda s0: 0.5 + s0, 0.43, rtol=1e-9, max_runs=5)
    assert len(result.tried) == 5
    assert abs(result.density - 0.43) == min(abs(d - 0.43) for _, d in result.tried)


@pytest.mark.parametrize("granularity", ["step", "epoch"])
def test_annealer_follows_the_schedule_and_saves_the_rewind_point(granularity):
    handle = scatter_scores(apply_cs(net()))
    annealer = Annealer(handle, epochs=3, steps_per_epoch=4, final=64.0, granularity=granularity, checkpoint_epoch=2)
    betas = [handle.beta]
    for step in range(12):
        assert handle.has_checkpoint == (step >= 8)
        annealer(step)
        betas.append(handle.beta)
    ends = [1.0, 4.0, 16.0, 64.0] if granularity == "step" else [1.0, 8.0, 64.0, 64.0]
    assert betas[::4] == pytest.approx(ends)
    assert (len(set(betas)) == 13) if granularity == "step" else (betas[:4] == [1.0] * 4)
    assert len(annealer.trace) == 3 and all(sum(record["histogram"]) == 80 for record in annealer.trace)


# --- a model with gates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: SmallCNN(widths=(4, 8)), lambda: mlp([784, 5, 3])])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_gated_model_starts_as_the_plain_one(make, foreach):
    model, x = make().eval(), torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    before = model(x)
    handle = apply_cs(model, s0=-0.3, foreach=foreach)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert handle.density() == 0.0 and handle.beta == 1.0


def test_foreach_and_layerwise_gates_train_alike():
    results = []
    for foreach in (False, True):
        handle = scatter_scores(apply_cs(net(), lam=1e-2, foreach=foreach))
        optimizer = torch.optim.SGD(handle.param_groups(0.1, 1.0), momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            handle.model(torch.full((2, 6), 0.5 + step)).square().sum().backward()
            optimizer.step()
        results.append([p.detach().clone() for p in handle.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_foreach_forgets_its_weights_even_after_an_exception():
    handle = apply_cs(net(), foreach=True)
    with pytest.raises(RuntimeError):
        handle.model(torch.ones(1, 5))
    assert all(gate._ready is None for gate in handle.gates.values())


@given(betas, st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_density_does_not_depend_on_temperature_or_scale(beta, factor):
    handle = scatter_scores(apply_cs(net()))
    before = handle.density()
    handle.set_beta(beta)
    with torch.no_grad():
        for scores in handle.gate_parameters():
            scores.mul_(factor)
    assert handle.density() == before
    sizes = [mask.numel() for mask in handle.masks().values()]
    assert sum(d * n for d, n in zip(handle.per_layer().values(), sizes, strict=True)) / sum(sizes) == pytest.approx(
        before
    )


def test_penalty_and_soft_density_by_hand():
    handle = apply_cs(nn.Linear(3, 2), s0=0.0, lam=0.5)
    assert handle.penalty() == pytest.approx(0.5 * 2 * 0.5 * 6)
    assert handle.density(hard=False) == pytest.approx(0.5)
    assert handle.undecided() == 1.0


@given(st.floats(1.5, 300), st.floats(-0.2, 0.2))
@settings(max_examples=30, deadline=None)
def test_reset_of_the_paper(beta, s0):
    handle = scatter_scores(apply_cs(net(), s0=s0))
    before = [s.detach().clone() for s in handle.gate_parameters()]
    handle.set_beta(beta)
    handle.end_round()
    assert handle.beta == 1.0
    for old, new in zip(before, handle.gate_parameters(), strict=True):
        torch.testing.assert_close(new.detach(), (old * beta).clamp(max=s0))
        assert (new <= s0).all()
        suppressed = old * beta < s0
        torch.testing.assert_close(new[suppressed].detach(), old[suppressed] * beta)


def test_reset_of_the_published_code_does_not_freeze_what_was_suppressed():
    handle = scatter_scores(apply_cs(net(), s0=0.05))
    before = [s.detach().clone() for s in handle.gate_parameters()]
    handle.set_beta(200.0)
    handle.end_round(reset="official")
    assert all(
        torch.equal(new.detach(), old.clamp(max=0.05))
        for old, new in zip(before, handle.gate_parameters(), strict=True)
    )


def test_suppressed_gates_stay_closed_through_the_next_round():
    handle = scatter_scores(apply_cs(net(), s0=0.05), size=0.3)
    handle.set_beta(200.0)
    closed = {name: (gate.scores < -0.1) for name, gate in handle.gates.items()}
    handle.end_round()
    optimizer = torch.optim.SGD(handle.param_groups(0.1))
    for _ in range(5):
        optimizer.zero_grad()
        handle.model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
    assert all(not (mask & closed[name]).any() for name, mask in handle.masks().items())


def test_checkpoint_and_rewind_restore_everything_but_the_gates():
    model = SmallCNN(widths=(3, 4))
    handle = scatter_scores(apply_cs(model))
    handle.checkpoint()
    saved, scores = handle.plain_state(), [s.detach().clone() for s in handle.gate_parameters()]
    optimizer = torch.optim.SGD(handle.weight_parameters(), lr=0.5)
    model(torch.rand(4, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(handle.plain_state()["features.1.running_mean"], saved["features.1.running_mean"])
    handle.rewind()
    assert all(torch.equal(v, saved[k]) for k, v in handle.plain_state().items())
    assert set(saved) == set(SmallCNN(widths=(3, 4)).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(scores, handle.gate_parameters(), strict=True))


def test_state_dict_round_trip_is_bit_identical():
    first, second = scatter_scores(apply_cs(net(0), s0=-0.1, lam=1e-3)), apply_cs(net(1))
    first.set_beta(37.0)
    second.model.load_state_dict(first.model.state_dict())
    x = torch.rand(3, 6)
    assert torch.equal(first.model(x), second.model(x))
    gate, other = first.gates["1"], second.gates["1"]
    assert (other.beta, other.lam, other.s0, other.scale) == (gate.beta, gate.lam, gate.s0, gate.scale)
    plain = ContinuousGate((2,), scale_init=False)
    plain.load_state_dict(ContinuousGate((2,), scale_init=False).hard().state_dict())
    assert plain.is_hard and plain.scale == 1.0


# --- the ticket ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: SmallCNN(widths=(4, 8)), lambda: mlp([64, 9, 3])])
@pytest.mark.parametrize("density", [None, 0.2])
def test_finalize_folds_bit_for_bit_and_leaves_a_plain_model(make, density):
    model, x = make().eval(), torch.rand(2, 1, 8, 8)
    names = set(model.state_dict())
    handle = scatter_scores(apply_cs(model, s0=-0.1))
    handle.hard(density=density)
    ticket = model(x)
    plain = handle.finalize()
    assert plain is model and set(model.state_dict()) == names
    assert torch.equal(model(x), ticket)
    assert not any(isinstance(m, ContinuousGate) for m in model.modules())
    with pytest.raises(RuntimeError, match="finished"):
        handle.density()


@given(st.floats(0.02, 1.0))
@settings(max_examples=25, deadline=None)
def test_exact_density(density):
    handle = scatter_scores(apply_cs(net()))
    handle.hard(density=density)
    total = sum(mask.numel() for mask in handle.masks().values())
    assert round(handle.density() * total) == max(1, round(density * total))
    kept = torch.cat([s[s > 0] for s in handle.gate_parameters()])
    assert len(kept) == round(handle.density() * total)


def test_exact_density_keeps_the_largest_scores():
    handle = scatter_scores(apply_cs(nn.Linear(10, 10)))
    scores = handle.gate_parameters()[0].detach().clone()
    handle.hard(density=0.13)
    assert torch.equal(handle.masks()[""], scores >= scores.flatten().topk(13).values[-1])


def test_folding_keeps_the_function_and_the_mask_through_fine_tuning():
    handle = scatter_scores(apply_cs(net(), s0=-0.1))
    x, masks = torch.rand(4, 6), handle.masks()
    handle.hard()
    before = handle.model(x)
    handle.fold()
    torch.testing.assert_close(handle.model(x), before, rtol=1e-6, atol=1e-6)
    assert all(gate.scale == 1.0 for gate in handle.gates.values())
    optimizer = torch.optim.SGD(handle.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(handle.model(x), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    model = handle.finalize()
    assert all(torch.equal(model.get_submodule(n).weight != 0, mask) for n, mask in masks.items())


def test_scale_is_needed_when_folding_without_normalisation():
    handle = scatter_scores(apply_cs(net(), s0=-0.1))
    raw = {name: w.detach().clone() for name, w in handle.weights().items()}
    masks, model = handle.masks(), handle.finalize()
    for name, mask in masks.items():
        torch.testing.assert_close(model.get_submodule(name).weight, raw[name] * mask * gate_scale(-0.1))


def test_dead_layers_are_named_and_min_keep_saves_them():
    handle = apply_cs(net(), s0=-0.1)
    with pytest.warns(UserWarning, match="layer '1' is dead"):
        handle.hard()
    handle = scatter_scores(apply_cs(net(), s0=-0.1, min_keep=2))
    with torch.no_grad():
        handle.gate_parameters()[1].sub_(10)
    largest = handle.gate_parameters()[1].flatten().topk(2).indices
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.hard()
    mask = handle.masks()["3"]
    assert int(mask.sum()) == 2 and mask.flatten()[largest].all()
    handle.hard(density=0.05)
    assert all(int(mask.sum()) >= 2 for mask in handle.masks().values())


def test_hard_gates_get_no_gradient_and_the_mask_is_used():
    handle = scatter_scores(apply_cs(net()))
    handle.hard()
    handle.model(torch.rand(2, 6)).sum().backward()
    assert all(s.grad is None for s in handle.gate_parameters())
    for name, weight in handle.weights().items():
        assert (weight.grad[~handle.masks()[name]] == 0).all()
    handle.hard(False)
    assert not handle.is_hard


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_gate(torch.ones(2), torch.ones(2), 0.0), "beta must be finite and > 0"),
        (lambda: soft_gate(torch.ones(2), torch.ones(2), float("inf")), "beta must be finite and > 0"),
        (lambda: soft_gate(torch.ones(2), torch.ones(2), 1.0, 0.0, -1e-9), "lam must be finite and >= 0"),
        (lambda: soft_gate(torch.ones(2), torch.ones(3), 1.0), "scores must have the weight's shape"),
        (lambda: soft_gates([torch.ones(2)], [], 1.0), "one tensor per weight"),
        (lambda: gate_scale(float("nan")), "s0 must be finite"),
        (lambda: gate_scale(-16.0), "s0 must be finite and >= -15"),
        (lambda: BetaSchedule(1), "total must be >= 2"),
        (lambda: BetaSchedule(3, final=0.5), "final must be finite and >= 1"),
        (lambda: BetaSchedule(3, granularity="batch"), "granularity must be one of"),
        (lambda: BetaSchedule(3)(3), "index must be finite, >= 0 and <= 2"),
        (lambda: Annealer(apply_cs(net()), 0, 5), "epochs must be >= 1"),
        (lambda: Annealer(apply_cs(net()), 2, 5, checkpoint_epoch=3), "checkpoint_epoch must be from 1 to 2"),
        (lambda: fit_s0(lambda s: 0.5, 1.5), "target must be finite, > 0 and < 1"),
        (lambda: fit_s0(lambda s: 0.5, 0.2), "target must lie between"),
        (lambda: fit_s0(lambda s: 0.5, 0.5, low=1, high=0), "high must be finite and > 1"),
        (lambda: fit_s0(lambda s: 0.5, 0.5, max_runs=1), "max_runs must be >= 2"),
        (lambda: apply_cs(net(), s0=float("inf")), "s0 must be finite"),
        (lambda: apply_cs(net(), lam=-1.0), "lam must be finite and >= 0"),
        (lambda: apply_cs(net(), min_keep=-1), "min_keep must be >= 0"),
        (lambda: apply_cs(nn.ReLU()), "include must match"),
        (lambda: apply_cs(net(), exclude=["*"]), "include must match"),
        (lambda: apply_cs(apply_cs(net()).model), "parametrised already"),
        (lambda: apply_cs(net(), exclude=["3", "typo"]), r"exclude must match .* got 'typo'; near names"),
        (lambda: apply_cs(SmallCNN(widths=(3, 4)), exclude=["features"]), r"exclude .* got 'features'; near names"),
        (lambda: hard_gate(torch.ones(1), torch.tensor([math.nan])), "scores must not hold NaN"),
        (lambda: Annealer(apply_cs(net()), 2, 0), "steps_per_epoch must be >= 1"),
        (lambda: apply_cs(net()).set_beta(-1.0), "beta must be finite and > 0"),
        (lambda: apply_cs(net()).end_round("soft"), "reset must be one of"),
        (lambda: apply_cs(net()).hard(density=0.0), "density must be finite, > 0 and <= 1"),
        (lambda: apply_cs(nn.Sequential(nn.LazyLinear(3))), "must be initialised"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_call_leaves_the_model_alone():
    model = net()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="s0"):
        apply_cs(model, s0=float("nan"))
    assert list(model.state_dict()) == keys


def test_wrong_order_of_calls():
    handle = scatter_scores(apply_cs(net()))
    with pytest.raises(RuntimeError, match="checkpoint"):
        handle.rewind()
    handle.checkpoint()
    handle.hard()
    with pytest.raises(RuntimeError, match="soft gates"):
        handle.end_round()
    handle.rewind()
    handle.fold()
    with pytest.raises(RuntimeError, match="lose the scale"):
        handle.rewind()
    with pytest.raises(RuntimeError, match="not possible after fold"):
        handle.hard(False)


def test_shared_weights_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="share weights"):
        apply_cs(model)


def test_exclude_by_name_pattern_and_type():
    model = SmallCNN(widths=(3, 4, 5))
    assert list(apply_cs(model, exclude=["head", "features.0"]).gates) == ["features.4", "features.8"]
    assert list(apply_cs(SmallCNN(widths=(3, 4)), exclude=[nn.Linear]).gates) == ["features.0", "features.4"]


def test_exclude_takes_one_item_and_either_name_of_a_shared_layer():
    assert list(apply_cs(net(), exclude="1").gates) == ["3"]
    assert list(apply_cs(net(), exclude=[nn.Conv3d]).gates) == ["1", "3"]  # a type may match nothing
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(3, 3)})
    assert list(apply_cs(model, exclude=["b"]).gates) == ["c"]
    with pytest.raises(TypeError, match="exclude must hold names and types"):
        apply_cs(net(), exclude=[3])


@pytest.mark.parametrize("foreach", [False, True])
def test_a_copy_of_the_model_has_gates_of_its_own(foreach):
    model, x = net(), torch.ones(2, 6)
    handle = scatter_scores(apply_cs(model, foreach=foreach))
    twin, before = copy.deepcopy(model), model(x)
    handle.finalize(density=0.5)
    assert torch.equal(twin(x), before)
    twin(x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_a_diverged_search_has_no_ticket():
    handle = scatter_scores(apply_cs(net()))
    with torch.no_grad():
        handle.gate_parameters()[1].fill_(math.nan)
    with pytest.raises(ValueError, match="diverged"):
        handle.hard()
    assert not handle.is_hard


def test_a_finished_handle_says_so():
    handle = scatter_scores(apply_cs(net()))
    handle.checkpoint()
    handle.finalize()
    calls = (handle.weights, handle.masks, handle.plain_state, handle.rewind, handle.penalty, handle.finalize)
    for call in (*calls, handle.end_round, handle.gate_parameters, lambda: handle.beta, lambda: handle.set_beta(2.0)):
        with pytest.raises(RuntimeError, match="finished"):
            call()


def test_weight_decay_on_gates_warns_once_by_itself():
    handle = apply_cs(net())
    optimizer = torch.optim.SGD(handle.model.parameters(), lr=0.1, weight_decay=1e-4)
    handle.model(torch.ones(2, 6)).sum().backward()
    with pytest.warns(UserWarning, match="decision boundary"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_param_groups_pass_the_check():
    handle = apply_cs(net())
    optimizer = torch.optim.SGD(handle.param_groups(0.1, 20.0, weight_decay=1e-4))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 20.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_optimizer(handle, optimizer)
    assert not check_optimizer(handle, torch.optim.SGD([torch.zeros(1)], lr=1.0))
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert count == sum(p.numel() for p in handle.model.parameters())


def test_mode_and_requires_grad_are_untouched():
    model = net().eval()
    model[1].bias.requires_grad_(False)
    handle = apply_cs(model)
    assert not any(m.training for m in model.modules())
    handle.finalize(density=0.5)
    assert not model[1].bias.requires_grad and model[1].weight.requires_grad
