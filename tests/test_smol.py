"""SMOL: the number format, the noise and its gradients, the closed form, the two phases."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from effnb.compress import (
    bits_from_s,
    codebook,
    draw_noise,
    fisher_diagonal,
    optimal_bits,
    optimal_limits,
    perturb,
    quantize_pm1,
    s_from_bits,
)
from effnb.compress.smol.noise import NOISE_POWER, Groups, perturb_weight
from effnb.models import mlp

GRANULARITIES = ["weight", "filter", "input", "layer", ("block", 4), ("block", 5)]
F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def net(seed=0, sizes=(6, 8, 4)):
    return mlp(list(sizes), generator=rng(seed))


def slow_code(u, p):
    """The nearest code by looking at all of them; halfway the upper one."""
    distance = {code: abs(Fraction(code) - Fraction(u)) for code in codebook(p).tolist()}
    return max(code for code, d in distance.items() if d == min(distance.values()))


# --- the number format -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", range(1, 9))
def test_codes_are_sums_of_signed_digits(p):
    sums = {sum(b * 2.0**-i for i, b in enumerate(digits)) for digits in itertools.product((-1, 1), repeat=p)}
    codes = codebook(p)
    assert sorted(sums) == codes.tolist() and len(codes) == 2**p
    assert 0.0 not in sums and float(codes.abs().max()) == 2 - 2.0 ** (1 - p)
    assert set(codes.diff().tolist()) == {2.0 ** (2 - p)}


@given(st.floats(-2.5, 2.5, allow_subnormal=False), st.integers(1, 8))
def test_the_quantiser_finds_the_nearest_code(u, p):
    assert float(quantize_pm1(torch.tensor(u, dtype=F64), p)) == slow_code(u, p)


@pytest.mark.parametrize("p", range(1, 9))
def test_ties_go_to_the_upper_code(p):
    h = 2.0 ** (1 - p)
    ties = torch.arange(-(2 ** (p - 1)) + 1, 2 ** (p - 1)) * 2 * h
    assert torch.equal(quantize_pm1(ties, p), ties + h)
    assert quantize_pm1(torch.tensor([0.0, -0.0]), p).tolist() == [h, h]


@given(st.lists(st.floats(-2, 2, width=32, allow_subnormal=False), min_size=1, max_size=20), st.integers(1, 8))
def test_error_idempotence_and_oddness(values, p):
    u, h = torch.tensor(values, dtype=torch.float32), 2.0 ** (1 - p)
    code = quantize_pm1(u, p)
    assert bool(((code.double() - u.double()).abs() <= h).all())
    assert torch.equal(quantize_pm1(code, p), code)
    off_ties = (u / (2 * h)) != (u / (2 * h)).round()
    assert torch.equal(quantize_pm1(-u, p)[off_ties], -code[off_ties])
    assert set(code.tolist()) <= set(codebook(p).tolist())


@given(st.lists(st.floats(-2, 1.984375, width=32, allow_subnormal=False), min_size=1, max_size=20), st.integers(2, 8))
def test_dropping_the_last_digit_gives_the_shorter_code(values, p):
    u = torch.tensor(values, dtype=torch.float32)
    code, h = quantize_pm1(u, p), 2.0 ** (1 - p)
    shorter = quantize_pm1(u, p - 1)
    assert bool(((code - shorter).abs() == h).all())  # the missing digit is +-h: planes are progressive


def test_bits_may_differ_by_weight_and_are_checked():
    u = torch.linspace(-2.2, 2.2, 23).repeat(8, 1)
    p = torch.arange(1, 9).unsqueeze(1)
    rows = [quantize_pm1(u[i], i + 1) for i in range(8)]
    assert torch.equal(quantize_pm1(u, p), torch.stack(rows))
    assert torch.equal(quantize_pm1(u, p.float()), torch.stack(rows))
    for bad in (0, 17, 1.5, math.nan, torch.tensor([1.0, 2.5]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="p must hold whole numbers of bits"):
            quantize_pm1(u, bad)
    with pytest.raises(ValueError, match="p must broadcast"):
        quantize_pm1(u, torch.ones(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="from 1 to 16, got 0"):
        codebook(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_upper_end_is_the_last_code_in_every_type(dtype):
    for p in range(1, 9):
        ends = quantize_pm1(torch.tensor([2.0, 5.0, math.inf, -2.0, -math.inf], dtype=dtype), p)
        top = 2 - 2.0 ** (1 - p)
        assert ends.tolist() == [top, top, top, -top, -top] and ends.dtype == dtype


def test_straight_through_inside_and_zero_outside():
    u = torch.tensor([-2.5, -1.9, 0.0, 1.7, 2.01], requires_grad=True)
    (quantize_pm1(u, 2) * torch.arange(1.0, 6.0)).sum().backward()
    assert u.grad.tolist() == [0, 2, 3, 4, 0]


@given(st.floats(1.001, 16))
def test_bits_and_limits_are_inverse(p):
    s = s_from_bits(p)
    assert bits_from_s(s) == pytest.approx(p, rel=1e-10)
    assert 1 / (1 + math.exp(-s)) == pytest.approx(2 ** (1 - p), rel=1e-10)
    tensor = torch.tensor(p, dtype=F64)
    assert float(s_from_bits(tensor)) == pytest.approx(s, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(torch.sigmoid(s_from_bits(tensor)), 2 ** (1 - tensor), rtol=1e-10, atol=0)


def test_more_limit_fewer_bits():
    s = torch.linspace(-40, 30, 701, dtype=F64)
    assert bool((bits_from_s(s).diff() < 0).all())
    for k in range(2, 17):
        assert bits_from_s(-math.log(2 ** (k - 1) - 1)) == pytest.approx(k, rel=1e-12)
    for bad in (1.0, 0.0, math.inf, torch.tensor([2.0, 1.0])):
        with pytest.raises(ValueError, match="p must be finite and > 1"):
            s_from_bits(bad)


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "unit", "power"), [("uniform", 2**-15, 1 / 3), ("rademacher", 1, 1)])
def test_noise_has_the_right_moments(noise, unit, power):
    eps = draw_noise(1_000_003, noise, rng()).double() * unit
    assert len(eps) == 1_000_003
    assert float(eps.abs().max()) <= 1 and bool((eps != 0).all())
    assert abs(float(eps.mean())) < 4 * (power / 1e6) ** 0.5
    assert float(eps.square().mean()) == pytest.approx(power, rel=4e-3)
    lag = float((eps[1:] * eps[:-1]).mean())  # four (or 64) values share a draw
    assert abs(lag) < 4 * power / 1e3


def test_uniform_noise_is_uniform():
    eps = draw_noise(400_000, "uniform", rng(1)).double() / 2**15
    counts = eps.histc(20, -1, 1)
    assert float(((counts - 20_000) ** 2 / 20_000).sum()) < 50  # chi-squared, 19 degrees of freedom, p ~ 1e-4


def test_noise_follows_its_generator_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    assert torch.equal(draw_noise(99, generator=rng(3)), draw_noise(99, generator=rng(3)))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(draw_noise(99, generator=rng(3)), draw_noise(99, generator=rng(4)))
    for bad in ({"count": 3, "noise": "normal"}, {"count": -1}):
        with pytest.raises(ValueError, match=r"noise must be one of|count must be"):
            draw_noise(**bad)


def naive(w, s, eps, base, size, lam, groups):
    """What a user would write: expanded limits, autograd for everything."""
    return base * w + size * groups.expand(torch.sigmoid(s)) * eps, lam * ((bits_from_s(s) - 1) * groups.sizes(s)).sum()


@pytest.mark.parametrize("noise", ["uniform", "rademacher"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("per_filter", [False, True])
def test_fused_gradients_are_those_of_autograd(noise, granularity, per_filter):
    g, groups = rng(5), Groups((4, 7), granularity)
    w = torch.randn(4, 7, generator=g, dtype=F64).requires_grad_()
    s = torch.randn(groups.shape, generator=g, dtype=F64).requires_grad_()
    scale = torch.rand(4, 1, generator=g, dtype=F64) + 0.1 if per_filter else 0.7
    eps, up = draw_noise(28, noise, g), torch.randn(4, 7, generator=g, dtype=F64)
    unit = 2.0**-15 if noise == "uniform" else 1.0
    value, penalty = naive(w, s, eps.view(4, 7) * unit, 1.0, scale, 0.3, groups)
    expected = torch.autograd.grad([value, penalty], [w, s], [up, torch.ones((), dtype=F64)])
    ours = perturb_weight(w, s, eps, noise, groups, scale, 0.3)
    found = torch.autograd.grad(ours, [w, s], up)
    for a, b in zip((ours, *found), (value, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1), (1, 4), (1, 1), ()])
def test_perturb_sums_gradients_over_what_shares_a_limit(shape):
    u = torch.randn(3, 4, generator=rng(), dtype=F64).requires_grad_()
    s = torch.zeros(shape, dtype=F64, requires_grad=True)
    w = perturb(u, s, scale=2.0, generator=rng(9), lam=0.1)
    eps = (draw_noise(12, generator=rng(9)).double() / 2**15).view(3, 4)
    torch.testing.assert_close(w, 2.0 * (u + 0.5 * eps), rtol=1e-12, atol=0)
    w.sum().backward()
    assert torch.equal(u.grad, torch.full_like(u, 2.0))
    each = 2.0 * eps * 0.25 - 0.1 / math.log(2) * 0.5  # per weight: data term and penalty
    torch.testing.assert_close(s.grad, each.sum_to_size(shape), rtol=1e-10, atol=1e-12)
    assert len(eps.unique()) == 12  # noise is never shared


def test_perturb_averages_to_the_clean_weight_and_vanishes_with_sigma():
    u, s = torch.randn(5, generator=rng()), torch.zeros(5)
    g = rng(1)
    draws = torch.stack([perturb(u, s, 0.5, generator=g) for _ in range(4000)])
    error = 0.5 * 0.5 / 3**0.5 / 4000**0.5
    assert float((draws.mean(0) - 0.5 * u).abs().max()) < 4 * error
    assert torch.equal(perturb(u, torch.full((5,), -200.0), 0.5), 0.5 * u)


def test_a_noisy_linear_layer_is_unbiased():
    x, u, g = torch.randn(16, generator=rng()), torch.randn(3, 16, generator=rng(1)), rng(2)
    outs = torch.stack([perturb(u, torch.zeros(3, 16), 0.1, generator=g) @ x for _ in range(3000)])
    errors = outs.std(0) / 3000**0.5
    assert bool(((outs.mean(0) - 0.1 * u @ x).abs() < 4 * errors).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1e-9}, "lam must be finite and >= 0"),
        ({"lam": math.nan}, "lam must be finite and >= 0"),
        ({"noise": "normal"}, "noise must be one of"),
        ({"scale": 0.0}, "scale must be finite and > 0"),
        ({"scale": math.inf}, "scale must be finite and > 0"),
        ({"scale": torch.tensor([[1.0], [-1.0]])}, "scale must be finite and > 0"),
        ({"s": torch.zeros(3)}, "s must broadcast"),
    ],
)
def test_perturb_refuses_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        perturb(**({"u": torch.zeros(2, 2), "s": torch.zeros(2, 2)} | options))


# --- reverse water-filling -------------------------------------------------------------------------------------------


def expected_noise_loss(curvature, limits, noise):
    """What noise adds to a quadratic loss on average: ``sum(H_i sigma_i^2) / 6``, ``/ 2`` if Rademacher."""
    return (curvature * limits.square()).sum() * (NOISE_POWER[noise] / 6)


@given(st.floats(1e-4, 1e4), st.floats(1e-6, 1e2), st.sampled_from(["uniform", "rademacher"]))
def test_the_closed_form_is_the_minimum(curvature, lam, noise):
    h = torch.tensor([curvature], dtype=F64)

    def objective(sigma):
        return float(expected_noise_loss(h, sigma, noise) - lam * torch.log2(sigma).sum())

    best = optimal_limits(h, lam, noise)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert objective(best) <= objective((best * factor).clamp(max=1.0)) + 1e-12 * abs(objective(best))


def test_half_a_bit_for_every_doubling_of_the_curvature():
    h = 2.0 ** torch.arange(12, dtype=F64)
    lam = math.log(2) / 3 / 16  # curvature 1 would want 3 bits
    torch.testing.assert_close(optimal_bits(h, lam), 3 + torch.arange(12, dtype=F64) / 2)
    torch.testing.assert_close(optimal_bits(h, lam / 3, "uniform"), optimal_bits(h, lam, "rademacher"))
    torch.testing.assert_close(optimal_bits(3 * h, 3 * lam, "rademacher"), optimal_bits(h, lam, "rademacher"))
    assert optimal_bits(torch.tensor([0.0, 1e-9]), 1.0).tolist() == [1, 1]
    for curvature, lam in ((torch.tensor([-1.0]), 1.0), (torch.ones(1), 0.0), (torch.ones(1), -1.0)):
        with pytest.raises(ValueError, match=r"curvature must be|lam must be"):
            optimal_bits(curvature, lam)


def search_quadratic(curvature, lam, noise, steps=600, samples=32):
    """Phase I on ``1/2 sum(H u^2)`` with many samples a step; returns the learned bits."""
    s = nn.Parameter(torch.full_like(curvature, s_from_bits(8.0)))
    optimizer = torch.optim.Adam([s], lr=0.06)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    g, u = rng(), torch.zeros(samples, len(curvature))
    for _ in range(steps):
        optimizer.zero_grad()
        w = perturb(u, s.expand(1, -1), 1.0, noise, g)
        loss = 0.5 * (curvature * w.square()).sum(1).mean() + lam * (bits_from_s(s) - 1).sum()
        loss.backward()
        optimizer.step()
        schedule.step()
    return bits_from_s(s.detach())


@pytest.mark.parametrize("noise", ["uniform", "rademacher"])
def test_phase_one_finds_the_closed_form(noise):
    curvature = 2.0 ** torch.linspace(-2, 10, 13)
    lam = math.log(2) / 3
    found, expected = search_quadratic(curvature, lam, noise), optimal_bits(curvature, lam, noise)
    interior = expected > 1.5
    assert float((found - expected)[interior].abs().max()) <= 0.1
    assert float(found[expected == 1].max()) < 1.3  # approached from above, never reached: s would be infinite


def test_fisher_is_the_mean_squared_gradient():
    model, x = net(), torch.randn(7, 6, generator=rng())
    weight = model[1].weight
    losses = F.cross_entropy(model(x), torch.arange(7) % 4, reduction="none")
    (found,) = fisher_diagonal(losses, [weight])
    alone = [F.cross_entropy(model(x[i : i + 1]), torch.tensor([i % 4])) for i in range(7)]
    singles = [torch.autograd.grad(loss, weight)[0] for loss in alone]
    torch.testing.assert_close(found, torch.stack(singles).square().mean(0))
    with pytest.raises(ValueError, match="one per example"):
        fisher_diagonal(losses.mean(), [weight])
