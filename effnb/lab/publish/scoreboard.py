"""The scoreboard: claims and results of both profiles as flat rows; counts, failures, tables, cards and pictures."""

import html
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from effnb.lab.judge.claims import PASSED
from effnb.lab.judge.results import format_measured, stated_verdict
from effnb.lab.publish.verdicts import LOOKS, ORDER, UNMEASURED, render

#: The study speaks for a claim where it was tested there, else the book.
PROFILES = ("study", "book")
_FIRST = ("not-reproduced-at-this-scale", "partially", "not-tested", "smoke", UNMEASURED)
_SHOWN = ("measured", "note", "scale", "conditions", "contradicted", "seeds")


def flatten(found: Mapping[str, Iterable[Mapping]], chapters: Mapping[str, str]) -> list[dict]:
    """Return one flat dictionary a claim, sorted by chapter and claim.

    Its ``profiles`` hold what was measured at each profile; the same fields at the top are those of the profile that
    speaks for the claim, and ``profile`` names it.

    Args:
        found: profile to its rows of :func:`effnb.lab.judge.results.joined`.
        chapters: system to the name of its notebook without suffix, ``{"avagrad": "13_avagrad"}``; one for each.
    """
    rows: dict[str, dict] = {}
    for profile in PROFILES:
        for row in found.get(profile, ()):
            if row["system"] not in chapters:
                raise ValueError(f"system {row['system']!r} has claims but no notebook; there are {sorted(chapters)}")
            claim, entry = row["claim"], row["entry"]
            about = {key: row[key] for key in ("system", "title", "method")}
            about |= {key: getattr(claim, key) for key in ("id", "anchor", "primary", "kind", "statement", "paper")}
            about |= {"chapter": chapters[row["system"]], "criterion": claim.criterion, "supersedes": claim.supersedes}
            about |= {"expected": claim.expected_at_paper_scale, "paper_value": claim.paper_value, "profiles": {}}
            flat = rows.setdefault(claim.id, about)
            if entry:
                flat["profiles"][profile] = {key: entry.get(key) for key in _SHOWN} | {
                    "verdict": entry["verdict"],
                    "stated": stated_verdict(claim, entry),
                    "runtime_s": row["result"]["runtime_s"],
                }
    empty = dict.fromkeys((*_SHOWN, "runtime_s")) | {"verdict": UNMEASURED, "stated": UNMEASURED, "contradicted": False}
    for flat in rows.values():
        known = flat["profiles"]
        spoken = [p for p in PROFILES if p in known and known[p]["verdict"] != "not-tested"] or [*known, None]
        flat |= {"profile": spoken[0]} | known.get(spoken[0], empty)
    return sorted(rows.values(), key=lambda r: (r["chapter"], order(r["id"])))


def order(ident: str) -> tuple[str, int]:
    """Return the sorting key of a claim id, so that A10 follows A9.

    >>> sorted(["a/A10", "a/A9"], key=order)
    ['a/A9', 'a/A10']
    """
    head, tail = re.fullmatch(r"(.*?)(\d*)", ident).groups()
    return head, int(tail or 0)


def scale_text(scale: Mapping | None) -> str:
    """Return what "at this scale" means: data and model by name, the rest as ``key value``.

    >>> scale_text({"profile": "book", "dataset": "digits", "n_train": 1437, "epochs": 5})
    'digits, n train 1\u202f437, epochs 5'
    """
    parts = []
    for key, value in (scale or {}).items():
        if key == "profile" or value in (None, ""):
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            whole = float(value).is_integer()
            value = f"{value:,.0f}".replace(",", "\u202f") if whole else f"{value:.3g}"
        if isinstance(value, list | tuple):
            value = " to ".join(map(str, (value[0], value[-1]))) if len(value) > 4 else " ".join(map(str, value))
        parts.append(str(value) if key in ("dataset", "data", "model") else f"{key.replace('_', ' ')} {value}")
    return ", ".join(parts)


def tally(rows: Sequence[Mapping]) -> dict:
    """Return counts per verdict and per system, and how many (primary) claims are confirmed, by both questions.

    ``confirmed`` counts the claims reproduced or checked analytically against the strongest rival, ``stated`` those
    that are so as the paper states them.

    >>> row = {"system": "a", "verdict": "partially", "stated": "reproduced", "primary": True, "profiles": {"book": 0}}
    >>> found = tally([row]); found["confirmed"], found["stated"]
    (0, 1)
    """
    found, systems = Counter(row["verdict"] for row in rows), defaultdict(Counter)
    for row in rows:
        systems[row["system"]][row["verdict"]] += 1
    primary = [row for row in rows if row.get("primary")]
    return {
        "total": len(rows),
        "confirmed": sum(found[v] for v in PASSED),
        "stated": sum(row["stated"] in PASSED for row in rows),
        "studied": sum("study" in row["profiles"] for row in rows),
        "contradicted": sum(bool(row.get("contradicted")) for row in rows),
        "primary_total": len(primary),
        "primary_confirmed": sum(row["verdict"] in PASSED for row in primary),
        "primary_stated": sum(row["stated"] in PASSED for row in primary),
        "verdicts": {v: found[v] for v in ORDER if found[v]},
        "systems": {name: {v: c[v] for v in ORDER if c[v]} for name, c in sorted(systems.items())},
    }


def failures(rows: Iterable[Mapping]) -> list[Mapping]:
    """Return the claims that are not confirmed, worst first: contradicted, not reproduced, partially, not tested."""
    left = [row for row in rows if row["verdict"] not in PASSED]
    return sorted(left, key=lambda r: (not r.get("contradicted"), _FIRST.index(r["verdict"]), r["system"]))


def machine_copy(rows: Sequence[Mapping]) -> dict:
    """Return what ``scoreboard.json`` holds: counts and rows, ready for JSON."""
    kept = []
    for row in rows:
        value = row["paper_value"] and row["paper_value"].model_dump()
        kept.append(row | {"criterion": row["criterion"].text(), "paper_value": value})
    return {"schema": "effnb-scoreboard/2", **tally(rows), "claims": kept}


def slug(row: Mapping) -> str:
    """Return the HTML id of a claim's row.

    >>> slug({"id": "avagrad/A1"})
    'avagrad-a1'
    """
    return row["id"].replace("/", "-").lower()


def board(rows: Sequence[Mapping], ident: str = "board") -> str:
    """Return controls and the table of all claims, which sorts and filters in the browser and needs no scripts."""
    menu = sorted({(row["chapter"], row["system"], row["title"]) for row in rows})
    return _page("board.html", rows=rows, counts=tally(rows), menu=menu, ident=ident)


def blocks(rows: Sequence[Mapping], results: Sequence[Mapping], toc: Mapping) -> dict[str, str]:
    """Return every generated block of the prose pages that follows from claims, results and the book's ``_toc.yml``."""
    counts, captions = tally(rows), {}
    for part in toc.get("parts", []):
        names = (chapter["file"].split("/")[-1] for chapter in part.get("chapters", []))
        captions |= dict.fromkeys(names, part.get("caption", ""))
    chapters = sorted({(r["chapter"], r["system"], r["title"]) for r in rows})
    return {
        "tally": _page("tally.html", counts=counts),
        "summary": summary(counts),
        "per-system": _page("systems.html", counts=counts, chapters=chapters),
        "cards": _page("cards.html", rows=rows, captions=captions),
        "failures": _page("failures.html", rows=failures(rows)),
        "board": board(rows),
        "environment": _page("environment.html", lines=environment(results)),
        "paper-scale": _page("paper_scale.html", rows=[row for row in rows if row["primary"]]),
    }


def summary(counts: Mapping) -> str:
    """Return the sentence with the counts that matter, of both questions, the unwelcome ones included."""
    return str(render("summary.md", counts=counts, PASSED=PASSED))


def environment(results: Sequence[Mapping]) -> dict[str, str]:
    """Return hardware and software of the runs in words; values that differ between chapters are all named."""

    def values(block: str, key: str) -> str:
        return ", ".join(dict.fromkeys(str(r[block].get(key)) for r in results if r[block].get(key) is not None))

    if not results:
        return {}
    seconds = {p: sum(r["runtime_s"] for r in results if r["profile"] == p) for p in PROFILES}
    return {
        "Processor": values("hardware", "cpu"),
        "Cores, threads per chapter": f"{values('hardware', 'cores')}, {values('hardware', 'threads')}",
        "Memory": f"{values('hardware', 'ram_gb')} GB",
        "GPU": values("hardware", "gpu") or "none",
        "Python, torch, effnb": ", ".join(values("software", k) for k in ("python", "torch", "effnb")),
        "Commit of the runs": ", ".join(dict.fromkeys((r["software"]["commit"] or "unknown")[:12] for r in results)),
        "Sum of the chapters' run times": f"book {seconds['book']:.0f} s, study {seconds['study'] / 60:.0f} min",
    }


def readme_table(rows: Sequence[Mapping], speed: Mapping[str, str] | None = None) -> str:
    """Return the README's Markdown table: one line a chapter, by its primary claim, with both verdicts.

    ``speed`` maps a system to its measured speed or memory in words.
    """
    heads = ("Method", "Paper's figure", "Ours", "As stated", "Strongest rival", "Measured speed or memory")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]

    def told(verdict: str, contradicted: bool = False) -> str:
        return f"{LOOKS[verdict].sign} {LOOKS[verdict].words}" + ", contradicted" * contradicted

    for row in (r for r in rows if r["primary"]):
        method = f"[{row['method']}](notebooks/{row['chapter']}.ipynb)"
        ours = f"{format_measured(row['measured'])} at {row['profile']} scale" if row["profile"] else "-"
        cells = [method, row["paper"], ours, told(row["stated"]), told(row["verdict"], bool(row["contradicted"]))]
        cells.append((speed or {}).get(row["system"], ""))
        lines.append("| " + " | ".join(html.escape(str(c), quote=False).replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)


def pictures(rows: Sequence[Mapping]) -> dict[str, str]:
    """Return the committed pictures by file name: the scoreboard at one glance, and the README's badge."""
    counts, chapters = tally(rows), defaultdict(list)
    for row in rows:
        chapters[row["chapter"]].append(row)
    widest = max((len(c) for c in chapters.values()), default=1)
    left = 64 + round(7.8 * max((len(c[0]["title"]) for c in chapters.values()), default=10))
    legend, x = [], 20.0
    for verdict, count in counts["verdicts"].items():
        label = f"{count} {LOOKS[verdict].words}"
        legend.append((x, verdict, label))
        x += 24 + 7.1 * len(label) + 16
    title = f"{counts['confirmed']} of {counts['total']} claims confirmed, {counts['stated']} as stated"
    value = f"{counts['stated']}/{counts['total']} as stated, {counts['confirmed']}/{counts['total']} strongest rival"
    size = {"width": max(760, left + 64 * widest + 14), "height": 100 + 38 * len(chapters), "left": left}
    return {
        "scoreboard.svg": _page("scoreboard.svg", chapters=chapters, counts=counts, legend=legend, title=title, **size),
        "claims.svg": _page("badge.svg", value=value, left=50, right=14 + round(6.2 * len(value))),
    }


def _page(template: str, **values: object) -> str:
    return str(render(template, slug=slug, scale_text=scale_text, **values)) + "\n"
