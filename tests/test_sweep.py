"""Sweeps and the fan-out beneath them: order, failures, resumption, a real Ray cluster, tables and files."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fanout_items import act
from toy import toy_notebook

from effnb.lab.judge import stats
from effnb.lab.run import chapter as runner
from effnb.lab.run import fanout, process
from effnb.lab.run import sweep as sweeps
from effnb.lab.run.fanout import fan_out
from effnb.lab.run.parameters import parse_grid, parse_parameters, parse_seeds
from effnb.lab.run.sweep import Store

VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


# ---- fan-out ---------------------------------------------------------------------------------------------------------
def test_results_and_exceptions_come_in_order_and_a_death_costs_one_item():
    seen = {}
    items = [1, 0, "die", "unbuildable", 5, "threads"]
    outcomes = fan_out(act, items, jobs=2, on_done=lambda k, outcome: seen.update({k: outcome}))
    assert outcomes[0] == 10 and outcomes[4] == 2
    assert isinstance(outcomes[1], ZeroDivisionError) and "in act" in outcomes[1].__notes__[0]
    assert isinstance(outcomes[2], RuntimeError) and "died" in str(outcomes[2])
    assert isinstance(outcomes[3], RuntimeError) and "Unbuildable: 1 2" in str(outcomes[3])
    assert outcomes[5] == "1"
    assert seen == dict(enumerate(outcomes))


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_the_processes_of_a_killed_fan_out_end_too(tmp_path, sign):
    mark = tmp_path / "pid"
    script = tmp_path / "script.py"
    script.write_text(
        "from fanout_items import tell_and_sleep\nfrom effnb.lab.run.fanout import fan_out\n"
        f"if __name__ == '__main__':\n    fan_out(tell_and_sleep, [{str(mark)!r}])\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": path})
    started = time.monotonic()
    while not (mark.exists() and mark.read_text()):
        assert time.monotonic() - started < 60
        time.sleep(0.05)
    command.send_signal(sign)
    command.wait(30)
    worker = Path(f"/proc/{mark.read_text()}")
    while worker.exists():
        assert time.monotonic() - started < 90, "the worker outlived the fan-out"
        time.sleep(0.05)


def test_fan_out_checks_its_arguments():
    assert fan_out(act, []) == []
    with pytest.raises(ValueError, match="jobs must be >= 1, got 0"):
        fan_out(act, [1], jobs=0)
    with pytest.raises(ValueError, match="function must be picklable"):
        fan_out(lambda x: x, [1])


def test_no_cluster_is_said_at_once():
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=r"ray_address '127.0.0.1:9': no Ray cluster answers there"):
        fan_out(abs, [1], ray_address="127.0.0.1:9")
    assert time.perf_counter() - begun < 30


def test_missing_ray_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'effnb\[ray\]'"):
        fan_out(abs, [1], ray_address="auto")


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "[::1]:6379", "127.0.0.1:6379", "ray://head:10001", "auto"])
def test_addresses_are_read(address, monkeypatch):
    """A head on the loopback address alone needs a variable of Ray's; every address with a port must answer."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    asked = []
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(fanout, "_outer_address", lambda: "192.0.2.7")
    monkeypatch.setattr(fanout, "_listens", lambda host, port: asked.append((host, port)) or host != "192.0.2.7")
    fanout._import_ray(address)
    place = {"10.0.0.1:6379": ("10.0.0.1", 6379), "[::1]:6379": ("::1", 6379), "127.0.0.1:6379": ("127.0.0.1", 6379)}
    assert asked[:1] == ([place[address]] if address in place else [])
    assert os.environ.pop(VARIABLE, None) == ("0" if place.get(address, "x")[0] in fanout._LOOPBACK else None)


# ---- command line forms ----------------------------------------------------------------------------------------------
def test_grids_are_typed():
    grid = parse_grid(["a=1,2", "b=1,2.5", "c=true,null", "d=[1,2],(3,)", "e='x,y',z", "f=1,big", "g=1_000"])
    assert grid["a"] == [1, 2] and all(type(v) is int for v in grid["a"])
    assert grid["b"] == [1.0, 2.5] and all(type(v) is float for v in grid["b"])
    assert grid["c"] == [True, None] and grid["d"] == [[1, 2], [3]] and grid["e"] == ["x,y", "z"]
    assert grid["f"] == [1, "big"] and grid["g"] == [1000]
    # The same values, one by one.
    assert parse_parameters(["b=2.5", "eps=1e-2", "d=(8,16)", "e='x,y'", "f=fashion-mnist"]) == {
        "b": 2.5, "eps": 0.01, "d": [8, 16], "e": "x,y", "f": "fashion-mnist"
    }  # fmt: skip


@pytest.mark.parametrize("text", ["{1, 2}", "b'x'", "1j", "[1,", "'open", "(1, {2})"])
def test_values_that_no_chapter_can_hold_are_refused(text):
    with pytest.raises(ValueError, match="value must be a number, text or a list"):
        parse_parameters([f"x={text}"])


@pytest.mark.parametrize("entry", ["eps", "eps=", "eps=1,,2", "=1", "2x=1", "a b=1"])
def test_a_grid_of_another_form_is_refused(entry):
    with pytest.raises(ValueError, match="a parameter must read NAME=V1,V2"):
        parse_grid([entry])


def test_a_grid_names_each_parameter_once():
    with pytest.raises(ValueError, match="'a' twice"):
        parse_grid(["a=1", "a=2"])
    with pytest.raises(ValueError, match="'a' twice"):
        parse_parameters(["a=1", "a=2"])


def test_seeds_are_numbers_and_ranges():
    assert parse_seeds("0-2,5") == [0, 1, 2, 5] and parse_seeds(" 7 ") == [7]
    for text in ("", "a", "3-1", "-1", "1-", "1,,2", "0.5"):
        with pytest.raises(ValueError, match="seeds must read like"):
            parse_seeds(text)
    with pytest.raises(ValueError, match="seeds must differ"):
        parse_seeds("0-2,1")
    for text in ("0-99999999999", "99999999999", "0-6000,10000-16000"):
        with pytest.raises(ValueError, match="seeds must be at most 10000 numbers below 4294967296"):
            parse_seeds(text)


# ---- sweeps, with a stand-in for the chapter's run -------------------------------------------------------------------
@pytest.fixture
def quick(toy_book, monkeypatch):
    """Runs of the toy chapter without processes or kernels; ``quick.runs`` lists what was injected."""

    def execute(system, profile, parameters, folder, timeout):
        execute.runs.append({"profile": profile} | parameters)
        execute.timeout = timeout
        gain, (seed,) = parameters["gain"], parameters["seeds"]
        record = runner.RunRecord(system, profile, "ok", 0.1, folder / "01_toy.ipynb")
        if gain in execute.failing:
            return replace(record, status="failed", error="Traceback\nValueError: no such gain")
        record.notebook.write_text("{}")
        metrics = {"ours": [gain + 0.1 * seed], "loss": [1 / (1 + gain)]}
        entry = {"measured": {"per_seed": [gain], "baseline_per_seed": [0.5], "estimate": gain}}
        path = record.results / profile / f"{system}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"claims": {"toy/T1": entry}, "metrics": metrics, "key": execute.stamp}))
        return record

    execute.runs, execute.failing, execute.stamp = [], (), {}
    monkeypatch.setattr(runner, "execute", execute)
    monkeypatch.setattr(sweeps, "figure", lambda table: {"svg": b"<svg>", "png": b"PNG"})
    return execute


def test_every_combination_and_seed_is_run_once(quick, toy_book):
    table = sweeps.sweep("toy", {"gain": [1, 2]}, [0, 1, 2], timeout=50)
    assert quick.timeout == 50
    assert [(r["gain"], r["seeds"], r["profile"]) for r in quick.runs] == [
        (gain, [seed], "book") for gain in (1.0, 2.0) for seed in (0, 1, 2)
    ]
    assert table.tidy.columns.tolist() == ["system", "gain", "seed", "metric", "value"]
    assert len(table.tidy) == 6 * 4 and set(table.tidy["metric"]) == {"toy/T1", "toy/T1 baseline", "ours", "loss"}
    row = table.intervals.query("gain == 2 and metric == 'ours'").iloc[0]
    expected = stats.paired_t_interval([2.0, 2.1, 2.2])
    assert row["n"] == 3 and np.allclose([row["mean"], row["lo"], row["hi"]], [2.1, expected.lo, expected.hi])
    out = toy_book / "_build" / "sweeps" / "toy"
    assert table.out == str(out) and not table.failures and "written to" in table.text()
    assert len(list((out / "cells").glob("*.json"))) == len(list((out / "notebooks").glob("*.ipynb"))) == 6
    pd.testing.assert_frame_equal(pd.read_csv(out / "sweep.csv"), table.tidy, check_dtype=False)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "sweep.parquet"), table.tidy, check_dtype=False)
    assert (out / "sweep.png").is_file() and (out / "sweep.svg").is_file()


def test_finished_cells_are_not_run_again_and_new_ones_are(quick):
    first = sweeps.sweep("toy", {"gain": [1.0]}, [0, 1])
    again = sweeps.sweep("toy", {"gain": [1.0]}, [0, 1])
    assert len(quick.runs) == 2
    pd.testing.assert_frame_equal(first.tidy, again.tidy)
    more = sweeps.sweep("toy", {"gain": [1.0, 3.0]}, [0, 1, 2])
    assert len(quick.runs) == 6 and len(more.tidy) == 24


def test_a_changed_notebook_or_module_makes_cells_run_again(quick, toy_book, monkeypatch):
    quick.stamp = {"modules": {"effnb.lab.run.grid": "1"}}
    monkeypatch.setattr(sweeps, "module_hash", lambda name: "1")
    sweeps.sweep("toy", {"gain": [1.0]}, [0])
    sweeps.sweep("toy", {"gain": [1.0]}, [0])
    assert len(quick.runs) == 1
    monkeypatch.setattr(sweeps, "module_hash", lambda name: "2")
    sweeps.sweep("toy", {"gain": [1.0]}, [0])
    assert len(quick.runs) == 2
    (toy_book / "notebooks" / "01_toy.ipynb").write_text(toy_notebook({"2 + 2": "3 + 1"}))
    sweeps.sweep("toy", {"gain": [1.0]}, [0])
    assert len(quick.runs) == 3
    assert len(list((toy_book / "_build/sweeps/toy/cells").glob("*.json"))) == 2


def test_a_failing_cell_is_recorded_loses_no_other_and_is_tried_again(quick, toy_book):
    quick.failing = (2.0,)
    table = sweeps.sweep("toy", {"gain": [1.0, 2.0, 3.0]}, [0])
    assert [f["parameters"] for f in table.failures] == [{"gain": 2.0}] and "no such gain" in table.failures[0]["error"]
    assert sorted(set(table.tidy["gain"])) == [1.0, 3.0]
    assert "failed: gain=2 seed 0: ValueError: no such gain" in table.text()
    quick.failing = ()
    assert not sweeps.sweep("toy", {"gain": [1.0, 2.0, 3.0]}, [0]).failures and len(quick.runs) == 4


def gone(*_):
    raise OSError("gone")


def test_an_exception_around_a_run_is_a_failure_too(quick, monkeypatch):
    monkeypatch.setattr(
        sweeps, "fan_out", lambda f, items, j, r, done: [done(k, OSError("gone")) for k, _ in enumerate(items)]
    )
    table = sweeps.sweep("toy", {"gain": [1.0]}, [0], ray_address="somewhere:1")
    assert "OSError('gone')" in table.failures[0]["error"] and "no cell ended well" in table.text()
    monkeypatch.setattr(runner, "execute", gone)
    table = sweeps.sweep("toy", {"gain": [1.0]}, [0])
    assert "OSError('gone')" in table.failures[0]["error"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:50],
        lambda text: "[]",
        lambda text: "null",
        lambda text: '{"status": "ok", "result": null}',
        lambda text: json.dumps(json.loads(text) | {"result": None}),
        lambda text: text.replace('"loss": [', '"loss": [7.0, '),
        lambda text: "\ud83d",
    ],
)
def test_a_damaged_cell_file_is_not_taken_for_finished_and_stops_nothing(quick, toy_book, spoil):
    sweeps.sweep("toy", {"gain": [1.0]}, [0])
    (cell,) = (toy_book / "_build/sweeps/toy/cells").glob("*.json")
    cell.write_bytes(spoil(cell.read_text()).encode("utf-8", "surrogatepass"))
    table = sweeps.sweep("toy", {"gain": [1.0]}, [0])
    assert len(quick.runs) == 2 and not table.failures


def test_another_version_of_the_chapter_on_a_node_is_refused(toy_book):
    cell = sweeps.Cell("toy", "book", {}, 0, "0" * 64)
    with pytest.raises(RuntimeError, match="another version of the chapter toy"):
        sweeps.run_cell(cell)


@pytest.mark.parametrize(
    "system, grid, seeds, message",
    [
        ("nope", {}, [0], r"system must be one of \['toy'\], got 'nope'"),
        ("toy", {"gian": [1]}, [0], r"parameters of toy must be among \['gain'\], got 'gian'"),
        ("toy", {"gian": []}, [0], "got 'gian'"),
        ("toy", {"seeds": [1]}, [0], "got 'seeds'"),
        ("toy", {"gain": [1.0, "high"]}, [0], "gain of toy must be of type float, got 'high'"),
        ("toy", {"gain": []}, [0], "gain must have values that differ"),
        ("toy", {"gain": [1, 1]}, [0], "gain must have values that differ"),
        ("toy", {}, [], "seeds must have values that differ"),
    ],
)
def test_a_sweep_checks_its_arguments_before_any_run(system, grid, seeds, message, quick):
    with pytest.raises(ValueError, match=message):
        sweeps.sweep(system, grid, seeds)
    with pytest.raises(ValueError, match="profile of toy must be one of"):
        sweeps.sweep("toy", {}, [0], profile="paper")
    with pytest.raises(ValueError, match="jobs must be >= 1, got 0"):
        sweeps.sweep("toy", {}, [0], jobs=0)
    assert quick.runs == []


def test_outputs_may_lie_behind_an_fsspec_address(quick):
    import fsspec

    table = sweeps.sweep("toy", {"gain": [1.0, 2.0]}, [0, 1], out="memory://sweeps/toy")
    sweeps.sweep("toy", {"gain": [1.0, 2.0]}, [0, 1], out="memory://sweeps/toy")
    assert len(quick.runs) == 4 and table.out == "memory://sweeps/toy"
    files = fsspec.filesystem("memory")
    assert len(files.ls("/sweeps/toy/cells")) == 4 and files.exists("/sweeps/toy/sweep.parquet")
    with pytest.raises(ValueError, match="nonsense"):
        Store("nonsense://x")


# ---- tables and figures ----------------------------------------------------------------------------------------------
def test_figures_of_a_run_are_the_claims_and_the_metrics():
    result = {
        "claims": {
            "a/A1": {"measured": {"per_seed": [2.0], "estimate": 2.0, "baseline_per_seed": None}},
            "a/A2": {"measured": {"per_seed": [1.9, 2.1, 2.3], "estimate": 2.1}},
            "a/A3": {"verdict": "not-tested", "measured": {"per_seed": [], "estimate": None}},
        },
        "metrics": {"loss": [0.25]},
    }
    assert sweeps.values_of(result) == {"a/A1": 2.0, "a/A2": 2.1, "loss": 0.25}


def record(parameters, seed, **metrics):
    result = {"metrics": {name: [value] for name, value in metrics.items()}}
    return {"parameters": parameters, "seed": seed, "status": "ok", "error": "", "result": result}


def test_mixed_values_become_text_and_one_seed_has_no_interval(tmp_path):
    table = sweeps.tabulate("toy", [record({"p": v}, 0, m=1.0) for v in (1, "auto", [2, 3], None)], Store(tmp_path))
    assert table.intervals["p"].tolist() == ["1", "auto", "[2, 3]", "None"]
    assert table.intervals["lo"].isna().all() and "-" in table.text()
    assert (tmp_path / "sweep.parquet").is_file() and (tmp_path / "sweep.svg").is_file()


def test_the_figure_draws_every_line_seed_and_interval(tmp_path):
    from matplotlib.figure import Figure

    rng = np.random.default_rng(0)
    cells = [{"eps": eps, "lr": lr, "mode": "x"} for eps in (1e-8, 1e-2, 1.0) for lr in (1, 2)]
    records = [record(cell, seed, acc=float(rng.normal())) for cell in cells for seed in range(4)]
    table = sweeps.tabulate("toy", records, Store(tmp_path))
    axes = Figure().add_subplot()
    sweeps.panel(axes, table, "acc")
    assert axes.get_xscale() == "log" and len(axes.containers) == 2
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["lr=1, mode=x", "lr=2, mode=x"]
    dots = [line for line in axes.lines if line.get_marker() == "."]
    drawn = sorted(y for line in dots for y in line.get_ydata())
    assert np.allclose(drawn, sorted(table.tidy["value"]))
    assert sweeps.figure(table) == sweeps.figure(table)
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG" and b"<svg" in (tmp_path / "sweep.svg").read_bytes()


def test_many_metrics_are_said_to_be_left_out_of_the_figure(tmp_path):
    many = {f"m{k}": float(k) for k in range(9)}
    table = sweeps.tabulate("toy", [record({}, s, **many) for s in range(2)], Store(tmp_path))
    assert "the figure shows 6 of 9 metrics" in table.text() and len(table.intervals) == 9


# ---- the real thing --------------------------------------------------------------------------------------------------
BROKEN = {"ours = [gain": "if gain == 13:\n    raise TypeError('unlucky')\nours = [gain"}


def test_a_sweep_on_local_processes_with_a_failing_cell(toy_book):
    (toy_book / "notebooks" / "01_toy.ipynb").write_text(toy_notebook(BROKEN))
    seen = []
    table = sweeps.sweep("toy", {"gain": [1.0, 13.0]}, [0], jobs=2, on_cell=lambda k, n, _: seen.append((k, n)))
    assert seen == [(1, 2), (2, 2)] and len(table.failures) == 1
    assert "TypeError: unlucky" in table.failures[0]["error"]
    assert table.tidy.set_index("metric")["value"]["ours"] == 1.0
    failed = toy_book / "_build/sweeps/toy/notebooks" / f"{table.failures[0]['key']}.ipynb"
    assert "unlucky" in failed.read_text()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def no_other_ray():
    """Tests that start a Ray cluster wait for each other: two clusters may pick each other's inner ports."""
    with Path(tempfile.gettempdir(), f"effnb-ray-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def ray_cluster(no_other_ray):
    """A Ray cluster of this test alone, on the loopback address, in a process group of its own; yields its address."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    program = Path(sys.executable).with_name("ray")
    if not program.is_file():
        pytest.skip(f"no command `ray` beside {sys.executable}")
    for _ in range(4):
        # A short path: the names of Ray's sockets lie below it, and a socket's name has at most 107 characters.
        folder, port = tempfile.mkdtemp(prefix="ray", dir="/tmp"), free_port()
        head = subprocess.Popen(
            [program, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2",
             "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}",
             f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=100000000"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            # A token that this user keeps for other clusters must not close this one.
            env=os.environ | {"RAY_AUTH_MODE": "disabled", VARIABLE: "0", "RAY_raylet_start_wait_time_s": "90"},
        )  # fmt: skip
        watch = threading.Timer(180, head.kill)
        watch.start()
        try:
            said = []
            for line in head.stdout:
                said.append(line)
                if "Ray runtime started" in line:
                    watch.cancel()
                    yield f"127.0.0.1:{port}"
                    return
        finally:
            watch.cancel()
            stop(head, folder)
    told = "".join(said)[-2000:]
    # Ray's own limits, of fifteen and thirty seconds, are no matter of ours; anything else is.
    if "timed out during startup" in told:
        pytest.skip("Ray did not start on this busy machine within its own time limits")
    pytest.fail(f"ray start ended: {told}")


def stop(head: subprocess.Popen, folder: str) -> None:
    """Stop this cluster only: its process group, then whatever still names its folder."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError, ProcessLookupError):
            if folder.encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def test_the_same_sweep_on_a_real_ray_cluster(ray_cluster, toy_book):
    """By the command, in a process of its own: Ray reads its variables when it is imported."""
    (toy_book / "notebooks" / "01_toy.ipynb").write_text(toy_notebook(BROKEN))
    arguments = ["sweep", "toy", "--grid", "gain=1,13", "--ray", ray_cluster]
    further = {"RAY_AUTH_MODE": "disabled"}
    code, told = process.call([sys.executable, "-m", "effnb.lab.cli", *arguments], further, timeout=900)
    assert code == 1 and "TypeError: unlucky" in told, told
    out = toy_book / "_build" / "sweeps" / "toy"
    tidy = pd.read_parquet(out / "sweep.parquet")
    assert tidy.set_index("metric")["value"]["ours"] == 1.0
    assert sorted(json.loads(p.read_text())["status"] for p in (out / "cells").glob("*.json")) == ["failed", "ok"]


def test_an_item_that_dies_on_ray_costs_only_itself(ray_cluster, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom fanout_items import act\nfrom effnb.lab.run.fanout import fan_out\n"
        "print([type(o).__name__ for o in fan_out(act, [5, 0, 'die', 'threads'], ray_address=sys.argv[1])])\n"
    )
    further = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    code, told = process.call([sys.executable, script, ray_cluster], further, timeout=900)
    assert code == 0 and "['float', 'ZeroDivisionError', 'WorkerCrashedError', 'str']" in told, told
