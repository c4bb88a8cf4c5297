"""Chapters in worker processes: profiles, progress, time-outs, resumed studies, updates that give no diff."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from toy import toy_notebook

from effnb.lab import show
from effnb.lab.judge.results import check, load_result, result_path
from effnb.lab.paths import committed_results
from effnb.lab.run import chapter as runner
from effnb.lab.run import process, stale

RENDER = {"at-a-glance": show.at_a_glance, "study": show.study}
OPENING = 'from effnb import lab\n\nlab.show.at_a_glance("toy")'
MEASURING = "ours = [gain + 0.1 * seed for seed in seeds]"


def wait_for(condition, seconds=60.0) -> bool:
    end = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < end:
        time.sleep(0.1)
    return condition()


def gone(pid: str) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# ---- processes -------------------------------------------------------------------------------------------------------
def test_a_call_returns_code_and_output():
    assert process.call([sys.executable, "-c", "import sys; print('out'); sys.exit(3)"]) == (3, "out\n")
    code, told = process.call(["no-such-program-at-all"])
    assert code == 127 and "No such file" in told


def test_workers_use_one_thread_and_this_checkout(monkeypatch, toy_book):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "8")
    found = process.environment({"EXTRA": "1"})
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == "1" and found["EXTRA"] == "1"
    assert found["EFFNB_ROOT"] == str(toy_book) and str(toy_book) in found["PYTHONPATH"].split(os.pathsep)


def test_lines_are_told_as_they_come():
    seen = []
    process.call([sys.executable, "-c", "print(1); print(2)"], on_line=seen.append)
    assert seen == ["1\n", "2\n"]


# Holds the interpreter's lock in C for ever, in a session of its own, with the pipe of its parent in hand.
STUBBORN = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); sum(range(10**12))"
PARENT = (
    "import subprocess, sys, time; "
    f"subprocess.Popen([sys.executable, '-c', {STUBBORN!r}, sys.argv[1]], start_new_session=True); "
)


def test_the_time_is_up_for_all_descendants(tmp_path):
    mark = tmp_path / "pid"
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        process.call([sys.executable, "-c", PARENT + "time.sleep(600)", mark], timeout=8)
    assert time.monotonic() - begun < 60 and gone(mark.read_text())


def test_what_a_command_leaves_behind_ends_with_it(tmp_path):
    mark = tmp_path / "pid"
    wait = "import pathlib\nwhile not (p := pathlib.Path(sys.argv[1])).exists() or not p.read_text(): time.sleep(0.05)"
    assert process.call([sys.executable, "-c", PARENT + wait, mark], timeout=120) == (0, "")
    assert gone(mark.read_text())


def test_without_git_its_facts_are_unknown(monkeypatch, tmp_path):
    assert process.git("rev-parse", "--verify", "no-such-revision") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert process.git("rev-parse", "HEAD") is None


# ---- runs ------------------------------------------------------------------------------------------------------------
def test_a_run_reports_progress_and_records_environment(toy_book):
    seen = []
    record = runner.execute("toy", on_progress=seen.append)
    assert record.status == "ok", record.error
    assert len(seen) >= 5 and seen == sorted(seen) and seen[0] >= 0 and seen[-1] <= 1
    result = load_result("toy", "book", record.results)
    hardware = result["hardware"]
    assert set(hardware) == {"cpu", "cores", "threads", "ram_gb", "gpu"} and hardware["threads"] == 1
    assert result["metrics"]["ours"] == [1.0, 1.1, 1.2]
    copy = runner.deliver(record, RENDER)
    opening = nbformat.read(copy, as_version=4).cells[1]
    assert "reproduced" in opening.outputs[0].data["text/html"]  # of this run, though it stands before it
    assert load_result("toy", "book", toy_book / "_build" / "results") == result
    # The cells' durations weigh the next run's progress.
    assert set(json.loads((toy_book / "_build/durations/book/toy.json").read_text())) >= {"c02", "c05"}


def test_smoke_parameters_and_overrides_are_injected(toy_book):
    record = runner.execute("toy", "smoke", {"gain": 2})
    result = load_result("toy", "smoke", record.results)
    assert record.status == "ok" and result["metrics"]["ours"] == [2.0]
    assert result["key"]["parameters"] == {"profile": "smoke", "seeds": [0], "gain": 2.0}


def test_unknown_chapter_profile_and_jobs_are_named(toy_book):
    with pytest.raises(ValueError, match=r"system must be one of \['toy'\], got 'nope'"):
        runner.execute_all(["nope"])
    with pytest.raises(ValueError, match=r"profile of toy must be one of \['book', 'smoke', 'study'\], got 'paper'"):
        runner.execute("toy", "paper")
    with pytest.raises(ValueError, match="jobs must be >= 1, got 0"):
        runner.execute_all(["toy"], jobs=0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"gian": 1.0}, r"parameters of toy must be among \['gain', 'profile', 'seeds'\], got 'gian'; near.*gain"),
        ({"gain": "much"}, "gain of toy must be of type float, got 'much'"),
        ({"gain": True}, "gain of toy must be of type float, got True"),
        ({"seeds": 3}, "seeds of toy must be of type list, got 3"),
        ({"seeds": ["a"]}, "seeds of toy must be of type list"),
        ({"seeds": []}, "seeds of toy must be whole numbers"),
        ({"profile": "book"}, "profile is chosen by --profile"),
    ],
)
def test_parameters_are_refused_before_anything_runs(toy_book, parameters, message):
    with pytest.raises(ValueError, match=message):
        runner.execute_all(["toy"], "smoke", parameters)
    assert not (toy_book / "_build").exists()


def test_a_notebook_without_its_parameters_tag_is_refused(toy_book):
    path = toy_book / "notebooks" / "01_toy.ipynb"
    path.write_text(path.read_text().replace('"parameters"', '"settings"'))
    with pytest.raises(ValueError, match=r"01_toy\.ipynb must have a cell with the tag 'parameters'"):
        runner.execute("toy", "smoke")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("toy: [1, 2", "not valid YAML"),
        ("- toy", "must map chapters to profiles"),
        ("toy: 3", "profiles.yaml: toy"),
        ("toy: {smoke: {gian: 1}}", "toy at smoke .* got 'gian'"),
        ("toy: {smoke: {gain: high}}", "gain of toy at smoke .* of type float"),
        ("toy: {smoke: {profile: study}}", "profile of toy at smoke must be 'smoke'"),
    ],
)
def test_a_bad_file_of_profiles_is_named(toy_book, content, message):
    (toy_book / "notebooks" / "profiles.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"profiles\.yaml") as caught:
        runner.execute("toy", "smoke")
    assert re.search(message, str(caught.value))


def test_a_mistake_in_another_chapters_profiles_stops_only_that_one(toy_book):
    profiles = toy_book / "notebooks" / "profiles.yaml"
    profiles.write_text(profiles.read_text() + "other: 3\n")
    assert runner.injected("toy", "smoke") == {"profile": "smoke", "seeds": [0]}


@pytest.mark.parametrize("where", [MEASURING, "record.save()"])
def test_leaving_a_notebook_is_no_success(toy_book, where):
    (toy_book / "notebooks" / "01_toy.ipynb").write_text(toy_notebook({where: f"import sys; sys.exit(0); {where}"}))
    record = runner.execute("toy", "smoke")
    assert record.status == "failed" and "left the notebook: SystemExit" in record.error


def test_a_notebook_without_a_result_has_failed(toy_book):
    (toy_book / "notebooks" / "01_toy.ipynb").write_text(toy_notebook({"record.save()\n": ""}))
    record = runner.execute("toy", "smoke")
    assert record.status == "failed" and "wrote no result" in record.error
    assert runner.deliver(record) and not (toy_book / "_build" / "results").exists()


def test_a_cell_may_print_what_looks_like_progress(toy_book):
    fake = "print('Executing Cell 900----\\n@cell a b'); " + MEASURING
    (toy_book / "notebooks" / "01_toy.ipynb").write_text(toy_notebook({MEASURING: fake}))
    seen = []
    assert runner.execute("toy", "smoke", on_progress=seen.append).status == "ok"
    assert seen == sorted(seen) and seen[-1] <= 1


def test_two_runs_at_once_do_not_mix_their_results(toy_book):
    first = runner.execute("toy")
    second = runner.execute("toy", "book", {"gain": 50.0})
    runner.deliver(second)
    assert load_result("toy", "book", first.results)["metrics"]["ours"] == [1.0, 1.1, 1.2]
    runner.update(first, RENDER)
    assert load_result("toy")["metrics"]["ours"] == [1.0, 1.1, 1.2]
    with pytest.raises(ValueError, match="other parameters than those of book"):
        runner.update(second, RENDER)


def test_folders_of_runs_that_died_are_removed_and_others_are_not(toy_book):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = toy_book / "_build" / "runs" / f"toy-book.{ended.pid}-abc"
    alive = toy_book / "_build" / "runs" / f"toy-book.{os.getpid()}-abc"
    for folder in (dead, alive):
        folder.mkdir(parents=True)
    assert runner._fresh_folder("toy-smoke").is_dir()
    assert alive.is_dir() and not dead.exists()


def hang(book, how: str = "time.sleep(600)") -> Path:
    """Add a chapter that never ends; its kernel writes its process number to the file returned."""
    mark = book / "pid"
    source = f"import os, time, pathlib\npathlib.Path({str(mark)!r}).write_text(str(os.getpid()))\n{how}"
    (book / "notebooks" / "02_slow.ipynb").write_text(toy_notebook({OPENING: source}))
    return mark


@pytest.mark.parametrize("how", ["time.sleep(600)", "sum(range(10**12))"])
def test_a_chapter_that_hangs_is_killed_with_its_kernel(toy_book, how):
    """Also where the kernel holds the interpreter's lock, so that it answers nobody."""
    mark = hang(toy_book, how)
    record = runner.execute("slow", timeout=30)
    assert record.status == "timeout" and "stopped after 30 s" in record.error
    assert mark.exists() and wait_for(lambda: gone(mark.read_text()))
    runner.deliver(record)
    assert not (toy_book / "_build" / "executed" / "02_slow.ipynb").exists()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_command_leaves_no_process_behind(toy_book, sign):
    mark = hang(toy_book, "sum(range(10**12))")
    # A background job of a shell starts with SIGINT ignored, and so would its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    arguments = [sys.executable, "-m", "effnb.lab.cli", "run", "slow"]
    command = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heed)
    assert wait_for(lambda: mark.exists() and mark.read_text(), 240)
    command.send_signal(sign)
    assert command.wait(60) != 0
    assert wait_for(lambda: gone(mark.read_text()))


# ---- studies that go on ----------------------------------------------------------------------------------------------
def slow_study(book, fail_at: int | None) -> Path:
    """A chapter whose seeds leave a line each in the file returned; it dies at one of them."""
    log = book / "calls"
    source = (
        "@lab.resumable(calls=len(seeds))\ndef gain_of(seed):\n"
        f"    open({str(log)!r}, 'a').write(f'{{seed}}\\n')\n"
        "    return {'gain': gain + 0.1 * seed}\n\n"
        f"import os, pathlib\ndies = pathlib.Path({str(book / 'dies')!r})\nours = []\nfor seed in seeds:\n"
        "    if dies.exists() and seed == int(dies.read_text()):\n        os._exit(1)\n"
        "    ours.append(gain_of(seed)['gain'])"
    )
    (book / "notebooks" / "01_toy.ipynb").write_text(toy_notebook({MEASURING: source}))
    if fail_at is not None:
        (book / "dies").write_text(str(fail_at))
    return log


def test_a_study_that_is_cut_off_goes_on_and_changes_start_afresh(toy_book):
    log = slow_study(toy_book, fail_at=2)
    seen = []
    first = runner.execute("toy", "study", on_progress=seen.append)
    assert first.status == "failed" and log.read_text().split() == ["0", "1"]
    (toy_book / "dies").unlink()
    second = runner.execute("toy", "study")
    assert second.status == "ok", second.error
    assert log.read_text().split() == ["0", "1", "2", "3"]
    result = load_result("toy", "study", second.results)
    assert result["metrics"]["ours"] == pytest.approx([1.0, 1.1, 1.2, 1.3])
    runner.execute("toy", "study", {"gain": 2.0})
    assert len(log.read_text().split()) == 8, "other parameters start afresh"
    path = toy_book / "notebooks" / "01_toy.ipynb"
    path.write_text(path.read_text().replace("print(2 + 2)", "print(1 + 3)"))
    runner.execute("toy", "study")
    assert len(log.read_text().split()) == 12, "so does other code"
    runner.execute("toy", "smoke")
    assert log.read_text().split()[12:] == ["0"], "and a smoke run keeps nothing"


def test_the_code_that_counts_is_the_package_without_what_shows_it(toy_book, monkeypatch):
    names = stale.all_modules()
    assert {"effnb.common", "effnb.lab.measure.train", "effnb.optim", "effnb.lab.show"} <= set(names)
    assert not [name for name in names if name.startswith(("effnb.lab.publish", "effnb.lab.cli"))]
    before = stale.folder_of("toy", {})
    monkeypatch.setattr(stale, "module_hash", lambda name: "other")
    assert stale.folder_of("toy", {}) != before


SCRIPT = """
import sys
from effnb.lab.run.stale import resumable
@resumable(calls=3)
def double(x):
    print("computed", x)
    return 2 * x
print([double(x) for x in map(int, sys.argv[1:])])
"""


def resumed(tmp_path, *values):
    (tmp_path / "double.py").write_text(SCRIPT)
    variables = {"EFFNB_RESUME": str(tmp_path / "kept"), "EFFNB_PROGRESS": str(tmp_path / "progress.json")}
    code, told = process.call([sys.executable, tmp_path / "double.py", *map(str, values)], variables)
    assert code == 0, told
    return told


def test_a_killed_or_damaged_write_is_never_read(tmp_path):
    assert resumed(tmp_path, 1, 2).splitlines() == ["computed 1", "computed 2", "[2, 4]"]
    assert json.loads((tmp_path / "progress.json").read_text()) == {"done": 2, "calls": 3}
    (whole, other) = sorted((tmp_path / "kept").rglob("output.pkl"))
    # What a kill leaves: a part under a temporary name, and nothing under the final one.
    whole.rename(whole.with_name("output.pkl.thread-1-pid-2"))
    other.write_bytes(other.read_bytes()[:3])  # and what a failing disk leaves
    again = resumed(tmp_path, 1, 2)
    assert "computed 1" in again and "computed 2" in again and "[2, 4]" in again
    assert "computed" not in resumed(tmp_path, 1, 2)


def test_time_of_earlier_runs_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFNB_RESUME", str(tmp_path))
    (tmp_path / "spent.json").write_text('{"seconds": 7.5, "cpu": 7.0}')
    stale.earlier.cache_clear()
    assert stale.earlier() == (7.5, 7.0)
    (tmp_path / "spent.json").write_text("{")
    stale.earlier.cache_clear()
    assert stale.earlier() == (0.0, 0.0)
    monkeypatch.delenv("EFFNB_RESUME")
    stale.earlier.cache_clear()


# ---- what is committed -----------------------------------------------------------------------------------------------
def test_update_twice_gives_no_diff_and_nothing_volatile(toy_book):
    first = runner.execute("toy")
    source = toy_book / "notebooks" / "01_toy.ipynb"
    before = stale.notebook_hash(source)
    assert [path.name for path in runner.update(first, RENDER)] == ["toy.json", "01_toy.ipynb"]
    assert stale.notebook_hash(source) == before  # outputs do not count
    assert check() == [] and runner.misfits(["toy"], RENDER) == []
    second = runner.execute("toy")
    assert runner.update(second, RENDER) == []
    text = source.read_text()
    assert "papermill" not in text and "injected-parameters" not in text and "iopub" not in text
    counts = [c["execution_count"] for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    assert counts == [1, 2, 3, 4, 5, 6]
    source.write_text(toy_notebook({"print(2 + 2)": "print(2 + 3)"}))
    with pytest.raises(ValueError, match="cell 'c03' is not the one of"):
        runner.update(second, RENDER)


def test_a_study_update_leaves_the_outputs_of_the_book(toy_book):
    runner.update(runner.execute("toy"), RENDER)
    source = toy_book / "notebooks" / "01_toy.ipynb"
    before, digest = source.read_text(), runner.outputs_digest(nbformat.read(source, as_version=4))
    assert "No study has been run yet" in before
    record = runner.execute("toy", "study")
    changed = runner.update(record, RENDER)
    assert [path.relative_to(toy_book).as_posix() for path in changed] == [
        "book/results/study/toy.json",
        "notebooks/01_toy.ipynb",
    ]
    notebook = nbformat.read(source, as_version=4)
    assert runner.outputs_digest(notebook) == digest
    assert "Gains." in notebook.cells[-1].outputs[0].data["text/html"]
    assert "study" in notebook.cells[1].outputs[0].data["text/html"]
    assert len(load_result("toy", "study")["seeds"]) == 4 and len(load_result("toy")["seeds"]) == 3
    assert check() == check(profile="study") == [] and runner.misfits(["toy"], RENDER) == []
    assert not stale.folder_of("toy", record and runner.parameters_of("toy", "study")).exists()


def test_a_stored_figure_is_copied_before_the_result_and_an_old_one_goes(toy_book):
    figure = (
        'from effnb.lab import plot\nfigure, axes = plot.single()\nrecord.figure(figure, "gain", "The gain.")\n'
        "record.save()"
    )
    path = toy_book / "notebooks" / "01_toy.ipynb"
    path.write_text(toy_notebook({"record.save()": figure}))
    old = toy_book / "book" / "results" / "study" / "toy" / "older.svg"
    old.parent.mkdir(parents=True)
    old.write_text("<svg/>")
    changed = runner.update(runner.execute("toy", "study"), RENDER)
    assert [p.name for p in changed] == ["gain.svg", "toy.json", "01_toy.ipynb"] and not old.exists()
    assert check(profile="study") == []
    (old.parent / "gain.svg").write_text("<svg/>")
    assert check(profile="study") == ["toy: figure gain is missing or not the one of this run"]


@pytest.mark.parametrize("profile", ["book", "study"])
def test_an_update_that_is_killed_between_its_files_is_red(toy_book, monkeypatch, profile):
    runner.update(runner.execute("toy"), RENDER)
    path = toy_book / "notebooks" / "01_toy.ipynb"
    path.write_text(path.read_text().replace("0.05 * seed", "0.04 * seed"))
    record = runner.execute("toy", profile)
    write = runner.write_atomically

    def killed(target, data):
        if Path(target).suffix == ".ipynb":
            raise KeyboardInterrupt
        write(target, data)

    monkeypatch.setattr(runner, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        runner.update(record, RENDER)
    assert result_path("toy", profile, committed_results()).is_file()
    assert runner.misfits(["toy"], RENDER) != []


def test_only_whole_runs_at_book_or_study_are_published(toy_book):
    record = runner.execute("toy", "smoke")
    with pytest.raises(ValueError, match="only whole runs at book or study can be published, got smoke, ok"):
        runner.update(record, RENDER)


# ---- the key ---------------------------------------------------------------------------------------------------------
def test_the_key_ignores_docstrings_and_comments(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "demo_module.py"
    module.write_text('"""One."""\n\n\ndef f():\n    """Two."""\n    return 1  # three\n')
    first = stale.module_hash("demo_module")
    module.write_text('"""Uno."""\n\n\ndef f():\n    """Due."""\n    return 1\n')
    assert stale.module_hash("demo_module") == first
    module.write_text("def f():\n    return 2\n")
    assert stale.module_hash("demo_module") != first


def test_changed_parameters_of_a_profile_make_its_results_stale(toy_book):
    runner.update(runner.execute("toy", "study"), RENDER)
    assert runner.stale(["toy"], "study") == {}
    (toy_book / "notebooks" / "profiles.yaml").write_text(yaml.safe_dump({"toy": {"study": {"seeds": [0, 1]}}}))
    assert runner.stale(["toy"], "study") == {"toy": ["parameters"]}
    assert stale.stale_parts("toy", {"profile": "study", "key": {"modules": {}}}) == ["result without key"]
