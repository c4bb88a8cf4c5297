"""Verdicts, failures and the table of claims as HTML; plain markup, styled by the site and complete without scripts."""

import html
import re
from collections.abc import Mapping, Sequence

from effnb.lab.claims import format_measured
from effnb.lab.publish import pictures
from effnb.lab.publish.scoreboard import ORDER, WORDS, failures, order, scale_text, tally


def text(value: str) -> str:
    """Plain text as HTML: `` `code` `` becomes a code element, ``>=`` a sign, and ``n = 5`` stays on one line.

    >>> text("a >= `b`")
    'a ≥ <code>b</code>'
    """
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(str(value)))
    marked = marked.replace("&gt;=", "≥").replace("&lt;=", "≤")
    return re.sub(r"\(n = (\d+)\)", "(n\u00a0=\u00a0\\1)", marked)


def sentence(value: str | None) -> str:
    """A note as a sentence of its own: capital letter, full stop.

    >>> sentence("the estimate is low")
    'The estimate is low.'
    """
    value = (value or "").strip()
    return text(value[:1].upper() + value[1:] + ("" if value.endswith((".", "!", "?")) else ".")) if value else ""


def badge(row: Mapping, wrap: bool = False) -> str:
    """A verdict as HTML: glyph, word and colour; ``contradicted`` is added in words."""
    glyph, word = WORDS[row["verdict"]]
    word += ", contradicted" if row.get("contradicted") else ""
    classes = f"eff-verdict eff-{row['verdict']}" + " wrap" * wrap + " eff-contradicted" * bool(row.get("contradicted"))
    return f'<span class="{classes}"><span aria-hidden="true">{glyph}</span> {word}</span>'


def slug(row: Mapping) -> str:
    """The HTML id of a claim's row.

    >>> slug({"id": "avagrad/A1"})
    'avagrad-a1'
    """
    return row["id"].replace("/", "-").lower()


def section(row: Mapping, base: str = "../") -> str:
    """Address of the chapter's section that measures a claim."""
    return f"{base}notebooks/{row['chapter']}.html#{row['anchor']}"


def failures_html(rows: Sequence[Mapping]) -> str:
    """The list of every claim that is not confirmed, with its note."""
    kinds = {"not-reproduced-at-this-scale": "bad", "partially": "part"}
    items = []
    for row in failures(rows):
        found = f"Criterion: {text(row['criterion'].text())}."
        if (row["measured"] or {}).get("estimate") is not None:
            found = f"Measured: {text(format_measured(row['measured']))}. {found}"
        items.append(
            f'<li class="{kinds.get(row["verdict"], "none")}"><a href="{section(row)}"><b>{row["id"]}</b></a> '
            f"{badge(row)}<p>{text(row['statement'])}</p>"
            f'<p class="eff-note">{found} {sentence(row["note"])}</p></li>'
        )
    return f'<ul class="eff-failures">{"".join(items)}</ul>' if items else "<p>None.</p>"


def controls_html(rows: Sequence[Mapping], ident: str) -> str:
    """Search box, chapter menu and verdict buttons; hidden until the script that serves them runs."""
    systems = sorted({(row["chapter"], row["system"], row["title"]) for row in rows})
    menu = "".join(f'<option value="{system}">{text(title)}</option>' for _, system, title in systems)
    chips = "".join(
        f'<button type="button" class="eff-{v}" data-verdict="{v}" aria-pressed="true">'
        f"{' '.join(WORDS[v])} ({n})</button>"
        for v, n in tally(rows)["verdicts"].items()
    )
    return (
        f'<form class="eff-controls" id="{ident}-controls" hidden role="search" aria-label="Filter the claims">'
        '<input type="search" name="words" placeholder="Filter by words" aria-label="Filter by words">'
        f'<select name="chapter" aria-label="Chapter"><option value="">All chapters</option>{menu}</select>'
        f'<div class="eff-chips" role="group" aria-label="Verdicts shown">{chips}</div></form>'
        f'<p class="eff-count" id="{ident}-count" aria-live="polite">{len(rows)} claims.</p>'
    )


def _cell(label: str, body: str, sort: object = None, kind: str = "") -> str:
    key = "" if sort is None else f' data-sort="{html.escape(str(sort), quote=True)}"'
    return f'<td data-label="{label}" class="{kind}"{key}><div>{body}</div></td>'


def _row_html(row: Mapping) -> str:
    star = ' <span class="eff-star" title="primary claim of its chapter">★</span>' if row.get("primary") else ""
    link = f'<a class="eff-id" href="{section(row)}">{row["id"]}</a>{star}'
    estimate = (row["measured"] or {}).get("estimate")
    found = text(format_measured(row["measured"])) + pictures.strip(row)
    found += f'<span class="eff-small">criterion: {text(row["criterion"].text())}</span>'
    for condition in row["conditions"] or ():
        signed = f"{WORDS[condition['verdict']][0]} {condition['name']}: {format_measured(condition['measured'])}"
        found += f'<span class="eff-small">also {text(signed)}</span>'
    seconds = row["runtime_s"]
    cells = [
        _cell("Claim", f"{link}<br>{text(row['statement'])}", row["id"], "eff-claim"),
        _cell("Paper", text(row["paper"]), kind="eff-paper"),
        _cell("Measured", found, "" if estimate is None else estimate, "eff-num eff-measured"),
        _cell("Scale", text(scale_text(row["scale"])), kind="eff-scale"),
        _cell("Verdict", badge(row, wrap=True), ORDER.index(row["verdict"])),
        _cell(
            "Runtime", "" if seconds is None else f"{seconds:.0f}\u00a0s", "" if seconds is None else seconds, "eff-num"
        ),
    ]
    return f'<tr id="{slug(row)}" data-system="{row["system"]}" data-verdict="{row["verdict"]}">{"".join(cells)}</tr>'


def table_html(rows: Sequence[Mapping], ident: str = "board") -> str:
    """Controls and the table of all claims, sorted by chapter and claim; it sorts and filters in the browser."""
    heads = ("Claim", "Paper", "Measured", "Scale", "Verdict", "Runtime")
    head = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in heads)
    body = "\n".join(_row_html(row) for row in sorted(rows, key=lambda r: (r["chapter"], order(r["id"]))))
    return (
        f'{controls_html(rows, ident)}\n<div class="eff-scroll" tabindex="0" role="region" aria-label="All claims">'
        f'<table class="eff-board" id="{ident}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )
