"""ZiCo: the score against the stacked original, closed forms, invariances, streaming, the two-batch floor, theorems."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from zico_oracles import layer_score, official_zico, small_net, some_batches, stacked_gradients

from effnb.models.small import initialize
from effnb.nas.nb201 import build_cell_net
from effnb.nas.zico import (
    VARIANTS,
    GradientMoments,
    gradient_moments,
    score,
    zico,
    zico_floor,
    zico_per_layer,
    zico_terms,
)

DOUBLE = {"dtype": torch.float64}


def filled(g, absolute=False):
    """Moments of the rows of an array."""
    found = GradientMoments(absolute)
    for row in g:
        found.update(torch.as_tensor(row))
    return found


# The score against the stacked original


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_equals_the_stacked_original(count, variant, reduction):
    net, batches = small_net(**DOUBLE), some_batches(count, **DOUBLE)
    expected = official_zico(small_net(**DOUBLE), batches, variant, reduction)
    assert zico(net, batches, variant=variant, reduction=reduction) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("edges", ["333333", "130432", "420410", "000000", "123402"])
def test_equals_the_stacked_original_on_cells(edges):
    """Float32, with dead branches and edges that lead nowhere."""
    torch.manual_seed(0)
    net = build_cell_net(edges, 4, 1)
    batches = [(torch.randn(4, 3, 16, 16), torch.randint(10, (4,))) for _ in range(3)]
    assert zico(net, batches[:2]) == pytest.approx(official_zico(net, batches[:2]), rel=1e-6)
    assert zico(net, batches) == pytest.approx(official_zico(net, batches), rel=1e-5)


def test_accumulated_gradients_as_in_the_official_code():
    """It never clears gradients, so that its second sample is g1 + g2."""
    net, batches = small_net(**DOUBLE), some_batches(3, **DOUBLE)
    expected = official_zico(small_net(**DOUBLE), batches, accumulate=True)
    assert zico(net, batches, accumulate=True) == pytest.approx(expected, rel=1e-10)
    assert abs(expected - zico(net, batches)) > 0.1


def test_per_layer_terms_sum_to_the_score():
    net, batches = small_net(), some_batches(3)
    terms = zico_per_layer(net, batches)
    stacks = stacked_gradients(small_net(), batches)
    assert list(terms) == list(stacks) == ["0", "3", "7"]
    assert all(terms[name] == pytest.approx(layer_score(g), abs=1e-5) for name, g in stacks.items())
    assert zico(net, batches) == pytest.approx(math.fsum(terms.values()))


@pytest.mark.parametrize("count", [2, 4])
def test_terms_agree_with_single_calls(count):
    net, batches = small_net(), some_batches(count)
    terms = zico_terms(net, batches)
    assert list(terms) == list(VARIANTS)
    for variant in ("code", "paper", "mean", "std"):
        assert terms[variant] == pytest.approx(zico(net, batches, variant=variant), rel=1e-12)
    assert terms["floor"] == zico_floor(net, batches)


def test_ablations_by_hand():
    """Mean only: sum over layers of log sum a. Deviation only: log sum 1/s over elements with s != 0."""
    net, batches = small_net(**DOUBLE), some_batches(3, **DOUBLE)
    stacks = stacked_gradients(small_net(**DOUBLE), batches)
    terms = zico_terms(net, batches, variants=("mean", "std"))
    assert terms["mean"] == pytest.approx(sum(math.log(np.abs(g).mean(0).sum()) for g in stacks.values()))
    expected = 0.0
    for g in stacks.values():
        s = g.std(0)
        expected += math.log((1 / s[s != 0]).sum())
    assert terms["std"] == pytest.approx(expected)


def test_custom_layers_and_loss():
    net, batches = small_net(**DOUBLE), some_batches(2, **DOUBLE)
    only = zico_per_layer(net, batches, layers=(nn.Linear,))
    assert only == {"7": pytest.approx(zico_per_layer(net, batches)["7"])}
    targets = [(x, F.one_hot(y, 5).double()) for x, y in batches]
    assert zico(net, targets, F.mse_loss) != pytest.approx(zico(net, batches))


# Two batches: closed form and floor

pairs = st.lists(st.tuples(*[st.floats(-4, 4, width=32)] * 2), min_size=1, max_size=30)


@given(pairs)
def test_two_batches_have_a_closed_form(rows):
    """(|g1| + |g2|) / |g1 - g2|: exactly 1 where the signs differ, above 1 where they agree."""
    g = np.array(rows, dtype=np.float32).T
    found = filled(g)
    a, s = found.mean_abs().numpy(), found.std().numpy()
    live = s != 0
    ratio = a[live] / s[live]
    differ = (np.sign(g[0]) != np.sign(g[1]))[live]
    assert np.allclose(ratio[differ], 1, rtol=1e-6)
    assert (ratio >= 1 - 1e-6).all() and (live == (g[0] != g[1])).all()


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_the_floor_is_a_lower_bound_at_two_batches(variant):
    net, batches = small_net(**DOUBLE), some_batches(2, **DOUBLE)
    floor = zico_floor(net, batches)
    counts = [(g[0] != g[1]).sum() for g in stacked_gradients(small_net(**DOUBLE), batches).values()]
    assert floor == pytest.approx(sum(map(math.log, counts)), rel=1e-12)
    assert zico(net, batches, variant=variant) >= floor
    assert zico(net, batches, accumulate=True) >= floor
    assert floor <= zico_floor(net) == pytest.approx(math.log(36) + math.log(216) + math.log(120))


def test_the_floor_is_no_bound_at_three_batches():
    """g = (1, -1, 0): a = 2/3 and s = .816."""
    found = filled([[1.0], [-1.0], [0.0]])
    assert found.mean_abs().item() == pytest.approx(2 / 3)
    assert found.std().item() == pytest.approx(math.sqrt(2 / 3))
    assert found.sums("code")["0"] < found.sums("floor")["0"] == 1


@given(st.integers(2, 9), st.integers(0, 10**6))
def test_ratio_is_at_least_that_of_the_mean(count, seed):
    """a <= sqrt(mean g^2) and s^2 = mean g^2 - (mean g)^2."""
    g = np.random.default_rng(seed).normal(0.3, 1, (count, 20))
    found = filled(g)
    a, s = found.mean_abs().numpy(), found.std().numpy()
    assert (a <= np.sqrt((g**2).mean(0)) + 1e-12).all()
    assert np.allclose(s**2, (g**2).mean(0) - g.mean(0) ** 2)
    assert (a / s >= np.abs(g.mean(0)) / s - 1e-12).all()


# Invariances


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_scaling_the_loss_changes_nothing(count, factor):
    net, batches = small_net(**DOUBLE), some_batches(count, **DOUBLE)
    scaled = zico(net, batches, lambda out, y: factor * F.cross_entropy(out, y))
    assert scaled == pytest.approx(zico(net, batches), rel=1e-9)


@pytest.mark.parametrize("variant", ["code", "paper", "floor"])
@pytest.mark.parametrize("count", [2, 5])
def test_scaling_permuting_and_negating_gradients_change_nothing(variant, count):
    g = np.random.default_rng(0).normal(size=(count, 50)).astype(np.float32)
    expected = filled(g, variant == "paper").sums(variant)["0"]
    for changed in (1e-6 * g, 1e6 * g, g[::-1].copy(), -g):
        assert filled(changed, variant == "paper").sums(variant)["0"] == pytest.approx(expected, rel=1e-5)


def test_order_of_the_batches_does_not_matter():
    net, batches = small_net(**DOUBLE), some_batches(4, **DOUBLE)
    assert zico(net, batches[::-1]) == pytest.approx(zico(net, batches), rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_batches_score_exactly_zero(count):
    batches = some_batches(1) * count
    assert zico(small_net(), batches) == 0.0 and zico_floor(small_net(), batches) == 0.0


def test_a_layer_without_gradient_contributes_zero():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(2)]
    terms = zico_per_layer(Branch(), batches)
    assert terms["unused"] == 0.0 and terms["used"] > 0


def test_a_constant_gradient_is_left_out_not_divided_by_epsilon():
    """g = 3 in both batches: s = 0, and one such element must not rule the score."""
    found = filled([[3.0, 1.0, 0.0], [3.0, -1.0, 0.0]])
    assert found.sums("code")["0"] == 1.0 and found.sums("floor")["0"] == 1.0
    assert found.sums("paper")["0"] == 0.0 and found.sums("std")["0"] == 1.0
    many = filled([[3.0, 1.0, 0.0], [3.0, -1.0, 0.0], [3.0, 1.0, 0.0]])
    assert many.sums("code")["0"] == pytest.approx(1 / math.sqrt(8 / 9)) and many.sums("floor")["0"] == 1.0


def test_one_nearly_constant_weight_rules_its_layer():
    """The quotient has a heavy tail, so that rounding can move a score by per cents; the floor does not move."""
    g = torch.ones(2, 1000)
    g[1] = -1
    g[1, 0] = 1 + 2**-20
    assert filled(g).sums("code")["0"] == pytest.approx(2**21 + 999 + 1) and filled(g).sums("floor")["0"] == 1000


def test_the_deviation_divides_by_n():
    """With N - 1 every layer would be shifted by log sqrt((N - 1) / N), which ranks deep networks differently."""
    g = np.random.default_rng(0).normal(size=(2, 40))
    assert np.allclose(filled(g).std(), g.std(0)) and not np.allclose(filled(g).std(), g.std(0, ddof=1))


# Streaming moments


@pytest.mark.parametrize("count", range(2, 17))
@pytest.mark.parametrize("absolute", [False, True])
def test_streaming_equals_two_passes(count, absolute):
    g = np.random.default_rng(count).normal(0.2, 1, (count, 3000)).astype(np.float32)
    found, wide = filled(g, absolute), g.astype(np.float64)
    samples = np.abs(wide) if absolute else wide
    assert np.allclose(found.mean_abs(), np.abs(wide).mean(0), rtol=1e-6)
    assert np.allclose(found.std(), samples.std(0), rtol=2e-5, atol=1e-7)
    total = (np.abs(wide).mean(0) / samples.std(0)).sum()
    # Single deviations near zero lose digits in float32; the sum over a layer keeps them.
    tolerance = 1e-6 if not absolute else 1e-4
    assert math.log(found.sums("paper" if absolute else "code")["0"]) == pytest.approx(math.log(total), rel=tolerance)


@pytest.mark.parametrize("size", [4, 7, 64, 10**6])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_buckets_do_not_change_the_moments(monkeypatch, size, count):
    """Layers that share a bucket, fill one, or spread over many pieces of it."""
    monkeypatch.setattr(score, "CHUNK", size)
    g = torch.Generator().manual_seed(0)
    shapes = {"a": (2, 3), "b": (1,), "c": (40,), "d": (5, 2), "e": (3,)}
    sets = [{name: torch.randn(shape, generator=g) for name, shape in shapes.items()} for _ in range(count)]
    found = GradientMoments()
    for grads in sets:
        found.update(grads)
    for name in shapes:
        stack = torch.stack([grads[name] for grads in sets]).double()
        assert torch.allclose(found.std()[name].double(), stack.std(0, correction=0), rtol=1e-5)
        assert torch.allclose(found.mean_abs()[name].double(), stack.abs().mean(0), rtol=1e-6)
        ratio = (stack.abs().mean(0) / stack.std(0, correction=0)).sum().item()
        assert found.sums("code")[name] == pytest.approx(ratio, rel=1e-5)


def test_moments_keep_the_form_of_their_input():
    for grads in (torch.ones(2), [torch.ones(2), torch.ones(3)], (torch.ones(2),), {"w": torch.ones(2)}):
        found = GradientMoments()
        found.update(grads)
        found.update(grads)
        assert type(found.std()) is type(grads) and type(found.mean_abs()) is type(grads)


def test_moments_copy_what_they_are_given():
    grad, found = torch.ones(3), GradientMoments()
    for value in (1.0, 2.0, 6.0):
        found.update(grad.fill_(value))
    assert found.mean_abs().tolist() == [3.0] * 3 and torch.equal(grad, torch.full((3,), 6.0))


@pytest.mark.parametrize("count", [2, 3, 16])
def test_memory_does_not_grow_with_the_batches(count):
    found, grads = GradientMoments(), {"w": torch.randn(1000), "v": torch.randn(10, 10)}
    for _ in range(count):
        found.update({name: torch.randn_like(grad) for name, grad in grads.items()})
    assert found.nbytes() == 4 * 1100 * (2 if count == 2 else 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_summed_in_single(dtype):
    g = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = filled(g)
    expected = filled(g.float())
    assert found.std().dtype == torch.float32 and torch.equal(found.std(), expected.std())


def test_huge_and_tiny_gradients_keep_their_two_batch_score():
    g = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
    expected = filled(g).sums("code")["0"]
    for factor in (np.float32(1e-30), np.float32(1e30)):
        assert filled(factor * g).sums("code")["0"] == pytest.approx(expected, rel=1e-5)


def test_exact_and_fast_sums_agree():
    g = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    for count in (2, 5):
        found = filled(torch.cat([g, g.flip(0), g[:1] * 2])[:count])
        (cells,) = found.buckets
        for variant in ("code", "mean"):
            (fast,), (exact,) = cells.sums(variant), cells.sums(variant, exact=True)
            assert float(fast) == pytest.approx(float(exact), rel=1e-6)


def test_the_stream_holds_every_prefix():
    net, batches = small_net(), some_batches(5)
    seen = {}
    for found in gradient_moments(net, batches):
        if found.count >= 2:
            totals = found.sums("code").values()
            seen[found.count] = math.fsum(math.log(total) for total in totals)
    assert seen == {n: pytest.approx(zico(net, batches[:n]), rel=1e-6) for n in (2, 3, 4, 5)}


# Initialisation


def test_kaiming_equals_a_network_built_from_the_same_stream():
    given_ = initialize(small_net(), torch.Generator().manual_seed(3))
    batches = some_batches(2)
    expected = zico(given_, batches)
    assert zico(small_net(5), batches, init="kaiming", seed=3) == expected
    assert zico(small_net(5), batches, init="kaiming", generator=torch.Generator().manual_seed(3)) == expected
    assert zico(small_net(5), batches, init="kaiming", seed=4) != expected


def test_terms_draw_the_same_weights_for_both_of_their_streams():
    batches = some_batches(3)
    found = zico_terms(small_net(), batches, init="kaiming", generator=torch.Generator().manual_seed(3))
    assert found == zico_terms(small_net(), batches, init="kaiming", seed=3)


# Theorems


def linear_task(rng, samples, features):
    """Unit inputs, targets of their own weights: gradient of sample i is -(y - a'x) x."""
    x = rng.normal(size=(samples, features))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x, rng.normal(size=samples), rng.normal(size=features) * rng.uniform(0, 2)


def test_theorem_31_as_printed_is_wrong_and_one_factor_mends_it():
    """Loss after a step of eta on the summed gradient against G/2 - (eta/2) M^2 (2 - eta) sum mu^2.

    Summing eta^2 M^2 mu^2 over the M samples gives M^3, not M^2: (eta M^2 / 2)(2 - eta M).
    """
    rng, printed_fails = np.random.default_rng(0), 0
    for _ in range(500):
        m, d = rng.integers(2, 9), rng.integers(1, 9)
        x, y, a = linear_task(rng, m, d)
        eta = rng.uniform(0, 2)
        g = (x @ a - y)[:, None] * x
        mu, total = g.mean(0), (g**2).sum()
        after = 0.5 * ((x @ (a - eta * g.sum(0)) - y) ** 2).sum()
        printed = total / 2 - eta / 2 * m**2 * (2 - eta) * (mu**2).sum()
        corrected = total / 2 - eta * m**2 / 2 * (2 - eta * m) * (mu**2).sum()
        assert after <= corrected + 1e-9 * (1 + abs(corrected))
        printed_fails += after > printed + 1e-9
    assert printed_fails > 50


def test_theorem_31_at_step_one_over_m():
    """There both bounds are M/2 times the sum of variances."""
    rng = np.random.default_rng(1)
    for _ in range(100):
        m = int(rng.integers(2, 9))
        x, y, a = linear_task(rng, m, 5)
        g = (x @ a - y)[:, None] * x
        after = 0.5 * ((x @ (a - g.sum(0) / m) - y) ** 2).sum()
        assert after <= m / 2 * g.var(0).sum() + 1e-9


def test_theorem_31_counter_example():
    """M equal samples and eta = 1: the printed right side is (M/2)(1 - M) sum mu^2 < 0, a loss is not."""
    for m in (2, 5):
        mu = np.array([0.6, 0.8])
        g = np.tile(mu, (m, 1))
        printed = (g**2).sum() / 2 - 0.5 * m**2 * (mu**2).sum()
        assert printed == pytest.approx(m / 2 * (1 - m) * (mu**2).sum()) and printed < 0


def test_eigenvalues_of_the_gram_matrix_move_less_than_its_entries():
    """Theorems 3.2 and 3.5 rest on Weyl's inequality; two-layer ReLU net, d = 10, m = 256, M = 20."""
    g = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(20, 10, generator=g, dtype=torch.float64), dim=1)
    w = torch.randn(256, 10, generator=g, dtype=torch.float64)

    def gram(weights):
        active = (x @ weights.T > 0).double()
        return (x @ x.T) * (active @ active.T) / len(weights)

    start = gram(w)
    for step in (0.01, 0.1, 0.5):
        moved = gram(w + step * torch.randn(w.shape, generator=g, dtype=torch.float64))
        gap = (torch.linalg.eigvalsh(moved) - torch.linalg.eigvalsh(start)).abs()
        assert gap[0] <= (moved - start).abs().sum() and gap[-1] <= (moved - start).abs().sum()
