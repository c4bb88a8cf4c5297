"""Build the website: stage the sources, generate what follows from results, render, check, put in place."""

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from effnb.common import write_atomically
from effnb.lab.judge.claims import ClaimSet, load_all
from effnb.lab.judge.results import check, joined, load_result
from effnb.lab.paths import committed_results, root
from effnb.lab.publish import links, performance, scoreboard, verdicts
from effnb.lab.run import process
from effnb.lab.run.stale import stale_parts

_HOME = "book/index.html"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_MARKER = re.compile(r"<!-- generated: ([a-z-]+) -->")
TABLE_START, TABLE_END = "<!-- claims-table:start -->", "<!-- claims-table:end -->"


def load_yaml(path: Path) -> dict:
    """Return a YAML file as a dictionary; empty where the file holds nothing."""
    return yaml.safe_load(path.read_text()) or {}


def configure(config: dict) -> dict:
    """Return the site's configuration, content of ``_config.yml``, with the addresses that the environment gives.

    ``EFFNB_REPOSITORY_URL`` replaces the repository, ``EFFNB_REPOSITORY_BRANCH`` the branch of edit and launch links,
    ``EFFNB_SITE_URL`` the address of the site that link previews need.
    """
    environ, repository = os.environ, dict(config["repository"])
    repository["url"] = (environ.get("EFFNB_REPOSITORY_URL") or repository["url"]).removesuffix(".git").rstrip("/")
    repository["branch"] = environ.get("EFFNB_REPOSITORY_BRANCH") or repository["branch"]
    site = dict(config["html"])
    site["baseurl"] = (environ.get("EFFNB_SITE_URL") or site.get("baseurl") or "").rstrip("/")
    return config | {"repository": repository, "html": site}


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """Replace every ``<!-- generated: NAME -->`` of a page by ``blocks[NAME]``; ValueError where nobody generates it.

    >>> fill("a <!-- generated: x --> b", {"x": "1"})
    'a 1 b'
    """

    def block(match: re.Match) -> str:
        if match[1] not in blocks:
            raise ValueError(f"generated block must be one of {sorted(blocks)}, got {match[1]!r}")
        return blocks[match[1]]

    return _MARKER.sub(block, page)


def _bench(results: Path) -> dict[str, dict]:
    """Benchmarks are taken apart from the chapters: a fresh run of the book shows the committed ones."""
    folder = results / "bench" if (results / "bench").is_dir() else committed_results() / "bench"
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _studies(results: Path) -> Path:
    """Studies are run by hand: a fresh run of the book shows the committed ones."""
    return results if (results / "study").is_dir() else committed_results()


def rows_of(notebooks: Path, results: Path) -> list[dict]:
    """Return the scoreboard's rows: the book's results from ``results``, the studies' where they stand."""
    stems = {path.stem[3:]: path.stem for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))}
    found = {"book": joined(results, "book"), "study": joined(_studies(results), "study")}
    return scoreboard.flatten(found, stems)


def stage(notebooks: Path, results: Path, folder: Path) -> Path:
    """Assemble the sources of the site in ``folder``, which is emptied first, and fill their generated blocks.

    ``notebooks`` holds executed chapters, ``results`` one folder a profile and ``bench/``.

    Raises:
        ValueError: claims without a chapter, or a page that asks for an unknown block.
    """
    notebooks, results = Path(notebooks), Path(results)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "notebooks").mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root() / name, folder / name)
    ignore = shutil.ignore_patterns("results", "claims", "__pycache__")
    shutil.copytree(root() / "book", folder / "book", ignore=ignore)
    chapters = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    for path in chapters:
        shutil.copy(path, folder / "notebooks" / path.name)
    sets, rows = load_all(), rows_of(notebooks, results)
    records = [load_result(s.system, "book", results) for s in sets]
    studies = {s.system: load_result(s.system, "study", _studies(results)) for s in sets}
    titles, bench = {s.system: s.title for s in sets}, _bench(results)
    # Studies whose code or parameters have changed since are named, not failed.
    older = ", ".join(titles[system] for system, result in studies.items() if result and stale_parts(system, result))
    told = f"Older than today's code: the studies of {older}." if older else "All studies are of today's code."
    blocks = scoreboard.blocks(rows, list(filter(None, [*records, *studies.values()])), load_yaml(folder / "_toc.yml"))
    blocks |= {
        "failure-count": str(len(scoreboard.failures(rows))),
        "bench-summary": performance.summary(bench),
        "bench": performance.page(bench, {path.stem[3:]: titles.get(path.stem[3:], path.stem) for path in chapters}),
        "stale-studies": told,
    }
    config = configure(load_yaml(folder / "_config.yml"))
    for page in sorted((folder / "book").rglob("*.md")):
        page.write_text(fill(page.read_text(), blocks).replace("REPOSITORY_URL", config["repository"]["url"]))
    (folder / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    static = folder / "book" / "_static"
    schema = {"schema": ClaimSet.model_json_schema()}
    (static / "scoreboard.json").write_text(json.dumps(scoreboard.machine_copy(rows) | schema, indent=1) + "\n")
    for name, picture in scoreboard.pictures(rows).items():
        (static / name).write_text(picture)
    return folder


def render(source: Path, target: Path, log: Path) -> list[str]:
    """Run Jupyter Book on what :func:`stage` made, every warning an error; return the problems, empty if all is well.

    The pages come to ``target/_build/html``, the builder's whole output to ``log``.
    """
    start = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", start, "build", str(source), "--path-output", str(target)]
    command += ["-W", "-n", "--keep-going", "--all"]
    code, output = process.call(command, {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"})
    write_atomically(log, plain := _COLOUR.sub("", output))
    lines = plain.splitlines()
    found = [line for line in lines if "WARNING" in line or "ERROR" in line or "CRITICAL" in line]
    complete = (target / "_build" / "html" / _HOME).is_file()
    if (code or not complete) and not found:
        found = [f"jupyter-book ended with {code}", *lines[-20:]]
    return list(dict.fromkeys(found))


def finish(html: Path) -> None:
    """Add what a host needs: a front door that keeps link previews, and a file that stops Pages from hiding folders."""
    head = (html / _HOME).read_text().partition("<head>")[2].partition("</head>")[0]
    lines = (line.strip().replace("../_static/", "_static/") for line in head.splitlines())
    tags = [line for line in lines if line.startswith(("<meta", "<title"))]
    page = verdicts.render("front_door.html", home=_HOME, tags=tags)
    (html / "index.html").write_text(f"{page}\n")
    (html / ".nojekyll").touch()


def publish(html: Path, out: Path) -> None:
    """Swap a finished folder into place, so that ``out`` is never half a site."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rename(old)
    html.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def build(notebooks_dir: Path | None = None, results_dir: Path | None = None, out: Path | None = None) -> int:
    """Build the whole site; an existing one stays in place unless the new one has no warning.

    Args:
        notebooks_dir: executed chapters; default the committed ``notebooks/``.
        results_dir: folder with one folder a profile, and ``bench/``; default the committed ``book/results/``.
        out: where the finished pages go; default ``_build/html``.

    Returns:
        0, or 1 after printing every problem: claims against results, warnings of the builder, dead links,
        addresses on other hosts.
    """
    notebooks, results = Path(notebooks_dir or root() / "notebooks"), Path(results_dir or committed_results())
    # A folder of its own for each build: two at once must not mix.
    out, work = Path(out or root() / "_build" / "html"), root() / "_build" / f"site-{os.getpid()}"
    found = check(results=results) + check(profile="study", results=_studies(results))
    try:
        if not found:
            try:
                source = stage(notebooks, results, work / "source")
            except ValueError as error:
                found = [str(error)]
        if not found:
            found = render(source, work / "output", root() / "_build" / "site.log")
        html = work / "output" / "_build" / "html"
        if not found:
            finish(html)
            found = links.problems(html)
        if not found:
            publish(html, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if found:
        print("The site has problems:", *(f"  {line}" for line in found), sep="\n", file=sys.stderr)
    return int(bool(found))


def outdated(results_dir: Path | None = None) -> dict[Path, str]:
    """Return the README and the committed pictures that do not show the results, with the text they should have."""
    results, static = Path(results_dir or committed_results()), root() / "book" / "_static"
    rows, readme = rows_of(root() / "notebooks", results), root() / "README.md"
    texts = {static / name: picture for name, picture in scoreboard.pictures(rows).items()}
    if readme.is_file():
        before, start, rest = readme.read_text().partition(TABLE_START)
        _, end, after = rest.partition(TABLE_END)
        if not (start and end):
            raise ValueError(f"README.md must hold {TABLE_START} and {TABLE_END}")
        table = scoreboard.readme_table(rows, performance.headline(_bench(results)))
        texts[readme] = f"{before}{TABLE_START}\n{table}\n{TABLE_END}{after}"
    return {path: text for path, text in texts.items() if not path.is_file() or path.read_text() != text}


def refresh(results_dir: Path | None = None) -> list[Path]:
    """Bring the README's table and the committed pictures up to date with the results; return the files changed."""
    texts = outdated(results_dir)
    for path, text in texts.items():
        write_atomically(path, text)
    return list(texts)
