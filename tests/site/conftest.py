"""A local server for the built site and a browser that can reach nothing else."""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest

from effnb.lab.paths import root

# No name resolves but the local server's: the network is off, while the cache stays on (request routing would turn it
# off and make the suite three times slower).
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
ARGUMENTS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
NO_PAGES = ("_static", "_sources", "index.html")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="session")
def site():
    """Folder of the built site: ``$EFFNB_SITE``, else ``_build/html`` of the checkout."""
    folder = Path(os.environ.get("EFFNB_SITE") or root() / "_build" / "html").resolve()
    if not (folder / "index.html").is_file():
        pytest.skip(f"no built site in {folder}: run `make site` first, or set EFFNB_SITE")
    return folder


@pytest.fixture(scope="session")
def pages(site):
    """Addresses of all pages, relative to the site; the front door only leads on and has a test of its own."""
    found = (path.relative_to(site) for path in sorted(site.rglob("*.html")))
    return [str(page) for page in found if page.parts[0] not in NO_PAGES]


@pytest.fixture(scope="session")
def address(site):
    """Address of a local server for the site."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium of the system."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the extra site-test")
    names = (os.environ.get("EFFNB_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: install it, or set EFFNB_CHROMIUM to its path")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def open_page(browser, address):
    """A function that opens a page of the site in a context without network; it records what goes wrong."""
    contexts = []

    def start(**options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page, trouble = context.new_page(), []

        def note_outside(request):
            if not request.url.startswith((address, "data:", "blob:")):
                trouble.append(f"request to another host: {request.url}")

        def note_failed(request):
            if request.failure != "net::ERR_ABORTED":  # left behind by going to the next page, not failed
                trouble.append(f"request failed: {request.url}: {request.failure}")

        page.on("request", note_outside)
        page.on("console", lambda m: trouble.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: trouble.append(f"script: {error}"))
        page.on("requestfailed", note_failed)
        page.on("response", lambda r: trouble.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        return page, trouble

    yield start
    for context in contexts:
        context.close()
