"""The side-by-side benchmarks: each in a fresh process on one thread, judged against the target set beforehand.

A file ``benchmarks/bench_<system>.py`` holds ``run(quick=False)``, which returns rows: ``name``, ``ours``, ``peer``,
``ratio`` (a :class:`~effnb.lab.measure.timing.Ratio`, a number, or ``None`` where an optional peer is missing), ``target``
(a number or ``None``), ``better`` (``"higher"`` or ``"lower"``), ``unit`` and ``detail``.
"""

import argparse
import dataclasses
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from effnb.common import write_atomically
from effnb.lab.measure.timing import Ratio, machine_info, roofline_probe
from effnb.lab.paths import committed_results, root
from effnb.lab.publish.performance import judge, ratio_text

SCHEMA = "effnb-bench/1"
FIELDS = ("name", "ours", "peer", "ratio", "target", "better", "unit", "detail")
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_COLOURS = {"met": "green", "median only": "yellow", "not met": "red"}


def run_all(
    systems: Sequence[str] = (),
    quick: bool = False,
    out: str | Path | None = None,
    folder: str | Path | None = None,
    timeout: float = 3600.0,
) -> list[dict[str, Any]]:
    """Run the benchmarks one after another, write ``<out>/<system>.json`` for each and print its table.

    A benchmark that fails leaves its earlier file as it was and does not stop the others.

    Args:
        systems: names; none means all.
        quick: smoke scale; the figures then go to ``_build/bench``, never among the published ones.
        out: folder to write to; default ``book/results/bench``, or ``_build/bench`` with ``quick``.
        folder: where the ``bench_*.py`` are; default ``benchmarks`` of the checkout.
        timeout: seconds for each benchmark.

    Returns:
        One record a system: ``schema``, ``system``, ``quick``, ``rows`` (each with its ``verdict``), ``machine``,
        ``roofline``, ``seconds``; or ``system``, ``seconds`` and ``error``.

    Raises:
        ValueError: a system without a benchmark, or ``timeout`` not positive.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> run_all(folder=folder, out=folder)
    []
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be positive, got {timeout}")
    found = benchmarks(folder)
    if missing := sorted(set(systems) - set(found)):
        raise ValueError(f"systems must be among {', '.join(found) or 'none'}, got {', '.join(missing)}")
    out = Path(out) if out else root() / "_build" / "bench" if quick else committed_results() / "bench"
    console, records = Console(), []
    for system in dict.fromkeys(systems or found):
        console.print(f"bench {system} ...", style="dim")
        record = _run_apart(system, found[system], quick, timeout)
        if "error" not in record:
            write_atomically(out / f"{system}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
        console.print(table(record))
        records.append(record)
    return records


def benchmarks(folder: str | Path | None = None) -> dict[str, Path]:
    """System to its benchmark file, sorted by name.

    Args:
        folder: where the ``bench_*.py`` are; default ``benchmarks`` of the checkout.

    >>> benchmarks("no/such/folder")
    {}
    """
    paths = sorted(Path(folder or root() / "benchmarks").glob("bench_*.py"))
    return {path.stem.removeprefix("bench_"): path.resolve() for path in paths}


def checked_rows(rows: Any) -> list[dict[str, Any]]:
    """Rows as plain JSON values, each with its ``verdict``.

    A target is met only if the whole interval is on its good side.

    Args:
        rows: what a benchmark's ``run`` returned.

    Raises:
        ValueError: no rows, a field missing, unknown or of a wrong kind, two rows of one name, a ratio that is not
            finite and positive, no ``detail`` where nothing was measured.

    >>> row = {"name": "step", "ours": "a", "peer": "b", "ratio": 3.0, "target": 2.0, "unit": "x", "detail": ""}
    >>> checked_rows([row | {"better": "higher"}])[0]["verdict"]
    'met'
    """
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"rows must be a list with at least one row, got {rows!r}")
    plain = [_checked_row(row) for row in rows]
    names = [row["name"] for row in plain]
    if len(set(names)) < len(names):
        raise ValueError(f"name must differ from row to row, got {names}")
    return [row | {"verdict": judge(row)} for row in plain]


def table(record: Mapping[str, Any]) -> Table:
    """A table for the terminal of one system's record, or of what went wrong.

    >>> table({"system": "a", "seconds": 1.0, "error": "broken"}).row_count
    1
    """
    title = f"{record['system']} ({record['seconds']:.0f} s{', quick' if record.get('quick') else ''})"
    shown = Table(title=title, title_justify="left")
    if "error" in record:
        shown.add_column("failed", style="red")
        shown.add_row(escape(record["error"]))
        return shown
    for column in ("what", "ours", "against", "ratio", "target", "verdict"):
        shown.add_column(column)
    for row in record["rows"]:
        colour, noisy = _COLOURS.get(row["verdict"], "dim"), isinstance(row["ratio"], dict) and row["ratio"]["noisy"]
        side = "≤" if row["better"] == "lower" else "≥"
        target = "" if row["target"] is None else f"{side} {row['target']:g}"
        cells = [escape(text) for text in (row["name"], row["ours"], row["peer"], ratio_text(row) + " noisy" * noisy)]
        shown.add_row(*cells, target, f"[{colour}]{row['verdict']}[/]")
    return shown


def _checked_row(row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping) or set(row) != set(FIELDS):
        fields = sorted(row) if isinstance(row, Mapping) else row
        raise ValueError(f"a row must have exactly the fields {', '.join(FIELDS)}, got {fields}")
    for field in ("name", "ours", "peer", "unit", "detail"):
        if not isinstance(row[field], str) or not (row[field] or field in ("unit", "detail")):
            raise ValueError(f"{field} must be a text, got {row[field]!r}")
    if row["better"] not in ("higher", "lower"):
        raise ValueError(f"better must be 'higher' or 'lower', got {row['better']!r}")
    if row["ratio"] is None and not row["detail"]:
        raise ValueError(f"detail must say why {row['name']!r} has no ratio, got ''")
    target = None if row["target"] is None else _positive("target", row["target"])
    return {field: row[field] for field in FIELDS} | {"ratio": _plain_ratio(row["ratio"]), "target": target}


def _plain_ratio(ratio: Any) -> dict[str, Any] | float | None:
    if not isinstance(ratio, Ratio):
        return None if ratio is None else _positive("ratio", ratio)
    for field in ("lo", "median", "hi"):
        _positive(f"ratio.{field}", getattr(ratio, field))
    if not ratio.lo <= ratio.median <= ratio.hi:
        raise ValueError(f"ratio must have lo <= median <= hi, got {ratio}")
    return dataclasses.asdict(ratio)


def _positive(field: str, value: Any) -> float:
    number = float(value) if hasattr(value, "__float__") and not isinstance(value, bool) else math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{field} must be a positive and finite number, got {value!r}")
    return number


def _run_apart(system: str, path: Path, quick: bool, timeout: float) -> dict[str, Any]:
    """The record of one benchmark, run by a fresh interpreter; what goes wrong there becomes ``error``."""
    package = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = os.environ | dict.fromkeys(_ONE_THREAD, "1") | {"PYTHONPATH": paths}
    start = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        record, log = Path(folder) / "record.json", Path(folder) / "log.txt"
        command = [sys.executable, "-m", "effnb.lab.run.bench", str(path), str(record), *["--quick"] * quick]
        try:
            with log.open("w") as stream:
                code = subprocess.run(
                    command, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=timeout, check=False
                ).returncode
            error = f"exit code {code}: {_last_line(log)}" if code or not record.exists() else ""
        except subprocess.TimeoutExpired:
            error = f"took more than {timeout:g} s"
        seconds = round(perf_counter() - start, 1)
        content = {"error": error} if error else json.loads(record.read_text())
    return {"schema": SCHEMA, "system": system, "quick": quick, "seconds": seconds} | content


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def _main() -> None:
    """Inside the fresh interpreter: run one file and leave its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("out")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = checked_rows(runpy.run_path(options.path)["run"](quick=options.quick))
    record = {"rows": rows, "machine": machine_info(), "roofline": roofline_probe()}
    write_atomically(Path(options.out), json.dumps(record, allow_nan=False))


if __name__ == "__main__":
    _main()
