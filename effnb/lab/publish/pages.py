"""The generated parts of the site's prose pages: what stands at ``<!-- generated: NAME -->`` in ``book/*.md``."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import yaml

from effnb.lab.claims import format_measured
from effnb.lab.publish import markup, pictures, scoreboard
from effnb.lab.publish.markup import text
from effnb.lab.publish.scoreboard import WORDS

_MARKER = re.compile(r"<!-- generated: ([a-z-]+) -->")
_PARAMETER = re.compile(r"^(?P<name>\w+)\s*(?::[^=]+)?=\s*(?P<value>[^#]*?)\s*(?:#\s*(?P<help>.*))?$")


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """Replace every ``<!-- generated: NAME -->`` of a page by ``blocks[NAME]``.

    Raises:
        ValueError: the page asks for a block that nobody generates.

    >>> fill("a <!-- generated: x --> b", {"x": "1"})
    'a 1 b'
    """

    def block(match: re.Match) -> str:
        if match[1] not in blocks:
            raise ValueError(f"generated block must be one of {sorted(blocks)}, got {match[1]!r}")
        return blocks[match[1]]

    return _MARKER.sub(block, page)


def captions(toc: Mapping) -> dict[str, str]:
    """Chapter's file name to the caption of its part, from the table of contents.

    >>> captions({"parts": [{"caption": "I", "chapters": [{"file": "notebooks/01_a"}]}]})
    {'01_a': 'I'}
    """
    return {
        chapter["file"].split("/")[-1]: part.get("caption", "")
        for part in toc.get("parts", [])
        for chapter in part.get("chapters", [])
        if chapter["file"].startswith("notebooks/")
    }


def tally_html(counts: Mapping) -> str:
    """The bar of verdicts and the counts below it."""
    shares = "".join(
        f'<span class="eff-{v}" style="flex:{n}" title="{n} {WORDS[v][1]}"></span>'
        for v, n in counts["verdicts"].items()
    )
    items = "".join(
        f'<li><b>{n}</b> <span class="eff-verdict eff-{v}"><span aria-hidden="true">{WORDS[v][0]}</span> {WORDS[v][1]}'
        "</span></li>"
        for v, n in counts["verdicts"].items()
    )
    words = f"{counts['confirmed']} of {counts['total']} claims confirmed"
    return f'<div class="eff-tally" role="img" aria-label="{words}">{shares}</div><ul class="eff-numbers">{items}</ul>'


def summary(counts: Mapping) -> str:
    """One sentence with the counts that matter, the unwelcome ones included.

    >>> summary({"confirmed": 2, "total": 3, "primary_confirmed": 1, "primary_total": 1, "contradicted": 0,
    ...          "verdicts": {"reproduced": 2, "partially": 1}})
    '**2 of 3** claims are confirmed, and 1 of 1 primary claims; 1 partially.'
    """
    rest = []
    for verdict, count in counts["verdicts"].items():
        if verdict not in scoreboard.CONFIRMED:
            bad = verdict == "not-reproduced-at-this-scale" and counts["contradicted"]
            rest.append(f"{count} {WORDS[verdict][1]}" + (f" ({counts['contradicted']} contradicted)" if bad else ""))
    line = f"**{counts['confirmed']} of {counts['total']}** claims are confirmed, and {counts['primary_confirmed']} of "
    return line + f"{counts['primary_total']} primary claims" + ("; " + ", ".join(rest) if rest else "") + "."


def per_system(rows: Sequence[Mapping], counts: Mapping) -> str:
    """Markdown table of counts per chapter and verdict."""
    verdicts = list(counts["verdicts"])
    lines = ["| Chapter | " + " | ".join(WORDS[v][1] for v in verdicts) + " |", "|---|" + "---:|" * len(verdicts)]
    for chapter, system, title in sorted({(r["chapter"], r["system"], r["title"]) for r in rows}):
        found = counts["systems"][system]
        cells = [f"[{title}](../notebooks/{chapter}.ipynb)", *(str(found.get(v, "·")) for v in verdicts)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tiles(rows: Sequence[Mapping]) -> str:
    """One small link a claim, in its verdict's colour and sign, to its row of the scoreboard."""
    links = "".join(
        f'<a class="eff-verdict eff-{r["verdict"]}" href="scoreboard.html#{markup.slug(r)}" '
        f'title="{text(r["statement"])} {WORDS[r["verdict"]][1]}">'
        f'<span aria-hidden="true">{WORDS[r["verdict"]][0]}</span> {r["id"].split("/")[1]}'
        f"{'★' if r['primary'] else ''}</a>"
        for r in rows
    )
    return f'<div class="eff-tiles">{links}</div>'


def cards(rows: Sequence[Mapping], parts: Mapping[str, str]) -> str:
    """One card a chapter: its primary claim, the paper's figure, ours, the verdict, and all its claims as tiles."""
    out = []
    for row in (r for r in rows if r["primary"]):
        own = [r for r in rows if r["system"] == row["system"]]
        out.append(
            f'<div class="eff-card"><p class="eff-part">{text(parts.get(row["chapter"], ""))}</p>'
            f'<p class="eff-title"><a href="../notebooks/{row["chapter"]}.html">{text(row["title"])}</a></p>'
            f"<p>{text(row['statement'])}</p><dl><dt>Paper</dt><dd>{text(row['paper'])}</dd>"
            f"<dt>Ours</dt><dd>{text(format_measured(row['measured']))}{pictures.strip(row)}</dd>"
            f"<dt>Verdict</dt><dd>{markup.badge(row, wrap=True)}</dd></dl>{tiles(own)}</div>"
        )
    return f'<div class="eff-cards">{"".join(out)}</div>'


def environment(results: Sequence[Mapping]) -> str:
    """Hardware and software of the runs, as a list; values that differ between chapters are all named."""

    def values(block: str, key: str) -> str:
        return ", ".join(dict.fromkeys(str(r[block].get(key)) for r in results if r[block].get(key) is not None))

    if not results:
        return "<p>No chapter has been measured yet.</p>"
    seconds = sum(r["runtime_s"] for r in results)
    commits = list(dict.fromkeys((r["software"]["commit"] or "unknown")[:12] for r in results))
    lines = {
        "Processor": values("hardware", "cpu"),
        "Cores, threads per chapter": f"{values('hardware', 'cores')}, {values('hardware', 'threads')}",
        "Memory": f"{values('hardware', 'ram_gb')} GB",
        "GPU": values("hardware", "gpu") or "none",
        "Python, torch, effnb": ", ".join(values("software", k) for k in ("python", "torch", "effnb")),
        "Commit of the runs": ", ".join(commits),
        "Sum of the chapters' run times": f"{seconds:.0f} s",
    }
    return '<dl class="eff-meta">' + "".join(f"<dt>{k}</dt><dd>{text(v)}</dd>" for k, v in lines.items()) + "</dl>"


def parameters(notebook: Path) -> dict[str, tuple[str, str]]:
    """Name to (default, comment) of a chapter's cell tagged ``parameters``; empty if it has none.

    Args:
        notebook: path of the ``.ipynb``.
    """
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            found = filter(None, map(_PARAMETER.match, cell.source.splitlines()))
            return {m["name"]: (m["value"], m["help"] or "") for m in found}
    return {}


def paper_scale(profiles: Mapping[str, Mapping], notebooks: Mapping[str, Path], titles: Mapping[str, str]) -> str:
    """A section a chapter: the command, and a table of what the ``paper`` profile changes.

    Args:
        profiles: content of ``notebooks/profiles.yaml``.
        notebooks: system to its notebook, in the order of the book.
        titles: system to the chapter's short name.
    """
    sections = []
    for system, path in notebooks.items():
        defaults, changed = parameters(path), dict((profiles.get(system) or {}).get("paper") or {})
        changed.pop("profile", None)
        lines = ["| Parameter | Book | Paper | Meaning |", "|---|---|---|---|"]
        for name, value in changed.items():
            default, meaning = defaults.get(name, ("", ""))
            cells = (f"`{name}`", f"`{default}`" if default else "", f"`{value!r}`", meaning)
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        table = (
            "\n".join(lines)
            if changed
            else "This chapter has no larger parameter set: the book profile is the full one."
        )
        command = f"```bash\neffnb run {system} --profile paper\n```"
        sections.append(f"### {titles.get(system, system)}\n\n{command}\n\n{table}")
    return "\n\n".join(sections)


def blocks(rows: Sequence[Mapping], results: Sequence[Mapping], toc: Mapping) -> dict[str, str]:
    """Every generated block that follows from claims and results.

    Args:
        rows: flat rows of the scoreboard.
        results: the chapters' result records.
        toc: content of ``_toc.yml``.
    """
    counts = scoreboard.tally(rows)
    return {
        "tally": tally_html(counts),
        "summary": summary(counts),
        "per-system": per_system(rows, counts),
        "cards": cards(rows, captions(toc)),
        "failures": markup.failures_html(rows),
        "failure-count": str(len(scoreboard.failures(rows))),
        "board": markup.table_html(rows),
        "environment": environment(results),
    }


def load_yaml(path: Path) -> dict:
    """A YAML file as a dictionary; empty where the file holds nothing."""
    return yaml.safe_load(path.read_text()) or {}


def load_bench(folder: Path) -> dict[str, dict]:
    """System to the content of its ``bench/<system>.json``, sorted by name; empty without a folder."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
