"""The committed scores: what they must hold, that a rerun gives them, and that the figures measured on them follow."""

import sys

import numpy as np
import pandas as pd
import pytest

from effnb.lab.measure import data
from effnb.lab.paths import root
from effnb.lab.run.fanout import fan_out, one_thread
from effnb.nas.nb201 import all_cells, iso_class

sys.path.insert(0, str(root() / "data"))
import correlate_nas
import score_nas

needs_cifar = pytest.mark.skipif(not data.available("cifar10"), reason="needs EFFNB_DATA with CIFAR-10")
needs_table = pytest.mark.skipif(not data.available("nas-bench-201"), reason="needs EFFNB_DATA with NAS-Bench-201")
TABLES = ("nb201", "skeleton", "classes", "nano-bench", "nano-width")


def stored(name):
    return pd.read_csv(correlate_nas.SCORES / f"{name}.csv", dtype={"edges": str})


@pytest.mark.parametrize("name", TABLES)
def test_the_files_hold_every_network_and_seed(name):
    found, table = stored(name), score_nas.TABLES[name]
    items = [item[0] for item in table.items()]
    if name == "classes":
        assert sorted(found.edges) == sorted(items) and len(found) == 6_466
        assert found.notna().all().all() and len(found.columns) == 1 + 2 * table.seeds
        return
    assert found.edges.tolist() == items * table.seeds
    assert found.seed.tolist() == [seed for seed in range(table.seeds) for _ in items]
    assert found[list(table.shared)].notna().all().all()
    first = found[found.seed == 0]
    assert first.notna().all().all(), "seed 0 has every score"


def test_the_sample_is_large_enough_and_uniform():
    cells = score_nas.nb201_cells()
    assert len(cells) == len(set(cells)) >= 200 and stored("nb201").seed.nunique() >= 3
    digits = np.array([list(map(int, cell)) for cell in cells])
    assert np.abs([(digits == op).mean() - 0.2 for op in range(5)]).max() < 0.05


@pytest.mark.parametrize("name", TABLES)
def test_no_accuracy_of_the_table_is_committed(name):
    assert not [column for column in stored(name).columns if column.startswith(("acc", "cifar", "imagenet"))]


def test_the_floor_is_a_lower_bound_in_every_row():
    for name in ("nb201", "skeleton", "nano-bench", "nano-width"):
        found = stored(name)
        assert (found.zico >= found.zico_floor - 1e-4).all()
    found = stored("classes")
    assert all((found[f"zico_seed{s}"] >= found[f"zico_floor_seed{s}"] - 1e-4).all() for s in range(3))


@pytest.mark.parametrize("name", [pytest.param("nb201", marks=needs_cifar), "nano-bench", "nano-width"])
def test_scoring_again_gives_the_committed_scores(name):
    score_nas.check(score_nas.TABLES[name], 2)


def test_classes_are_scored_again():
    table = score_nas.TABLES["classes"]
    some = [item for item in table.items() if item[0] in ("000000", "003010", "004433", "003321")][:3]
    rows = score_nas.score_all(some, score_nas.batches(table.images, 0), table.shared, build=table.build, seed=0)
    found = stored("classes").set_index("edges")
    for item, row in zip(some, rows, strict=True):
        assert row["zico"] == pytest.approx(found.zico_seed0[item[0]], rel=score_nas.TOLERANCE["zico"])


def test_batches_depend_on_the_seed_and_prefixes_agree():
    first, again, other = (score_nas.batches(score_nas.fashion, seed) for seed in (0, 0, 1))
    assert all((a[0] == b[0]).all() for a, b in zip(first, again, strict=True))
    assert not (first[0][0] == other[0][0]).all()
    more = score_nas.batches(score_nas.fashion, 0, 4)
    assert len(more) == 4 and all((a[0] == b[0]).all() for a, b in zip(first, more, strict=False))


def test_the_script_resumes(tmp_path, monkeypatch):
    """A second run finds every score in the cache and computes none."""
    monkeypatch.setattr(score_nas, "CACHE", tmp_path)
    items = [("332113", 4, 4, 1), ("000000", 4, 4, 1)]
    table = score_nas.Table("nano-width", lambda: items, score_nas.build_nano, score_nas.fashion, 2)
    calls = []

    def run(function, tasks, on_done):
        calls.extend(tasks)
        outcomes = [function(task) for task in tasks]
        for index, outcome in enumerate(outcomes):
            on_done(index, outcome)
        return outcomes

    first = score_nas.score(table, run)
    assert len(calls) == 2 * (3 + 1 + 1 + 1)
    calls.clear()
    pd.testing.assert_frame_equal(first, score_nas.score(table, run))
    assert not calls and len(first) == 4


@pytest.mark.slow
def test_processes_give_the_same_scores():
    items = [("332113", 4, 4, 1), ("000000", 4, 4, 1)]
    one_thread()  # as the processes
    batches = score_nas.batches(score_nas.fashion, 0)
    options = {"build": score_nas.build_nano, "seed": 0}
    serial = score_nas.score_all(items, batches, ("zico", "naswot"), **options)
    assert score_nas.score_all(items, batches, ("zico", "naswot"), run=fan_out, **options) == serial


def test_measured_figures_are_complete_and_plausible():
    found = pd.read_csv(correlate_nas.SCORES / "measured.csv")
    assert set(found.experiment) >= {"sample", "connected", "table", "skeleton", "search", "top 100 %", "top 5 %"}
    correlations = found[found.experiment != "search"]
    assert correlations.estimate.between(-2, 2).all() and found[found.experiment == "search"].estimate.ge(-1e-9).all()
    bounds = found.dropna(subset=["lo"])
    assert (bounds.lo <= bounds.hi).all()


@needs_table
def test_the_figures_follow_from_the_scores():
    found = pd.read_csv(correlate_nas.SCORES / "measured.csv")
    again = correlate_nas.measured()
    assert np.allclose(found.estimate, again.estimate, atol=1e-5)
    assert np.allclose(found.lo, again.lo, atol=1e-5, equal_nan=True)


@needs_table
def test_a_cell_has_the_score_of_its_class():
    table = correlate_nas.accuracies()
    frame, classes = correlate_nas.by_class(table)[0], stored("classes")
    score = dict(zip(map(iso_class, classes.edges), classes.zico_seed0, strict=True))
    cells = list(all_cells())
    for i in np.random.default_rng(0).choice(len(cells), 50, replace=False):
        assert frame.zico[cells[i]] == score[iso_class(cells[i])] and frame.params[cells[i]] == table.params[cells[i]]
