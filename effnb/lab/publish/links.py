"""Checks on finished HTML: internal links with their anchors resolve, and no page asks another host for anything."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_OUTSIDE = re.compile(r"^(?:https?:)?//", re.IGNORECASE)
_CSS_FETCH = re.compile(r"(?:@import\s+|url\()\s*[\"']?((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)
_FETCHING_LINKS = {
    "stylesheet",
    "preload",
    "prefetch",
    "preconnect",
    "dns-prefetch",
    "modulepreload",
    "manifest",
    "icon",
}


class Page(HTMLParser):
    """Ids, links and fetched addresses of one page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what one opening tag names."""
        found = {key: value or "" for key, value in attrs}
        self.ids.update(v for k, v in found.items() if k == "id" or (tag == "a" and k == "name"))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and _FETCHING_LINKS & set(found.get("rel", "").split()):
            self.fetched.append(found.get("href", ""))
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "object"):
            self.fetched += [found[k] for k in ("src", "data", "srcset") if found.get(k)]


def read(site: Path) -> dict[Path, Page]:
    """Every page of a site, by its resolved path; templates that themes leave in ``_static`` are no pages."""
    found = [path for path in sorted(Path(site).resolve().rglob("*.html")) if "_static" not in path.parts]
    return {path: Page(path.read_text(errors="replace")) for path in found}


def _broken(page: Path, link: str, pages: dict[Path, Page]) -> str | None:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or link.startswith("#!"):
        return None
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.exists():
        return "no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].ids:
        return "no such anchor"
    return None


def problems(site: Path) -> list[str]:
    """One line for each link that leads nowhere and each address that a page would fetch from another host.

    Args:
        site: folder of finished HTML.
    """
    site, found = Path(site).resolve(), []
    pages = read(site)
    for path, page in pages.items():
        name = path.relative_to(site)
        for link in dict.fromkeys([*page.links, *page.fetched]):
            if why := _broken(path, link, pages):
                found.append(f"{name}: {link}: {why}")
        found += [f"{name}: fetches {address}" for address in page.fetched if _OUTSIDE.match(address)]
    for sheet in sorted(site.rglob("*.css")):
        outside = _CSS_FETCH.findall(sheet.read_text(errors="replace"))
        found += [f"{sheet.relative_to(site)}: fetches {address}" for address in outside]
    return found
