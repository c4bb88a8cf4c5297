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
    assert (interval.estimate, interval.n, interval.method) == (2.5, 2, "paired-t")
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
    assert ratio.method == "paired-t-log"


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
    draws = RNG(n).normal(1.0, 2.0, size=(10_000, n))
    covered = [i.lo <= 1.0 <= i.hi for i in map(stats.paired_t_interval, draws)]
    assert 0.94 <= np.mean(covered) <= 0.96


# --- median ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "lo", "hi", "attained"), [(6, 1, 6, 1 - 2 / 64), (7, 1, 7, 1 - 2 / 128), (15, 4, 12, 1 - 1152 / 32768)]
)
def test_order_statistics_of_the_rule_book(n, lo, hi, attained):
    interval = stats.order_statistic_interval(RNG(0).permutation(np.arange(1.0, n + 1)))
    assert (interval.estimate, interval.lo, interval.hi) == ((n + 1) / 2, lo, hi)
    assert interval.level == pytest.approx(attained, rel=1e-12)
    assert interval.method == "order-statistic"


@pytest.mark.parametrize("n", range(6, 40))
def test_no_narrower_symmetric_pair_reaches_the_level(n):
    interval = stats.order_statistic_interval(np.arange(1.0, n + 1))
    k = int(interval.lo)
    assert interval.hi == n + 1 - k
    assert 1 - 2 * scipy_stats.binom.cdf(k - 1, n, 0.5) >= 0.95
    assert k == (n + 1) // 2 or 1 - 2 * scipy_stats.binom.cdf(k, n, 0.5) < 0.95


@pytest.mark.parametrize("n", [7, 15])
def test_simulated_coverage_of_the_order_statistics_on_skewed_data(n):
    draws = RNG(n).lognormal(size=(10_000, n))
    interval = [stats.order_statistic_interval(row) for row in draws]
    covered = np.mean([i.lo <= 1.0 <= i.hi for i in interval])
    assert covered == pytest.approx(interval[0].level, abs=4 * math.sqrt(0.03 * 0.97 / 10_000))


def test_reciprocals_invert_the_median_of_an_odd_count():
    ratios = RNG(3).lognormal(size=9)
    a, b = stats.order_statistic_interval(ratios), stats.order_statistic_interval(1 / ratios)
    assert (a.estimate, a.lo, a.hi) == pytest.approx((1 / b.estimate, 1 / b.hi, 1 / b.lo), rel=1e-12)


# --- bootstrap and aggregates ------------------------------------------------------------------------------------


def test_bootstrap_resamples_seeds_within_each_task_only():
    scores = np.arange(5)[:, None] * 0.0 + np.array([1.0, 10.0, 100.0, 1000.0])
    interval = stats.stratified_bootstrap(scores, np.mean)
    assert interval.lo == interval.hi == interval.estimate == 277.75


def test_bootstrap_standard_error_of_the_mean_is_the_closed_form():
    scores = RNG(0).normal(size=(10, 3)) * [1, 5, 0.1]
    interval = stats.stratified_bootstrap(scores, np.mean, reps=50_000, level=0.6826895)
    error = math.sqrt((scores.var(axis=0) / 10).sum()) / 3
    assert (interval.hi - interval.lo) / 2 == pytest.approx(error, rel=0.02)


def test_stacked_and_looped_statistics_agree():
    scores = RNG(1).normal(size=(6, 5))
    looped = stats.stratified_bootstrap(scores, lambda x: stats.iqm(x), reps=300, generator=generator(1))
    stacked = stats.stratified_bootstrap(scores, stats.iqm, reps=300, generator=generator(1))
    assert (looped.lo, looped.hi) == pytest.approx((stacked.lo, stacked.hi), rel=1e-12)
    other = stats.stratified_bootstrap(scores, stats.iqm, reps=300, generator=generator(2))
    assert other.lo != stacked.lo
    assert other.estimate == stacked.estimate == stats.iqm(scores)


def test_bootstrap_of_two_algorithms_and_of_a_profile():
    a, b = RNG(2).normal([[[0.5]], [[0.0]]], size=(2, 10, 4))
    better = stats.stratified_bootstrap((a, b), stats.probability_of_improvement, reps=500)
    assert 0 <= better.lo < better.estimate < better.hi <= 1
    assert better.estimate == stats.probability_of_improvement(a, b)
    taus = np.linspace(-1, 1, 5)
    band = stats.stratified_bootstrap(a, lambda x: stats.performance_profile(x, taus), reps=200)
    assert band.lo.shape == band.hi.shape == (5,)
    assert (band.lo <= band.estimate).all() and (band.estimate <= band.hi).all()


@pytest.mark.slow
def test_simulated_coverage_of_the_bootstrap():
    draws = RNG(4).normal(size=(2000, 20, 5))
    covered = [i.lo <= 0 <= i.hi for i in (stats.stratified_bootstrap(d, np.mean, reps=400) for d in draws)]
    assert 0.91 <= np.mean(covered) <= 0.96


@pytest.mark.parametrize("shape", [(4,), (7,), (5, 4), (3, 3, 3)])
def test_iqm_is_the_trimmed_mean_of_all_runs(shape):
    scores = RNG(0).normal(size=shape)
    assert stats.iqm(scores) == pytest.approx(scipy_stats.trim_mean(scores.ravel(), 0.25), rel=1e-12)


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (-2, -1), (0, 2)])
def test_iqm_along_axes(axis):
    scores = RNG(0).normal(size=(6, 5, 4))
    axes = np.atleast_1d(axis) % 3
    kept = [k for k in range(3) if k not in axes]
    flat = scores.transpose(*kept, *axes).reshape(*(scores.shape[k] for k in kept), -1)
    expected = np.apply_along_axis(lambda row: scipy_stats.trim_mean(row, 0.25), -1, flat)
    np.testing.assert_allclose(stats.iqm(scores, axis=axis), expected, rtol=1e-12)


@settings(deadline=None)
@given(vectors(-1e3, 1e3, min_size=1, max_size=30))
def test_iqm_lies_between_the_quartiles(values):
    lo, hi = np.quantile(values, 0.25, method="lower"), np.quantile(values, 0.75, method="higher")
    assert lo - 1e-6 <= stats.iqm(values) <= hi + 1e-6
    if len(values) < 4:
        assert stats.iqm(values) == pytest.approx(np.mean(values), rel=1e-12, abs=1e-12)
    assert stats.iqm([values[0]] * len(values)) == pytest.approx(values[0], rel=1e-12)


@settings(deadline=None)
@given(vectors(-3, 3, min_size=1, max_size=8), vectors(-3, 3, min_size=1, max_size=8))
def test_probabilities_of_improvement_add_up_and_are_mann_whitneys(a, b):
    p = stats.probability_of_improvement(a, b)
    assert p + stats.probability_of_improvement(b, a) == pytest.approx(1, abs=1e-12)
    u = sum((x > y) + 0.5 * (x == y) for x, y in itertools.product(a, b))
    assert p == pytest.approx(u / (len(a) * len(b)), abs=1e-12)


def test_improvement_is_averaged_over_tasks_with_unequal_seeds():
    a, b = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[2.0, 0.0]])
    assert stats.probability_of_improvement(a, b) == 0.5
    assert stats.probability_of_improvement(a[:, :1], [0.0]) == 1.0


def test_gap_and_profile_by_hand():
    scores = [[0.2, 1.3], [0.9, 1.0]]
    assert stats.optimality_gap(scores) == pytest.approx(0.9 / 4)
    assert stats.optimality_gap(scores, target=0.0) == 0
    assert stats.performance_profile(scores, [0, 0.5, 0.9, 1.2, 2]).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_area_under_the_profile_is_one_minus_the_gap():
    scores = RNG(0).uniform(0, 1, size=(5, 4))
    taus = (np.arange(20_000) + 0.5) / 20_000
    area = stats.performance_profile(scores, taus).mean()
    assert area == pytest.approx(1 - stats.optimality_gap(scores), abs=1e-4)


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


@pytest.mark.parametrize("seed", range(5))
def test_equivalence_agrees_with_two_one_sided_tests_of_scipy(seed):
    a, b = RNG(seed).normal(size=(2, 6))
    result = stats.tost(a, b, 1.0)
    upper = scipy_stats.ttest_1samp(a - b, 1.0, alternative="less").pvalue
    lower = scipy_stats.ttest_1samp(a - b, -1.0, alternative="greater").pvalue
    assert result.p == pytest.approx(max(upper, lower), rel=1e-9)
    assert result.equivalent == (result.p < 0.05)
    assert result.interval == stats.paired_t_interval(a - b, level=0.9)


def test_equivalence_at_the_edges():
    assert stats.tost([1.0, 1.0], None, 1.5).equivalent
    on_the_margin = stats.tost([1.0, 1.0], None, 1.0)
    assert (on_the_margin.equivalent, on_the_margin.p) == (False, 1.0)
    assert not stats.tost([0.0, 3.0, -3.0], None, 1.0).equivalent


def test_size_of_the_equivalence_test_is_five_percent_on_the_margin():
    draws = RNG(0).normal(1.0, 0.3, size=(10_000, 5))
    assert np.mean([stats.tost(row, None, 1.0).equivalent for row in draws]) == pytest.approx(0.05, abs=0.009)


def test_holm_by_hand():
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02], rtol=1e-12)
    assert stats.holm([0.9, 0.8]).tolist() == [1, 1]
    assert stats.holm([0.2]).tolist() == [0.2]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_closed_bonferroni(p):
    m = len(p)
    families = [f for k in range(1, m + 1) for f in itertools.combinations(range(m), k)]
    closed = [max(min(1, len(f) * min(p[j] for j in f)) for f in families if i in f) for i in range(m)]
    np.testing.assert_allclose(stats.holm(p), closed, rtol=1e-12)


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
        (lambda: stats.stratified_bootstrap(np.ones((3, 5)), np.mean), "scores need 20 entries"),
        (lambda: stats.stratified_bootstrap(np.ones((5, 5)), np.mean, reps=10), "reps 100"),
        (lambda: stats.stratified_bootstrap(np.full((5, 5), np.nan), np.mean), "scores must be finite"),
        (lambda: stats.stratified_bootstrap(np.ones((5, 5)), np.mean, level=2), "level must be in"),
        (lambda: stats.stratified_bootstrap(np.ones((5, 5, 2)), np.mean), "scores must have shape"),
        (lambda: stats.iqm([]), "scores must be finite and not empty"),
        (lambda: stats.probability_of_improvement(np.ones((2, 3)), np.ones((2, 2))), "same number of tasks"),
        (lambda: stats.optimality_gap([math.nan]), "scores must be finite"),
        (lambda: stats.performance_profile([1.0], [math.nan]), "thresholds must be finite"),
        (lambda: stats.sign_flip_test(np.ones(25)), "at most 24 values"),
        (lambda: stats.sign_flip_test([1, 2], alternative="more"), "alternative must be"),
        (lambda: stats.tost([1, 2], None, 0.0), "margin must be positive"),
        (lambda: stats.tost([1, 2], None, math.nan), "margin must be positive"),
        (lambda: stats.tost([1, 2], None, 1.0, alpha=0.5), "2 alpha must be in"),
        (lambda: stats.holm([0.5, 1.5]), "p must be one row of values in"),
        (lambda: stats.holm([]), "p must be finite and not empty"),
    ],
)
def test_refusals_name_argument_rule_and_value(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_interval_prints_and_compares():
    assert str(Interval(0.51234, 0.4, 0.6)) == "0.5123 [0.4, 0.6]"
    assert Interval(1, 0, 2) == Interval(1, 0, 2)
