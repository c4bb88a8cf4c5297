"""How a verdict looks everywhere: one table of words, signs and colours, the interval's picture, and HTML templates."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from effnb.lab.judge.claims import PASSED, VERDICTS, Claim, ClaimSet, Criterion
from effnb.lab.judge.results import format_measured, load_result, stated_verdict


class Look(NamedTuple):
    """Sign and words of a verdict, the site's colour variable, ink and ground for files that carry their own."""

    sign: str
    words: str
    colour: str
    ink: str
    ground: str


#: A claim without a result; it can only stand in a draft, a strict build refuses it.
UNMEASURED = "not-run"
#: The one table. Colour is never the only sign.
LOOKS = {
    "reproduced": Look("✓", "reproduced", "good", "#07543e", "#d3efe4"),
    "checked-analytically": Look("✓", "checked analytically", "exact", "#0a4a78", "#d6e8f6"),
    "partially": Look("◐", "partially", "part", "#664300", "#fbe6b4"),
    "not-reproduced-at-this-scale": Look("✗", "not reproduced at this scale", "bad", "#8a2412", "#f9d3ca"),
    "not-tested": Look("–", "not tested", "none", "#46515c", "#e6eaee"),
    "smoke": Look("~", "smoke run, no verdict", "none", "#46515c", "#e6eaee"),
    UNMEASURED: Look("…", "not yet measured", "none", "#6b7682", "#ffffff"),
}
ORDER = (*VERDICTS, UNMEASURED)


def text(value: object) -> Markup:
    """Return plain text as HTML: `` `code` `` becomes a code element, ``>=`` a sign, and ``n = 5`` stays on one line.

    >>> print(text("a >= `b`"))
    a ≥ <code>b</code>
    """
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(str(value))))
    marked = marked.replace("&gt;=", "≥").replace("&lt;=", "≤")
    return Markup(re.sub(r"\(n = (\d+)\)", "(n\u00a0=\u00a0\\1)", marked))


def sentence(value: str | None) -> Markup:
    """Return a note as a sentence of its own: capital letter, full stop.

    >>> print(sentence("the estimate is low"))
    The estimate is low.
    """
    value = (value or "").strip()
    return text(value[:1].upper() + value[1:] + ("" if value.endswith((".", "!", "?")) else ".")) if value else Markup()


def badge(verdict: str | None, contradicted: bool = False, label: str = "") -> Markup:
    """Return a verdict (None for a claim without a result) as sign, word and colour, after ``label``, the profile.

    >>> "reproduced" in badge("reproduced")
    True
    """
    return render("verdict.html", verdict=verdict or UNMEASURED, contradicted=contradicted, label=label)


def strip(measured: Mapping | None, criterion: Criterion, width: float = 190.0, height: float = 26.0) -> Markup:
    """Return the estimate and its interval on a line, the region that the criterion allows shaded; empty if unmeasured.

    The axis is logarithmic where all values are positive and span more than a factor of 20. Sizes are in pixels.
    """
    if (measured or {}).get("estimate") is None:
        return Markup()
    margin, threshold = criterion.margin or 0, criterion.threshold
    values = [measured["estimate"], *(measured["ci"] or []), threshold - margin, threshold + margin]
    log = min(values) > 0 and max(values) > 20 * min(values)
    warp = math.log10 if log else float
    low, high = min(map(warp, values)), max(map(warp, values))
    room = (high - low) or max(abs(high), 1.0)

    def place(value: float) -> float:
        return 6 + (width - 12) * (warp(value) - low + 0.12 * room) / ((high - low) + 0.24 * room)

    if criterion.op == "within":
        left, right = place(threshold - margin), place(threshold + margin)
    else:
        left, right = (place(threshold), width) if criterion.op in (">", ">=") else (0.0, place(threshold))
    ci = [place(v) for v in measured["ci"] or [measured["estimate"]] * 2]
    what = f"estimate {measured['estimate']:.3g}"
    what += f", interval {measured['ci'][0]:.3g} to {measured['ci'][1]:.3g}" if measured["ci"] else ""
    return render(
        "strip.html", width=width, height=height, left=left, right=right, ci=ci, middle=place(measured["estimate"]),
        edges=[edge for edge in (left, right) if 0 < edge < width], what=what,
    )  # fmt: skip


def verdict_pairs(claim: Claim, entries: Mapping[str, Mapping | None]) -> list[dict]:
    """Return a claim's verdicts, as stated and against the strongest rival, at every profile that was run."""
    return [
        {"profile": profile, "stated": stated_verdict(claim, entry), "rival": entry["verdict"],
         "contradicted": entry["contradicted"], "measured": entry["measured"]}
        for profile, entry in entries.items() if entry is not None
    ]  # fmt: skip


def headline(claim: Claim, entries: Mapping[str, Mapping | None]) -> tuple[str | None, Mapping | None]:
    """Return the profile and entry that speak for a claim: the study's where it was tested, else the book's."""
    for profile in ("study", "book"):
        entry = entries.get(profile)
        if entry and entry["verdict"] != "not-tested":
            return profile, entry
    return next(((p, e) for p, e in entries.items() if e), (None, None))


def entries_of(claims: ClaimSet, results: Path | None = None) -> dict[str, dict[str, Mapping | None]]:
    """Return, for every claim of a chapter, profile (``study`` first) to its stored entry or None."""
    found = {profile: load_result(claims.system, profile, results) for profile in ("study", "book")}
    return {
        claim.id: {profile: (result or {"claims": {}})["claims"].get(claim.id) for profile, result in found.items()}
        for claim in claims.claims
    }


def glance(claims: ClaimSet, entries: Mapping[str, Mapping[str, Mapping | None]]) -> Markup:
    """Return *At a glance*: the primary claim with its interval and four small verdicts, the others one line each."""
    ordered = sorted(claims.claims, key=lambda claim: not claim.primary)
    return render("glance.html", claims=ordered, entries=entries, headline=headline, verdict_pairs=verdict_pairs)


def report(claims: ClaimSet, entries: Mapping[str, Mapping]) -> Markup:
    """Return the closing table: per claim the criterion, what was measured, conditions, both verdicts and the note."""
    return render("report.html", rows=[(c, entries[c.id]) for c in claims.claims if c.id in entries])


def shortfalls(claims: ClaimSet, entries: Mapping[str, Mapping]) -> Markup:
    """Return every claim short of ``reproduced`` with its reason, as a list; one sentence if there is none."""
    missed = [(c, entries[c.id]) for c in claims.claims if c.id in entries and entries[c.id]["verdict"] not in PASSED]
    return render("shortfalls.html", rows=missed)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "", best: Any = ()) -> Markup:
    """Return a plain table; ``best`` holds the ``(row, column)`` of cells to mark."""
    return render("table.html", columns=columns, rows=rows, caption=caption, best=set(best))


def render(template: str, **values: Any) -> Markup:
    """Return a template of this room, filled in; what is not markup is escaped."""
    return Markup(_TEMPLATES.get_template(template).render(**values).strip())


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals.update(
    badge=badge, strip=strip, format_measured=format_measured, stated_verdict=stated_verdict, LOOKS=LOOKS, ORDER=ORDER
)
_TEMPLATES.filters.update(text=text, sentence=sentence)
