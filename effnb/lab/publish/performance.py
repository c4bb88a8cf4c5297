"""The performance page: side-by-side benchmark figures, each judged against the target set beforehand."""

from collections.abc import Mapping, Sequence

from effnb.lab.judge.claims import Criterion
from effnb.lab.publish.verdicts import render

#: What a benchmark row's judgement looks like, as the verdict of the same weight.
MET = {"met": "reproduced", "median only": "partially", "not met": "not-reproduced-at-this-scale"}


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
    worst, middle = min(sign * found[1], sign * found[2]), sign * found[0]
    return "met" if worst >= sign * target else "median only" if middle >= sign * target else "not met"


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


def criterion_of(row: Mapping) -> Criterion | None:
    """Return a row's target as a criterion, so that its picture is drawn as a claim's is; None without one."""
    if row.get("target") is None:
        return None
    op = "<=" if row.get("better") == "lower" else ">="
    return Criterion(row["name"], op, float(row["target"]), {"x": "×"}.get(row.get("unit"), row.get("unit") or ""))


def rows_of(record: Mapping | Sequence) -> list[Mapping]:
    """Return the rows of one benchmark file, which is a list or holds one under ``rows``."""
    return list(record["rows"] if isinstance(record, Mapping) else record)


def summary(bench: Mapping[str, Mapping]) -> str:
    """Return one sentence: how many targets are met."""
    words = [judge(row) for record in bench.values() for row in rows_of(record)]
    targets = [w for w in words if w in MET]
    if not targets:
        return "No benchmark has been run yet: `make bench` fills this page."
    line = f"**{targets.count('met')} of {len(targets)}** targets are met over the whole interval"
    rest = [f"{targets.count(w)} {how}" for w, how in (("median only", "by the median only"), ("not met", "not met"))]
    return line + "; " + ", ".join(rest) + "."


def machine(record: Mapping | Sequence) -> str:
    """Return one line on where a benchmark ran: processor, threads, the machine's measured peaks; empty if unknown.

    >>> machine({"rows": [], "machine": {"cpu": "X", "threads": 1}, "roofline": {"gflops": 50.2, "gb_s": 10.0}})
    'Measured on X, threads 1; measured peaks: 50 GFLOP/s, 10 GB/s.'
    """
    found = record.get("machine") if isinstance(record, Mapping) else None
    if not found:
        return ""
    line = f"Measured on {found.get('cpu', 'an unnamed processor')}, threads {found.get('threads', '?')}"
    peaks = record.get("roofline")
    return line + (f"; measured peaks: {peaks['gflops']:.0f} GFLOP/s, {peaks['gb_s']:.0f} GB/s." if peaks else ".")


def page(bench: Mapping[str, Mapping], titles: Mapping[str, str]) -> str:
    """Return a section a system: its rows as dots with intervals against their targets, and the machine.

    Args:
        bench: system to its record.
        titles: system to the chapter's short name, in the order of the book.
    """
    sections, order = [], list(titles)
    for system, record in sorted(bench.items(), key=lambda item: order.index(item[0]) if item[0] in titles else 99):
        rows = [
            {
                "row": row,
                "ratio": ratio_text(row),
                "bounds": bounds(row),
                "word": judge(row),
                "criterion": criterion_of(row),
            }
            for row in rows_of(record)
        ]
        table = render("performance.html", rows=rows, MET=MET)
        command = f"```bash\neffnb bench {system}\n```"
        sections.append(f"## {titles.get(system, system)}\n\n{table}\n\n{machine(record)}\n\n{command}")
    return "\n\n".join(sections)


def headline(bench: Mapping[str, Mapping]) -> dict[str, str]:
    """Return system to its first measured row with a peer and a target, in words, for the README's table.

    >>> headline({"a": [{"name": "step", "peer": "torch", "ratio": 2.5, "unit": "x", "target": 2.0}]})
    {'a': 'step: 2.5× against torch'}
    """
    found = {}
    for system, record in bench.items():
        measured = [row for row in rows_of(record) if bounds(row)]
        # A row against nobody ("-") says nothing on a front page.
        told = [r for r in measured if r.get("target") is not None and r["peer"].strip("- ")] or measured
        if told:
            found[system] = f"{told[0]['name']}: {ratio_text(told[0])} against {told[0]['peer']}"
    return found
