"""`score_all` over a list: in this process, on local processes, on a Ray cluster; killed, resumed, with failures."""

import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_sweep
import torch
from proxy_oracles import batch, seeded
from score_items import build, build_and_note
from torch import nn
from torch.nn import functional as F

from effnb.lab.run import process
from effnb.lab.run.fanout import fan_out
from effnb.models.small import mlp
from effnb.nas import nanobench, score_all
from effnb.nas.proxies.scoring import fingerprint

no_other_ray, ray_cluster = test_sweep.no_other_ray, test_sweep.ray_cluster  # fixtures
BATCHES = [batch(4, 14, seed) for seed in (0, 1)]
CELLS = ["312403", "000000", "333333"]
NAMES = ["zico", "naswot", "snip", "count_params", "zen_score"]


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the fan-out's processes, so that sums are added in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def built(tmp_path, monkeypatch):
    """What was built since it was asked last."""
    log = tmp_path / "log"
    monkeypatch.setenv("SCORE_LOG", str(log))

    def read():
        found = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return found

    return read


def expected(cells=CELLS, seeds=(0,)):
    return [score_all(build(c, seeded(s)), BATCHES, NAMES, seed=s) for c in cells for s in seeds]


# ---- results ---------------------------------------------------------------------------------------------------------
def test_rows_are_those_of_the_networks_one_by_one():
    assert score_all(CELLS, BATCHES, NAMES, build=build) == expected()
    assert score_all(CELLS, BATCHES, NAMES, build=build, seeds=[3, 5]) == expected(seeds=(3, 5))
    assert score_all(CELLS[:1], BATCHES, NAMES, build=build, seed=7) == expected(CELLS[:1], (7,))
    assert score_all([], BATCHES, NAMES, build=build) == []


def test_items_may_be_networks_or_partial_builders():
    models = [build(c, seeded(0)) for c in CELLS]
    assert score_all(models, BATCHES, NAMES) == expected()
    assert score_all(iter(CELLS), BATCHES, NAMES, build=partial(nanobench.build_net, widths=(2, 4))) == expected()


def test_a_failing_item_costs_only_itself():
    rows = score_all(["312403", "999999", 7, "333333"], BATCHES, NAMES, build=build)
    assert [rows[0], rows[3]] == expected(["312403", "333333"])
    assert isinstance(rows[1], ValueError) and "edges must be a string of six digits" in str(rows[1])
    assert isinstance(rows[2], ValueError)
    (row,) = score_all([nn.Linear(3, 2)], [(torch.zeros(2, 3), torch.tensor([0, 5]))], ["snip"])
    assert isinstance(row, ValueError) and "labels must be in 0..1" in str(row)
    (row,) = score_all(["no network"], BATCHES, ["snip"])
    assert isinstance(row, TypeError) and "model must be a torch.nn.Module, got str" in str(row)


def test_local_processes_give_the_same_and_a_killed_worker_costs_one_row():
    run = partial(fan_out, jobs=2)
    rows = score_all(["312403", "die", "000000", "bad", "333333"], BATCHES, NAMES, build=build, run=run)
    assert [rows[0], rows[2], rows[4]] == expected()
    assert isinstance(rows[1], RuntimeError) and "died" in str(rows[1])
    assert isinstance(rows[3], ValueError) and "edges must be" in str(rows[3])


ON_RAY = """
import json, sys
from functools import partial
from proxy_oracles import batch
from score_items import build
from effnb.lab.run.fanout import fan_out
from effnb.nas import score_all

address, path, names, items = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
run = partial(fan_out, ray_address=address)
rows = score_all(items, [batch(4, 14, seed) for seed in (0, 1)], names, build=build, run=run, resume=path)
print("ROWS", json.dumps([type(row).__name__ if isinstance(row, Exception) else row for row in rows]))
"""


def test_a_ray_cluster_gives_the_same(ray_cluster, tmp_path):
    """In a process of its own: Ray reads where a head may listen when it is imported."""
    script, path = tmp_path / "script.py", tmp_path / "scores.jsonl"
    script.write_text(ON_RAY)
    arguments = [ray_cluster, path, json.dumps(NAMES), json.dumps([*CELLS, "bad"])]
    further = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    code, told = process.call([sys.executable, script, *arguments], further, timeout=900)
    assert code == 0, told
    rows = json.loads(next(line for line in told.splitlines() if line.startswith("ROWS ")).removeprefix("ROWS "))
    assert rows == [*expected(), "ValueError"]
    assert len(path.read_text().splitlines()) == 3
    assert score_all(CELLS, BATCHES, NAMES, build=build, resume=path) == rows[:3]


# ---- resumption ------------------------------------------------------------------------------------------------------
def test_finished_rows_are_not_computed_again(tmp_path, built):
    score = partial(score_all, batches=BATCHES, names=NAMES, build=build_and_note, resume=tmp_path / "a" / "s.jsonl")
    first = score(CELLS[:2])
    assert built() == CELLS[:2]
    more = score([CELLS[2], *CELLS[:2], CELLS[2]], seeds=[0, 1])
    assert sorted(built()) == sorted([CELLS[2]] * 4 + CELLS[:2])
    assert [more[2], more[4]] == first and more[0] == more[6]
    assert score([*CELLS], seeds=[1, 0])[1::2] == expected() and built() == []
    assert first[1]["naswot"] == -math.inf and json.loads((tmp_path / "a/s.jsonl").read_text().splitlines()[1])


def test_rows_are_asked_for_by_everything_that_they_depend_on(tmp_path, built):
    def count(**changed):
        options = {"batches": BATCHES, "names": ["snip"], "build": build_and_note, "resume": tmp_path / "s", **changed}
        score_all(CELLS[:1], **options)
        return len(built())

    assert count() == 1 and count() == 0
    x, y = BATCHES[0]
    assert count(batches=[(x + 1e-6, y), BATCHES[1]]) == 1
    assert count(batches=[(x, y.flip(0)), BATCHES[1]]) == 1
    assert count(names=["plain"]) == 1 and count(seed=1) == 1
    assert count(options={"fisher": {"broadcast": False}}) == 1
    assert count(loss_fn=lambda out, y: 2 * F.cross_entropy(out, y)) == 1
    assert count(loss_fn=lambda out, y: 3 * F.cross_entropy(out, y)) == 1
    assert count() == 0


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_half_written_last_line_is_dropped(tmp_path, built, cut):
    path = tmp_path / "scores.jsonl"
    score = partial(score_all, CELLS, BATCHES, NAMES, build=build_and_note, resume=path)
    rows, whole = score(), path.read_bytes()
    built()
    path.write_bytes(whole[:-cut])
    assert score() == rows and built() == CELLS[2:]
    assert path.read_bytes() == whole
    assert score() == rows and built() == []


def test_another_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("to do\nmore\n")
    with pytest.raises(ValueError, match=r"resume must be a file of scores, line 1 of .*notes\.txt is not one"):
        score_all(CELLS, BATCHES, NAMES, build=build, resume=path)
    assert path.read_text() == "to do\nmore\n"


def test_failures_are_tried_again(tmp_path, built, monkeypatch):
    score = partial(score_all, CELLS, BATCHES, NAMES, build=build_and_note, resume=tmp_path / "s")
    monkeypatch.setenv("SCORE_FAIL", CELLS[1])
    rows = score()
    assert isinstance(rows[1], OSError) and built() == [CELLS[0], CELLS[2]]
    monkeypatch.delenv("SCORE_FAIL")
    assert score() == expected() and built() == [CELLS[1]]


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import torch
from test_nas_proxies_list import BATCHES, CELLS, NAMES, build_and_note, score_all
torch.set_num_threads(1)
score_all(CELLS, BATCHES, NAMES, build=build_and_note, resume={path!r})
"""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, built):
    path, tests = tmp_path / "scores.jsonl", Path(__file__).parent
    script = SCRIPT.format(paths=[str(tests), str(tests.parent)], path=str(path))
    environment = {**os.environ, "SCORE_DIE": CELLS[2]}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert built() == CELLS[:2] and len(path.read_text().splitlines()) == 2
    rows = score_all(CELLS, BATCHES, NAMES, build=build_and_note, resume=path)
    assert built() == CELLS[2:] and rows == expected()


def test_fingerprints_are_of_contents():
    equal = [
        lambda: ("303030", 0, None, 1.5, True, b"x"),
        lambda: {"b": [1], "a": {2, 3}},
        lambda: torch.arange(6.0).reshape(2, 3),
        lambda: np.arange(6).reshape(2, 3),
        lambda: mlp([3, 2], generator=seeded(0)),
        lambda: partial(nanobench.build_net, widths=(2, 4)),
        lambda: F.cross_entropy,
        lambda: Path("x"),
        lambda: frozenset({"a", "b"}),
    ]
    found = [fingerprint(make()) for make in equal]
    assert found == [fingerprint(make()) for make in equal] and len(set(found)) == len(found)
    different = [1, 1.0, True, "1", b"1", (1,), [1], {1: 1}, torch.ones(1), torch.ones(1, 1), np.ones(1), None]
    assert len(set(map(fingerprint, different))) == len(different)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    assert fingerprint(mlp([3, 2], generator=seeded(0))) != fingerprint(mlp([3, 2], generator=seeded(1)))


def test_fingerprints_are_the_same_in_another_process():
    code = (
        "import torch; from effnb.nas.proxies.scoring import fingerprint as f; "
        "print(f([torch.arange(4), {'x', 'y', 'z'}, {'k': (1, None)}, lambda t, k=2: {t in {'p', 'q'}}]))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True,
            check=True, cwd=Path(__file__).parents[1],
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1] and len(runs[0]) == 33
