"""AvaGrad's three paths against the slow oracle, the official rule and pytorch_optimizer; identities of the theory."""

import copy
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
from avagrad_oracles import OfficialRule, SlowOracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.optim import AvaGrad, AvaGradW, DelayedAdam, functional
from effnb.optim.avagrad import fused as fused_module

SHAPES = [(3, 4), (5,), (1,), (2, 1, 3)]
PATHS = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def tensors(seed=0, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def parameters(**options):
    return [nn.Parameter(t) for t in tensors(**options)]


def gradients(step, late=(), **options):
    """Fresh gradients for each step; parameters in ``late`` have none before step 4 nor at step 6."""
    scales = (1.0, 1e-3, 10.0, 0.0)
    fresh = [g * scale for g, scale in zip(tensors(seed=100 + step, **options), scales, strict=False)]
    return [None if i in late and (step < 4 or step == 6) else g for i, g in enumerate(fresh)]


def run(optimizer, params, steps=8, late=(), after_step=None, **options):
    for step in range(1, steps + 1):
        for p, g in zip(params, gradients(step, late, **options), strict=True):
            p.grad = g
        optimizer.step()
        if after_step:
            after_step(step)
    return params


def run_oracle(steps=8, late=(), **options):
    oracle, params = SlowOracle(**options), {i: p.numpy().copy() for i, p in enumerate(tensors())}
    for step in range(1, steps + 1):
        grads = {i: g.numpy() for i, g in enumerate(gradients(step, late)) if g is not None}
        oracle.step(params, grads)
    return params, oracle


def assert_equal(params, expected, **tolerance):
    for p, e in zip(params, expected.values(), strict=True):
        np.testing.assert_allclose(p.detach().double().numpy(), e, **(tolerance or dict(rtol=1e-10, atol=1e-12)))


# ---------------------------------------------------------------- paths against the oracle


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("late", [(), (1,)], ids=["all", "late"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"first_step": "sgd"},
        {"norm": "lagged"},
        {"norm": "lagged", "first_step": "sgd"},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"eps": 1e-8, "maximize": True, "weight_decay": 0.05},
        {"betas": (0.0, 0.0)},
    ],
    ids=str,
)
def test_avagrad_equals_the_oracle(path, late, options):
    params = parameters()
    optimizer = AvaGrad(params, **options, **PATHS[path])
    run(optimizer, params, late=late)
    renamed = {("decoupled" if k == "decoupled_weight_decay" else k): v for k, v in options.items()}
    expected, oracle = run_oracle(late=late, **renamed)
    assert_equal(params, expected)
    assert optimizer.param_groups[0]["gamma"] == pytest.approx(oracle.gamma, rel=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("first_step", ["skip", "sgd"])
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}])
def test_delayed_adam_equals_the_oracle(path, first_step, decay):
    params = parameters()
    run(DelayedAdam(params, lr=0.01, eps=1e-3, first_step=first_step, **decay, **PATHS[path]), params, late=(1,))
    expected, _ = run_oracle(
        late=(1,),
        lr=0.01,
        eps=1e-3,
        norm=None,
        first_step=first_step,
        weight_decay=decay.get("weight_decay", 0.0),
        decoupled=len(decay) == 2,
    )
    assert_equal(params, expected)


@pytest.mark.parametrize("path", ["single", "foreach"])
@pytest.mark.parametrize("first_step", ["skip", "sgd"])
@pytest.mark.parametrize("norm", ["current", "lagged"])
def test_capturable_equals_the_oracle(path, first_step, norm):
    params = parameters()
    lr = torch.tensor(0.1, dtype=torch.float64)
    options = {"first_step": first_step, "norm": norm, "weight_decay": 0.1, "decoupled_weight_decay": True}
    optimizer = AvaGrad(params, lr=lr, capturable=True, **options, **PATHS[path])
    run(optimizer, params, late=(1,))
    expected, oracle = run_oracle(late=(1,), first_step=first_step, norm=norm, weight_decay=0.1, decoupled=True)
    assert_equal(params, expected, rtol=1e-5, atol=1e-6)  # counters and bias corrections are float32
    assert isinstance(optimizer.param_groups[0]["gamma"], torch.Tensor)
    assert float(optimizer.param_groups[0]["gamma"]) == pytest.approx(oracle.gamma, rel=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_float32_is_close_to_the_oracle(path):
    params = parameters(dtype=torch.float32)
    run(AvaGrad(params, weight_decay=0.1, **PATHS[path]), params, dtype=torch.float32)
    assert_equal(params, run_oracle(weight_decay=0.1)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["single", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_sums_the_norm_in_float32(path, dtype):
    params = [nn.Parameter(torch.ones(1000, dtype=dtype))]
    optimizer = AvaGrad(params, lr=1.0, eps=1e-4, **PATHS[path])
    for _ in range(3):  # squares of 1e4 overflow float16
        params[0].grad = torch.full((1000,), 1e-2, dtype=dtype)
        optimizer.step()
    state = optimizer.state[params[0]]
    assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype, params[0].dtype} == {dtype}
    assert math.isfinite(optimizer.param_groups[0]["gamma"])
    # one value everywhere: eta / r = 1, two steps of lr * g
    torch.testing.assert_close(params[0].float(), torch.full((1000,), 0.98), rtol=1e-2, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_complex_parameters_are_pairs_of_real_ones(path):
    real = [torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(6)]
    as_complex, as_real = (nn.Parameter(t) for t in (torch.view_as_complex(real[0]).clone(), real[0].clone()))
    pairs = [(AvaGrad([p], weight_decay=0.1, **PATHS[path]), p) for p in (as_complex, as_real)]
    for g in real[1:]:
        as_complex.grad, as_real.grad = torch.view_as_complex(g), g
        for optimizer, _ in pairs:
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(as_complex.detach()), as_real.detach(), rtol=1e-12, atol=1e-12)


def test_mixed_precision_group_shares_one_norm():
    low, high = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2))
    for path in ("single", "foreach"):
        optimizer = AvaGrad([low, high], **PATHS[path])
        for _ in range(3):
            low.grad, high.grad = torch.ones(3, dtype=torch.bfloat16), torch.full((2,), 3.0)
            optimizer.step()
        expected = math.sqrt(5 / (3 / 1.1**2 + 2 / 3.1**2))
        assert optimizer.param_groups[0]["gamma"] == pytest.approx(expected, rel=1e-2)


@settings(max_examples=30, deadline=None)
@given(
    lr=st.floats(1e-4, 10),
    eps=st.floats(1e-8, 1e3),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.9999),
    decay=st.sampled_from([0.0, 0.01]),
    decoupled=st.booleans(),
    norm=st.sampled_from(["current", "lagged"]),
    first_step=st.sampled_from(["skip", "sgd"]),
    path=st.sampled_from(["single", "foreach"]),
)
def test_any_setting_equals_the_oracle(lr, eps, beta1, beta2, decay, decoupled, norm, first_step, path):
    shared = {"lr": lr, "eps": eps, "betas": (beta1, beta2), "weight_decay": decay, "norm": norm}
    params = parameters()
    run(AvaGrad(params, decoupled_weight_decay=decoupled, first_step=first_step, **shared, **PATHS[path]), params, 4)
    expected, _ = run_oracle(4, decoupled=decoupled, first_step=first_step, **shared)
    assert_equal(params, expected, rtol=1e-7, atol=1e-8)  # large lr amplifies rounding


# ---------------------------------------------------------------- official code, pytorch_optimizer


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("late", [(), (1,)], ids=["all", "late"])
def test_lagged_norm_reproduces_the_official_code(path, decoupled, late):
    ours, theirs = parameters(), parameters()
    options = {"lr": 0.3, "eps": 1e-2, "weight_decay": 0.05}
    cls = AvaGradW if decoupled else AvaGrad
    run(cls(ours, norm="lagged", first_step="skip", **options, **PATHS[path]), ours, 12, late)
    run(OfficialRule(theirs, decoupled=decoupled, **options), theirs, 12, late)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("path", ["single", "foreach"])
def test_lagged_norm_reproduces_pytorch_optimizer(path):
    package = pytest.importorskip("pytorch_optimizer")
    ours, theirs = parameters(), parameters()
    run(AvaGrad(ours, norm="lagged", **PATHS[path]), ours)
    run(package.AvaGrad(theirs), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_lagged_gamma_is_eps_at_the_second_step_and_the_slip_fades():
    gammas = {}
    for norm in ("current", "lagged"):
        params = parameters()
        optimizer, seen = AvaGrad(params, norm=norm), []
        run(optimizer, params, 40, after_step=lambda _, o=optimizer, s=seen: s.append(o.param_groups[0]["gamma"]))
        gammas[norm] = seen
    assert gammas["lagged"][0] == pytest.approx(0.1)  # left behind for step 2
    assert gammas["current"][1] > 0.101
    lag = [gammas["lagged"][t - 1] / gammas["current"][t] for t in (1, 39)]
    assert abs(lag[1] - 1) < 0.05 < abs(lag[0] - 1)


def test_a_checkpoint_of_the_official_code_continues_with_the_lagged_norm():
    theirs = parameters()
    official = OfficialRule(theirs)
    run(official, theirs, 5)
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = AvaGrad(ours, norm="lagged")
    saved = copy.deepcopy(official.state_dict())
    for group in saved["param_groups"]:
        group.pop("decoupled")
    optimizer.load_state_dict(saved)
    run(optimizer, ours)
    run(official, theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- theory


@pytest.mark.parametrize("path", PATHS)
def test_effective_rates_have_root_mean_square_lr(path):
    """p moves by lr * eta/r * mhat; with beta1 = 0 the quotient of move and gradient is the effective rate."""
    params = parameters()
    optimizer = AvaGrad(params, lr=0.7, betas=(0.0, 0.999), eps=1e-3, **PATHS[path])
    for step in range(1, 7):
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, tensors(seed=step), strict=True):
            p.grad = g
        optimizer.step()
        rates = torch.cat([((b - p) / p.grad).detach().flatten() for p, b in zip(params, before, strict=True)])
        assert float(rates.square().mean().sqrt()) == pytest.approx(0.7 if step > 1 else 0.0, rel=1e-9)


def test_large_eps_is_sgd_with_averaged_gradients():
    params, reference = parameters(), [t.clone() for t in tensors()]
    run(AvaGrad(params, lr=0.1, eps=1e8, first_step="sgd"), params)
    means = [torch.zeros_like(w) for w in reference]
    for t in range(1, 9):
        for w, m, g in zip(reference, means, gradients(t), strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            w.sub_(0.1 * m / (1 - 0.9**t))
    for p, w in zip(params, reference, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-6, atol=1e-6)


def test_avagrad_is_delayed_adam_up_to_one_scalar_a_step():
    ours, theirs = parameters(), parameters()
    avagrad, delayed = AvaGrad(ours, lr=0.1, eps=1e-2), DelayedAdam(theirs, eps=1e-2)
    for step in range(1, 9):
        for p, q, g in zip(ours, theirs, gradients(step), strict=True):
            p.grad = q.grad = g
        avagrad.step()
        delayed.param_groups[0]["lr"] = 0.1 * avagrad.param_groups[0]["gamma"]
        delayed.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@given(c=st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_scaling_gradients_and_eps_scales_the_step(c):
    runs = {}
    for name, lr in {"plain": 0.1, "scaled": 0.1, "compensated": 0.1 / c}.items():
        params, factor = parameters(), 1.0 if name == "plain" else c
        optimizer = AvaGrad(params, lr=lr, eps=0.1 * factor)
        for step in range(1, 5):
            for p, g in zip(params, gradients(step), strict=True):
                p.grad = g * factor
            optimizer.step()
        runs[name] = torch.cat([(p.detach() - w).flatten() for p, w in zip(params, tensors(), strict=True)])
    torch.testing.assert_close(runs["compensated"], runs["plain"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(runs["scaled"], c * runs["plain"], rtol=1e-8, atol=1e-10 * max(c, 1))


@pytest.mark.parametrize("eps", [1e-8, 0.1, 100.0])
@pytest.mark.parametrize("shared", [False, True], ids=["one entry", "equal second moments"])
def test_equal_second_moments_make_it_sgd(eps, shared):
    shape = (6,) if shared else (1,)
    w = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer, m, reference = AvaGrad([w], lr=0.1, eps=eps), 0.0, 1.0
    for t, g in enumerate((1.0, -2.0, 0.5, 3.0), start=1):
        w.grad = torch.full(shape, g, dtype=torch.float64)
        optimizer.step()
        m = 0.9 * m + 0.1 * g
        reference -= 0.1 * m / (1 - 0.9**t) * (t > 1)
    assert w.tolist() == pytest.approx([reference] * len(w), rel=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_splitting_a_tensor_changes_nothing_splitting_a_group_does(path):
    whole = nn.Parameter(tensors()[0].flatten())
    halves, groups = ([nn.Parameter(t.clone()) for t in tensors()[0].flatten().split([5, 7])] for _ in range(2))
    optimizers = [
        AvaGrad([whole], **PATHS[path]),
        AvaGrad(halves[::-1], **PATHS[path]),
        AvaGrad([{"params": [p]} for p in groups], **PATHS[path]),
    ]
    for step in range(1, 6):
        g = tensors(seed=step)[0].flatten() * torch.tensor([1.0] * 5 + [20.0] * 7)
        whole.grad = g
        for pair in (halves, groups):
            pair[0].grad, pair[1].grad = (x.clone() for x in g.split([5, 7]))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.cat(list(halves)), whole, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(torch.cat(list(groups)), whole, rtol=1e-3)


def test_only_parameters_with_gradients_count():
    active, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1000))
    alone, together = AvaGrad([active]), AvaGrad([nn.Parameter(torch.ones(3)), idle])
    for optimizer in (alone, together):
        p = optimizer.param_groups[0]["params"][0]
        for step in range(1, 4):
            p.grad = torch.arange(3.0) + step
            optimizer.step()
    assert alone.param_groups[0]["gamma"] == together.param_groups[0]["gamma"]
    assert torch.equal(active, together.param_groups[0]["params"][0])
    assert idle not in together.state


# ---------------------------------------------------------------- the fused path's bookkeeping


def equal_after(change, **options):
    """Run fused and single side by side, calling ``change(optimizer, step)`` after each step."""
    results = []
    for path in ("fused", "single"):
        params = parameters()
        optimizer = AvaGrad(params, **options, **PATHS[path])
        run(optimizer, params, 6, after_step=lambda step, o=optimizer: change(o, step))
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_fused_recomputes_the_norm_when_eps_or_beta2_change():
    def change(optimizer, step):
        optimizer.param_groups[0]["eps"] = 0.1 * step
        optimizer.param_groups[0]["betas"] = (0.9, 0.99 if step > 3 else 0.999)

    equal_after(change)


def test_fused_does_not_trust_sums_from_before_a_foreach_step():
    def change(optimizer, step):
        if optimizer.param_groups[0]["fused"] is not None:
            optimizer.param_groups[0]["fused"] = step % 2 == 0

    equal_after(change)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler: the fused path falls back to foreach")
def test_fused_sum_is_accurate_for_millions_of_equal_entries():
    p = nn.Parameter(torch.zeros(3_000_000))
    optimizer = AvaGrad([p], eps=0.1, fused=True)
    for _ in range(2):
        p.grad = torch.full_like(p, 0.3)
        optimizer.step()
    total = optimizer.state[p]["rate_sum"].item()
    assert total == pytest.approx(3_000_000 / 0.4**2, rel=1e-5)


def test_fused_falls_back_to_foreach_without_a_compiler(monkeypatch):
    def broken(*_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(fused_module, "_unavailable", None)
    monkeypatch.setattr(fused_module, "_ready", set())
    monkeypatch.setattr(fused_module, "compiled_kernel", lambda key: broken)
    params, reference = parameters(), parameters()
    with pytest.warns(UserWarning, match="falls back to foreach.*no C\\+\\+ compiler"):
        run(AvaGrad(params, fused=True), params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it says so once
        run(AvaGrad(parameters(), fused=True), params)
    run(AvaGrad(reference, foreach=True), reference)
    assert all(torch.equal(a, b) for a, b in zip(params, reference, strict=True))


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler: the fused path falls back to foreach")
def test_an_error_of_a_compiled_kernel_is_not_swallowed(monkeypatch):
    params = parameters()
    optimizer = AvaGrad(params, fused=True)
    run(optimizer, params, 1)

    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(fused_module, "compiled_kernel", lambda key: broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(optimizer, params, 1)


def test_functional_form_is_what_the_class_runs():
    params, reference = tensors(), parameters()
    m, v, t = ([torch.zeros_like(p) for p in params] for _ in range(3))
    t = [torch.zeros(()) for _ in params]
    gamma = None
    for step in range(1, 5):
        gamma = functional.avagrad(params, gradients(step), m, v, t, lr=0.2, eps=0.05, norm="lagged", gamma=gamma)
    run(AvaGrad(reference, lr=0.2, eps=0.05, norm="lagged"), reference, 4)
    assert all(torch.equal(a, b) for a, b in zip(params, reference, strict=True))
    assert functional.avagrad([], [], [], [], []) is None


def test_functional_form_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match=r"one length, got \[1, 0, 1, 1, 1\]"):
        one = [torch.ones(1)]
        functional.avagrad(one, [], one, one, one)
    with pytest.raises(TypeError, match="no normaliser, got \\['norm'\\]"):
        functional.delayed_adam(one, one, one, one, one, norm="lagged")


@pytest.mark.parametrize("name", ["avagrad", "delayed_adam"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and >= 0, got -1.0"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be finite and >= 0"),
        ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor with one element"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, got '0.1'"),
        ({"eps": -1.0}, ValueError, "eps must be finite and > 0, got -1.0"),
        ({"eps": 0.0}, ValueError, "eps must be finite and > 0"),
        ({"betas": (5, 0.999)}, ValueError, r"betas must be two numbers in \[0, 1\), got \(5, 0.999\)"),
        ({"weight_decay": -5.0}, ValueError, "weight_decay must be finite and >= 0, got -5.0"),
        ({"first_step": "nonsense"}, ValueError, "first_step must be one of 'skip', 'sgd', got 'nonsense'"),
        ({"foreach": True, "fused": True}, ValueError, "foreach and fused exclude each other"),
    ],
    ids=str,
)
def test_functional_forms_refuse_bad_hyper_parameters_before_any_change(name, options, error, message):
    p, m, v, t = torch.ones(2), torch.zeros(2), torch.zeros(2), torch.tensor(1.0)
    with pytest.raises(error, match=message):
        getattr(functional, name)([p], [torch.ones(2)], [m], [v], [t], **options)
    assert p.tolist() == [1, 1] and not m.any() and not v.any() and t == 1


def test_functional_form_refuses_an_unknown_norm():
    with pytest.raises(ValueError, match="norm must be one of 'current', 'lagged', None, got 'nonsense'"):
        functional.avagrad([], [], [], [], [], norm="nonsense")


def test_paths_agree_on_a_channels_last_network():
    results = []
    for path in PATHS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=torch.channels_last)
        optimizer = AvaGrad(model.parameters(), **PATHS[path])
        for step in range(3):
            x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- entries whose first gradient comes late


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("first_step", ["skip", "sgd"])
def test_an_entry_whose_first_gradient_comes_late_does_not_fly_away(path, first_step):
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = DelayedAdam([w], lr=0.1, betas=(0.0, 0.999), eps=1e-8, first_step=first_step, **PATHS[path])
    places = []
    for grad in ([1.0, 0.0], [1.0, 0.0], [1.0, 2.0], [1.0, 2.0]):
        w.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        places.append(w[1].item())
    assert places[:3] == pytest.approx([0.0, 0.0, -0.2 if first_step == "sgd" else 0.0])
    assert -0.5 < places[3] < places[2]


def test_delayed_adam_with_its_defaults_trains_a_net_with_dead_units():
    losses = {}
    for kind in (torch.optim.Adam, DelayedAdam):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
        optimizer, seen = kind(model.parameters()), []
        for _ in range(100):
            x = torch.randn(4, 20)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses[kind] = sum(seen[-10:]) / 10
    assert losses[DelayedAdam] < 1.5 * losses[torch.optim.Adam]


# ---------------------------------------------------------------- one norm over all groups


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{}, {"first_step": "sgd"}, {"weight_decay": 0.1}, {"capturable": True}], ids=str)
def test_groups_that_differ_in_nothing_are_one_group_under_a_joint_norm(path, options):
    together, apart = parameters(), parameters()
    groups = [{"params": apart[:1]}, {"params": apart[1:3], "lr": 0.1}, {"params": apart[3:]}]
    run(AvaGrad(together, **options, **PATHS[path]), together, late=(1,))
    optimizer = AvaGrad(groups, norm_scope="all", **options, **PATHS[path])
    run(optimizer, apart, late=(1,))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if options.get("capturable") else {"rtol": 1e-10, "atol": 1e-12}
    for a, b in zip(apart, together, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    assert len({float(group["gamma"]) for group in optimizer.param_groups}) == 1


def test_a_joint_norm_takes_each_groups_eps_and_lr():
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    groups = [{"params": params[:1], "eps": 1.0}, {"params": params[1:], "eps": 0.1, "lr": 0.2}]
    optimizer = AvaGrad(groups, lr=0.1, norm_scope="all", first_step="sgd")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()  # v = 0: the rates are 1 / eps
    gamma = math.sqrt(5 / (2 * 1.0**2 + 3 * 10.0**2))
    assert optimizer.param_groups[1]["gamma"] == pytest.approx(gamma)
    torch.testing.assert_close(params[0].detach(), torch.full((2,), -0.1 * gamma, dtype=torch.float64))
    torch.testing.assert_close(params[1].detach(), torch.full((3,), -0.2 * gamma * 10, dtype=torch.float64))


def test_a_joint_norm_needs_the_norm_of_this_step():
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"norm_scope='all' needs norm='current', got norm='lagged'"):
        AvaGrad([w], norm="lagged", norm_scope="all")
    with pytest.raises(ValueError, match="norm_scope must be one of 'group', 'all', got 'both'"):
        AvaGrad([w], norm_scope="both")
    with pytest.raises(ValueError, match=r"norm_scope='all' needs norm='current', got norm=None"):
        DelayedAdam([{"params": [w], "norm_scope": "all"}])
