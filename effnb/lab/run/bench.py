"""The side-by-side benchmarks: each in a fresh process on one thread, judged against the target set beforehand.

A file ``benchmarks/bench_<system>.py`` holds ``run(quick=False)``, which returns rows: ``name``, ``ours``, ``peer``,
``ratio`` (a :class:`~effnb.lab.measure.timing.Ratio`, a number, or ``None`` where an optional peer is missing),
``target`` (a number or ``None``), ``better`` (``"higher"`` or ``"lower"``), ``unit`` and ``detail``. Further arguments
of ``run`` can be given on the command line.
"""

import dataclasses
import json
import math
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from effnb.common import write_atomically
from effnb.lab.measure.timing import Ratio, machine_info, roofline_probe
from effnb.lab.paths import committed_results, digest, root
from effnb.lab.run import process

SCHEMA = "effnb-bench/1"
FIELDS = ("name", "ours", "peer", "ratio", "target", "better", "unit", "detail")
_COLOURS = {"met": "green", "median only": "yellow", "not met": "red"}


def run_all(
    systems: Sequence[str] = (),
    quick: bool = False,
    out: str | Path | None = None,
    folder: str | Path | None = None,
    timeout: float = 3600.0,
    further: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run the benchmarks one after another, write ``<out>/<system>.json`` for each and print its table.

    A benchmark that fails leaves its earlier file as it was and does not stop the others. Returns one record a system:
    ``schema``, ``system``, ``quick``, ``rows`` (each with its ``verdict``), ``machine``, ``roofline``, ``seconds``,
    ``digest``; or ``system``, ``seconds`` and ``error``.

    Args:
        systems: names; none means all.
        quick: smoke scale; the figures then go to ``_build/bench``, never among the published ones.
        out: folder to write to; default ``book/results/bench``, or ``_build/bench`` with ``quick`` or ``further``.
        folder: where the ``bench_*.py`` are; default ``benchmarks`` of the checkout.
        timeout: seconds for each benchmark.
        further: arguments of every benchmark's ``run``, over its own defaults.

    Raises:
        ValueError: a system without a benchmark, an argument that one has not or of another type, or ``timeout`` not
            positive; nothing has run then.

    >>> run_all(folder="no/such/folder")
    []
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be positive, got {timeout}")
    found = benchmarks(folder)
    if missing := sorted(set(systems) - set(found)):
        raise ValueError(f"systems must be among {', '.join(found) or 'none'}, got {', '.join(missing)}")
    chosen = list(dict.fromkeys(systems or found))
    options = {system: {"quick": quick} for system in chosen}
    if further:
        from effnb.lab.run import parameters  # here: a benchmark's own process needs none of it

        for system in chosen:
            declared = parameters.arguments(found[system])
            declared.pop("quick", None)  # which has an option of its own
            options[system] |= parameters.checked(further, declared, system)
    out = Path(out or (root() / "_build" if quick or further else committed_results()) / "bench")
    console, records = Console(), []
    for system in chosen:
        console.print(f"bench {system} ...", style="dim")
        record = _run_apart(system, found[system], options[system], timeout)
        if "error" not in record:
            write_atomically(out / f"{system}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
        console.print(table(record))
        records.append(record)
    return records


def benchmarks(folder: str | Path | None = None) -> dict[str, Path]:
    """Return system to its file ``bench_<system>.py`` in ``folder`` (default: ``benchmarks``), sorted by name."""
    paths = sorted(Path(folder or root() / "benchmarks").glob("bench_*.py"))
    return {path.stem.removeprefix("bench_"): path.resolve() for path in paths}


def checked_rows(rows: Any) -> list[dict[str, Any]]:
    """Return the rows that a benchmark's ``run`` gave as plain JSON values, each with its ``verdict``.

    Raises:
        ValueError: no rows, a field missing, unknown or of a wrong kind, two rows of one name, a ratio that is not
            finite and positive, no ``detail`` where nothing was measured.

    >>> row = {"name": "step", "ours": "a", "peer": "b", "ratio": 3.0, "target": 2.0, "unit": "x", "detail": ""}
    >>> checked_rows([row | {"better": "higher"}])[0]["verdict"]
    'met'
    """
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"rows must be a list with at least one row, got {rows!r}")
    found = []
    for row in rows:
        if not isinstance(row, Mapping) or set(row) != set(FIELDS):
            fields = sorted(row) if isinstance(row, Mapping) else row
            raise ValueError(f"a row must have exactly the fields {', '.join(FIELDS)}, got {fields}")
        for field in ("name", "ours", "peer", "unit", "detail"):
            if not isinstance(row[field], str) or not (row[field] or field in ("unit", "detail")):
                raise ValueError(f"{field} must be a text, got {row[field]!r}")
        if row["better"] not in ("higher", "lower"):
            raise ValueError(f"better must be 'higher' or 'lower', got {row['better']!r}")
        ratio = row["ratio"]
        if ratio is None and not row["detail"]:
            raise ValueError(f"detail must say why {row['name']!r} has no ratio, got ''")
        if isinstance(ratio, Ratio):
            low, middle, high = (_positive(f"ratio.{field}", getattr(ratio, field)) for field in ("lo", "median", "hi"))
            if not low <= middle <= high:
                raise ValueError(f"ratio must have lo <= median <= hi, got {ratio}")
            ratio = dataclasses.asdict(ratio)
        elif ratio is not None:
            ratio = _positive("ratio", ratio)
        target = None if row["target"] is None else _positive("target", row["target"])
        plain = {field: row[field] for field in FIELDS} | {"ratio": ratio, "target": target}
        found.append(plain | {"verdict": judge(plain)})
    names = [row["name"] for row in found]
    if len(set(names)) < len(names):
        raise ValueError(f"name must differ from row to row, got {names}")
    return found


def _positive(field: str, value: Any) -> float:
    number = float(value) if hasattr(value, "__float__") and not isinstance(value, bool) else math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{field} must be a positive and finite number, got {value!r}")
    return number


def table(record: Mapping[str, Any]) -> Table:
    """Return a table for the terminal of one system's record, or of what went wrong."""
    title = f"{record['system']} ({record['seconds']:.0f} s{', quick' if record.get('quick') else ''})"
    shown = Table(title=title, title_justify="left")
    if "error" in record:
        shown.add_column("failed", style="red")
        shown.add_row(escape(record["error"]))
        return shown
    for column in ("what", "ours", "against", "ratio", "target", "verdict"):
        shown.add_column(column)
    for row in record["rows"]:
        colour, side = _COLOURS.get(row["verdict"], "dim"), "≤" if row["better"] == "lower" else "≥"
        target = "" if row["target"] is None else f"{side} {row['target']:g}"
        cells = [escape(text) for text in (row["name"], row["ours"], row["peer"], ratio_text(row))]
        shown.add_row(*cells, target, f"[{colour}]{row['verdict']}[/]")
    return shown


def bounds(row: Mapping) -> tuple[float, float, float] | None:
    """Return median, low and high end of a row's ratio; ``None`` where nothing was measured.

    >>> bounds({"ratio": {"median": 2.0, "lo": 1.5, "hi": 2.5}})
    (2.0, 1.5, 2.5)
    """
    ratio = row.get("ratio")
    if isinstance(ratio, Mapping):
        return (ratio["median"], ratio["lo"], ratio["hi"]) if ratio.get("median") is not None else None
    return None if ratio is None else (float(ratio),) * 3


def judge(row: Mapping) -> str:
    """Return ``met`` if the whole interval is on the right side of the target, ``median only`` if just the median is.

    >>> judge({"ratio": 3.0, "target": 2.0, "better": "higher"})
    'met'
    """
    found, target = bounds(row), row.get("target")
    if found is None:
        return "not measured"
    if target is None:
        return "no target"
    sign = -1 if row.get("better") == "lower" else 1
    middle, *ends = (sign * value for value in found)
    if min(ends) >= sign * target:
        return "met"
    return "median only" if middle >= sign * target else "not met"


def ratio_text(row: Mapping) -> str:
    """Return the ratio with its interval and unit.

    >>> ratio_text({"ratio": {"median": 2.04, "lo": 1.96, "hi": 2.1}, "unit": "x"})
    '2.0× [2.0, 2.1]'
    """
    if (found := bounds(row)) is None:
        return "not measured"
    places = 0 if abs(found[0]) >= 100 else 1 if abs(found[0]) >= 2 else 2
    median, low, high = (f"{v:.{places}f}" for v in found)
    unit = {"x": "×", None: "", "": ""}.get(row.get("unit"), f" {row.get('unit')}")
    noisy = isinstance(row.get("ratio"), Mapping) and row["ratio"].get("noisy")
    return f"{median}{unit}" + (f" [{low}, {high}]" if found[1] != found[2] else "") + " (noisy)" * bool(noisy)


def problems(folder: Path | None = None) -> list[str]:
    """Return what is wrong with stored benchmarks, a line each: edited by hand, a verdict its ratio does not give."""
    lines = []
    for path in sorted((folder or committed_results() / "bench").glob("*.json")):
        try:
            record = json.loads(path.read_text())
            if record["digest"] != digest({k: v for k, v in record.items() if k != "digest"}):
                lines.append(f"bench/{path.name}: the file was edited after it was written")
            lines += [
                f"bench/{path.name}, {row['name']}: stored {row['verdict']!r}, but its ratio gives {judge(row)!r}"
                for row in record["rows"]
                if row["verdict"] != judge(row)
            ]
        except (ValueError, KeyError, TypeError) as error:
            lines.append(f"bench/{path.name}: not a benchmark's record ({type(error).__name__}: {error})")
    return lines


def _run_apart(system: str, path: Path, options: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Return the record of one benchmark, run by a fresh interpreter; what goes wrong there becomes ``error``."""
    start = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        command = [sys.executable, "-m", "effnb.lab.run.bench", path, out, json.dumps(dict(options))]
        try:
            code, log = process.call(command, timeout=timeout)
            last = (log.strip().splitlines() or ["no output"])[-1]
            error = f"exit code {code}: {last}" if code or not out.exists() else ""
        except TimeoutError:
            error = f"took more than {timeout:g} s"
        seconds = round(perf_counter() - start, 1)
        content = {"error": error} if error else json.loads(out.read_text())
    record = {"schema": SCHEMA, "system": system, "quick": options["quick"], "seconds": seconds} | content
    return record if error else record | {"digest": digest(record)}


def _main() -> None:
    """Inside the fresh interpreter: run one file and leave its record."""
    path, out, options = sys.argv[1:]
    process.one_thread()
    rows = checked_rows(runpy.run_path(path)["run"](**json.loads(options)))
    record = {"rows": rows, "machine": machine_info(), "roofline": roofline_probe()}
    write_atomically(out, json.dumps(record, allow_nan=False))


if __name__ == "__main__":
    _main()
