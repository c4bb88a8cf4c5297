"""Every proxy against its slow and obvious version, and the laws that its formula implies."""

import itertools
import math

import numpy as np
import proxy_oracles as oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from proxy_oracles import ALIVE, NETS, batch, seeded
from scipy.stats import rankdata
from torch import nn
from torch.nn import functional as F

from effnb.nas import nb201
from effnb.nas import proxies as P
from effnb.nas.proxies.activations import CodeKernel, code_kernel, log_determinant
from effnb.nas.proxies.kernel import per_sample, run_measured, tangent_kernel

PAIR = batch()


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks so small are slower on several threads, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- against the oracles ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ["grad_norm", "snip", "plain", "fisher"])
def test_gradient_proxies(name, net):
    model = NETS[net]()
    expected = getattr(oracles, name)(model, PAIR)
    assert getattr(P, name)(model, PAIR) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("net", ALIVE)
def test_fisher_without_broadcast(net):
    model = NETS[net]()
    found, expected = P.fisher(model, PAIR, broadcast=False), oracles.fisher(model, PAIR, broadcast=False)
    assert found == pytest.approx(expected, rel=1e-4) and 0 < found < P.fisher(model, PAIR)


@pytest.mark.parametrize("net", NETS)
def test_grasp_is_a_difference_of_gradients(net):
    model = NETS[net]().double()
    pair = (PAIR[0].double(), PAIR[1])
    assert P.grasp(model, pair) == pytest.approx(oracles.grasp(model, pair), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("bn", ["identity", "keep"])
def test_synflow(bn, net):
    model = NETS[net]()
    expected = oracles.synflow(model, PAIR, norms=bn == "keep")
    assert P.synflow(model, PAIR, bn=bn) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_synflow_turns_no_mask_and_no_index():
    """A boolean buffer has no absolute value, and the place -1 is not the place 1; a scale of -2 is made 2."""

    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(4, 3, bias=False)
            self.register_buffer("mask", torch.tensor([True, False, True]))
            self.register_buffer("order", torch.tensor([-1, 0, 1]))
            self.register_buffer("scale", torch.tensor(-2.0))

        def forward(self, x):
            return (super().forward(x) * self.scale)[:, self.order] * self.mask

    model = Masked()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sums = model.weight.detach().double().abs().sum(1)
    assert P.synflow(model, torch.zeros(1, 4)) == pytest.approx(2 * float(sums[2] + sums[1]), rel=1e-12)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.mask.dtype == torch.bool and model.order.dtype == torch.int64


@pytest.mark.parametrize("net", ALIVE)
def test_jacob_cov(net):
    model = NETS[net]()
    assert P.jacob_cov(model, PAIR) == pytest.approx(oracles.jacob_cov(model, PAIR), rel=1e-6)


@pytest.mark.parametrize("net", ALIVE)
def test_naswot(net):
    model = NETS[net]()
    assert np.array_equal(code_kernel(model, PAIR).numpy(), oracles.naswot_kernel(model, PAIR[0]))
    assert P.naswot(model, PAIR) == pytest.approx(oracles.naswot(model, PAIR), rel=1e-10)


@pytest.mark.parametrize("net", NETS)
def test_linear_regions(net):
    # Small inputs, as in the original: some samples fall into one region.
    model, pair = NETS[net](), (torch.randn(40, 1, 12, 12, generator=seeded(1)) * 0.01, None)
    x = pair[0].repeat(2, 1, 1, 1) if net == "mlp" else pair[0]
    assert P.linear_regions(model, x) == oracles.linear_regions(model, (x, None))
    assert P.linear_regions(model, x) <= 40


@pytest.mark.parametrize("variance", ["running", "batch"])
@pytest.mark.parametrize("net", ["nano", "cell"])
def test_zen(net, variance):
    model = NETS[net]()
    for seed in (0, 3):
        expected = oracles.zen(model, PAIR[0], seed, variance)
        assert P.zen_score(model, PAIR, seed=seed, variance=variance) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("net", NETS)
def test_tangent_kernel(net):
    model = NETS[net]()
    found, expected = tangent_kernel(model, PAIR), oracles.tangent_kernel(model, PAIR)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("net", ALIVE)
def test_grad_sign(net):
    # Double precision: a gradient of zero must not get the sign of its rounding.
    model, pair = NETS[net]().double(), (PAIR[0].double(), PAIR[1])
    assert P.grad_sign(model, pair) == oracles.grad_sign(model, pair)
    assert P.grad_sign(model, pair, coupled=False) == oracles.grad_sign_alone(model, pair)


@pytest.mark.parametrize("net", NETS)
def test_knas_is_the_mean_of_the_kernel(net):
    model = NETS[net]()
    expected = oracles.tangent_kernel(model, PAIR).mean().item()
    assert P.knas(model, PAIR) == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_knas_of_the_loss():
    model = NETS["twisted"]()
    g = oracles.per_sample(
        model, PAIR, lambda out: F.cross_entropy(out, PAIR[1], reduction="none"), oracles.named_weight
    )
    assert P.knas(model, PAIR, of="loss") == pytest.approx((g @ g.T).mean().item(), rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 5, 6, 99])
def test_products_are_the_same_in_chunks_of_any_size(chunk):
    model = NETS["cell"]().double()
    output = model(PAIR[0].double())
    rows = torch.randn(output.shape, dtype=torch.float64, generator=seeded(2))
    theta = list(model.parameters())
    found = per_sample(output, rows, theta, chunk)
    for i in range(len(rows)):
        one = torch.autograd.grad((output[i] * rows[i]).sum(), theta, retain_graph=True, allow_unused=True)
        for p, g, all_g in zip(theta, one, found, strict=True):
            assert torch.allclose(all_g[i], torch.zeros_like(p) if g is None else g, rtol=1e-10, atol=1e-12)


def test_an_operation_that_cannot_be_batched_is_looped_over():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return torch.from_numpy(2 * grad.numpy())

    class Net(nn.Linear):
        def forward(self, x):
            return Double.apply(super().forward(x))

    model, x = Net(3, 2), torch.randn(5, 3)
    expected = oracles.tangent_kernel(model, (x, None))
    assert torch.allclose(tangent_kernel(model, x), expected, rtol=1e-5)


def test_large_activations_are_not_batched():
    model = nn.Conv2d(1, 1, 1)
    for size, expected in ((16, 2**18 // 2048), (256, 1)):
        x = torch.zeros(8, 1, size, size)
        output, chunk = run_measured(model, model, x)
        assert chunk == expected and torch.equal(output, model(x)) and not model._forward_hooks


# ---- counts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "edges, params, macs", [("000000", 73_306, 7_783_040), ("333333", 1_531_546, 220_119_680)]
)  # the ends of the table of NAS-Bench-201
def test_the_table_counts_multiply_adds_of_convolutions_and_linear_layers(edges, params, macs):
    model = nb201.build_cell_net(edges)
    assert P.count_params(model) == params
    assert P.count_macs(model, torch.zeros(1, 3, 32, 32)) == macs


def test_multiply_adds_by_hand():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, groups=2),  # 3 x 3 places, 6 x 1 x 9 weights
        nn.ConvTranspose2d(6, 4, 2, stride=2),  # 3 x 3 places of the input, 6 x 4 x 4 weights
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    assert P.count_macs(model, torch.zeros(7, 2, 7, 7)) == 9 * 54 + 9 * 96 + 12
    shared = nn.Conv2d(2, 2, 1, bias=False)
    assert P.count_macs(nn.Sequential(shared, nn.ReLU(), shared), torch.zeros(1, 2, 5, 5)) == 2 * 25 * 4
    assert P.count_macs(nn.Linear(4, 3), torch.zeros(2, 5, 4)) == 5 * 12


def test_parameters_by_hand():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    assert P.count_params(model) == 16 + 8 + 8
    model[0].weight.requires_grad_(False)
    assert P.count_params(model) == 4 + 8 + 8


def test_l2_norm_by_hand():
    model = nn.Sequential(nn.Linear(2, 1), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0]]))
        model[1].weight.fill_(-2.0)
    assert P.l2_norm(model) == 7.0


def test_nn_mass_by_hand():
    # Skip links 0>2, 0>3 and 1>3 are digits 1, 3 and 4; three stages of one cell, widths 4, 8, 16, depth 3.
    for edges, share in (("333333", 1.0), ("300003", 0.0), ("030000", 1 / 3), ("010403", 2 / 3)):
        model = nb201.build_cell_net(edges, channels=4, cells=1, in_channels=1)
        assert P.nn_mass(model, PAIR) == pytest.approx(share * 3 * (4 + 8 + 16))


# ---- laws ------------------------------------------------------------------------------------------------------------
def chain(widths, seed, bias=False):
    layers = [nn.Linear(a, b, bias) for a, b in itertools.pairwise(widths)]
    body = [part for layer in layers for part in (layer, nn.ReLU())][:-1]
    model = nn.Sequential(*body)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=seeded(seed))
    return model


WIDTHS = st.lists(st.integers(1, 6), min_size=2, max_size=5)


@given(WIDTHS, st.integers(0, 99))
def test_snip_is_at_least_plain(widths, seed):
    model, x = chain(widths, seed, bias=True), torch.randn(4, widths[0], generator=seeded(seed))
    pair = (x, torch.zeros(4, dtype=torch.int64))
    assert P.snip(model, pair) >= abs(P.plain(model, pair)) - 1e-9


@given(WIDTHS, st.integers(0, 99))
def test_synaptic_flow_is_conserved(widths, seed):
    """Each layer of a chain without biases carries the whole flow R, so the score is (layers) x R."""
    model = chain(widths, seed)
    flow = torch.ones(widths[0], dtype=torch.float64)
    for layer in model[::2]:
        flow = layer.weight.detach().double().abs() @ flow
    expected = (len(widths) - 1) * flow.sum().item()
    assert P.synflow(model, torch.zeros(1, widths[0])) == pytest.approx(expected, rel=1e-12)


def test_flow_is_conserved_layer_by_layer_with_convolutions():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4),
        nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 2, bias=False),
    )  # fmt: skip
    plain = nn.Sequential(*[m for m in model if not isinstance(m, nn.BatchNorm2d)])
    x = torch.zeros(1, 1, 12, 12)
    with torch.no_grad():
        expected = [p.abs().double() for p in plain.parameters()]
        flow = torch.func.functional_call(
            plain, dict(zip(dict(plain.named_parameters()), expected, strict=True)), torch.ones_like(x).double()
        ).sum()
    assert P.synflow(model, x) == pytest.approx(3 * flow.item(), rel=1e-12)
    # With the norms left in, the score is another thing.
    assert P.synflow(model, x, bn="keep") != pytest.approx(P.synflow(model, x), rel=0.5)


@given(st.floats(0.2, 5.0))
def test_scale_of_a_layer_before_a_batch_norm_earns_nothing(c):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-12), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3)
    ).double()
    pair = (PAIR[0].double(), PAIR[1] % 3)
    before = P.GradientPass(model, pair)
    with torch.no_grad():
        model[0].weight *= c
    after = P.GradientPass(model, pair)
    for step in (before, after):
        assert abs((step.grads["0"] * step.weights["0"]).sum().item()) < 1e-10
    assert after.loss == pytest.approx(before.loss, rel=1e-9)
    assert torch.allclose(after.grads["0"] * c, before.grads["0"], rtol=1e-6, atol=1e-12)


@given(st.integers(2, 8), st.integers(1, 12), st.integers(1, 3), st.integers(0, 99))
def test_the_code_kernel_counts_equal_units(samples, units, relus, seed):
    kernel, rng = CodeKernel(), np.random.default_rng(seed)
    values = [torch.from_numpy(rng.normal(size=(samples, units)).astype(np.float32).round(1)) for _ in range(relus)]
    for value in [*values, values[0]]:  # the first once more: its product is taken from memory
        kernel.add(value)
    codes = torch.cat([*values, values[0]], 1) > 0
    hamming = (codes[:, None] != codes[None]).sum(2)
    matrix = kernel.matrix()
    assert torch.equal(matrix, (units * (relus + 1) - hamming).double())
    assert torch.equal(matrix, matrix.T) and float(torch.linalg.eigvalsh(matrix)[0]) > -1e-9
    if samples > len({tuple(row) for row in codes.tolist()}):
        assert log_determinant(matrix) == -math.inf


def test_an_overwritten_tensor_is_multiplied_again():
    kernel, x = CodeKernel(), torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    kernel.add(x)
    x.neg_()
    kernel.add(x)
    assert kernel.matrix().tolist() == [[4, 2], [2, 4]] and kernel.units == 4


def test_two_equal_samples_are_singular():
    x = PAIR[0].clone()
    x[1] = x[0]
    for net in ("nano", "cnn", "twisted"):
        assert P.naswot(NETS[net](), x) == -math.inf


class Given(nn.Module):
    """A network whose Jacobian rows are given."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, x):
        return (x * self.rows).sum(1, keepdim=True)


def highest(n, k=1e-5):
    return -(n * math.log(1 + k) + n / (1 + k))


def test_jacob_cov_is_highest_without_correlation():
    rows = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    assert P.jacob_cov(Given(rows), torch.randn(3, 4)) == pytest.approx(highest(3), rel=1e-12)


@given(st.integers(2, 6), st.integers(3, 12), st.integers(0, 999))
def test_jacob_cov_is_at_most_its_maximum(n, size, seed):
    rows = torch.randn(n, size, generator=seeded(seed))
    score = P.jacob_cov(Given(rows), torch.zeros(n, size))
    assert score <= highest(n) + 1e-9
    shifted = Given(3 * rows + 1)  # a correlation knows neither scale nor mean
    if size > n:
        assert P.jacob_cov(shifted, torch.zeros(n, size)) == pytest.approx(score, rel=1e-3)


def test_jacob_cov_falls_when_two_samples_coincide():
    rows = torch.randn(3, 8, generator=seeded(0))
    rows[2] = rows[0]
    assert P.jacob_cov(Given(rows), torch.zeros(3, 8)) < -9e4


@pytest.mark.parametrize("row", [0.0, 0.1])
def test_a_constant_jacobian_is_minus_infinity_with_a_warning(row):
    rows = torch.randn(3, 7, generator=seeded(0))
    rows[1] = row
    with pytest.warns(UserWarning, match="the Jacobian of a sample is constant"):
        assert P.jacob_cov(Given(rows), torch.zeros(3, 7)) == -math.inf


@pytest.mark.parametrize("net", ALIVE)
def test_the_tangent_kernel_is_positive_and_its_condition_at_least_one(net):
    model = NETS[net]()
    kernel = tangent_kernel(model, PAIR)
    values = torch.linalg.eigvalsh(kernel)
    assert torch.equal(kernel, kernel.T) and float(values[0]) > -1e-9 * float(values[-1])
    assert P.ntk_condition(model, PAIR) == pytest.approx(float(values[-1] / values[0]), rel=1e-9)
    assert P.ntk_condition(model, PAIR) >= 1


def test_the_condition_where_it_is_not_defined_or_infinite():
    assert P.ntk_condition(NETS["nano disconnected"](), PAIR) == 1e5
    model = nn.Linear(2, 1, bias=False)
    assert P.ntk_condition(model, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])) > 1e12


class Scaled(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False))

    def forward(self, x):
        return (self.c * self.body(x)).mean((2, 3))


@given(st.floats(1e-3, 1e3))
def test_zen_shifts_by_the_logarithm_of_a_scale(c):
    x = torch.zeros(3, 1, 10, 10)
    shift = P.zen_score(Scaled(c), x) - P.zen_score(Scaled(1.0), x)
    assert shift == pytest.approx(math.log(c), abs=1e-4)


def test_zen_takes_the_last_map_wherever_it_ends():
    body = [nn.Conv2d(1, 4, 3), nn.ReLU()]
    flat = nn.Sequential(*body, nn.Flatten(), nn.Linear(4 * 64, 3))
    pooled = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    bare = nn.Sequential(*body)
    x = torch.zeros(2, 1, 10, 10)
    with torch.no_grad():
        torch.manual_seed(0)
        weight = torch.randn(4, 1, 3, 3)
        for net, extra in ((flat, 3 * 4 * 64), (pooled, 12), (bare, 0)):
            torch.manual_seed(0)
            torch.randn(weight.shape), torch.randn(extra) if extra else None
            a, b = torch.randn(x.shape), torch.randn(x.shape)
            gap = F.conv2d(a, weight).relu() - F.conv2d(a + 0.01 * b, weight).relu()
            assert P.zen_score(net, x) == pytest.approx(gap.abs().sum((1, 2, 3)).mean().log().item(), rel=1e-5)


def test_zen_is_the_mean_of_its_repeats():
    model = NETS["nano"]()
    one, three = P.zen_score(model, PAIR), P.zen_score(model, PAIR, repeats=3)
    assert one != three and P.zen_score(model, PAIR, repeats=3) == three
    assert abs(one - three) < 5


def test_running_variance_is_mixed_from_two_batches():
    """0.81 of the initial one, 0.09 and 0.1 of the two batches."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1))
    x = torch.zeros(4, 1, 5, 5)
    torch.manual_seed(0)
    weight, a, b = torch.randn(2, 1, 1, 1), torch.randn(x.shape), torch.randn(x.shape)
    first, second = F.conv2d(a, weight), F.conv2d(a + 0.01 * b, weight)
    v, w = first.var((0, 2, 3)), second.var((0, 2, 3))
    expected = 0.5 * (math.log((0.81 + 0.09 * v + 0.1 * w).mean()) - math.log(v.mean()))
    shift = P.zen_score(model, x) - P.zen_score(model, x, variance="batch")
    assert shift == pytest.approx(expected, rel=1e-4)


@given(st.integers(2, 7), st.integers(0, 99))
def test_grad_sign_is_bounded_and_of_one_parity(samples, seed):
    model = chain([3, 4, 2], seed)
    pair = (torch.randn(samples, 3, generator=seeded(seed)), torch.arange(samples) % 2)
    score = P.grad_sign(model, pair)
    assert 0 <= score <= samples * 20 and score == int(score)
    once = (pair[0][:1].expand(samples, 3), pair[1][:1].expand(samples))
    assert P.grad_sign(model, once) == samples * P.grad_sign(model, (pair[0][:1], pair[1][:1]))


# ---- votes -----------------------------------------------------------------------------------------------------------
SCORES = st.lists(st.floats(-5, 5).map(lambda v: round(v, 1)), min_size=4, max_size=4)


@given(SCORES, SCORES)
def test_votes_know_ranks_only(a, b):
    found = P.rank_average({"snip": a, "mine": b})
    assert np.allclose(found, (rankdata(a) + rankdata(b)) / 2)
    assert P.rank_average({"snip": [math.exp(v) for v in a], "mine": [3 * v - 7 for v in b]}) == found
    majority = P.rank_average({"snip": a, "mine": b, "other": a}, method="majority")
    assert np.allclose(rankdata(majority), rankdata(a)) or len(set(a)) < 4


def test_votes_by_hand():
    scores = {"a": [1.0, 2.0, 3.0], "b": [2.0, 1.0, 3.0], "c": [3.0, 1.0, -math.inf]}
    assert P.rank_average(scores) == [2.0, pytest.approx(5 / 3), pytest.approx(7 / 3)]
    # 0 beats 1 twice, 2 beats 0 twice, 2 beats 1 twice.
    assert P.rank_average(scores, method="majority") == [1.0, 0.0, 2.0]
    assert P.rank_average({"ntk_condition": [1.0, 9.0]}) == [2.0, 1.0]


def test_the_vote_of_networks_is_that_of_their_scores():
    models = [NETS[name]() for name in ("nano", "cnn", "twisted")]
    columns = {name: [getattr(P, name)(m, PAIR) for m in models] for name in ("synflow", "jacob_cov", "snip")}
    assert P.vote(models, PAIR) == P.rank_average(columns)
    assert P.vote(models, PAIR, method="majority") == P.rank_average(columns, method="majority")
