"""Claims and verdicts as tables for people: notebook cells, scoreboard, README."""

import html
import math
from collections.abc import Mapping

from effnb.lab.claims.registry import Claim, ClaimSet, load
from effnb.lab.claims.results import load_result
from effnb.lab.claims.verdict import UNIT_NAMES

#: Words and a sign for each verdict; the sign keeps the meaning where colour is lost.
WORDS = {
    "checked-analytically": "✓ checked analytically",
    "reproduced": "✓ reproduced",
    "partially": "◐ partially",
    "not-reproduced-at-this-scale": "✗ not reproduced at this scale",
    "not-tested": "– not tested",
    "smoke": "smoke run, no verdict",
}
COLOURS = {
    "checked-analytically": "#0b6e4f",
    "reproduced": "#0b6e4f",
    "partially": "#8a5a00",
    "not-reproduced-at-this-scale": "#a4262c",
    "not-tested": "#5a6470",
    "smoke": "#5a6470",
}


class Table:
    """HTML for notebooks and the site, with a plain-text form for terminals."""

    def __init__(self, markup: str) -> None:
        self.markup = markup

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return "<verdict table>"


def _digits(half_width: float, value: float) -> int:
    reference = half_width if half_width > 0 else abs(value) / 10
    return 2 if reference <= 0 else max(0, min(6, 1 - math.floor(math.log10(reference))))


def format_measured(measured: Mapping | None) -> str:
    """``estimate [lo, hi] unit (n)``, rounded to two significant digits of the interval's half-width.

    Args:
        measured: the ``measured`` block of a result entry, or ``None``.

    Returns:
        Text; ``"-"`` where nothing was measured.

    >>> format_measured({"estimate": 1.2345, "ci": [1.1, 1.4], "per_seed": [1, 1], "unit": "pt"})
    '1.23 [1.10, 1.40] pt (n = 2)'
    """
    if not measured or measured["estimate"] is None:
        return "-"
    value, ci = measured["estimate"], measured["ci"]
    digits = _digits((ci[1] - ci[0]) / 2 if ci else 0.0, value)

    def show(x: float) -> str:
        text = f"{x:.{digits}f}" if abs(x) < 1e6 and (x == 0 or abs(x) >= 1e-5) else f"{x:.2e}"
        return text[1:] if text.lstrip("-0.") == "" and text.startswith("-") else text

    interval = f" [{show(ci[0])}, {show(ci[1])}]" if ci else ""
    unit = UNIT_NAMES.get(measured.get("unit"), measured.get("unit"))
    return f"{show(value)}{interval}{f' {unit}' if unit else ''} (n = {len(measured['per_seed'])})"


def badge(verdict: str | None) -> str:
    """The verdict as word, sign and colour.

    >>> "reproduced" in badge("reproduced")
    True
    """
    if verdict is None:
        return '<span class="verdict verdict-none">not yet measured</span>'
    style = f"color:{COLOURS[verdict]};font-weight:600"
    return f'<span class="verdict verdict-{verdict}" style="{style}">{WORDS[verdict]}</span>'


def _rows(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f'<th scope="col" style="text-align:left">{h}</th>' for h in head)
    cell = '<td style="text-align:left;vertical-align:top">'
    body = "".join("<tr>" + "".join(f"{cell}{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="claims-table"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def glance_html(claims: ClaimSet, entries: Mapping[str, dict] | None) -> str:
    """The opening table: claim, what the paper says, what is checked here, ours, verdict."""
    rows = []
    for claim in claims.claims:
        entry = (entries or {}).get(claim.id)
        star = " ★" if claim.primary else ""
        rows.append(
            [
                f"{claim.short}{star}",
                html.escape(claim.statement),
                html.escape(claim.paper),
                html.escape(claim.criterion.text()),
                html.escape(format_measured(entry and entry["measured"])),
                badge(entry and entry["verdict"]),
            ]
        )
    return _rows(["id", "claim", "paper", "we check", "ours", "verdict"], rows)


def at_a_glance(system: str, profile: str = "book") -> Table:
    """The opening table of a chapter, from the committed result (the runner refreshes it after a run).

    Args:
        system: the chapter's system.
        profile: which result to show.

    Raises:
        ValueError: unknown system, or a result that breaks a rule.
    """
    result = load_result(system, profile)
    return Table(glance_html(load(system), result["claims"] if result else None))


def report(claims: ClaimSet, entries: Mapping[str, dict]) -> Table:
    """The closing table: per claim the criterion, estimate with interval, conditions, verdict and note."""
    rows = []
    for claim in claims.claims:
        entry = entries.get(claim.id)
        if entry is None:
            continue
        by_name = {c.name: c for c in claim.conditions}
        lines = [html.escape(f"{claim.criterion.text()}: {format_measured(entry['measured'])}")]
        lines += [
            html.escape(f"{c['name']}: {by_name[c['name']].text()}: {format_measured(c['measured'])}")
            for c in entry["conditions"]
        ]
        rows.append([claim.short, "<br>".join(lines), badge(entry["verdict"]), html.escape(entry["note"])])
    return Table(_rows(["id", "criterion: measured", "verdict", "note"], rows))


def shortfalls(claims: ClaimSet, entries: Mapping[str, dict]) -> Table:
    """Every claim short of ``reproduced`` with its reason, as a list; one sentence if there is none."""
    passed = ("reproduced", "checked-analytically")
    missed = [(c, entries[c.id]) for c in claims.claims if c.id in entries and entries[c.id]["verdict"] not in passed]
    if not missed:
        return Table("<p>Every claim of this chapter was reproduced at this scale.</p>")
    return Table(f"<ul>{''.join(_shortfall(c, e) for c, e in missed)}</ul>")


def _shortfall(claim: Claim, entry: Mapping) -> str:
    measured = (
        f"Measured {format_measured(entry['measured'])}, asked {claim.criterion.bound()}." if entry["measured"] else ""
    )
    note = f"{entry['note'].rstrip('.')}." if entry["note"] else ""
    told = " ".join(filter(None, [f"Claimed: {claim.statement}", measured, note]))
    return f"<li><b>{claim.short}</b> {badge(entry['verdict'])}. {html.escape(told)}</li>"
