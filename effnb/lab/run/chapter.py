"""Run chapters: each by papermill in a process and a folder of its own, several at once; commit what they gave."""

import base64
import contextlib
import json
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
_PICTURE = re.compile(r"(?<=data:image/svg\+xml;base64,)[A-Za-z0-9+/=]+")
#: Tags of the cells that show stored results; what they show follows from those.
STORED = {"lead", "at-a-glance", "study"}
#: Tag of a cell that shows stored results, and what draws it: of a system, from a folder of results.
Renderers = Mapping[str, Callable[[str, Path], Any]]


@dataclass(frozen=True)
class RunRecord:
    """How one chapter's run ended: ``status`` is ``ok``, ``failed`` or ``timeout``; ``error`` is the tail of its log.

    No other run writes to the folder of its executed notebook.
    """

    system: str
    profile: str
    status: str
    seconds: float
    notebook: Path
    error: str = ""

    @property
    def results(self) -> Path:
        """What the run wrote: a folder with one folder a profile, as ``book/results``."""
        return self.notebook.parent / "results"

    def discard(self) -> None:
        """Remove the run's folder."""
        shutil.rmtree(self.notebook.parent, ignore_errors=True)


# --- running -------------------------------------------------------------------------------------------------------


def execute(
    system: str,
    profile: str = "book",
    parameters: Mapping | None = None,
    folder: Path | None = None,
    timeout: float | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> RunRecord:
    """Execute one chapter in a worker process; return how that ended, also where the notebook fails.

    Args:
        system: the chapter.
        profile: which parameter set; see :func:`effnb.lab.run.parameters.parameters_of`.
        parameters: further parameters, over the profile's.
        folder: where the run writes; default a fresh one below ``_build/runs``.
        timeout: seconds; default by profile. The worker and all that it started are killed after that.
        on_progress: called with the share of the work that is done, from other threads.

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
    begun, limit = time.perf_counter(), TIMEOUTS[profile] if timeout is None else timeout
    with _meter(source, system, profile, bool(values), folder / "progress.json", on_progress) as read:
        try:
            code, log = process.call(command, further, root(), limit, read)
            status, error = "failed" if code else "ok", _last_words(log) or f"worker ended with code {code}"
        except TimeoutError as expired:
            status, error = "timeout", f"stopped after {limit:g} s\n{_last_words(str(expired))}"
    if status == "ok" and (error := _unfinished(record)):
        status = "failed"
    return replace(record, status=status, seconds=time.perf_counter() - begun, error=error)


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
    """Return why a run that ended without an error is none that counts; else nothing, and keep its cells' seconds."""
    took = {}
    for cell in nbformat.read(record.notebook, as_version=4).cells:
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        # `sys.exit(0)` stops a notebook, and papermill takes that for an end.
        wrong = [o for o in cell.outputs if o.output_type == "error"]
        if wrong and "raises-exception" not in cell.metadata.get("tags", []):
            return f"cell {cell.id!r} left the notebook: {wrong[0].ename}"
        if cell.execution_count is None:
            return f"cell {cell.id!r} was not run"
        took[cell.id] = cell.metadata["papermill"]["duration"]
    if not result_path(record.system, record.profile, record.results).is_file():
        return "the notebook ran, but wrote no result"
    write_atomically(_durations_file(record.system, record.profile), json.dumps(took))
    return ""


def _durations_file(system: str, profile: str) -> Path:
    return root() / "_build" / "durations" / profile / f"{system}.json"


@contextlib.contextmanager
def _meter(
    source: Path, system: str, profile: str, injects: bool, told: Path, on_progress: Callable[[float], None] | None
) -> Iterator[Callable[[str], None]]:
    """Yield what reads papermill's log; report the share of work done, by it and by what resumable functions tell.

    Cells count by the seconds that they took in the last run that ended well, of this profile or another.
    """
    cells = nbformat.read(source, as_version=4).cells
    files = (_durations_file(system, name) for name in (profile, "study", "book", "smoke"))
    took = next((json.loads(file.read_text()) for file in files if file.is_file()), {})
    usual = sum(took.values()) / len(took) if took else 1.0
    weights = [took.get(c.id, usual) if c.cell_type == "code" else 0.0 for c in cells]
    if injects:  # papermill puts its own cell after the parameters
        place = next(k for k, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
        weights.insert(place + 1, 0.0)
    begun, before, ended = 0, 0, threading.Event()

    def calls() -> tuple[int, int]:
        content = json.loads(told.read_text()) if told.is_file() else {"done": 0, "calls": 0}
        return content["done"], content["calls"]

    def tell() -> None:
        if on_progress and begun:
            done, expected = calls()
            left = expected - before
            within = min(1.0, (done - before) / left) if left > 0 else 0.0
            on_progress((sum(weights[: begun - 1]) + within * weights[begun - 1]) / (sum(weights) or 1.0))

    def read(line: str) -> None:
        nonlocal begun, before
        found = re.match(r"Executing Cell (\d+)-", line)
        # A cell may print what looks like papermill's, so only the next number counts.
        if found and int(found[1]) == begun + 1 and begun < len(weights):
            begun, before = begun + 1, calls()[0]
            tell()

    def tick() -> None:
        while not ended.wait(1.0):
            tell()

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield read
    finally:
        ended.set()
        ticker.join()


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

    Returns one record a chapter, in the order of ``systems``.

    Args:
        systems: the chapters.
        profile: as in :func:`execute`, as are ``parameters`` and ``timeout``, for each.
        jobs: worker processes at a time, >= 1.
        on_progress: called with (system, share of its work that is done), from other threads.
        on_done: called with each record as it comes.

    Raises:
        ValueError: unknown system, profile or parameter, or ``jobs < 1``; nothing has run then.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}")
    for system in systems:
        injected(system, profile, parameters)

    def one(system: str) -> RunRecord:
        return execute(system, profile, parameters, None, timeout, on_progress and partial(on_progress, system))

    records, first = {}, sorted(systems, key=lambda s: expected_seconds(s, profile), reverse=True)
    for system, future in process.on_threads(one, first, jobs):
        records[system] = future.result()
        if on_done:
            on_done(records[system])
    return [records[system] for system in systems]


def expected_seconds(system: str, profile: str = "book") -> float:
    """Return the seconds that the committed result took, a guess where there is none.

    >>> expected_seconds("no_such_system")
    60.0
    """
    with contextlib.suppress(ValueError):
        if result := load_result(system, profile):
            return float(result["runtime_s"])
    return _GUESS.get(profile, 60.0)


def smoke(systems: Sequence[str]) -> int:
    """Run chapters at smoke scale through nbval, which compares the outputs that must never change.

    Returns 0 if all passed, pytest's exit code otherwise; 1 if a result breaks a rule or the time is up.

    Raises:
        ValueError: a chapter has no smoke profile, or its parameters do not fit.
    """
    sets, folder = {chapter_path(system): injected(system, "smoke") for system in systems}, _fresh_folder("smoke")
    copies = [folder / source.name for source in sets]
    for (source, values), copy in zip(sets.items(), copies, strict=True):
        papermill.execute_notebook(source, copy, parameters=values, prepare_only=True, progress_bar=False)
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-cell-timeout=120", "--durations=5"]
    command += ["-p", "no:doctest", "-o", "addopts=", "-q", "-c", os.devnull, "--rootdir", folder, *copies]
    further = {"EFFNB_RESULTS": str(folder / "results"), "EFFNB_PARAMETERS": "{}", RESUME: ""}
    limit = TIMEOUTS["smoke"] * len(systems)
    try:
        code, _ = process.call(command, further, folder, limit, partial(print, end="", flush=True))
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

    Returns the copy of the notebook, in which ``render`` has drawn anew the cells that show stored results: they stand
    before the run that they report on.
    """
    target = root() / "_build" / "executed" / record.notebook.name
    if record.status == "timeout" or not record.notebook.is_file():
        return target
    notebook = nbformat.read(record.notebook, as_version=4)
    if record.status == "ok":
        _draw(notebook, record.system, record.results, render or {})
        result = json.loads(result_path(record.system, record.profile, record.results).read_text())
        _copy_result(record, result, results_root())
    write_atomically(target, nbformat.writes(notebook) + "\n")
    return target


def _renew(path: Path, data: str | bytes) -> list[Path]:
    """Write a file unless it holds that already; return the files written."""
    raw = data.encode() if isinstance(data, str) else data
    if path.is_file() and path.read_bytes() == raw:
        return []
    write_atomically(path, raw)
    return [path]


def _copy_result(record: RunRecord, result: Mapping, target: Path) -> list[Path]:
    """Copy a run's result with its files, the result last; return what was written. Files that it does not name go."""
    old, new = (result_path(record.system, record.profile, folder) for folder in (record.results, target))
    names = sorted(f"{record.system}/{figure['name']}.svg" for figure in result["figures"])
    names += [f"{record.system}.npz"] if result["units_sha256"] else []
    written = []
    for name in names:
        written += _renew(new.parent / name, (old.parent / name).read_bytes())
    written += _renew(new, json.dumps(result, indent=1) + "\n")
    for path in {*new.with_suffix("").glob("*.svg"), new.with_suffix(".npz")} - {new.parent / name for name in names}:
        path.unlink(missing_ok=True)
    return written


def _draw(notebook: nbformat.NotebookNode, system: str, results: Path, render: Renderers) -> None:
    """Replace the output of each cell that shows stored results by what they are now."""
    for cell in notebook.cells:
        for tag in render.keys() & set(cell.metadata.get("tags", [])):
            shown = render[tag](system, results)
            data = {"text/html": shown._repr_html_(), "text/plain": repr(shown)}
            cell.outputs = [nbformat.v4.new_output("execute_result", data, execution_count=cell.execution_count)]


def normalized(source: Path, executed: Path) -> nbformat.NotebookNode:
    """Return a committed notebook with the outputs of papermill's copy, and nothing that changes from run to run.

    Raises:
        ValueError: a code cell of the source is missing in the executed copy or was run from another source.
    """
    notebook = nbformat.read(source, as_version=4)
    ran = {cell.id: cell for cell in nbformat.read(executed, as_version=4).cells}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        if cell.id not in ran or ran[cell.id].source != cell.source:
            raise ValueError(
                f"{executed.name}: cell {cell.id!r} is not the one of {source.name}: run the chapter again"
            )
        cell.execution_count, cell.outputs = count, ran[cell.id].outputs
        for output in cell.outputs:
            output.pop("transient", None)
            if "metadata" in output:
                output.metadata = {}
            if output.output_type == "execute_result":
                output.execution_count = count
            if "text/html" in output.get("data", {}):
                output.data["text/html"] = _PICTURE.sub(_lighter, output.data["text/html"])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    return notebook


def _lighter(picture: re.Match) -> str:
    """The same picture without what nobody sees: comments, fall-back fonts, indentation, digits below 0.01 points."""
    svg = base64.b64decode(picture[0]).decode()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'(?:, '[^']*')+", "'DejaVu Sans'", re.sub(r">\s+<", "><", svg))
    short = (r"([1-9]\d*\.\d\d|0\.\d{4})\d+", r"\1"), (r"(?<=[;:]) +| *\n(?=[A-Z])", "")
    for pattern, kept in short:
        svg = re.sub(r"<[^>]*>", lambda tag, p=pattern, k=kept: re.sub(p, k, tag[0]), svg)
    return base64.b64encode(svg.encode()).decode()


def outputs_digest(notebook: nbformat.NotebookNode) -> str:
    """Return the digest of all outputs, text and figures, but those of cells that show stored results."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return digest([[cell.id, cell.outputs] for cell in code if not STORED & set(cell.metadata.get("tags", []))])


def update(record: RunRecord, render: Renderers) -> list[Path]:
    """Commit a finished run: its result with tables and figures, and what the chapter's notebook shows of it.

    A ``book`` run refreshes all outputs, normalised; a ``study`` run only the cells that show stored results. A result
    that differs only in time, machine or commit is kept, so a run that changes nothing gives no diff. The result is
    written first and names the outputs that belong to it: a kill before the notebook is written shows in
    :func:`misfits`. Returns the files that changed.

    Raises:
        ValueError: a smoke run or one that failed, other parameters than the profile's, a notebook that has changed.
    """
    system, profile, source = record.system, record.profile, chapter_path(record.system)
    if profile == "smoke" or record.status != "ok":
        raise ValueError(f"{system}: only whole runs at book or study can be published, got {profile}, {record.status}")
    new, own = load_result(system, profile, record.results), parameters_of(system, profile)
    if new["key"]["parameters"] != own:
        raise ValueError(f"{system}: measured with other parameters than those of {profile}: run the chapter again")
    notebook = normalized(source, record.notebook)
    if new["key"]["notebook"] != notebook_hash(source):
        raise ValueError(f"{system}: the notebook was changed while it ran: run the chapter again")
    new = {k: v for k, v in new.items() if k != "digest"} | {"outputs_sha256": outputs_digest(notebook)}
    if profile == "study":
        notebook, new["outputs_sha256"] = nbformat.read(source, as_version=4), None
    committed, changed = result_path(system, profile, committed_results()), []
    old = json.loads(committed.read_text()) if committed.is_file() else {}  # it may break today's rules
    if any(new[k] != old.get(k) for k in new if k not in _VOLATILE):
        changed = _copy_result(record, new | {"digest": digest(new)}, committed_results())
    changed += redraw(system, render, notebook)
    if profile == "study":
        shutil.rmtree(folder_of(system, own), ignore_errors=True)
    return changed


def redraw(system: str, render: Renderers, notebook: nbformat.NotebookNode | None = None) -> list[Path]:
    """Bring a chapter's cells that show stored results up to date; return its path if anything changed."""
    notebook = notebook or nbformat.read(chapter_path(system), as_version=4)
    _draw(notebook, system, committed_results(), render)
    return _renew(chapter_path(system), nbformat.writes(notebook) + "\n")


def misfits(systems: Sequence[str], render: Renderers) -> list[str]:
    """Return the committed notebooks that do not show what the committed results say, one line each."""
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
    results = {system: load_result(system, profile) for system in (chapters() if systems is None else systems)}
    found = {system: stale_parts(system, result) for system, result in results.items() if result or profile == "book"}
    return {system: parts for system, parts in found.items() if parts}


def clean() -> None:
    """Remove executed notebooks and book results of earlier runs under ``_build``."""
    for folder in (root() / "_build" / "executed", results_root() / "book"):
        shutil.rmtree(folder, ignore_errors=True)
