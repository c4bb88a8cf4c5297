"""Chapters in worker processes: profiles, progress, time-outs, updates that give no diff."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import pytest
from toy import toy_notebook

from effnb.lab.judge.results import load_result
from effnb.lab.run import chapter as runner
from effnb.lab.run import stale as key
from effnb.lab.run.notebooks import normalize


def test_a_run_reports_progress_and_records_environment(toy_book):
    seen = []
    record = runner.execute("toy", on_progress=lambda k, n: seen.append((k, n)))
    assert record.status == "ok", record.error
    assert seen[-1][0] <= seen[-1][1] and len(seen) >= 5
    result = load_result("toy", "book", toy_book / "_build" / "results")
    assert (
        set(result["hardware"]) == {"cpu", "cores", "threads", "ram_gb", "gpu"} and result["hardware"]["threads"] == 1
    )
    assert result["metrics"]["ours"] == [1.0, 1.1, 1.2]
    opening = nbformat.read(record.notebook, as_version=4).cells[1]
    assert "reproduced" in opening.outputs[0].data["text/html"]  # of this run, though it stands before it


def test_smoke_parameters_and_overrides_are_injected(toy_book):
    record = runner.execute("toy", "smoke", {"gain": 2.0})
    result = load_result("toy", "smoke", toy_book / "_build" / "results")
    assert record.status == "ok" and result["metrics"]["ours"] == [2.0]
    assert result["key"]["parameters"] == {"profile": "smoke", "seeds": [0], "gain": 2.0}


def test_unknown_chapter_profile_and_jobs_are_named(toy_book):
    with pytest.raises(ValueError, match=r"system must be one of \['toy'\], got 'nope'"):
        runner.execute_all(["nope"])
    with pytest.raises(ValueError, match=r"profile of toy must be one of \['book', 'smoke'\], got 'paper'"):
        runner.execute("toy", "paper")
    with pytest.raises(ValueError, match="jobs must be >= 1, got 0"):
        runner.execute_all(["toy"], jobs=0)


def hang(book) -> Path:
    """Add a chapter that never ends; its kernel writes its process number to the file returned."""
    mark = book / "pid"
    source = f"import os, time, pathlib\npathlib.Path({str(mark)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    opening = 'from effnb.lab import claims\n\nclaims.at_a_glance("toy", "book")'
    (book / "notebooks" / "02_slow.ipynb").write_text(toy_notebook({opening: source}))
    return mark


def wait_for(condition, seconds=30.0) -> bool:
    end = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < end:
        time.sleep(0.1)
    return condition()


def test_a_chapter_that_hangs_is_killed_with_its_kernel(toy_book):
    mark = hang(toy_book)
    record = runner.execute("slow", timeout=20)
    assert record.status == "timeout" and 20 <= record.seconds < 40
    kernel = Path(f"/proc/{mark.read_text()}")
    assert wait_for(lambda: not kernel.exists())
    assert not (toy_book / "_build" / "executed" / "02_slow.ipynb").exists()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_command_leaves_no_process_behind(toy_book, sign):
    mark = hang(toy_book)
    # A background job of a shell starts with SIGINT ignored, and so would its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    arguments = [sys.executable, "-m", "effnb.lab.cli", "run", "slow"]
    command = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, preexec_fn=heed)
    assert wait_for(lambda: mark.exists() and mark.read_text(), 60)
    command.send_signal(sign)
    assert command.wait(30) != 0
    kernel = Path(f"/proc/{mark.read_text()}")
    assert wait_for(lambda: not kernel.exists())


def test_update_twice_gives_no_diff_and_nothing_volatile(toy_book):
    first = runner.execute("toy")
    source = toy_book / "notebooks" / "01_toy.ipynb"
    before = key.notebook_hash(source)
    assert [path.name for path in runner.update("toy", first.notebook)] == ["01_toy.ipynb", "toy.json"]
    assert key.notebook_hash(source) == before  # outputs do not count
    second = runner.execute("toy")
    assert runner.update("toy", second.notebook) == []
    text = source.read_text()
    assert "papermill" not in text and "injected-parameters" not in text and "iopub" not in text
    counts = [c["execution_count"] for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    assert counts == [1, 2, 3, 4, 5]
    source.write_text(toy_notebook({"print(2 + 2)": "print(2 + 3)"}))
    with pytest.raises(ValueError, match="cell 'c03' is not the one of"):
        normalize(source, second.notebook)


def test_the_key_ignores_docstrings_and_comments(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "demo_module.py"
    module.write_text('"""One."""\n\n\ndef f():\n    """Two."""\n    return 1  # three\n')
    first = key.module_hash("demo_module")
    module.write_text('"""Uno."""\n\n\ndef f():\n    """Due."""\n    return 1\n')
    assert key.module_hash("demo_module") == first
    module.write_text("def f():\n    return 2\n")
    assert key.module_hash("demo_module") != first


def test_workers_use_one_thread(monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "8")
    assert runner.environment(Path("r"), {})["OMP_NUM_THREADS"] == "1"
