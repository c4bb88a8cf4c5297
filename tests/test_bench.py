"""Benchmarks: rows are checked, verdicts follow the interval, a failure stops nothing and overwrites nothing."""

import json
import math

import numpy as np
import pytest

from effnb.lab.measure.timing import Ratio
from effnb.lab.paths import digest
from effnb.lab.run import bench

ROW = {"name": "step", "ours": "a", "peer": "b", "ratio": 3.0, "target": 2.0, "better": "higher", "unit": "x"}
ROW = ROW | {"detail": ""}

GOOD = """
import os
import torch
from effnb.lab.measure.timing import paired_ratio

def run(quick=False):
    assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"
    print("chatter")
    ratio = paired_ratio(lambda: sum(range(3000)), lambda: sum(range(30)), min_block=0.001)
    row = {"ours": "short", "peer": "long", "better": "higher", "unit": "x", "detail": f"quick={quick}"}
    missing = {"name": "optional", "ratio": None, "target": None, "detail": "needs the extra bench"}
    return [row | {"name": "sum [of] range", "ratio": ratio, "target": 2.0}, row | missing]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "bench_good.py").write_text(GOOD)
    (tmp_path / "bench_broken.py").write_text("def run(quick=False):\n    raise RuntimeError('no [such] luck')\n")
    return tmp_path


def test_run_all_writes_records_and_goes_on_after_a_failure(folder, capsys):
    out = folder / "results"
    records = bench.run_all(quick=True, out=out, folder=folder)
    broken, good = records
    assert (broken["system"], good["system"]) == ("broken", "good")
    assert broken["error"] == "exit code 1: RuntimeError: no [such] luck"
    assert [path.name for path in out.iterdir()] == ["good.json"]
    assert json.loads((out / "good.json").read_text()) == good
    assert good["schema"] == "effnb-bench/1" and good["quick"] is True
    assert bench.problems(out) == []
    assert good["machine"]["threads"] == 1
    assert good["roofline"]["gflops"] > 0 and good["roofline"]["gb_s"] > 0
    first, second = good["rows"]
    assert first["verdict"] == "met" and len(first["ratio"]["ratios"]) == 7
    assert second["verdict"] == "not measured" and second["ratio"] is None
    assert first["detail"] == "quick=True"
    printed = capsys.readouterr().out
    assert "no [such] luck" in printed and "sum [of] range" in printed and "met" in printed


def test_a_failure_leaves_the_earlier_record(folder):
    (folder / "broken.json").write_text("earlier")
    bench.run_all(["broken"], out=folder, folder=folder)
    assert (folder / "broken.json").read_text() == "earlier"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import time\ndef run(quick=False):\n    time.sleep(60)\n", "took more than 0.5 s"),
        ("import os\ndef run(quick=False):\n    os._exit(7)\n", "exit code 7: no output"),
        ("import os\ndef run(quick=False):\n    os._exit(0)\n", "exit code 0: no output"),
        ("", "exit code 1: KeyError: 'run'"),
        ("def run(quick=False):\n    return []\n", "exit code 1: ValueError: rows must be a list"),
    ],
)
def test_every_way_to_fail_becomes_an_error(tmp_path, source, error):
    (tmp_path / "bench_bad.py").write_text(source)
    timeout = 0.5 if "sleep" in source else 300.0
    (record,) = bench.run_all(out=tmp_path / "out", folder=tmp_path, timeout=timeout)
    assert record["error"].startswith(error)
    assert not (tmp_path / "out").exists()


def test_quick_figures_never_land_among_the_published(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "root", lambda: tmp_path)
    monkeypatch.setattr(bench, "committed_results", lambda: tmp_path / "book" / "results")
    monkeypatch.setattr(bench, "_run_apart", lambda system, *_: {"system": system, "seconds": 0.0, "rows": []})
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "bench_toy.py").touch()
    bench.run_all(quick=True)
    assert (tmp_path / "_build" / "bench" / "toy.json").exists() and not (tmp_path / "book").exists()
    bench.run_all()
    assert (tmp_path / "book" / "results" / "bench" / "toy.json").exists()


@pytest.mark.parametrize(
    ("ratio", "target", "better", "verdict"),
    [
        (Ratio(3.0, 2.0, 4.0, (3.0,), False), 2.0, "higher", "met"),
        (Ratio(3.0, 1.9, 4.0, (3.0,), False), 2.0, "higher", "median only"),
        (Ratio(1.8, 1.7, 4.0, (1.8,), False), 2.0, "higher", "not met"),
        (Ratio(2.0, 1.0, 2.4, (2.0,), True), 2.5, "lower", "met"),
        (Ratio(2.0, 1.0, 2.6, (2.0,), True), 2.5, "lower", "median only"),
        (2.6, 2.5, "lower", "not met"),
        (np.float32(3), 3, "higher", "met"),
        (3.0, None, "higher", "no target"),
    ],
)
def test_a_target_is_met_by_the_worse_end_of_the_interval(ratio, target, better, verdict):
    (row,) = bench.checked_rows([ROW | {"ratio": ratio, "target": target, "better": better}])
    assert row["verdict"] == verdict
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"better": "bigger"}, "better must be 'higher' or 'lower', got 'bigger'"),
        ({"name": ""}, "name must be a text"),
        ({"detail": None}, "detail must be a text, got None"),
        ({"ratio": math.nan}, "ratio must be a positive and finite number, got nan"),
        ({"ratio": True}, "ratio must be a positive and finite number, got True"),
        ({"ratio": "3"}, "ratio must be a positive and finite number, got '3'"),
        ({"ratio": None}, "detail must say why 'step' has no ratio"),
        ({"ratio": Ratio(1.0, 2.0, 3.0, (1.0,), False)}, "ratio must have lo <= median <= hi"),
        ({"ratio": Ratio(1.0, 0.0, 3.0, (1.0,), False)}, "ratio.lo must be a positive"),
        ({"target": -1}, "target must be a positive and finite number, got -1"),
        ({"speed": 1}, "a row must have exactly the fields"),
    ],
)
def test_bad_rows_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        bench.checked_rows([ROW | change])


def test_missing_fields_and_twins_are_refused():
    with pytest.raises(ValueError, match="a row must have exactly the fields"):
        bench.checked_rows([{key: value for key, value in ROW.items() if key != "unit"}])
    with pytest.raises(ValueError, match="name must differ from row to row"):
        bench.checked_rows([ROW, ROW])
    with pytest.raises(ValueError, match="rows must be a list"):
        bench.checked_rows(None)


SIZED = """
def run(quick: bool = False, size: int = 3, *, kind: str = "a"):
    row = {"name": f"{kind}{size}", "ours": "a", "peer": "b", "ratio": 1.0, "target": None}
    return [row | {"better": "higher", "unit": "x", "detail": ""}]
"""


def test_arguments_are_checked_before_anything_runs_and_passed_on(tmp_path, monkeypatch):
    (tmp_path / "bench_sized.py").write_text(SIZED)
    (record,) = bench.run_all(out=tmp_path, folder=tmp_path, further={"size": 5, "kind": "b"})
    assert record["rows"][0]["name"] == "b5"
    monkeypatch.setattr(bench, "_run_apart", lambda *_: pytest.fail("it ran"))
    for further, message in (
        ({"sise": 5}, r"parameters of sized must be among \['kind', 'size'\], got 'sise'"),
        ({"size": "big"}, "size of sized must be of type int, got 'big'"),
        ({"quick": True}, "got 'quick'"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.run_all(out=tmp_path, folder=tmp_path, further=further)


def test_an_edited_record_is_named(folder):
    (record,) = bench.run_all(["good"], out=folder, folder=folder)
    assert bench.problems(folder) == []
    record["rows"][0]["ratio"]["median"] = 99.0
    (folder / "good.json").write_text(json.dumps(record))
    assert bench.problems(folder) == ["bench/good.json: the file was edited after it was written"]
    # With a digest that fits, a verdict must still follow from its ratio.
    record["rows"][0] |= {"verdict": "not met"}
    record["digest"] = digest({k: v for k, v in record.items() if k != "digest"})
    (folder / "good.json").write_text(json.dumps(record))
    assert bench.problems(folder) == ["bench/good.json, sum [of] range: stored 'not met', but its ratio gives 'met'"]
    (folder / "good.json").write_text("[]")
    assert "not a benchmark's record" in bench.problems(folder)[0]


def test_run_all_refuses(tmp_path):
    (tmp_path / "bench_toy.py").touch()
    with pytest.raises(ValueError, match="systems must be among toy, got nothing"):
        bench.run_all(["nothing"], folder=tmp_path)
    with pytest.raises(ValueError, match="timeout must be positive, got 0"):
        bench.run_all(folder=tmp_path, timeout=0)
