"""Run chapters: each by papermill in a process and a folder of its own, several at once; commit what they gave."""

import contextlib
import json
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import yaml

from effnb.common import write_atomically
from effnb.lab.judge.results import check, load_result, result_path
from effnb.lab.paths import chapter_path, chapters, committed_results, digest, results_root, root
from effnb.lab.run import process
from effnb.lab.run.parameters import injected, parameters_of
from effnb.lab.run.stale import PROGRESS, RESUME, folder_of, notebook_hash, stale_parts

#: Seconds after which a chapter is stopped, by profile.
TIMEOUTS = {"smoke": 180, "book": 900, "study": 7200}
#: Seconds that a chapter is expected to take where no result says it.
_GUESS = {"smoke": 15.0, "book": 60.0, "study": 2400.0}
_VOLATILE = ("runtime_s", "cpu_s", "hardware", "software", "digest")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
#: Tags of the cells that show stored results; what they show follows from those.
STORED = {"lead", "at-a-glance", "study"}
#: Tag of a cell that shows stored results, and what draws it: of a system, from a folder of results.
Renderers = Mapping[str, Callable[[str, Path], Any]]


@dataclass(frozen=True)
class RunRecord:
    """How one chapter's run ended: ``status`` is ``ok``, ``failed`` or ``timeout``; ``error`` is the tail of its log.

    ``folder`` holds the executed notebook and, under ``results``, what the run wrote; no other run writes there.
    """

    system: str
    profile: str
    status: str
    seconds: float
    notebook: Path
    error: str = ""

    @property
    def folder(self) -> Path:
        """Where this run alone wrote."""
        return self.notebook.parent

    @property
    def results(self) -> Path:
        """Folder with one folder a profile, as ``book/results``."""
        return self.folder / "results"

    def discard(self) -> None:
        """Remove the run's folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


# --- running -------------------------------------------------------------------------------------------------------


def execute(
    system: str,
    profile: str = "book",
    parameters: Mapping | None = None,
    folder: Path | None = None,
    timeout: float | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> RunRecord:
    """Execute one chapter in a worker process.

    Args:
        system: the chapter.
        profile: which parameter set; see :func:`effnb.lab.run.parameters.parameters_of`.
        parameters: further parameters, over the profile's.
        folder: where the run writes; default a fresh one below ``_build/runs``.
        timeout: seconds; default by profile. The worker and all that it started are killed after that.
        on_progress: called with the share of the work that is done, from other threads.

    Returns:
        How the run ended. Nothing is raised for a failing notebook.

    Raises:
        ValueError: unknown system, profile or parameter, a value of another type than the chapter's.
    """
    source, values = chapter_path(system), injected(system, profile, parameters)
    folder = Path(folder or _fresh_folder(f"{system}-{profile}")).resolve()
    record = RunRecord(system, profile, "ok", 0.0, folder / source.name)
    write_atomically(folder / "parameters.yaml", yaml.safe_dump(values))
    further = {"EFFNB_RESULTS": str(record.results), "EFFNB_PARAMETERS": json.dumps(values)}
    further[PROGRESS] = str(folder / "progress.json")
    # Set or emptied: a run that is started from a cell of another must not inherit that one's.
    further[RESUME] = str(folder_of(system, values)) if profile == "study" else ""
    command = [sys.executable, "-m", "papermill", source, record.notebook, "-f", folder / "parameters.yaml"]
    command += ["--kernel", "python3", "--cwd", root(), "--log-output", "--no-progress-bar"]
    meter = _Meter(source, system, profile, bool(values), folder / "progress.json", on_progress)
    begun, limit = time.perf_counter(), TIMEOUTS[profile] if timeout is None else timeout
    with meter:
        try:
            code, log = process.call(command, further, root(), limit, meter.read)
            status, error = "failed" if code else "ok", _last_words(log) or f"worker ended with code {code}"
        except TimeoutError as expired:
            status, error = "timeout", f"stopped after {limit:g} s\n{_last_words(str(expired))}"
    if status == "ok" and (error := _unfinished(record)):
        status = "failed"
    if status == "ok":
        _keep_durations(record)
    return RunRecord(system, profile, status, time.perf_counter() - begun, record.notebook, error)


def _fresh_folder(name: str) -> Path:
    """Return a new folder for one run; those of commands that ended without removing theirs go."""
    runs = root() / "_build" / "runs"
    for old in runs.glob("*.*-*"):
        owner = old.name.rpartition(".")[2].partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(old, ignore_errors=True)
    folder = runs / f"{name}.{os.getpid()}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    return folder


def _last_words(log: str) -> str:
    """Return what papermill says of the failing cell, else the end of the log."""
    plain = _COLOUR.sub("", log)
    _, found, told = plain.rpartition("papermill.exceptions.PapermillExecutionError:")
    return told.strip() if found else "\n".join(plain.splitlines()[-40:])


def _unfinished(record: RunRecord) -> str:
    """Return why a run that ended without an error is none that counts, or nothing."""
    for cell in nbformat.read(record.notebook, as_version=4).cells:
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        # `sys.exit(0)` stops a notebook, and papermill takes that for an end.
        wrong = [o for o in cell.outputs if o.output_type == "error"]
        if wrong and "raises-exception" not in cell.metadata.get("tags", []):
            return f"cell {cell.id!r} left the notebook: {wrong[0].ename}"
        if cell.execution_count is None:
            return f"cell {cell.id!r} was not run"
    if not result_path(record.system, record.profile, record.results).is_file():
        return "the notebook ran, but wrote no result"
    return ""


class _Meter:
    """Turns papermill's log, and what resumable functions tell, into the share of the work that is done.

    Cells count by the seconds that they took in an earlier run, where there was one.
    """

    def __init__(
        self,
        source: Path,
        system: str,
        profile: str,
        injects: bool,
        told: Path,
        on_progress: Callable[[float], None] | None,
    ) -> None:
        cells = nbformat.read(source, as_version=4).cells
        took = _durations(system, profile)
        usual = sum(took.values()) / len(took) if took else 1.0
        self.weights = [took.get(c.id, usual) if c.cell_type == "code" else 0.0 for c in cells]
        if injects:  # papermill puts its own cell after the parameters
            place = next(k for k, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
            self.weights.insert(place + 1, 0.0)
        self.told, self.on_progress = told, on_progress
        self.begun, self.calls_before, self.ended = 0, 0, threading.Event()

    def __enter__(self) -> "_Meter":
        self.ticker = threading.Thread(target=self._tick, daemon=True)
        self.ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.ticker.join()

    def _tick(self) -> None:
        while not self.ended.wait(1.0):
            self.tell()

    def read(self, line: str) -> None:
        """Take one line of the log; a cell may print what looks like papermill's, so only the next number counts."""
        found = re.match(r"Executing Cell (\d+)-", line)
        if found and int(found[1]) == self.begun + 1 and self.begun < len(self.weights):
            self.begun += 1
            self.calls_before = self._calls()[0]
            self.tell()

    def _calls(self) -> tuple[int, int]:
        try:
            content = json.loads(self.told.read_text())
            return int(content["done"]), int(content["calls"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, 0

    def tell(self) -> None:
        """Report the share that is done."""
        if self.on_progress and self.begun:
            done, calls = self._calls()
            left = calls - self.calls_before
            within = min(1.0, (done - self.calls_before) / left) if left > 0 else 0.0
            whole = sum(self.weights) or 1.0
            self.on_progress((sum(self.weights[: self.begun - 1]) + within * self.weights[self.begun - 1]) / whole)


def _durations_file(system: str, profile: str) -> Path:
    return root() / "_build" / "durations" / profile / f"{system}.json"


def _durations(system: str, profile: str) -> dict[str, float]:
    """Return seconds by cell of the last run of this profile that ended well, else of another."""
    for name in (profile, "study", "book", "smoke"):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            content = json.loads(_durations_file(system, name).read_text())
            return {cell: float(seconds) for cell, seconds in content.items()}
    return {}


def _keep_durations(record: RunRecord) -> None:
    cells = nbformat.read(record.notebook, as_version=4).cells
    took = {c.id: (c.metadata.get("papermill") or {}).get("duration") for c in cells if c.cell_type == "code"}
    took = {cell: seconds for cell, seconds in took.items() if seconds is not None}
    write_atomically(_durations_file(record.system, record.profile), json.dumps(took))


def execute_all(
    systems: Sequence[str],
    profile: str = "book",
    parameters: Mapping | None = None,
    jobs: int = 2,
    on_progress: Callable[[str, float], None] | None = None,
    on_done: Callable[[RunRecord], None] | None = None,
    timeout: float | None = None,
) -> list[RunRecord]:
    """Execute several chapters, ``jobs`` at a time, the longest first; a failing one never stops the others.

    Args:
        systems: the chapters.
        profile: as in :func:`execute`, as are ``parameters`` and ``timeout``.
        parameters: further parameters for each.
        jobs: worker processes at a time, >= 1.
        on_progress: called with (system, share of its work that is done).
        on_done: called with each record as it comes.
        timeout: seconds for each.

    Returns:
        One record a chapter, in the order of ``systems``.

    Raises:
        ValueError: unknown system, profile or parameter, or ``jobs < 1``; nothing has run then.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}")
    for system in systems:
        injected(system, profile, parameters)
    turn = threading.Lock()

    def one(system: str) -> RunRecord:
        progress = (lambda share: on_progress(system, share)) if on_progress else None
        record = execute(system, profile, parameters, None, timeout, progress)
        with turn:
            if on_done:
                on_done(record)
        return record

    first = sorted(systems, key=lambda s: expected_seconds(s, profile), reverse=True)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            records = dict(zip(first, pool.map(one, first), strict=True))
        except BaseException:  # Ctrl-C: without this the pool would wait for the chapters to end
            pool.shutdown(wait=False, cancel_futures=True)
            process.stop_all()
            raise
    return [records[system] for system in systems]


def expected_seconds(system: str, profile: str = "book") -> float:
    """Return the seconds that the committed result took, a guess where there is none.

    >>> expected_seconds("no_such_system")
    60.0
    """
    try:
        result = load_result(system, profile)
    except ValueError:
        result = None
    return float(result["runtime_s"]) if result else _GUESS.get(profile, 60.0)


def smoke(systems: Sequence[str]) -> int:
    """Run chapters at smoke scale through nbval, which compares the outputs that must never change.

    Args:
        systems: the chapters.

    Returns:
        0 if all passed, pytest's exit code otherwise; 1 if a result breaks a rule or the time is up.

    Raises:
        ValueError: a chapter has no smoke profile, or its parameters do not fit.
    """
    sets, folder = {system: injected(system, "smoke") for system in systems}, _fresh_folder("smoke")
    copies = [folder / chapter_path(system).name for system in systems]
    for system, copy in zip(systems, copies, strict=True):
        papermill.execute_notebook(
            str(chapter_path(system)), str(copy), parameters=sets[system], prepare_only=True, progress_bar=False
        )
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-cell-timeout=120", "--durations=5"]
    command += ["-p", "no:doctest", "-o", "addopts=", "-q", "-c", os.devnull, "--rootdir", folder, *copies]
    further = {"EFFNB_RESULTS": str(folder / "results"), "EFFNB_PARAMETERS": "{}", RESUME: ""}
    limit = TIMEOUTS["smoke"] * len(systems)
    try:
        code, _ = process.call(command, further, folder, limit, lambda line: print(line, end="", flush=True))
    except TimeoutError:
        code = 1
        print(f"smoke runs were stopped after {limit} s")
    problems = check(list(systems), "smoke", folder / "results")
    print(*problems, sep="\n")
    if not (code or problems):
        shutil.rmtree(folder, ignore_errors=True)
    return code or int(bool(problems))


# --- what a run leaves -----------------------------------------------------------------------------------------------


def deliver(record: RunRecord, render: Renderers | None = None) -> Path:
    """Copy a run's notebook to ``_build/executed`` and, if it ended well, its results to ``_build/results``.

    Args:
        record: the run.
        render: draws the cells that show stored results, which stand before the run that they report on.

    Returns:
        The copy of the notebook.
    """
    target = root() / "_build" / "executed" / record.notebook.name
    if record.status == "timeout" or not record.notebook.is_file():
        return target
    notebook = nbformat.read(record.notebook, as_version=4)
    if record.status == "ok":
        _draw(notebook, record.system, record.results, render or {})
        _copy_result(record.system, record.profile, record.results, results_root())
    write_atomically(target, nbformat.writes(notebook) + "\n")
    return target


def _copy_result(system: str, profile: str, source: Path, target: Path, result: Mapping | None = None) -> list[Path]:
    """Copy one result with its files, the result last; return what was written. Files that it does not name go."""
    old, new = result_path(system, profile, source), result_path(system, profile, target)
    result = json.loads(old.read_text()) if result is None else result
    pictures = {f"{figure['name']}.svg" for figure in result["figures"]}
    beside = [Path(system) / name for name in sorted(pictures)]
    beside += [Path(f"{system}.npz")] if result["units_sha256"] else []
    written = []
    for name in beside:
        raw = (old.parent / name).read_bytes()
        if not (new.parent / name).is_file() or (new.parent / name).read_bytes() != raw:
            write_atomically(new.parent / name, raw)
            written.append(new.parent / name)
    write_atomically(new, json.dumps(result, indent=1) + "\n")
    left_over = [p for p in new.with_suffix("").glob("*.svg") if p.name not in pictures]
    for path in left_over + ([] if result["units_sha256"] else [new.with_suffix(".npz")]):
        path.unlink(missing_ok=True)
    return [*written, new]


def _draw(notebook: nbformat.NotebookNode, system: str, results: Path, render: Renderers) -> None:
    """Replace the output of each cell that shows stored results by what they are now."""
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            if tag in render:
                shown = render[tag](system, results)
                data = {"text/html": shown._repr_html_(), "text/plain": repr(shown)}
                count = cell.execution_count
                cell.outputs = [nbformat.v4.new_output("execute_result", data, execution_count=count)]


def _same_code(source: Path, executed: Path) -> None:
    ran = {cell.id: cell.source for cell in nbformat.read(executed, as_version=4).cells}
    for cell in nbformat.read(source, as_version=4).cells:
        if cell.cell_type == "code" and ran.get(cell.id) != cell.source:
            raise ValueError(
                f"{executed.name}: cell {cell.id!r} is not the one of {source.name}: run the chapter again"
            )


def normalized(source: Path, executed: Path) -> nbformat.NotebookNode:
    """Return the source notebook with the executed copy's outputs, and nothing that changes from run to run.

    Args:
        source: the committed notebook.
        executed: papermill's output for it, with the same cell ids.

    Raises:
        ValueError: a code cell of the source is missing in the executed copy or was run from another source.
    """
    _same_code(source, executed)
    notebook = nbformat.read(source, as_version=4)
    ran = {cell.id: cell for cell in nbformat.read(executed, as_version=4).cells}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        cell.execution_count, cell.outputs = count, ran[cell.id].outputs
        for output in cell.outputs:
            output.pop("transient", None)
            if "metadata" in output:
                output.metadata = {}
            if output.output_type == "execute_result":
                output.execution_count = count
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    return notebook


def outputs_digest(notebook: nbformat.NotebookNode) -> str:
    """Return the digest of all outputs, text and figures, but those of cells that show stored results."""
    return digest(
        [
            [cell.id, cell.outputs]
            for cell in notebook.cells
            if cell.cell_type == "code" and not STORED & set(cell.metadata.get("tags", []))
        ]
    )


def update(record: RunRecord, render: Renderers) -> list[Path]:
    """Commit a finished run: its result with tables and figures, and what the chapter's notebook shows of it.

    A ``book`` run refreshes all outputs, normalised; a ``study`` run only the cells that show stored results. A result
    that differs only in time, machine or commit is kept, so a run that changes nothing gives no diff. The result is
    written first and names the outputs that belong to it: a kill before the notebook is written shows in
    :func:`misfits`.

    Args:
        record: a run at ``book`` or ``study`` that ended well.
        render: draws the cells that show stored results.

    Returns:
        The files that changed.

    Raises:
        ValueError: a smoke run or one that failed, other parameters than the profile's, or a notebook that has changed
            since.
    """
    system, profile, source = record.system, record.profile, chapter_path(record.system)
    if profile == "smoke" or record.status != "ok":
        raise ValueError(f"{system}: only whole runs at book or study can be published, got {profile}, {record.status}")
    new = load_result(system, profile, record.results)
    if new["key"]["parameters"] != parameters_of(system, profile):
        raise ValueError(f"{system}: measured with other parameters than those of {profile}: run the chapter again")
    _same_code(source, record.notebook)
    if new["key"]["notebook"] != notebook_hash(source):
        raise ValueError(f"{system}: the notebook was changed while it ran: run the chapter again")
    notebook, shown = nbformat.read(source, as_version=4), None
    if profile == "book":
        notebook = normalized(source, record.notebook)
        shown = outputs_digest(notebook)
    new = {k: v for k, v in new.items() if k != "digest"} | {"outputs_sha256": shown}
    old_path = result_path(system, profile, committed_results())
    old = json.loads(old_path.read_text()) if old_path.is_file() else {}
    changed = []
    if any(new[k] != old.get(k) for k in new if k not in _VOLATILE):
        changed = _copy_result(system, profile, record.results, committed_results(), new | {"digest": digest(new)})
    changed += _write_drawn(source, notebook, system, render)
    if profile == "study":
        shutil.rmtree(folder_of(system, parameters_of(system, profile)), ignore_errors=True)
    return changed


def _write_drawn(source: Path, notebook: nbformat.NotebookNode, system: str, render: Renderers) -> list[Path]:
    _draw(notebook, system, committed_results(), render)
    text = nbformat.writes(notebook) + "\n"
    if source.read_text() == text:
        return []
    write_atomically(source, text)
    return [source]


def redraw(system: str, render: Renderers) -> list[Path]:
    """Bring the cells that show stored results up to date; return the notebook if it changed."""
    source = chapter_path(system)
    return _write_drawn(source, nbformat.read(source, as_version=4), system, render)


def misfits(systems: Sequence[str], render: Renderers) -> list[str]:
    """Return the committed notebooks that do not show what the committed results say, one line each.

    Args:
        systems: the chapters.
        render: draws the cells that show stored results.
    """
    lines = []
    for system in systems:
        source = chapter_path(system)
        notebook, result = nbformat.read(source, as_version=4), load_result(system)
        if result and result.get("outputs_sha256") != outputs_digest(notebook):
            lines.append(f"{source.name}: the outputs are not those of the stored result: run the chapter again")
        before = _shown(notebook)
        _draw(notebook, system, committed_results(), render)
        if before != _shown(notebook):
            lines.append(f"{source.name}: a cell does not show the stored results: run `effnb claims --write`")
    return lines


def _shown(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the markup of cells that show stored results; of pictures the alternative text, as versions draw apart."""
    outputs = [o for cell in notebook.cells if STORED & set(cell.metadata.get("tags", [])) for o in cell.outputs]
    return [re.sub(r'src="data:image[^"]*"', "", o.get("data", {}).get("text/html", "")) for o in outputs]


def stale(systems: Sequence[str] | None = None, profile: str = "book") -> dict[str, list[str]]:
    """Return the chapters whose committed result no longer fits their sources, with what changed.

    Nobody has to have run a study: at that profile a chapter without a result is none of them.
    """
    found = {}
    for system in chapters() if systems is None else systems:
        result = load_result(system, profile)
        if result or profile == "book":
            found[system] = stale_parts(system, result)
    return {system: parts for system, parts in found.items() if parts}


def clean(profile: str = "book") -> None:
    """Remove executed notebooks and results of earlier runs of ``profile`` under ``_build``."""
    for folder in (root() / "_build" / "executed", results_root() / profile):
        shutil.rmtree(folder, ignore_errors=True)
