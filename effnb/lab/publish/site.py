"""Build the website: stage the sources, generate what follows from results, render, check, put in place."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from effnb.common import write_atomically
from effnb.lab.judge import claims
from effnb.lab.paths import committed_results, root
from effnb.lab.publish import links, pages, performance, pictures, scoreboard

_HOME = "book/index.html"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def chapters(notebooks: Path) -> dict[str, Path]:
    """System to its notebook, in the order of the book.

    Args:
        notebooks: folder with ``NN_<system>.ipynb``.
    """
    return {path.stem[3:]: path for path in sorted(Path(notebooks).glob("[0-9][0-9]_*.ipynb"))}


def rows(notebooks: Path, results: Path, profile: str = "book") -> list[dict]:
    """The scoreboard's flat rows from the registered claims and the results in ``results``."""
    stems = {system: path.stem for system, path in chapters(notebooks).items()}
    return scoreboard.flatten(claims.joined(Path(results), profile), stems)


def configure(config: dict) -> dict:
    """The site's configuration with the addresses that the environment gives.

    ``EFFNB_REPOSITORY_URL`` replaces the repository, ``EFFNB_REPOSITORY_BRANCH`` the branch of edit and launch links,
    ``EFFNB_SITE_URL`` the address of the site that link previews need.

    Args:
        config: content of ``_config.yml``; not changed.
    """
    environ, repository = os.environ, dict(config["repository"])
    repository["url"] = (environ.get("EFFNB_REPOSITORY_URL") or repository["url"]).removesuffix(".git").rstrip("/")
    repository["branch"] = environ.get("EFFNB_REPOSITORY_BRANCH") or repository["branch"]
    site = dict(config["html"])
    site["baseurl"] = (environ.get("EFFNB_SITE_URL") or site.get("baseurl") or "").rstrip("/")
    return config | {"repository": repository, "html": site}


def _generate(stage: Path, notebooks: Path, results: Path) -> None:
    """Fill the staged pages' markers and write the machine copy and pictures beside them."""
    toc, found = pages.load_yaml(stage / "_toc.yml"), rows(notebooks, results)
    records = {r["system"]: r["result"] for r in claims.joined(results) if r["result"]}
    names = {s.system: s.title for s in claims.load_all()}
    titles = {system: names.get(system, system) for system in chapters(notebooks)}
    bench = _bench(results)
    config = configure(pages.load_yaml(stage / "_config.yml"))
    profiles = pages.load_yaml(root() / "notebooks" / "profiles.yaml")
    blocks = pages.blocks(found, list(records.values()), toc) | {
        "bench-summary": performance.summary(bench),
        "bench": performance.page(bench, titles),
        "paper-scale": pages.paper_scale(profiles, chapters(notebooks), titles),
    }
    for page in sorted((stage / "book").rglob("*.md")):
        filled = pages.fill(page.read_text(), blocks).replace("REPOSITORY_URL", config["repository"]["url"])
        page.write_text(filled)
    (stage / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    static = stage / "book" / "_static"
    (static / "scoreboard.json").write_text(json.dumps(scoreboard.machine_copy(found), indent=1) + "\n")
    for name, picture in _pictures(found).items():
        (static / name).write_text(picture)


def _bench(results: Path) -> dict[str, dict]:
    """Benchmarks are taken apart from the chapters: a fresh run of the book shows the committed ones."""
    own = results / "bench"
    return pages.load_bench(own if own.is_dir() else committed_results() / "bench")


def _pictures(found: list[dict]) -> dict[str, str]:
    counts = scoreboard.tally(found)
    return {
        "scoreboard.svg": pictures.scoreboard_svg(found, counts, scoreboard.WORDS),
        "claims.svg": pictures.badge_svg(counts["confirmed"], counts["total"]),
    }


def stage(notebooks: Path, results: Path, folder: Path) -> Path:
    """Assemble the sources of the site in ``folder``, which is emptied first.

    Args:
        notebooks: executed chapters.
        results: folder with one folder a profile, and ``bench/``.
        folder: where to; made if need be.

    Raises:
        ValueError: claims without a chapter, or a page that asks for an unknown block.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "notebooks").mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root() / name, folder / name)
    ignore = shutil.ignore_patterns("results", "claims", "__pycache__")
    shutil.copytree(root() / "book", folder / "book", ignore=ignore)
    for path in chapters(notebooks).values():
        shutil.copy(path, folder / "notebooks" / path.name)
    _generate(folder, Path(notebooks), Path(results))
    return folder


def render(source: Path, target: Path, log: Path) -> list[str]:
    """Run Jupyter Book on staged sources, every warning an error; returns the problems, empty if all is well.

    Args:
        source: what :func:`stage` made.
        target: Jupyter Book puts ``_build/html`` inside.
        log: receives the builder's whole output.
    """
    start = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", start, "build", str(source), "--path-output", str(target)]
    command += ["-W", "-n", "--keep-going", "--all"]
    environ = os.environ | {"PYTHONPATH": str(root()), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(plain := _COLOUR.sub("", done.stdout))
    lines = plain.splitlines()
    found = [line for line in lines if "WARNING" in line or "ERROR" in line or "CRITICAL" in line]
    complete = (target / "_build" / "html" / _HOME).is_file()
    if (done.returncode or not complete) and not found:
        found = [f"jupyter-book ended with {done.returncode}", *lines[-20:]]
    return list(dict.fromkeys(found))


def finish(html: Path) -> None:
    """Add what a host needs: a front door that keeps link previews, and a file that stops Pages from hiding folders."""
    home = (html / _HOME).read_text()
    head = home.partition("<head>")[2].partition("</head>")[0]
    tags = [line.strip() for line in head.splitlines() if line.strip().startswith(("<meta", "<title"))]
    tags = [tag.replace("../_static/", "_static/") for tag in tags]
    refresh = f'<meta http-equiv="refresh" content="0; url={_HOME}">'
    body = f'<p><a href="{_HOME}">effnb: efficient deep learning, reproduced</a></p>'
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{refresh}\n'
        + "\n".join(tags)
        + f"\n</head>\n<body>{body}</body>\n"
    )
    (html / "index.html").write_text(page + "</html>\n")
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
    out, work = Path(out or root() / "_build" / "html"), root() / "_build" / "site"
    found = claims.check(results=results)
    if not found:
        try:
            source = stage(notebooks, results, work / "source")
        except ValueError as error:
            found = [str(error)]
    if not found:
        shutil.rmtree(work / "output", ignore_errors=True)
        found = render(source, work / "output", work / "build.log")
    html = work / "output" / "_build" / "html"
    if not found:
        finish(html)
        found = links.problems(html)
    if found:
        print("The site has problems:", *(f"  {line}" for line in found), sep="\n", file=sys.stderr)
        return 1
    publish(html, out)
    return 0


def outdated(results_dir: Path | None = None) -> dict[Path, str]:
    """The README and the committed pictures that do not show the results, with the text that they should have.

    Args:
        results_dir: default the committed ``book/results/``.
    """
    results, static = Path(results_dir or committed_results()), root() / "book" / "_static"
    found, readme = rows(root() / "notebooks", results), root() / "README.md"
    texts = {static / name: picture for name, picture in _pictures(found).items()}
    if readme.is_file():
        table = scoreboard.readme_table(found, performance.headline(_bench(results)))
        texts[readme] = scoreboard.replace_block(readme.read_text(), table)
    return {path: text for path, text in texts.items() if not path.is_file() or path.read_text() != text}


def refresh(results_dir: Path | None = None) -> list[Path]:
    """Bring the README's table and the committed pictures up to date with the results; returns the files it changed.

    Args:
        results_dir: default the committed ``book/results/``.
    """
    texts = outdated(results_dir)
    for path, text in texts.items():
        write_atomically(path, text)
    return list(texts)
