"""Search under a budget and rank statistics: against SciPy and brute force, with every rule of the population."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from effnb.nas.nb201 import all_cells
from effnb.nas.search import CellSpace, evolve, random_search
from effnb.nas.stats import rank_correlation, rank_table, spearman_brown

SCIPY = {"spearman": scipy_stats.spearmanr, "kendall": scipy_stats.kendalltau}


def convolutions(cell):
    return cell.count("3") + 0.5 * cell.count("2")


# Search


class Line:
    """Integers; neighbours are one apart."""

    def sample(self, rng):
        return int(rng.integers(-50, 50))

    def mutate(self, arch, rng):
        return arch + int(rng.choice([-1, 1]))


def test_neighbours_differ_in_one_edge_and_all_are_reached():
    rng = np.random.default_rng(0)
    seen = Counter(CellSpace().mutate("012340", rng) for _ in range(4000))
    assert len(seen) == 24 and all(sum(a != b for a, b in zip(cell, "012340", strict=True)) == 1 for cell in seen)
    assert min(seen.values()) > 100


def test_random_cells_are_uniform():
    rng = np.random.default_rng(0)
    digits = np.array([list(map(int, CellSpace().sample(rng))) for _ in range(5000)])
    assert np.allclose([(digits == op).mean(0) for op in range(5)], 0.2, atol=0.03)


def test_evolution_climbs_and_counts_each_architecture_once():
    calls = Counter()

    def score(arch):
        calls[arch] += 1
        return -abs(arch - 70)

    found = evolve(Line(), score, steps=600, population=4, seed=0, start=0)
    assert found.best == 70 and found.score == 0 and found.population[0] == 70
    assert max(calls.values()) == 1 and found.evaluations == len(calls)
    assert found.history[0] == (0, -70) and len(found.history) == 601 and len(found.population) == 4


def test_the_population_follows_the_algorithm_step_by_step():
    """Replayed by hand with the same random choices: drop the lowest as soon as there are more than the limit."""
    found = evolve(Line(), lambda a: a, steps=50, population=3, seed=5, start=0)
    rng, members = np.random.default_rng(5), [0]
    for _ in range(50):
        members.append(Line().mutate(members[rng.integers(len(members))], rng))
        if len(members) > 3:
            members.remove(min(members))
    assert sorted(found.population) == sorted(members) and found.best == max(a for a, _ in found.history)


def test_the_oldest_member_can_go_instead():
    found = evolve(Line(), lambda a: -a, steps=3, population=2, seed=0, start=0, drop="oldest")
    assert set(found.population) == {a for a, _ in found.history[-2:]}


def test_every_scored_architecture_is_within_the_budget():
    within = lambda cell: cell.count("3") <= 2  # noqa: E731
    found = evolve(CellSpace(), convolutions, steps=400, population=8, budget_fn=within, seed=1)
    assert all(within(cell) for cell, _ in found.history) and len(found.history) < 401
    assert found.score == 4.0 and Counter(found.best) == {"3": 2, "2": 4}


def test_equal_seeds_give_equal_searches_and_others_differ():
    runs = [evolve(CellSpace(), convolutions, steps=50, population=8, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_the_first_of_equal_scores_is_returned():
    found = evolve(Line(), lambda a: 1.0, steps=20, population=3, seed=0, start=7)
    assert found.best == 7


def test_random_search_takes_the_best_of_its_draws():
    found = random_search(CellSpace(), convolutions, steps=200, budget_fn=lambda c: c[0] == "0", seed=0)
    assert len(found.history) == 200 and found.score == max(s for _, s in found.history)
    assert all(cell[0] == "0" for cell, _ in found.history) and found.evaluations <= 200


def test_evolution_beats_random_search_in_the_same_number_of_steps():
    gaps = [
        evolve(CellSpace(), convolutions, steps=150, population=16, seed=s).score
        - random_search(CellSpace(), convolutions, steps=151, seed=s).score
        for s in range(10)
    ]
    assert np.mean(gaps) > 0.5


def test_minus_infinity_is_a_score_and_nan_is_not():
    found = evolve(Line(), lambda a: a if a > 0 else -np.inf, steps=30, population=3, seed=0, start=0)
    assert found.best >= 0
    with pytest.raises(ValueError, match="NaN"):
        evolve(Line(), lambda a: np.nan, steps=1, population=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"population": 0}, "population must be"),
        ({"drop": "best"}, "drop must be"),
        ({"budget_fn": lambda arch: False}, "budget_fn must allow"),
        ({"budget_fn": lambda arch: arch > 0, "start": -1}, "start must be within"),
    ],
)
def test_bad_searches(options, message):
    with pytest.raises(ValueError, match=message):
        evolve(Line(), float, **{"steps": 5, "population": 2} | options)


def test_bad_random_searches():
    with pytest.raises(ValueError, match="steps must be"):
        random_search(Line(), float, steps=0)
    with pytest.raises(ValueError, match="budget_fn must allow"):
        random_search(Line(), float, steps=1, budget_fn=lambda arch: False)


# Rank statistics

columns = st.integers(3, 25).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(-4, 4).map(float), min_size=n, max_size=n)] * 2)
)


@given(columns, st.sampled_from(["spearman", "kendall"]))
def test_equals_scipy_with_ties(rows, method):
    x, y = rows
    found = rank_correlation(x, y, method=method).estimate
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(SCIPY[method](x, y).statistic, abs=1e-12)


@given(columns, st.sampled_from(["spearman", "kendall"]))
def test_increasing_maps_change_nothing(rows, method):
    x, y = map(np.array, rows)
    first = rank_correlation(x, y, method=method).estimate
    again = rank_correlation(np.exp(x), y**3 + y, method=method).estimate
    assert first == pytest.approx(again, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("method", ["spearman", "kendall"])
def test_every_resample_is_ranked_anew(method):
    rng = np.random.default_rng(3)
    x, z = rng.integers(0, 9, 40).astype(float), rng.normal(size=40)
    y = x + rng.normal(0, 3, 40)
    found = rank_correlation(x, y, method=method, bootstrap=50, seed=7, paired_with=z)
    index = np.random.default_rng(7).integers(40, size=(50, 40))
    expected = [SCIPY[method](x[i], y[i]).statistic - SCIPY[method](z[i], y[i]).statistic for i in index]
    assert np.allclose(found.resamples, expected)
    assert (found.lo, found.hi) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])))


@pytest.mark.parametrize("method", ["spearman", "kendall"])
def test_a_thousand_resamples_of_two_hundred_take_less_than_a_second(method):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 200))
    start = time.process_time()
    rank_correlation(x, y, method=method, bootstrap=1000)
    assert time.process_time() - start < 1


def test_kendall_of_the_whole_table_takes_milliseconds():
    x, y = np.random.default_rng(0).normal(size=(2, 15625))
    start = time.process_time()
    found = rank_correlation(x, y, method="kendall")
    assert time.process_time() - start < 0.1 and abs(found.estimate) < 0.03


def test_kendall_bootstrap_of_many_rows_needs_no_square_of_them():
    x, y = np.random.default_rng(0).normal(size=(2, 5000))
    found = rank_correlation(x, x + y, method="kendall", bootstrap=3)
    assert abs(found.resamples - found.estimate).max() < 0.05


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Gaussian pairs with Spearman (6 / pi) asin(r / 2)."""
    rng, r = np.random.default_rng(0), 0.7
    truth = 6 / np.pi * np.arcsin(r / 2)
    hits = []
    for _ in range(200):
        x = rng.normal(size=100)
        y = r * x + np.sqrt(1 - r**2) * rng.normal(size=100)
        found = rank_correlation(x, y, bootstrap=200)
        hits.append(found.lo <= truth <= found.hi)
    assert 0.88 <= np.mean(hits) <= 0.99


def test_a_score_paired_with_itself_differs_by_nothing():
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    found = rank_correlation(x, y, bootstrap=20, paired_with=x)
    assert found.estimate == found.lo == found.hi == 0


def test_missing_values_need_a_policy():
    x, y = np.arange(6.0), np.arange(6.0)
    x[2] = np.nan
    with pytest.raises(ValueError, match="must not be NaN, got 1 of 6"):
        rank_correlation(x, y)
    found = rank_correlation(x, y, nan="drop")
    assert (found.estimate, found.count, found.dropped) == (1.0, 5, 1)
    rival = np.arange(6.0)
    rival[0] = np.nan
    assert rank_correlation(x, y, nan="drop", paired_with=rival).count == 4


def test_minus_infinity_ranks_last_and_ties_with_itself():
    found = rank_correlation([-np.inf, -np.inf, 1, 2], [0, 1, 2, 3]).estimate
    assert found == rank_correlation([-9, -9, 1, 2], [0, 1, 2, 3]).estimate
    assert rank_correlation([-np.inf, -np.inf, 1, 2], [0, 1, 2, 3], method="kendall", bootstrap=5).count == 4


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1, 2], [1, 2]), {}, "at least 3"),
        (([1, 2, 3], [1, 2]), {}, "one length"),
        (([[1, 2, 3]], [[1, 2, 3]]), {}, "one length"),
        (([1, 2, 3], [1, 2, 3]), {"paired_with": [1, 2]}, "one length"),
        (([1, 2, 3], [1, 2, 3]), {"method": "pearson"}, "method must be"),
        (([1, 2, 3], [1, 2, 3]), {"nan": "omit"}, "nan must be"),
        (([1, 2, 3], [1, 2, 3]), {"bootstrap": -1}, "bootstrap must be"),
        (([1, 2, 3], [1, 2, 3]), {"level": 1.0}, "level"),
    ],
)
def test_bad_correlations(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        rank_correlation(*arguments, **options)


def test_a_table_of_correlations():
    rng = np.random.default_rng(0)
    y = rng.normal(size=50)
    scores = {"good": y + 0.1 * rng.normal(size=50), "bad": rng.normal(size=50)}
    rows = rank_table(scores, {"a": y, "b": -y}, rivals=[("good", "bad")], bootstrap=50)
    assert len(rows) == 6 and [row["scores"] for row in rows[:2]] == ["good", "good"]
    (difference,) = (row for row in rows if row["rival"] == "bad" and row["target"] == "a")
    assert difference["estimate"] == pytest.approx(rows[0]["estimate"] - rows[2]["estimate"])
    assert difference["lo"] > 0 and rows[1]["estimate"] == -rows[0]["estimate"]


@given(st.floats(0, 1), st.integers(1, 20))
def test_spearman_brown(r, k):
    """k = 1 changes nothing; doubling twice is quadrupling."""
    assert spearman_brown(r, 1) == pytest.approx(r)
    assert spearman_brown(spearman_brown(r, 2), k) == pytest.approx(spearman_brown(r, 2 * k))


def test_spearman_brown_on_simulated_runs():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=20000)
    runs = truth + rng.normal(0, 0.7, size=(6, 20000))
    single, means = np.corrcoef(runs[:2])[0, 1], np.corrcoef(runs[:3].mean(0), runs[3:].mean(0))[0, 1]
    assert spearman_brown(single, 3) == pytest.approx(means, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "name"), [((-1, 2), "reliability"), ((1.1, 2), "reliability"), ((0.5, 0), "count")]
)
def test_bad_spearman_brown(arguments, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        spearman_brown(*arguments)


def test_all_cells_can_be_reached_by_mutation():
    rng, cells = np.random.default_rng(0), {"000000"}
    known = set(all_cells())
    for _ in range(3000):
        cells.add(CellSpace().mutate(sorted(cells)[rng.integers(len(cells))], rng))
    assert cells <= known and len(cells) > 1000
