"""The performance page: side-by-side benchmark figures, each judged against the target set beforehand."""

from collections.abc import Mapping, Sequence

from effnb.lab.judge.claims import Criterion
from effnb.lab.publish.verdicts import render
from effnb.lab.run.bench import bounds, judge, ratio_text

#: What a benchmark row's judgement looks like, as the verdict of the same weight.
MET = {"met": "reproduced", "median only": "partially", "not met": "not-reproduced-at-this-scale"}


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
    helpers = {"MET": MET, "ratio_text": ratio_text, "bounds": bounds, "judge": judge, "criterion_of": criterion_of}
    for system, record in sorted(bench.items(), key=lambda item: order.index(item[0]) if item[0] in titles else 99):
        table = render("performance.html", rows=rows_of(record), **helpers)
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
