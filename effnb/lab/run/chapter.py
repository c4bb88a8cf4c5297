"""Run chapters with papermill, each in a process of its own that can be timed out or killed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from effnb.common import write_atomically
from effnb.lab.judge.results import load_result, result_path
from effnb.lab.paths import committed_results, results_root, root
from effnb.lab.run.notebooks import normalize
from effnb.lab.run.stale import chapters, stale_parts

#: Seconds after which a chapter is stopped, by profile.
TIMEOUTS = {"smoke": 180, "book": 900, "paper": 7 * 24 * 3600}
_WORKERS: set[subprocess.Popen] = set()
_VOLATILE = ("runtime_s", "cpu_s", "hardware", "software", "digest")


@dataclass(frozen=True)
class RunRecord:
    """How one chapter's run ended: ``status`` is ``ok``, ``failed`` or ``timeout``; ``error`` is the tail of its log.

    Reference: agarwal2021precipice.
    """

    system: str
    status: str
    seconds: float
    notebook: Path
    error: str = ""


def parameters_of(system: str, profile: str) -> dict:
    """The parameters that a profile injects into a chapter; the ``book`` profile is the notebook's own defaults.

    Raises:
        ValueError: the chapter has no such profile in ``notebooks/profiles.yaml``.

    >>> parameters_of("avagrad", "book")
    {}
    """
    if profile == "book":
        return {}
    found = (yaml.safe_load((root() / "notebooks" / "profiles.yaml").read_text()) or {}).get(system, {})
    if profile not in found:
        raise ValueError(f"profile of {system} must be one of {['book', *found]}, got {profile!r}")
    return {"profile": profile} | found[profile]


def environment(results: Path, parameters: Mapping) -> dict[str, str]:
    """One thread for every numerical library, fixed hashing, and the folder for results."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    ours = {"EFFNB_RESULTS": str(results), "EFFNB_ROOT": str(root()), "EFFNB_PARAMETERS": json.dumps(dict(parameters))}
    quiet = {"PYTHONHASHSEED": "0", "TQDM_DISABLE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    path = {"PYTHONPATH": os.pathsep.join(filter(None, [str(root()), os.environ.get("PYTHONPATH")]))}
    return os.environ | threads | ours | quiet | path


def execute(
    system: str,
    profile: str = "book",
    parameters: Mapping | None = None,
    out_notebook: Path | str | None = None,
    results: Path | None = None,
    timeout: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    source: Path | None = None,
) -> RunRecord:
    """Execute one chapter in a worker process.

    Args:
        system: the chapter.
        profile: which parameter set; see :func:`parameters_of`.
        parameters: further parameters, over the profile's.
        out_notebook: where the executed notebook goes; default ``_build/executed/<name>``.
        results: folder for result files; default ``_build/results``.
        timeout: seconds; default by profile. The worker and its kernel are killed after that.
        on_progress: called with (cells begun, cells in all).
        source: the notebook; default the chapter's.

    Returns:
        How the run ended. Nothing is raised for a failing notebook.

    Raises:
        ValueError: unknown system or profile.

    Reference: agarwal2021precipice.
    """
    source = source or chapters().get(system)
    if source is None:
        raise ValueError(f"system must be one of {list(chapters())}, got {system!r}")
    parameters = parameters_of(system, profile) | dict(parameters or {})
    out = str(out_notebook or root() / "_build" / "executed" / source.name)
    results = Path(results or results_root()).resolve()
    task = {"system": system, "profile": profile, "source": str(source), "out": out, "parameters": parameters}
    begun, log = time.perf_counter(), []
    worker = subprocess.Popen(
        [sys.executable, "-m", "effnb.lab.run.worker", json.dumps(task)],
        env=environment(results, parameters),
        cwd=root(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _WORKERS.add(worker)
    expired = threading.Event()
    limit = TIMEOUTS.get(profile, TIMEOUTS["book"]) if timeout is None else timeout
    timer = threading.Timer(limit, lambda: (expired.set(), _kill(worker)))
    timer.start()
    try:
        for line in worker.stdout:
            if line.startswith("@cell "):
                if on_progress:
                    on_progress(*map(int, line.split()[1:]))
            else:
                log.append(line)
        code = worker.wait()
    finally:
        timer.cancel()
        _kill(worker)
        _WORKERS.discard(worker)
    status = "timeout" if expired.is_set() else "ok" if code == 0 else "failed"
    error = "" if status == "ok" else "".join(log[-40:]) or f"worker ended with code {code}"
    return RunRecord(system, status, time.perf_counter() - begun, Path(out), error)


def _kill(worker: subprocess.Popen) -> None:
    """Kill the worker's process group; its kernel ends itself when its parent is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def execute_all(
    systems: Sequence[str],
    profile: str = "book",
    parameters: Mapping | None = None,
    jobs: int = 2,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_done: Callable[[RunRecord], None] | None = None,
    **options: object,
) -> list[RunRecord]:
    """Execute several chapters, ``jobs`` at a time, the longest first; a failing one never stops the others.

    Args:
        systems: the chapters.
        profile: as in :func:`execute`, as are ``parameters`` and ``options``.
        parameters: further parameters for each.
        jobs: worker processes at a time, >= 1.
        on_progress: called with (system, cells begun, cells in all).
        on_done: called with each record as it comes.

    Returns:
        One record a chapter, in the order of ``systems``.

    Raises:
        ValueError: unknown system or profile, or ``jobs < 1``.

    Reference: agarwal2021precipice.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}")
    for system in systems:
        if system not in chapters():
            raise ValueError(f"system must be one of {list(chapters())}, got {system!r}")
        parameters_of(system, profile)

    def one(system: str) -> RunRecord:
        progress = (lambda k, n: on_progress(system, k, n)) if on_progress else None
        record = execute(system, profile, parameters, on_progress=progress, **options)
        if on_done:
            on_done(record)
        return record

    first = sorted(systems, key=expected_seconds, reverse=True)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            records = dict(zip(first, pool.map(one, first), strict=True))
        except BaseException:  # Ctrl-C: without this the pool would wait for the chapters to end
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in list(_WORKERS):
                _kill(worker)
            raise
    return [records[system] for system in systems]


def expected_seconds(system: str) -> float:
    """Seconds that the chapter took when its committed result was written; 60 where there is none.

    >>> expected_seconds("no_such_system")
    60.0
    """
    try:
        result = load_result(system)
    except ValueError:
        result = None
    return float(result["runtime_s"]) if result else 60.0


def update(system: str, executed: Path, results: Path | None = None) -> list[Path]:
    """Refresh the committed outputs and result of a chapter from a finished ``book`` run.

    Outputs are normalised, and a result that differs only in time, machine or commit is kept, so that a run which
    changes nothing gives no diff.

    Args:
        system: the chapter.
        executed: its executed notebook.
        results: folder where the run wrote its result.

    Returns:
        The files that changed.
    """
    changed = []
    notebook, text = chapters()[system], normalize(chapters()[system], executed)
    if notebook.read_text() != text:
        write_atomically(notebook, text)
        changed.append(notebook)
    new_path, old_path = result_path(system, "book", results), result_path(system, "book", committed_results())
    new = json.loads(new_path.read_text())
    old = json.loads(old_path.read_text()) if old_path.is_file() else {}
    if any(new[k] != old.get(k) for k in new if k not in _VOLATILE):
        old_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(old_path, new_path.read_text())
        changed.append(old_path)
    return changed


def stale(systems: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Chapters whose committed result no longer fits their sources, with what changed."""
    found = {system: stale_parts(system, load_result(system)) for system in systems or chapters()}
    return {system: parts for system, parts in found.items() if parts}


def clean(profile: str = "book") -> None:
    """Remove executed notebooks and results of earlier runs of ``profile`` under ``_build``."""
    for folder in (root() / "_build" / "executed", results_root() / profile):
        shutil.rmtree(folder, ignore_errors=True)
