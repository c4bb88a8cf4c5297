"""The scoreboard as pure functions: claims and results in, counts, failures, README table and machine copy out.

The same rows as HTML are in :mod:`effnb.lab.publish.markup`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from effnb.lab.claims import VERDICTS, format_measured
from effnb.lab.run.report import WORDS as SIGNED_WORDS

#: A claim without a result; it can only stand in a draft, a strict build refuses it.
UNMEASURED = "not-run"
#: Verdict to the sign and the words that readers see; colour is never the only sign.
WORDS = {v: tuple(w.split(" ", 1)) for v, w in SIGNED_WORDS.items() if v != "smoke"}
WORDS |= {"smoke": ("~", SIGNED_WORDS["smoke"]), UNMEASURED: ("…", "not yet measured")}
CONFIRMED = ("reproduced", "checked-analytically")
ORDER = (*VERDICTS, UNMEASURED)
_FIRST = ("not-reproduced-at-this-scale", "partially", "not-tested", "smoke", UNMEASURED)
TABLE_START, TABLE_END = "<!-- claims-table:start -->", "<!-- claims-table:end -->"


def flatten(joined: Iterable[Mapping], chapters: Mapping[str, str]) -> list[dict]:
    """One flat dictionary a claim, sorted by chapter and claim.

    Args:
        joined: rows of :func:`effnb.lab.claims.joined`.
        chapters: system to the name of its notebook without suffix, ``{"avagrad": "13_avagrad"}``.

    Raises:
        ValueError: a system with claims has no chapter.
    """
    rows = []
    for row in joined:
        if row["system"] not in chapters:
            raise ValueError(f"system {row['system']!r} has claims but no notebook; there are {sorted(chapters)}")
        claim, entry = row["claim"], row["entry"] or {}
        found = {key: entry.get(key) for key in ("measured", "n_seeds", "scale", "note", "conditions")}
        rows.append(
            {key: row[key] for key in ("system", "title", "method")}
            | {"chapter": chapters[row["system"]], "id": claim.id, "anchor": claim.anchor, "primary": claim.primary}
            | {"kind": claim.kind, "statement": claim.statement, "paper": claim.paper, "criterion": claim.criterion}
            | {"registered": claim.raw.get("registered"), **found, "verdict": entry.get("verdict", UNMEASURED)}
            | {"contradicted": entry.get("contradicted", False), "runtime_s": (row["result"] or {}).get("runtime_s")}
        )
    return sorted(rows, key=lambda r: (r["chapter"], order(r["id"])))


def order(ident: str) -> tuple[str, int]:
    """Sorting key of a claim id, so that A10 follows A9.

    >>> sorted(["a/A10", "a/A9"], key=order)
    ['a/A9', 'a/A10']
    """
    head, tail = re.fullmatch(r"(.*?)(\d*)", ident).groups()
    return head, int(tail or 0)


def number(value: float) -> str:
    """A count or size for people, with thin spaces between thousands and at most three significant decimals.

    >>> number(20000), number(0.25)
    ('20\u202f000', '0.25')
    """
    return f"{value:,.0f}".replace(",", "\u202f") if float(value).is_integer() else f"{value:.3g}"


def scale_text(scale: Mapping | None) -> str:
    """What "at this scale" means: data and model by name, the rest as ``key value``.

    >>> scale_text({"profile": "book", "dataset": "digits", "n_train": 1437, "epochs": 5})
    'digits, n train 1\u202f437, epochs 5'
    """
    parts = []
    for key, value in (scale or {}).items():
        if key == "profile" or value in (None, ""):
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = number(value)
        if isinstance(value, list | tuple):
            value = " to ".join(map(str, (value[0], value[-1]))) if len(value) > 4 else " ".join(map(str, value))
        parts.append(str(value) if key in ("dataset", "data", "model") else f"{key.replace('_', ' ')} {value}")
    return ", ".join(parts)


def tally(rows: Sequence[Mapping]) -> dict:
    """Counts per verdict and per system, and how many (primary) claims are confirmed.

    ``confirmed`` means reproduced or checked analytically.

    >>> tally([{"system": "a", "verdict": "reproduced", "primary": True}])["confirmed"]
    1
    """
    found = Counter(row["verdict"] for row in rows)
    systems: dict[str, Counter] = {}
    for row in rows:
        systems.setdefault(row["system"], Counter())[row["verdict"]] += 1
    primary = [row for row in rows if row.get("primary")]
    return {
        "total": len(rows),
        "confirmed": sum(found[v] for v in CONFIRMED),
        "contradicted": sum(bool(row.get("contradicted")) for row in rows),
        "primary_total": len(primary),
        "primary_confirmed": sum(row["verdict"] in CONFIRMED for row in primary),
        "verdicts": {v: found[v] for v in ORDER if found[v]},
        "systems": {name: {v: c[v] for v in ORDER if c[v]} for name, c in sorted(systems.items())},
    }


def failures(rows: Iterable[Mapping]) -> list[Mapping]:
    """The claims that are not confirmed, worst first: contradicted, not reproduced, partially, not tested."""
    left = [row for row in rows if row["verdict"] not in CONFIRMED]
    return sorted(left, key=lambda r: (not r.get("contradicted"), _FIRST.index(r["verdict"]), r["system"]))


def machine_copy(rows: Sequence[Mapping]) -> dict:
    """What ``scoreboard.json`` holds: counts and rows, ready for JSON."""
    kept = [row | {"criterion": row["criterion"].text()} for row in rows]
    return {"schema": "effnb-scoreboard/1", **tally(rows), "claims": kept}


def readme_table(rows: Sequence[Mapping], speed: Mapping[str, str] | None = None) -> str:
    """The README's Markdown table: one line a chapter, by its primary claim.

    Args:
        rows: all claims.
        speed: system to the measured speed or memory in words.
    """
    lines = [
        "| Method | Paper's figure | Ours, at book scale | Measured speed or memory | Verdict |",
        "|---|---|---|---|---|",
    ]
    for row in sorted((r for r in rows if r.get("primary")), key=lambda r: r["chapter"]):
        method = f"[{row['method']}](notebooks/{row['chapter']}.ipynb)"
        cells = [method, row["paper"], format_measured(row["measured"]), (speed or {}).get(row["system"], "")]
        cells.append(f"{' '.join(WORDS[row['verdict']])}" + ", contradicted" * bool(row["contradicted"]))
        lines.append("| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)


def replace_block(page: str, block: str) -> str:
    """Put ``block`` between the markers of a page.

    Raises:
        ValueError: the page lacks the pair of markers.

    >>> replace_block(f"a {TABLE_START}old{TABLE_END} z", "new").split()[0]
    'a'
    """
    before, start, rest = page.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if not (start and end):
        raise ValueError(f"the page must hold {TABLE_START} and {TABLE_END}")
    return f"{before}{TABLE_START}\n{block}\n{TABLE_END}{after}"
