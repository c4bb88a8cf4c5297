"""Run a chapter over a grid of parameters and seeds, resumably, and gather what it measured: tables and a figure."""

import io
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path

import fsspec
import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from effnb.common import write_atomically
from effnb.lab.judge import stats
from effnb.lab.judge.results import result_path
from effnb.lab.measure import plot
from effnb.lab.paths import chapter_path, chapters, digest, root
from effnb.lab.run import chapter, process
from effnb.lab.run.fanout import fan_out
from effnb.lab.run.parameters import checked, injected, known
from effnb.lab.run.stale import module_hash, notebook_hash, staleness_key

PANELS = 6
OnCell = Callable[[int, int, dict], None]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: what is injected into the chapter, and the chapter's version."""

    system: str
    profile: str
    parameters: Mapping
    seed: int
    notebook: str
    timeout: float | None = None
    environment: Mapping = field(default_factory=dict)

    @property
    def further(self) -> dict:
        """What goes over the profile's parameters."""
        return dict(self.parameters) | {"seeds": [self.seed]}

    @cached_property
    def key(self) -> str:
        """Names the cell's files: equal for equal notebook source, profile and parameters."""
        everything = injected(self.system, self.profile, self.further) | {"profile": self.profile}
        return digest({"system": self.system, "notebook": self.notebook, "parameters": everything})[:16]


def run_cell(cell: Cell) -> dict:
    """Execute one cell in a folder of its own; return its result, its notebook and how it ended.

    ``status``, ``seconds`` and ``error`` are those of :class:`~effnb.lab.run.chapter.RunRecord`, ``result`` is the
    chapter's record, None if it failed, ``executed`` the notebook's text, empty if there is none.

    Raises:
        RuntimeError: if this machine's checkout has another version of the chapter.
    """
    for name, value in cell.environment.items():
        os.environ.setdefault(name, value)
    path = chapters().get(cell.system)
    if path is None or notebook_hash(path) != cell.notebook:
        raise RuntimeError(f"the checkout {root()} has no or another version of the chapter {cell.system}")
    with tempfile.TemporaryDirectory(prefix="effnb-sweep-", ignore_cleanup_errors=True) as folder:
        record = chapter.execute(cell.system, cell.profile, cell.further, Path(folder), cell.timeout)
        written = result_path(cell.system, cell.profile, record.results)
        return {
            "status": record.status,
            "seconds": record.seconds,
            "error": record.error,
            "result": json.loads(written.read_text()) if record.status == "ok" else None,
            "executed": record.notebook.read_text() if record.notebook.is_file() else "",
        }


def cells_of(system: str, grid: Mapping[str, list], seeds: Sequence[int], profile: str, timeout: float | None) -> list:
    """Return the cells of a sweep, seeds fastest.

    Raises:
        ValueError: an unknown system, profile or parameter, a value of another type than the chapter's, an empty or
            repeated list of values.
    """
    declared = {name: about for name, about in known(system).items() if name not in ("seeds", "profile")}
    if unknown := [name for name in grid if name not in declared]:
        checked(dict.fromkeys(unknown), declared, system)  # says what there is; an empty list of values would not
    grid = {name: [checked({name: v}, declared, system)[name] for v in values] for name, values in grid.items()}
    for name, values in [*grid.items(), ("seeds", seeds)]:
        if not values or len({repr(v) for v in values}) != len(values):
            raise ValueError(f"{name} must have values that differ, at least one; got {list(values)}")
    injected(system, profile, {"seeds": [int(seed) for seed in seeds]})
    environment = {name: value for name, value in os.environ.items() if name in ("EFFNB_DATA", "EFFNB_ROOT")}
    version = notebook_hash(chapter_path(system))
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [Cell(system, profile, c, int(s), version, timeout, environment) for c in combinations for s in seeds]


def sweep(
    system: str,
    grid: Mapping[str, list],
    seeds: Sequence[int],
    jobs: int = 1,
    ray_address: str | None = None,
    profile: str = "book",
    out: str | Path | None = None,
    timeout: float | None = None,
    on_cell: OnCell | None = None,
) -> "SweepTable":
    """Run a chapter once for each grid cell and seed; return the figures with intervals, and the failures.

    ``out`` receives ``cells/<key>.json`` as each cell ends, its executed notebook under ``notebooks/``, and at the end
    ``sweep.csv``, ``sweep.parquet``, ``intervals.csv``, ``sweep.svg`` and ``sweep.png``. A cell that ended well is not
    run again unless the notebook, its parameters, the loaded ``effnb`` modules, the lock or Python have changed; a cell
    that fails does not lose the others. On a Ray cluster every node needs the same checkout and packages; files are
    written by this process alone.

    Args:
        system: the chapter.
        grid: parameter name to values; every combination is one grid cell.
        seeds: each is a run of its own.
        jobs: processes at a time on this machine, >= 1.
        ray_address: address of a running Ray cluster, or ``"auto"``.
        profile: parameter set that the grid varies.
        out: folder or any address that fsspec knows; default ``_build/sweeps/<system>``.
        timeout: seconds after which a cell is stopped; default by profile.
        on_cell: called with (cells ended, cells in all, the record) as each ends.

    Raises:
        ValueError: an unknown system, profile or parameter, a value of another type, empty or repeated values,
            ``jobs < 1``, no cluster.
        ImportError: if ray or the protocol of ``out`` is not installed.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}")
    cells, store = cells_of(system, grid, seeds, profile, timeout), Store(out or root() / "_build" / "sweeps" / system)
    today, hash_of = staleness_key(system, (), {}), cache(module_hash)
    records = {cell.key: _finished(store.read(f"cells/{cell.key}.json"), today, hash_of) for cell in cells}

    def done(cell: Cell, outcome: dict | BaseException) -> None:
        if isinstance(outcome, BaseException):
            notes = "\n".join([repr(outcome), *getattr(outcome, "__notes__", [])])
            outcome = {"status": "failed", "seconds": 0.0, "error": notes, "result": None, "executed": ""}
        kept = {k: v for k, v in asdict(cell).items() if k not in ("environment", "timeout")}
        record = {"schema": "effnb-sweep-cell/1", "key": cell.key} | kept | outcome
        if executed := record.pop("executed"):
            store.write(f"notebooks/{cell.key}.ipynb", executed.encode())
        store.write(f"cells/{cell.key}.json", json.dumps(record | {"digest": digest(record)}, indent=1).encode())
        records[cell.key] = record
        if on_cell:
            on_cell(sum(r is not None for r in records.values()), len(cells), record)

    left = [cell for cell in cells if records[cell.key] is None]
    if ray_address is None:
        for cell, future in process.on_threads(run_cell, left, jobs):  # threads: each cell has its processes already
            done(cell, future.exception() or future.result())
    else:
        fan_out(run_cell, left, jobs, ray_address, lambda k, outcome: done(left[k], outcome))
    return tabulate(system, list(records.values()), store)


def _finished(stored: bytes | None, today: Mapping, hash_of: Callable[[str], str | None]) -> dict | None:
    """Return a stored cell if it is whole, ended well and nothing it depends on has changed since, else None."""
    try:
        record = json.loads(stored or "{}")
        whole = record.pop("digest") == digest(record) and record["status"] == "ok"
        old = record["result"]["key"]
        same = all(old.get(part, today[part]) == today[part] for part in ("lock", "python"))
        same = same and all(hash_of(name) == value for name, value in old.get("modules", {}).items())
        return record if whole and same else None
    except (ValueError, KeyError, TypeError, AttributeError):  # whatever it is, it is no cell of a sweep
        return None


class Store:
    """Files below a folder, or an address that fsspec knows such as ``"s3://bucket/sweep"``, read and written whole.

    Raises:
        ImportError: if the address needs a package that is not installed, naming it.
        ValueError: if fsspec does not know the protocol.

    >>> store = Store("memory://demo"); store.write("a/b.txt", b"x"); store.read("a/b.txt"), store.read("none")
    (b'x', None)
    """

    def __init__(self, out: str | Path) -> None:
        self.out = str(out).rstrip("/")
        self.remote = fsspec.get_mapper(self.out) if "://" in self.out else None

    def read(self, name: str) -> bytes | None:
        """Return a file's content, or None where there is none."""
        if self.remote is not None:
            return self.remote.get(name)
        path = Path(self.out, name)
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, raw: bytes) -> None:
        """Write a file at once: renamed into place here, sent in one piece elsewhere."""
        if self.remote is not None:
            self.remote[name] = raw
        else:
            write_atomically(Path(self.out, name), raw)


@dataclass(frozen=True, eq=False)
class SweepTable:
    """The outcome of a sweep.

    ``tidy`` has one row a measured value: ``system``, the grid's parameters, ``seed``, ``metric``, ``value``.
    ``intervals`` has one row a grid cell and metric: the parameters, ``metric``, ``n``, ``mean``, ``lo``, ``hi`` (95 %
    Student interval over seeds, NaN for one seed). ``failures`` lists the records of cells that did not end well.
    """

    system: str
    parameters: list[str]
    tidy: pd.DataFrame
    intervals: pd.DataFrame
    failures: list[dict] = field(default_factory=list)
    out: str = ""
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the table of intervals, the failures with the end of their errors, and where the files are."""
        shown = self.intervals.to_string(index=False, float_format=lambda v: f"{v:.6g}", na_rep="-")
        lines = [shown if len(self.intervals) else "no cell ended well"]
        for record in self.failures:
            last = record["error"].strip().splitlines()[-1:] or ["no message"]
            lines.append(f"{record['status']}: {_label(record['parameters'])} seed {record['seed']}: {last[0]}")
        return "\n".join([*lines, *self.notes, f"written to {self.out}"])


def values_of(result: Mapping) -> dict[str, float]:
    """Return the figures of one run (one seed): the noted metrics, each claim's, then each claim's baseline's.

    A claim that was measured over more than the seed (timing pairs) gives its estimate; one not tested gives nothing.

    >>> values_of({"claims": {"a/A1": {"measured": {"per_seed": [2.0]}}}, "metrics": {"loss": [0.5]}})
    {'loss': 0.5, 'a/A1': 2.0}
    """
    found = {name: math.fsum(v) / len(v) for name, v in result.get("metrics", {}).items() if v}
    baselines = {}
    for claim, entry in result.get("claims", {}).items():
        measured = entry["measured"]
        if values := measured["per_seed"]:
            found[claim] = float(values[0] if len(values) == 1 else measured["estimate"])
        if baseline := measured.get("baseline_per_seed"):
            baselines[f"{claim} baseline"] = math.fsum(baseline) / len(baseline)
    return found | baselines


def _label(parameters: Mapping) -> str:
    """Return parameters as ``eps=1, lr=0.1``."""
    told = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in parameters.items())
    return ", ".join(told) or "defaults"


def tabulate(system: str, records: Sequence[Mapping], store: Store) -> SweepTable:
    """Return the table of all cells, one record each as :func:`sweep` stores them, and write its files to ``store``."""
    parameters, columns = list(records[0]["parameters"]), {}
    for name in parameters:  # a column has one type: where not all are numbers, all become text
        values = [record["parameters"][name] for record in records]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        columns[name] = values if numbers else [str(v) for v in values]
    rows = [
        [system, *(columns[name][k] for name in parameters), record["seed"], metric, value]
        for k, record in enumerate(records)
        if record["status"] == "ok"
        for metric, value in values_of(record["result"]).items()
    ]
    tidy = pd.DataFrame(rows, columns=["system", *parameters, "seed", "metric", "value"])
    rows = []
    for names, group in tidy.groupby([*parameters, "metric"], sort=False, dropna=False):
        values = group["value"].to_numpy()
        mean, lo, hi = values.mean(), math.nan, math.nan
        if len(values) > 1:
            found = stats.paired_t_interval(values)
            mean, lo, hi = found.estimate, found.lo, found.hi
        rows.append([*names, len(values), mean, lo, hi])
    intervals = pd.DataFrame(rows, columns=[*parameters, "metric", "n", "mean", "lo", "hi"])
    failures = [dict(record) for record in records if record["status"] != "ok"]
    table = SweepTable(system, parameters, tidy, intervals, failures, store.out)
    store.write("sweep.csv", tidy.to_csv(index=False).encode())
    store.write("intervals.csv", intervals.to_csv(index=False).encode())
    try:
        tidy.to_parquet(buffer := io.BytesIO(), index=False)
        store.write("sweep.parquet", buffer.getvalue())
    except ImportError:
        table.notes.append("sweep.parquet was not written: it needs pyarrow (pip install 'effnb[ray]')")
    if len(intervals):
        for kind, raw in figure(table).items():
            store.write(f"sweep.{kind}", raw)
    return table


def figure(table: SweepTable) -> dict[str, bytes]:
    """Return the figure as ``{"svg": ..., "png": ...}``: a panel a metric, the grid's first parameter on x.

    Combinations of the further parameters are lines; bars are the 95 % intervals, dots the seeds.
    """
    every = table.intervals["metric"].unique()
    if len(every) > PANELS:
        table.notes.append(f"the figure shows {PANELS} of {len(every)} metrics; all are in sweep.csv")
    metrics = every[:PANELS]
    # For those who can't see it; no date, so that the same figures give the same bytes.
    described = f"{table.system}: {', '.join(metrics)} over {', '.join(table.parameters) or 'seeds'}"
    metadata = {"svg": {"Date": None, "Description": described}, "png": {"Description": described}}
    found, columns, rows = {}, min(2, len(metrics)), math.ceil(len(metrics) / 2)
    with mpl.rc_context():
        plot.style()
        canvas = Figure(figsize=(5.0 if columns == 1 else 7.2, 3.1 * rows))
        for k, metric in enumerate(metrics):
            panel(canvas.add_subplot(rows, columns, k + 1), table, metric)
        for kind, about in metadata.items():
            canvas.savefig(buffer := io.BytesIO(), format=kind, metadata=about, dpi=150)
            found[kind] = buffer.getvalue()
    return found


def panel(axes: Axes, table: SweepTable, metric: str) -> None:
    """Draw one metric into one set of axes."""
    means = table.intervals[table.intervals["metric"] == metric]
    seeds = table.tidy[table.tidy["metric"] == metric]
    first, *rest = table.parameters or [None]
    numeric = bool(first) and pd.api.types.is_numeric_dtype(means[first])
    places = {v: v if numeric else float(k) for k, v in enumerate(dict.fromkeys(means[first]) if first else ())}
    groups = means.groupby(rest, sort=False, dropna=False) if rest else [((), means)]
    for names, group in groups:
        chosen = seeds[(seeds[rest] == pd.Series(names, index=rest)).all(axis=1)] if rest else seeds
        x = [places[v] for v in group[first]] if first else [0.0]
        error = [(group["mean"] - group["lo"]).fillna(0), (group["hi"] - group["mean"]).fillna(0)]
        line = axes.errorbar(x, group["mean"], error, marker="o", capsize=3, elinewidth=0.8, lw=1.4 if first else 0)
        dots = [places[v] for v in chosen[first]] if first else [0.0] * len(chosen)
        axes.plot(dots, chosen["value"], ".", color=line[0].get_color(), mec="white", mew=0.4)
        if rest:
            line.set_label(_label(dict(zip(rest, names, strict=True))))
    axes.set(title=metric, xlabel=first or "")
    if numeric and min(places) > 0 and max(places) >= 50 * min(places):
        axes.set_xscale("log")
    elif not numeric:
        axes.set_xticks(list(places.values()), list(map(str, places)))
    if rest:
        axes.legend(fontsize=7)
