"""Every statistic against a closed form, an independent implementation, or simulated coverage."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from effnb.lab.judge import stats
from effnb.lab.judge.stats import Interval

RNG = np.random.default_rng


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def vectors(low, high, **size):
    return st.lists(st.floats(low, high, width=32), **size)


# --- Student's interval ------------------------------------------------------------------------------------------


def test_two_differences_give_the_textbook_factor():
    d = np.array([1.0, 4.0])
    interval = stats.paired_t_interval(d)
    half = 12.706204736 * d.std(ddof=1) / math.sqrt(2)
    assert (interval.estimate, interval.n, interval.method) == (2.5, 2, "t")
    assert interval.lo == pytest.approx(2.5 - half, rel=1e-9)
    assert interval.hi == pytest.approx(2.5 + half, rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 5, 20])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_interval_agrees_with_scipy(n, level):
    a, b = RNG(n).normal(size=(2, n))
    expected = scipy_stats.ttest_rel(a, b).confidence_interval(level)
    interval = stats.paired_t_interval(a, b, level)
    assert (interval.lo, interval.hi) == pytest.approx((expected.low, expected.high), rel=1e-10)
    assert interval.level == level


def test_log_interval_is_the_exponential_of_the_interval_of_logarithms():
    a, b = RNG(0).lognormal(size=(2, 6))
    ratio, difference = stats.paired_t_interval(a, b, log=True), stats.paired_t_interval(np.log(a), np.log(b))
    for field in ("estimate", "lo", "hi"):
        assert getattr(ratio, field) == pytest.approx(math.exp(getattr(difference, field)), rel=1e-12)
    assert ratio.estimate == pytest.approx(scipy_stats.gmean(a / b), rel=1e-12)
    assert ratio.method == "t-log"


def test_swapping_inverts_ratio_and_negates_difference():
    a, b = RNG(1).lognormal(size=(2, 5))
    r, s = stats.paired_t_interval(a, b, log=True), stats.paired_t_interval(b, a, log=True)
    assert (r.estimate, r.lo, r.hi) == pytest.approx((1 / s.estimate, 1 / s.hi, 1 / s.lo), rel=1e-12)
    d, e = stats.paired_t_interval(a, b), stats.paired_t_interval(b, a)
    assert (d.estimate, d.lo, d.hi) == pytest.approx((-e.estimate, -e.hi, -e.lo), rel=1e-12)


@settings(deadline=None)  # a busy machine is no failure
@given(vectors(-100, 100, min_size=2, max_size=12), st.randoms())
def test_interval_ignores_the_order_of_seeds(values, random):
    shuffled = random.sample(values, len(values))
    a, b = stats.paired_t_interval(values), stats.paired_t_interval(shuffled)
    assert (a.estimate, a.lo, a.hi) == pytest.approx((b.estimate, b.lo, b.hi), rel=1e-9, abs=1e-9)


def test_constant_differences_give_a_point():
    interval = stats.paired_t_interval([3.0, 4.0, 5.0], [1.0, 2.0, 3.0])
    assert (interval.estimate, interval.lo, interval.hi) == (2, 2, 2)


@pytest.mark.parametrize("n", [3, 5])
def test_simulated_coverage_of_the_t_interval(n):
    draws = RNG(n).normal(1.0, 2.0, size=(2_000, n))
    covered = [i.lo <= 1.0 <= i.hi for i in map(stats.paired_t_interval, draws)]
    assert 0.935 <= np.mean(covered) <= 0.965


# --- median ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "lo", "hi", "attained"), [(6, 1, 6, 1 - 2 / 64), (7, 1, 7, 1 - 2 / 128), (15, 4, 12, 1 - 1152 / 32768)]
)
def test_order_statistics_of_the_rule_book(n, lo, hi, attained):
    interval = stats.order_statistic_interval(RNG(0).permutation(np.arange(1.0, n + 1)))
    assert (interval.estimate, interval.lo, interval.hi) == ((n + 1) / 2, lo, hi)
    assert interval.level == pytest.approx(attained, rel=1e-12)
    assert interval.method == "order"


@pytest.mark.parametrize("n", range(6, 40))
def test_no_narrower_symmetric_pair_reaches_the_level(n):
    interval = stats.order_statistic_interval(np.arange(1.0, n + 1))
    k = int(interval.lo)
    assert interval.hi == n + 1 - k
    assert 1 - 2 * scipy_stats.binom.cdf(k - 1, n, 0.5) >= 0.95
    assert k == (n + 1) // 2 or 1 - 2 * scipy_stats.binom.cdf(k, n, 0.5) < 0.95


@pytest.mark.parametrize("n", [7, 15])
def test_simulated_coverage_of_the_order_statistics_on_skewed_data(n):
    draws = RNG(n).lognormal(size=(1_500, n))
    interval = [stats.order_statistic_interval(row) for row in draws]
    covered = np.mean([i.lo <= 1.0 <= i.hi for i in interval])
    assert covered == pytest.approx(interval[0].level, abs=4 * math.sqrt(0.03 * 0.97 / 1_500))


def test_reciprocals_invert_the_median_of_an_odd_count():
    ratios = RNG(3).lognormal(size=9)
    a, b = stats.order_statistic_interval(ratios), stats.order_statistic_interval(1 / ratios)
    assert (a.estimate, a.lo, a.hi) == pytest.approx((1 / b.estimate, 1 / b.hi, 1 / b.lo), rel=1e-12)


# --- items, units, counts ----------------------------------------------------------------------------------------


def test_items_interval_is_the_formula_and_seeds_alone_are_its_limit():
    a, b = RNG(0).normal(size=(2, 5))
    found, alone = stats.items_interval(a, b, d=2.0, m=50), stats.paired_t_interval(a, b)
    d = a - b
    half = scipy_stats.t.ppf(0.975, 4) * math.sqrt(d.var(ddof=1) / 5 + 2.0 / 50)
    assert (found.estimate, found.lo, found.hi) == pytest.approx(
        (d.mean(), d.mean() - half, d.mean() + half), rel=1e-12
    )
    limit = stats.items_interval(a, b, d=0.0, m=50)
    assert [limit.lo, limit.hi] == pytest.approx([alone.lo, alone.hi], rel=1e-12)


def test_item_variance_by_hand():
    ours, theirs = [[1, 0, 1], [1, 1, 0]], [[0, 0, 1], [1, 0, 0]]
    per_seed, baseline, d, m = stats.item_variance(ours, theirs)
    assert per_seed == pytest.approx([2 / 3, 2 / 3]) and baseline == pytest.approx([1 / 3, 1 / 3]) and m == 3
    assert d == pytest.approx(np.var([0.5, 0.5, 0.0], ddof=1))


def test_simulated_coverage_over_seeds_and_shared_items():
    """Another test set and other seeds: the t interval over seeds alone misses far too often."""
    rng, n, m = RNG(5), 5, 100
    hits = {"items": 0, "seeds": 0}
    for _ in range(1000):
        values = rng.normal(size=(1, m)) + 0.3 * rng.normal(size=(n, 1)) + rng.normal(size=(n, m))
        means, _, d, _ = stats.item_variance(values)
        for name, found in (
            ("items", stats.items_interval(means, None, d, m)),
            ("seeds", stats.paired_t_interval(means)),
        ):
            hits[name] += found.lo <= 0 <= found.hi
    assert 935 <= hits["items"] <= 990 and hits["seeds"] < hits["items"]


@pytest.mark.parametrize(("k", "n"), [(0, 7), (3, 7), (7, 7), (40, 50)])
def test_binomial_is_clopper_pearson(k, n):
    found = stats.binomial_interval(k, n)
    low = scipy_stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0
    high = scipy_stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0
    assert (found.estimate, found.lo, found.hi) == pytest.approx((k / n, low, high), abs=1e-9)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.97])
def test_coverage_of_the_exact_interval_is_never_below_its_level(p):
    n = 30
    inside = [k for k in range(n + 1) if (i := stats.binomial_interval(k, n)).lo <= p <= i.hi]
    assert scipy_stats.binom.pmf(inside, n, p).sum() >= 0.95


def test_units_interval_of_a_mean_is_the_closed_form():
    values = RNG(0).normal(size=(1, 200))
    found = stats.units_interval(values, reps=20_000, level=0.6826895)
    assert found.estimate == pytest.approx(values.mean())
    assert (found.hi - found.lo) / 2 == pytest.approx(values.std() / math.sqrt(200), rel=0.03)


@pytest.mark.parametrize("statistic", ["spearman", "kendall"])
def test_unit_statistics_are_scipys(statistic):
    values, target = RNG(1).integers(0, 9, (3, 40)).astype(float), RNG(2).integers(0, 9, 40).astype(float)
    reference = {"spearman": scipy_stats.spearmanr, "kendall": scipy_stats.kendalltau}[statistic]
    expected = np.mean([reference(row, target).statistic for row in values])
    found = stats.units_interval(values, None, target, statistic, reps=100)
    assert found.estimate == pytest.approx(expected, rel=1e-12)
    other = stats.units_interval(values, values[:, ::-1], target, statistic, reps=100)
    assert other.estimate == pytest.approx(
        expected - np.mean([reference(r, target).statistic for r in values[:, ::-1]])
    )


def test_units_interval_is_repeatable_and_swapping_negates():
    a, b = RNG(3).normal(size=(2, 3, 30))
    first, again, swapped = stats.units_interval(a, b), stats.units_interval(a, b), stats.units_interval(b, a)
    assert first == again
    assert (swapped.estimate, swapped.lo, swapped.hi) == pytest.approx(
        (-first.estimate, -first.hi, -first.lo), rel=1e-9
    )


@pytest.mark.parametrize("seeds", [1, 4])
def test_simulated_coverage_over_units_and_seeds(seeds):
    """Units matter most, as architectures do; seeds alone would give far too short an interval."""
    rng, covered = RNG(7), 0
    for _ in range(300):
        values = rng.normal(size=(1, 60)) + 0.05 * rng.normal(size=(seeds, 1)) + 0.5 * rng.normal(size=(seeds, 60))
        found = stats.units_interval(values, reps=300)
        covered += found.lo <= 0 <= found.hi
    assert 0.91 <= covered / 300 <= 0.995


def test_simulated_coverage_of_a_rank_correlation():
    rng, covered = RNG(8), 0
    truth = 6 / math.pi * math.asin(0.7 / 2)  # Spearman's of a normal pair with correlation .7
    for _ in range(200):
        target = rng.normal(size=80)
        values = 0.7 * target + math.sqrt(1 - 0.7**2) * rng.normal(size=80)
        found = stats.units_interval(values[None], None, target, "spearman", reps=300)
        covered += found.lo <= truth <= found.hi
    assert 0.90 <= covered / 200 <= 0.99


# --- tests of hypotheses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_all_positive_differences_have_the_least_p(n):
    d = RNG(n).uniform(0.1, 1, n)
    assert stats.sign_flip_test(d) == 2.0**-n
    assert stats.sign_flip_test(d, alternative="less") == 1.0
    assert stats.sign_flip_test(d, alternative="two-sided") == 2.0 ** (1 - n)


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
@pytest.mark.parametrize("seed", range(4))
def test_sign_flips_agree_with_enumeration_and_scipy(alternative, seed):
    a, b = RNG(seed).integers(-9, 10, size=(2, 7)).astype(float)  # with ties, free of rounding
    p = stats.sign_flip_test(a, b, alternative)
    sums = np.array(list(itertools.product([1, -1], repeat=7))) @ (a - b)
    sums = {"greater": sums, "less": -sums, "two-sided": abs(sums)}[alternative]
    assert p == np.mean(sums >= sums[0] - 1e-9)
    if alternative != "two-sided":

        def mean(x, axis):
            return x.mean(axis=axis)

        kwargs = {"permutation_type": "samples", "n_resamples": np.inf, "alternative": alternative}
        assert p == pytest.approx(scipy_stats.permutation_test((a - b,), mean, **kwargs).pvalue, rel=1e-12)


def test_sign_flip_is_exact_under_the_null():
    draws = RNG(0).normal(size=(4000, 5))
    p = np.array([stats.sign_flip_test(row) for row in draws])
    assert np.mean(p <= 0.0625) == pytest.approx(0.0625, abs=4 * math.sqrt(0.06 / 4000))


def test_ties_and_rounding_do_not_lower_p():
    assert stats.sign_flip_test([0.0, 0.0, 0.0]) == 1.0
    assert stats.sign_flip_test([0.1, 0.2, 0.3, -0.6]) == 9 / 16


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: stats.paired_t_interval([1, 2], [1, 2, 3]), "a and b must have the same length, got 2 and 3"),
        (lambda: stats.paired_t_interval([1.0]), "a must be one row of n >= 2 values"),
        (lambda: stats.paired_t_interval([1.0, math.nan]), "a must be finite"),
        (lambda: stats.paired_t_interval([1.0, 2.0], [1.0, math.inf]), "b must be finite"),
        (lambda: stats.paired_t_interval([[1.0, 2.0]]), "a must be one row"),
        (lambda: stats.paired_t_interval([1.0, 0.0], log=True), "a and b must be positive with log=True, got 0.0"),
        (lambda: stats.paired_t_interval([1.0, 2.0], [1.0, -1.0], log=True), "must be positive with log=True"),
        (lambda: stats.paired_t_interval([1.0, 2.0], level=1.0), r"level must be in \(0, 1\), got 1.0"),
        (lambda: stats.order_statistic_interval([1.0] * 5), "x must hold more values for a 95% interval"),
        (lambda: stats.order_statistic_interval([]), "x must be finite and not empty"),
        (lambda: stats.order_statistic_interval([1.0] * 9, level=0), "level must be in"),
        (lambda: stats.items_interval([1, 2], None, -1.0, 5), "d must be finite and >= 0"),
        (lambda: stats.items_interval([1, 2], None, 1.0, 1), "m >= 2, got 1.0 and 1"),
        (lambda: stats.item_variance([[1, 0]], [[1, 0, 1]]), "same shape"),
        (lambda: stats.item_variance([1, 0]), "a must be a matrix"),
        (lambda: stats.binomial_interval(3, 2), "successes must be from 0 to trials"),
        (lambda: stats.binomial_interval(0, 0), "successes must be from 0 to trials"),
        (lambda: stats.units_interval(np.ones((2, 5))), "a must be a matrix .* of n >= 20"),
        (lambda: stats.units_interval(np.ones((2, 20)), np.ones((3, 20))), "must share their units"),
        (lambda: stats.units_interval(np.ones((2, 20)), statistic="spearman"), "statistic must be one of"),
        (lambda: stats.units_interval(np.ones((2, 20)), target=np.ones(20)), "statistic must be one of"),
        (lambda: stats.units_interval(np.ones((2, 20)), reps=10), "reps be >= 100"),
        (lambda: stats.units_interval(np.full((2, 20), np.nan)), "a must be finite"),
        (lambda: stats.sign_flip_test(np.ones(25)), "at most 24 values"),
        (lambda: stats.sign_flip_test([1, 2], alternative="more"), "alternative must be"),
    ],
)
def test_refusals_name_argument_rule_and_value(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_interval_prints_and_compares():
    assert str(Interval(0.51234, 0.4, 0.6)) == "0.5123 [0.4, 0.6]"
    assert Interval(1, 0, 2) == Interval(1, 0, 2)
