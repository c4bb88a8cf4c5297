"""Run a chapter over a grid of parameters and seeds, resumably, and gather what it measured."""

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import papermill

from effnb.lab.paths import digest, root
from effnb.lab.run import chapter as runner
from effnb.lab.run.fanout import fan_out
from effnb.lab.run.grid import parse_grid, parse_seeds
from effnb.lab.run.stale import chapters, module_hash, notebook_hash, staleness_key
from effnb.lab.run.store import Store
from effnb.lab.run.sweep_table import SweepTable, tabulate

__all__ = ["Cell", "SweepTable", "parse_grid", "parse_seeds", "run_cell", "sweep"]


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
    def injected(self) -> dict:
        """Everything that papermill injects."""
        fixed = runner.parameters_of(self.system, self.profile)
        return fixed | {"profile": self.profile} | dict(self.parameters) | {"seeds": [self.seed]}

    @property
    def key(self) -> str:
        """Names the cell's files: equal for equal notebook source, profile and parameters."""
        return digest({"system": self.system, "notebook": self.notebook, "parameters": self.injected})[:16]


def run_cell(cell: Cell) -> dict:
    """Execute one cell in a folder of its own; return its result, its notebook and how it ended.

    Returns:
        ``status`` (``ok``, ``failed`` or ``timeout``), ``seconds``, ``error``, ``result`` (the chapter's result record,
        None if it failed) and ``executed`` (the notebook's text, empty if there is none).

    Raises:
        RuntimeError: if this machine's checkout has another version of the chapter.
    """
    for name, value in cell.environment.items():
        os.environ.setdefault(name, value)
    source = chapters().get(cell.system)
    if source is None or notebook_hash(source) != cell.notebook:
        raise RuntimeError(f"the checkout {root()} has no or another version of the chapter {cell.system}")
    with tempfile.TemporaryDirectory(prefix="effnb-sweep-", ignore_cleanup_errors=True) as folder:
        out, written = Path(folder) / source.name, Path(folder) / cell.profile / f"{cell.system}.json"
        record = runner.execute(cell.system, cell.profile, cell.injected, out, Path(folder), cell.timeout)
        status, error, result = record.status, record.error, None
        if status == "ok" and written.is_file():
            result = json.loads(written.read_text())
        elif status == "ok":
            status, error = "failed", "the notebook ran, but wrote no result"
        executed = out.read_text() if out.is_file() else ""
    return {"status": status, "seconds": record.seconds, "error": error, "result": result, "executed": executed}


def cells_of(system: str, grid: Mapping[str, list], seeds: Sequence[int], profile: str, timeout: float | None) -> list:
    """Return the cells of a sweep, seeds fastest.

    Raises:
        ValueError: for an unknown system, profile or parameter, an empty or repeated list of values.
    """
    source = chapters().get(system)
    if source is None:
        raise ValueError(f"system must be one of {list(chapters())}, got {system!r}")
    known = sorted(set(papermill.inspect_notebook(str(source))) - {"seeds", "profile"})
    for name in grid:
        # Papermill only warns of an unknown name: the sweep would run, and every cell would be the same.
        if name not in known:
            raise ValueError(f"grid must name parameters of {system}, which are {known}; got {name!r}")
    for name, values in [*grid.items(), ("seeds", seeds)]:
        if not values or len({repr(v) for v in values}) != len(values):
            raise ValueError(f"{name} must have values that differ, at least one; got {list(values)}")
    environment = {name: value for name, value in os.environ.items() if name in ("EFFNB_DATA", "EFFNB_ROOT")}
    version = notebook_hash(source)
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [Cell(system, profile, c, int(s), version, timeout, environment) for c in combinations for s in seeds]


def finished(stored: bytes | None, system: str) -> dict | None:
    """Return a stored cell if it ended well and nothing that it depends on has changed since, else None.

    Args:
        stored: content of the cell's file, None if there is none.
        system: the chapter.
    """
    try:
        record = json.loads(stored or "{}")
    except json.JSONDecodeError:
        return None
    if record.get("status") != "ok":
        return None
    old = record["result"].get("key") or {}
    now = staleness_key(system, ()) | {"modules": {name: _module_hash(name) for name in old.get("modules", {})}}
    return record if all(old[part] == now[part] for part in ("modules", "lock", "python") if part in old) else None


_module_hash = cache(module_hash)


def sweep(
    system: str,
    grid: Mapping[str, list],
    seeds: Sequence[int],
    jobs: int = 1,
    ray_address: str | None = None,
    profile: str = "book",
    out: str | Path | None = None,
    timeout: float | None = None,
    on_cell: Callable[[int, int, dict], None] | None = None,
) -> SweepTable:
    """Run a chapter once for each grid cell and seed, and gather the figures with intervals.

    ``out`` receives ``cells/<key>.json`` as each cell ends, its executed notebook under ``notebooks/``, and at the end
    ``sweep.csv``, ``sweep.parquet``, ``intervals.csv``, ``sweep.svg`` and ``sweep.png``. A cell that ended well is not
    run again unless the notebook, its parameters, the loaded ``effnb`` modules, the lock or Python have changed; a cell
    that fails does not lose the others. On a Ray cluster every node needs the same checkout and packages; files are
    written by this process alone.

    Args:
        system: the chapter.
        grid: parameter name to values; every combination is one grid cell.
        seeds: each is a run of its own.
        jobs: processes at a time on this machine.
        ray_address: address of a running Ray cluster, or ``"auto"``.
        profile: parameter set that the grid varies.
        out: folder or any address that fsspec knows; default ``_build/sweeps/<system>``.
        timeout: seconds after which a cell is stopped.
        on_cell: called with (cells ended, cells in all, the record) as each ends.

    Returns:
        The table; ``failures`` lists the cells that did not end well.

    Raises:
        ValueError: for an unknown system, profile or parameter, empty or repeated values, ``jobs < 1``, no cluster.
        ImportError: if ray or the protocol of ``out`` is not installed.
    """
    cells = cells_of(system, grid, seeds, profile, timeout)
    store = Store(out or root() / "_build" / "sweeps" / system)
    _module_hash.cache_clear()
    records = [finished(store.read(f"cells/{cell.key}.json"), system) for cell in cells]
    missing = [k for k, record in enumerate(records) if record is None]

    def done(k: int, outcome: dict | Exception) -> None:
        cell = cells[missing[k]]
        if isinstance(outcome, Exception):
            notes = "\n".join([repr(outcome), *getattr(outcome, "__notes__", [])])
            outcome = {"status": "failed", "seconds": 0.0, "error": notes, "result": None, "executed": ""}
        if executed := outcome.pop("executed"):
            store.write(f"notebooks/{cell.key}.ipynb", executed.encode())
        kept = {k: v for k, v in asdict(cell).items() if k not in ("environment", "timeout")}
        record = {"schema": "effnb-sweep-cell/1", "key": cell.key} | kept | outcome
        store.write(f"cells/{cell.key}.json", json.dumps(record, indent=1).encode())
        records[missing[k]] = record
        if on_cell:
            on_cell(sum(r is not None for r in records), len(cells), record)

    fan_out(run_cell, [cells[k] for k in missing], jobs, ray_address, done)
    return tabulate(system, records, store)
