"""The builder's gate: a page with a dead reference must not become a site."""

import shutil

import pytest

from effnb.lab.paths import root
from effnb.lab.publish import site

pytestmark = pytest.mark.site
pytest.importorskip("jupyter_book", reason="jupyter-book is not installed: the extra book")


@pytest.fixture
def source(tmp_path):
    """The smallest book with the real configuration."""
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copy(root() / "_config.yml", folder)
    shutil.copytree(root() / "book" / "_ext", folder / "book" / "_ext", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root() / "book" / "_static", folder / "book" / "_static")
    (folder / "book" / "references.bib").touch()
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/index\n")
    return folder


def test_a_clean_page_is_built_and_a_dead_reference_is_a_problem(source, tmp_path):
    page = source / "book" / "index.md"
    page.write_text("# Title\n\nMaths $a^2$ and [a section](#below).\n\n## Below\n\nText.\n")
    assert site.render(source, tmp_path / "good", tmp_path / "good.log") == []
    html = (tmp_path / "good" / "_build" / "html" / "book" / "index.html").read_text()
    assert "thebe" not in html and "cdn" not in html and "og:title" in html
    page.write_text("# Title\n\nSee [a page](nowhere.md).\n")
    found = site.render(source, tmp_path / "bad", tmp_path / "bad.log")
    assert len(found) == 1 and "nowhere.md" in found[0]
