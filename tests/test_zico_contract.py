"""ZiCo leaves no trace, and says what is wrong with its input."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zico_oracles import small_net, some_batches

from effnb.nas import zico as module
from effnb.nas.zico import GradientMoments, gradient_moments, zico, zico_floor, zico_per_layer, zico_terms

CALLS = [
    zico,
    zico_per_layer,
    zico_terms,
    zico_floor,
    lambda *a, **k: list(gradient_moments(*a, **k)),
    lambda *a, **k: zico(*a, variant="paper", accumulate=True, **k),
    lambda *a, **k: zico(*a, init="kaiming", **{"seed": 1} | k),
]


def snapshot(net):
    """Everything that a score must leave alone."""
    return {
        "state": copy.deepcopy(net.state_dict()),
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()},
        "flags": {n: p.requires_grad for n, p in net.named_parameters()},
        "modes": [m.training for m in net.modules()],
        "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in net.modules()],
        "identity": [id(p) for p in net.parameters()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "default": (torch.get_default_dtype(), torch.is_grad_enabled()),
    }


def assert_same(net, before):
    after = snapshot(net)
    for key in ("state", "grads"):
        assert after[key].keys() == before[key].keys()
        for name, value in before[key].items():
            assert (after[key][name] is None) == (value is None)
            assert value is None or torch.equal(after[key][name], value), name
    assert torch.equal(after["random"][0], before["random"][0]) and after["random"][1:] == before["random"][1:]
    for key in ("flags", "modes", "hooks", "identity", "default"):
        assert after[key] == before[key], key


def worn_net():
    """A network in a state of its own: modes mixed, a gradient there, a bias frozen, dropout."""
    net = nn.Sequential(*small_net(), nn.Dropout(0.5))
    net.eval()
    net[3].train()
    net[3].bias.requires_grad_(False)
    net[0].weight.grad = torch.full_like(net[0].weight, 2.0)
    return net


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("grad", [True, False])
def test_the_network_stays_as_it_was(call, grad):
    net = worn_net()
    with torch.set_grad_enabled(grad):
        before = snapshot(net)
        call(net, some_batches(3))
        assert_same(net, before)


@pytest.mark.parametrize("call", CALLS)
def test_the_network_stays_as_it_was_after_an_exception(call):
    net, calls = worn_net(), []

    def failing(out, y):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no loss today")
        return F.cross_entropy(out, y)

    before = snapshot(net)
    with pytest.raises(RuntimeError, match="no loss today"):
        call(net, some_batches(3), failing)
    assert_same(net, before)


def test_an_abandoned_stream_leaves_no_trace():
    net = worn_net()
    before = snapshot(net)
    next(gradient_moments(net, some_batches(3)))
    assert_same(net, before)


def test_in_training_mode_whatever_the_mode_of_the_network():
    net, batches = small_net(), some_batches(2)
    assert zico(net.eval(), batches) == zico(net.train(), batches)
    net[1].running_mean.fill_(1e3)
    assert zico(net, batches) == zico(small_net(), batches)


def test_a_seed_fixes_dropout_and_the_global_state_does_not_matter_then():
    net, batches = nn.Sequential(*small_net(), nn.Dropout(0.5)), some_batches(2)
    torch.manual_seed(1)
    first = zico(net, batches, seed=0)
    torch.manual_seed(2)
    assert zico(net, batches, seed=0) == first != zico(net, batches, seed=1)


def test_batches_may_be_an_iterator_or_a_loader():
    batches = some_batches(3)
    assert zico(small_net(), iter(batches)) == zico(small_net(), batches)
    whole = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert zico(small_net(), torch.utils.data.DataLoader(whole, 6)) == zico(small_net(), batches)


def test_a_network_that_returns_features_and_logits():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return x, self.net(x)

    assert zico(Pair(), some_batches(2)) == zico(small_net(), some_batches(2))


def test_a_shared_weight_counts_once_for_each_of_its_layers():
    """As in the official code, which walks over modules."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    terms = zico_per_layer(Tied(), [(torch.randn(5, 4), torch.randint(4, (5,))) for _ in range(2)])
    assert list(terms) == ["a", "b"] and terms["a"] == terms["b"] > 0


def test_frozen_layers_do_not_count():
    net, batches = small_net(), some_batches(2)
    every = zico_per_layer(net, batches)
    net[3].weight.requires_grad_(False)
    assert zico_per_layer(net, batches) == {name: every[name] for name in ("0", "7")}


def test_inplace_activations_and_channels_last():
    net, batches = small_net(), some_batches(2)
    expected = zico(net, batches)
    for layer in net.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = True
    last = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    assert zico(net.to(memory_format=torch.channels_last), last) == pytest.approx(expected, rel=1e-5)


# Bad input

one = some_batches(1)
BAD = {
    "one batch": (small_net, one, "batches must hold at least 2"),
    "no batch": (small_net, [], "batches must hold at least 2"),
    "empty batch": (small_net, [*one, (torch.zeros(0, 1, 9, 9), torch.zeros(0, dtype=torch.long))], "at least one"),
    "fewer targets": (small_net, [*one, (one[0][0], one[0][1][:2])], "as many targets"),
    "class too large": (small_net, [*one, (one[0][0], one[0][1] + 5)], r"labels must be in 0\.\.4"),
    "class negative": (small_net, [*one, (one[0][0], one[0][1] - 5)], "labels must be in"),
    "loss nan": (small_net, [*one, (one[0][0] * float("nan"), one[0][1])], "loss_fn must return one finite number"),
    "loss inf": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(81, 5)).apply(blown),
        one * 2,
        "loss_fn must return one finite number",
    ),
    "no layer": (lambda: nn.BatchNorm2d(1), one * 2, "model must have a layer of Conv2d, Linear"),
    "frozen": (lambda: small_net().requires_grad_(False), one * 2, "it has none but frozen ones"),
}


def blown(layer):
    if isinstance(layer, nn.Linear):
        nn.init.constant_(layer.weight, 1e38)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("call", [zico, zico_per_layer, zico_terms, zico_floor])
def test_bad_input_is_named_and_the_network_untouched(case, call):
    make, batches, message = BAD[case]
    net = make()
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        call(net, batches)
    assert_same(net, before)


class Poisoned(torch.autograd.Function):
    """Finite forwards, not a number backwards."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx_value[0]


ctx_value = [float("nan")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("variant", ["code", "paper", "mean", "std", "floor"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_gradient_that_is_not_finite_names_its_layer(value, variant, count):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.late(Poisoned.apply(self.early(x)))

    ctx_value[0] = value
    batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(count)]
    with pytest.raises(ValueError, match="gradient must be finite, got inf or nan in layer 'early'"):
        zico_per_layer(Net(), batches, variant=variant)


def test_no_layer_that_receives_a_gradient():
    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.scale

    batches = [(torch.randn(5, 4), torch.randint(4, (5,))) for _ in range(2)]
    with pytest.raises(ValueError, match="receives a gradient"):
        zico(Free(), batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "best"}, "variant must be one of 'code', 'paper', 'mean', 'std', 'floor'"),
        ({"reduction": "max"}, "reduction must be one of 'sum', 'mean'"),
        ({"init": "xavier", "seed": 0}, "init must be one of None, 'kaiming'"),
        ({"init": "kaiming"}, "needs a seed or a generator"),
        ({"init": "kaiming", "seed": 0, "generator": torch.Generator()}, "exclude each other"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        zico(small_net(), some_batches(2), **options)


def test_batches_of_another_type():
    with pytest.raises(TypeError, match="pairs of tensors"):
        zico(small_net(), [(1, 2), (3, 4)])
    with pytest.raises(TypeError):
        zico_per_layer(small_net(), some_batches(2), colour="red")


def test_bad_moments():
    found = GradientMoments()
    with pytest.raises(ValueError, match="at least one batch"):
        found.std()
    with pytest.raises(ValueError, match="at least one tensor"):
        found.update([])
    with pytest.raises(TypeError, match="floating tensors"):
        found.update([torch.ones(2, dtype=torch.long)])
    found.update([torch.ones(2)])
    with pytest.raises(ValueError, match="at least 2 batches"):
        found.sums("code")
    with pytest.raises(ValueError, match="names and shapes"):
        found.update([torch.ones(3)])
    with pytest.raises(ValueError, match="absolute=True"):
        for _ in range(2):
            found.update([torch.ones(2)])
        found.sums("paper")


def test_the_module_keeps_its_name():
    """`effnb.nas.zico` is the module; its function of the same name is inside."""
    assert module.zico is zico and callable(module.zico)
