"""What all proxies promise alike: no trace, no order, the same alone and together, clear errors."""

import copy
import functools
import itertools
import math
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proxy_oracles import NETS, batch, logits, seeded
from torch import nn
from torch.nn import functional as F

from effnb.nas import available_proxies, nb201, score_all
from effnb.nas import proxies as P
from effnb.nas.nb201 import is_connected

BATCHES = [batch(seed=0), batch(seed=1)]
PROXIES = available_proxies()
SHARED = ["grad_norm", "snip", "plain", "fisher", "naswot", "zico"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks so small are slower on several threads, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def score(name, model, **options):
    """One proxy on the two batches; NN-Mass has cells to count."""
    if name == "nn_mass":
        options = {"cells": [(0.5, 4, 3)], **options}
    data = BATCHES if PROXIES[name].batches > 1 else BATCHES[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PROXIES[name].function(model, data, **options)


def generators():
    numbers = np.random.get_state()[1].tolist()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numbers, random.getstate()


def snapshot(model):
    """Everything of a model that a proxy could leave changed."""
    return {
        "state": {name: (value.clone(), value.dtype) for name, value in model.state_dict().items()},
        "tensors": {name: (id(p), p.requires_grad, p.dtype, p._version) for name, p in model.named_parameters()},
        "buffers": {name: (id(b), b._version) for name, b in model.named_buffers()},
        "grads": {n: None if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "hooks": [
            [len(getattr(m, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            for m in model.modules()
        ],
        "tensor hooks": [bool(p._backward_hooks) for p in model.parameters()],
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def used(net):
    """A network that is in the middle of things: mixed modes, a frozen weight, gradients, a hook, moved statistics."""
    model = NETS[net]()
    F.cross_entropy(logits(model(BATCHES[0][0])), BATCHES[0][1]).backward()
    for i, module in enumerate(model.modules()):
        module.train(i % 3 == 0)
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda module, args, out: None)
    return model


# ---- no trace --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("net", ["nano", "twisted", "grouped"])
@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_leaves_no_trace(name, net):
    model = used(net)
    x = BATCHES[0][0].clone()
    before, drawn, precision = snapshot(model), generators(), torch.get_default_dtype()
    first = score(name, model)
    assert same(snapshot(model), before) and generators() == drawn and torch.get_default_dtype() == precision
    assert torch.equal(BATCHES[0][0], x) and not BATCHES[0][0].requires_grad and BATCHES[0][0].grad is None
    assert score(name, model) == first
    with torch.no_grad():
        assert score(name, model) == first


class Bomb(nn.Module):
    """Lets everything through until it is armed; then fails in the forward or in the backward pass."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("bang")

    armed = ""

    def forward(self, x):
        if self.armed == "forward":
            torch.rand(1)
            raise RuntimeError("bang")
        return self.Backward.apply(x) if self.armed == "backward" else x


@pytest.mark.parametrize("armed", ["forward", "backward"])
@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_leaves_no_trace_after_an_exception(name, armed):
    bomb = Bomb()
    body = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), bomb, nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)).eval()
    bomb.armed = armed
    before, drawn = snapshot(model), generators()
    fails = armed == "forward" and name not in ("count_params", "l2_norm", "nn_mass")
    fails |= armed == "backward" and name in (
        "grad_norm", "snip", "plain", "fisher", "grasp", "synflow", "jacob_cov", "ntk_condition", "grad_sign", "knas",
        "zico", "zico_floor",
    )  # fmt: skip
    if fails:
        with pytest.raises(RuntimeError, match="bang"):
            score(name, model)
    else:
        score(name, model)
    assert same(snapshot(model), before) and generators() == drawn


@settings(max_examples=8)
@given(st.permutations(sorted(PROXIES)))
def test_the_order_of_proxies_does_not_matter(order):
    model = NETS["twisted"]()
    found = {name: score(name, model) for name in order}
    assert found == alone()


@functools.cache
def alone():
    """Each on a network of its own; not at import, where the number of threads is another."""
    return {name: score(name, NETS["twisted"]()) for name in sorted(PROXIES)}


@pytest.mark.parametrize("name", PROXIES)
def test_double_precision_stays_and_agrees(name):
    single = NETS["cnn"]()
    double = copy.deepcopy(single).double()
    pairs = [(x.double(), y) for x, y in BATCHES]
    options = {"cells": [(1.0, 1, 1)]} if name == "nn_mass" else {}
    found = PROXIES[name].function(double, pairs if PROXIES[name].batches > 1 else pairs[0], **options)
    assert all(p.dtype == torch.float64 for p in double.parameters())
    if name not in ("zen_score", "zico", "zico_floor", "grad_sign", "nn_mass"):  # random draws, exact zeros
        assert found == pytest.approx(score(name, single), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["grad_norm", "naswot", "grasp", "ntk_condition", "zen_score", "jacob_cov"])
def test_seeds_rule_what_a_network_draws(name):
    model = NETS["grouped"]()
    if name == "zen_score":
        model = NETS["nano"]()
    assert score(name, model, seed=1) == score(name, model, seed=1) != score(name, model, seed=2)
    torch.manual_seed(5)
    drawn = score(name, model, seed=None)
    torch.rand(0 if name == "zen_score" else 3)
    torch.manual_seed(5)
    assert score(name, model, seed=None) == drawn


# ---- together --------------------------------------------------------------------------------------------------------
class Counted(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.calls = body, 0

    def forward(self, x):
        self.calls += 1
        return self.body(x)


@pytest.mark.parametrize("net", [n for n in NETS if n != "mlp"])
def test_scores_together_are_those_alone(net):
    names = [n for n in PROXIES if n not in ("nn_mass",) and not (n == "zen_score" and net == "mlp")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = score_all(NETS[net](), BATCHES, names, seed=3)
    assert list(together) == names
    assert together == {name: score(name, NETS[net](), seed=3) for name in names}


def test_the_zoo_takes_one_pass_a_batch():
    model = Counted(NETS["nano"]())
    found = score_all(model, BATCHES, SHARED)
    assert model.calls == 2
    assert found == {name: score(name, NETS["nano"]()) for name in SHARED}
    model.calls = 0
    score_all(model, BATCHES, ["naswot"])
    assert model.calls == 1


def test_more_batches_are_for_zico():
    batches = [*BATCHES, batch(seed=2)]
    found = score_all(NETS["nano"](), batches, ["zico", "zico_floor", "snip"])
    assert found["zico"] == P.zico(NETS["nano"](), batches, seed=0) and found["snip"] == score("snip", NETS["nano"]())


def test_options_reach_their_proxy():
    model = NETS["nano"]()
    options = {"fisher": {"broadcast": False}, "zen_score": {"repeats": 2}, "zico": {"variant": "paper"}}
    found = score_all(model, BATCHES, ["fisher", "zen_score", "zico", "snip"], options=options)
    assert found == {
        "fisher": P.fisher(model, BATCHES[0], broadcast=False),
        "zen_score": P.zen_score(model, BATCHES[0], repeats=2),
        "zico": P.zico(model, BATCHES, variant="paper", seed=0),
        "snip": P.snip(model, BATCHES[0]),
    }


def test_another_loss():
    def squares(output, y):
        return F.mse_loss(output, F.one_hot(y, 10).to(output.dtype))

    model = NETS["cnn"]()
    found = score_all(model, BATCHES, ["snip", "grasp", "grad_sign"], loss_fn=squares)
    assert found["snip"] == P.snip(model, BATCHES[0], loss_fn=squares) != P.snip(model, BATCHES[0])
    assert found["grad_sign"] == P.grad_sign(model, BATCHES[0], loss_fn=squares)


def test_the_registry_tells_direction_batches_and_labels():
    assert [n for n, proxy in PROXIES.items() if not proxy.higher_is_better] == ["ntk_condition"]
    assert [n for n, proxy in PROXIES.items() if proxy.batches > 1] == ["zico", "zico_floor"]
    assert all(getattr(P, name) is proxy.function for name, proxy in PROXIES.items())
    for name in (n for n, proxy in PROXIES.items() if not proxy.labels and n != "nn_mass"):
        assert PROXIES[name].function(NETS["nano"](), BATCHES[0][0]) == score(name, NETS["nano"]())


# ---- networks with holes ---------------------------------------------------------------------------------------------
DEAD = [c for c in ("000000", "300000", "001011", "303000", "100001")]


@pytest.mark.parametrize("edges", DEAD)
def test_disconnected_cells_have_scores(edges):
    assert not is_connected(edges)
    model = nb201.build_cell_net(edges, channels=4, cells=1, in_channels=1, generator=seeded(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = score_all(model, BATCHES, list(PROXIES))
    assert not any(map(math.isnan, found.values())) and not any(v == math.inf for v in found.values())
    lowest = {name for name, value in found.items() if value == -math.inf}
    # A ReLU on an edge that leads nowhere has codes all the same.
    dead_end = edges in ("300000", "303000")
    assert lowest == {"jacob_cov", "zen_score"} | (set() if dead_end else {"naswot"})
    assert found["ntk_condition"] == 1e5 and found["linear_regions"] == (6 if dead_end else 1)
    assert found["synflow"] == found["grad_norm"] == found["zico"] == 0


def test_weights_outside_the_graph_have_gradient_zero():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            return self.used(x).relu()

    model, pair = Spare(), (torch.randn(5, 3), torch.arange(5) % 4)
    step = P.GradientPass(model, pair)
    assert not step.grads["spare"].any() and step.grads["used"].any() and step.reached
    for name in ("grad_norm", "snip", "plain", "fisher", "grasp", "synflow", "grad_sign", "ntk_condition", "knas"):
        whole = getattr(P, name)(model, pair)
        assert math.isfinite(whole)
        alone = nn.Sequential(model.used, nn.ReLU())
        assert whole == pytest.approx(getattr(P, name)(alone, pair), rel=1e-6)


def test_a_loss_without_any_weight_scores_zero():
    class Constant(nn.Linear):
        def forward(self, x):
            return torch.zeros(len(x), 2)

    model, pair = Constant(3, 2), (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    for name in ("grad_norm", "snip", "plain", "fisher", "grasp", "synflow", "grad_sign", "knas"):
        assert getattr(P, name)(model, pair) == 0
    with pytest.raises(ValueError, match="receives a gradient"):
        score_all(model, [pair, pair], ["zico"])


def test_frozen_weights_do_not_count():
    model = NETS["cnn"]()
    whole = P.GradientPass(model, BATCHES[0])
    model.head.weight.requires_grad_(False)
    part = P.GradientPass(model, BATCHES[0])
    assert set(whole.weights) - set(part.weights) == {"head"}
    assert part.snip() == pytest.approx(whole.snip() - float((model.head.weight * whole.grads["head"]).abs().sum()))
    model.requires_grad_(False)
    for name in ("grad_norm", "snip", "plain", "fisher", "grasp", "grad_sign", "l2_norm", "ntk_condition", "knas"):
        with pytest.raises(ValueError, match="that requires a gradient, it has none"):
            getattr(P, name)(model, BATCHES[0])
    for name in ("synflow", "jacob_cov", "naswot", "zen_score", "linear_regions", "count_macs"):
        assert getattr(P, name)(model, BATCHES[0]) == score(name, NETS["cnn"]())


def test_a_tied_weight_counts_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    model, pair = Tied(), (torch.randn(5, 3), torch.arange(5) % 3)
    loss = F.cross_entropy(model(pair[0]), pair[1])
    (grad,) = torch.autograd.grad(loss, [model.a.weight])
    assert P.snip(model, pair) == pytest.approx((model.a.weight * grad).abs().sum().item(), rel=1e-5)
    flow = model.a.weight.detach().abs().double()
    r = (flow @ flow @ torch.ones(3, dtype=torch.float64)).sum()
    assert P.synflow(model, pair) == pytest.approx(2 * float(r))


# ---- bad input -------------------------------------------------------------------------------------------------------
X, Y = BATCHES[0]


@pytest.mark.parametrize("name", ["jacob_cov", "naswot", "ntk_condition"])
def test_one_sample_is_too_few(name):
    with pytest.raises(ValueError, match="batch must hold at least 2 samples, got 1"):
        getattr(P, name)(NETS["cnn"](), (X[:1], Y[:1]))


@pytest.mark.parametrize("name", ["naswot", "linear_regions"])
def test_a_network_without_a_relu(name):
    with pytest.raises(ValueError, match="model must use a ReLU"):
        getattr(P, name)(nn.Sequential(nn.Linear(12, 3), nn.Tanh()), X)
    with pytest.raises(ValueError, match="model must use a ReLU"):
        score_all(nn.Sequential(nn.Flatten(), nn.Linear(144, 10), nn.GELU()), BATCHES, ["snip", name])


def test_zen_needs_a_feature_map_but_no_norm():
    with pytest.raises(ValueError, match=r"must make a feature map \(batch, channels, h, w\), its output is \(6, 10\)"):
        P.zen_score(nn.Linear(5, 10), torch.zeros(6, 5))
    assert math.isfinite(P.zen_score(nn.Conv2d(1, 2, 3), X))


LABELLED = [name for name, proxy in PROXIES.items() if proxy.labels and proxy.batches == 1]
WITH_DATA = [name for name, proxy in PROXIES.items() if name not in ("count_params", "l2_norm", "nn_mass")]


@pytest.mark.parametrize("name", [n for n in WITH_DATA if PROXIES[n].batches == 1])
@pytest.mark.parametrize(
    "pair, error, message",
    [
        ((X[:0], Y[:0]), ValueError, "batch must hold at least"),
        ((X.to(torch.complex64), Y), TypeError, "real floating-point inputs, got torch.complex64"),
        ((X.long(), Y), TypeError, "real floating-point inputs, got torch.int64"),
        ((X / 0, Y), ValueError, "batch must hold finite inputs"),
        ((X.numpy(), Y), TypeError, "batch must be a tensor"),
        (None, TypeError, "batch must be a"),
        ((), TypeError, "batch must be a"),
    ],
)
def test_bad_batches(name, pair, error, message):
    with pytest.raises(error, match=message):
        getattr(P, name)(NETS["cnn"](), pair)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize(
    "pair, error, message",
    [
        ((X, Y[:-1]), ValueError, r"one label a sample: 6 samples, labels shape \(5,\)"),
        ((X, None), ValueError, "one label a sample: 6 samples, labels NoneType"),
        (X, TypeError, "batch must be a pair"),
        ((X, Y + 9), ValueError, r"labels must be in 0..9 for 10 outputs, got 9..14"),
        ((X, Y - 1), ValueError, r"labels must be in 0..9 for 10 outputs, got -1..4"),
    ],
)
def test_bad_labels(name, pair, error, message):
    with pytest.raises(error, match=message):
        getattr(P, name)(NETS["cnn"](), pair)


@pytest.mark.parametrize("name", PROXIES)
def test_bad_models(name):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        score(name, lambda x: x)
    if PROXIES[name].batches == 1:
        with pytest.raises(TypeError, match=r"model must hold real numbers, weight is torch\.complex64"):
            score(name, nn.Linear(3, 2, dtype=torch.complex64))


@pytest.mark.parametrize("name", LABELLED)
def test_losses_must_be_one_finite_number(name):
    model = NETS["cnn"]()
    with pytest.raises(ValueError, match=r"one finite number, got shape \(6,\)"):
        getattr(P, name)(model, BATCHES[0], loss_fn=lambda out, y: F.cross_entropy(out, y, reduction="none"))
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="one finite number, got nan"):
        getattr(P, name)(model, BATCHES[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: P.synflow(m, X, bn="drop"), "bn must be one of 'identity', 'keep', got 'drop'"),
        (lambda m: P.zen_score(m, X, variance="true"), "variance must be one of 'running', 'batch', got 'true'"),
        (lambda m: P.zen_score(m, X, repeats=0), "repeats must be >= 1, got 0"),
        (lambda m: P.knas(m, X, of="weights"), "of must be one of 'logits', 'loss', got 'weights'"),
        (lambda m: P.nn_mass(m, X), "model must have cells with skip links"),
        (lambda m: P.nn_mass(m, cells=[(1.5, 4, 3)]), "density of a cell must be finite, >= 0 and <= 1, got 1.5"),
        (lambda m: P.nn_mass(m, cells=[(0.5, 0, 3)]), "width of a cell must be finite and > 0, got 0"),
        (lambda m: score_all(m, BATCHES, ["snap"]), "names must be among count_params, .*zico_floor; got 'snap'"),
        (lambda m: score_all(m, BATCHES, ["snip"], options={"snap": {}}), "names must be among .*; got 'snap'"),
        (lambda m: score_all(m, BATCHES, []), "names must hold at least one proxy"),
        (lambda m: score_all(m, [], ["snip"]), "batches must hold at least one pair"),
        (lambda m: score_all(m, BATCHES[:1], ["snip", "zico"]), "batches must hold at least 2 batches"),
        (lambda m: score_all(m, BATCHES, ["snip"], seeds=[0]), "are for a list of networks"),
        (lambda m: score_all(m, BATCHES, ["snip"], resume="x"), "are for a list of networks"),
        (lambda m: P.vote([m], BATCHES[0], names=["snap"]), "names must be among"),
        (lambda m: P.vote([], BATCHES[0]), "scores must hold one value a network"),
        (lambda m: P.rank_average({"snip": [1.0], "plain": [1.0, 2.0]}), "got {'snip': 1, 'plain': 2}"),
        (lambda m: P.rank_average({}), "at least one proxy, got {}"),
        (lambda m: P.rank_average({"snip": [1.0, math.nan]}), "scores must not be NaN, snip is for network 1"),
        (
            lambda m: P.rank_average({"snip": [1.0]}, method="mean"),
            "method must be one of 'rank', 'majority', got 'mean'",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(NETS["cnn"]())


def test_a_pair_is_a_list_of_one_batch():
    model = NETS["cnn"]()
    assert score_all(model, BATCHES[0], "snip") == score_all(model, BATCHES, ["snip"])


def test_every_pair_of_shared_proxies_gives_the_same():
    model = NETS["nano"]()
    whole = score_all(model, BATCHES, SHARED)
    for names in itertools.combinations(SHARED, 2):
        assert score_all(model, BATCHES, names) == {name: whole[name] for name in names}
