"""Sphinx glue of the book: citations in docstrings, links to sources, link previews, no scripts from elsewhere."""

from __future__ import annotations

import html
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

_REFERENCE = re.compile(r"^(?P<indent>\s*)References?:[ \t]+(?P<text>\S.*)$")
_KEY = re.compile(r"(?<![\w.`-])[a-z]+\d{4}[a-z0-9_-]*(?![\w-])")
_SENTENCE = "Claims of efficient-deep-learning papers, written down first, measured with intervals, judged by code."
_OUTSIDE = ("http://", "https://", "//")


def cite_references(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn the line ``Reference: key.`` of a docstring into a citation of the bibliography."""
    for i, line in enumerate(lines):
        if match := _REFERENCE.match(line):
            cited = _KEY.sub(lambda key: f":cite:t:`{key[0]}`", match["text"])
            lines[i] = f"{match['indent']}**Reference:** {cited}"


def describe(doctree: nodes.document | None, limit: int = 200) -> str:
    """Return the first paragraph of a page, cut at a word, or the sentence about the whole book."""
    for paragraph in doctree.findall(nodes.paragraph) if doctree else ():
        text = " ".join(paragraph.astext().split())
        if len(text) > 40:
            return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " …"
    return _SENTENCE


def add_preview(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """Add the Open Graph tags that chat and search programs turn into a card."""
    base = app.config.html_baseurl.rstrip("/")
    title = re.sub(r"<[^>]+>", "", context.get("title") or app.config.html_title)
    tags = {
        "og:type": "website",
        "og:site_name": "effnb: efficient deep learning, reproduced",
        "og:title": html.unescape(title),
        "og:description": describe(doctree),
        "og:image": f"{base}/_static/card.png" if base else "",
        "og:image:alt": "effnb: efficient deep learning, reproduced",
        "og:url": f"{base}/{page}.html" if base else "",
    }
    if not base:  # still valid for a copy that is opened from a folder
        tags["og:image"] = context["pathto"]("_static/card.png", 1)
    lines = [f'<meta property="{k}" content="{html.escape(v, quote=True)}" />' for k, v in tags.items() if v]
    lines.append(f'<meta name="description" content="{html.escape(tags["og:description"], quote=True)}" />')
    lines.append('<meta name="twitter:card" content="summary_large_image" />')
    context["metatags"] = context.get("metatags", "") + "\n    " + "\n    ".join(lines)


def link_source(app: Sphinx, config: Any) -> None:
    """Let ``[source]`` lead to the lines of the object in the repository."""
    theme = config.html_theme_options
    base = f"{theme.get('repository_url', '')}/blob/{theme.get('repository_branch', 'main')}"

    def resolve(domain: str, info: dict[str, str]) -> str | None:
        thing = sys.modules.get(info.get("module", ""))
        for name in info.get("fullname", "").split("."):
            thing = getattr(thing, name, None)
        try:
            lines, start = inspect.getsourcelines(inspect.unwrap(thing))
            path = Path(inspect.getsourcefile(inspect.unwrap(thing)))
        except (TypeError, OSError):  # attributes and constants have no lines of their own
            return None
        package = Path(sys.modules["effnb"].__file__).parent
        if not path.is_relative_to(package):
            return None
        return f"{base}/effnb/{path.relative_to(package).as_posix()}#L{start}-L{start + len(lines) - 1}"

    config.linkcode_resolve = resolve


def keep_local_files(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """Drop scripts and style sheets that come from another host, and the sheet of sphinx-thebe, which nothing uses."""
    for kind in ("script_files", "css_files"):
        named = [(str(getattr(file, "filename", file) or ""), file) for file in context.get(kind, [])]
        context[kind] = [file for name, file in named if not name.startswith(_OUTSIDE) and "thebe" not in name]


def drop_thebe(app: Sphinx) -> None:
    """Disconnect sphinx-thebe, which Jupyter Book always loads and whose script lives on a CDN."""
    for listeners in app.events.listeners.values():
        listeners[:] = [entry for entry in listeners if entry.handler.__module__ != "sphinx_thebe"]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the hooks."""
    app.connect("config-inited", link_source)
    app.connect("builder-inited", drop_thebe, priority=1)
    app.connect("autodoc-process-docstring", cite_references, priority=400)
    app.connect("html-page-context", add_preview, priority=700)
    app.connect("html-page-context", keep_local_files, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
