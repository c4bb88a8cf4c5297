"""The built site in a real browser, with the network off."""

import pytest

from effnb.lab.publish import links

pytestmark = pytest.mark.site

READY = "async () => { if (window.MathJax?.startup?.promise) await MathJax.startup.promise; }"
# Fonts apart, a text browser and a screen reader need an `alt`; a blank picture has one colour only.
FIGURES = """async () => {
  const problems = [];
  for (const image of document.querySelectorAll(".bd-article img, .bd-article [role=img]:not([aria-hidden=true])")) {
    const name = (image.alt ?? image.getAttribute("aria-label") ?? "").trim();
    if (!name) problems.push("no alternative text: " + (image.src || image.outerHTML).slice(0, 80));
    if (image.tagName !== "IMG") {
      const box = image.getBoundingClientRect();
      const hidden = image.closest("[hidden], details:not([open])");
      if (!hidden && !(box.width > 10 && box.height > 5)) problems.push("empty: " + name);
      continue;
    }
    await image.decode().catch(() => {});
    if (!image.naturalWidth) { problems.push("not loaded: " + name); continue; }
    const canvas = Object.assign(document.createElement("canvas"), { width: 200, height: 120 });
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#fff"; pen.fillRect(0, 0, 200, 120); pen.drawImage(image, 0, 0, 200, 120);
    const data = pen.getImageData(0, 0, 200, 120).data;
    let sum = 0, squares = 0;
    for (let i = 0; i < data.length; i += 4) {
      const value = data[i] + data[i + 1] + data[i + 2];
      sum += value; squares += value * value;
    }
    const n = data.length / 4;
    if (squares / n - (sum / n) ** 2 < 1) problems.push("blank: " + name);
  }
  return problems;
}"""
MATHS = """() => [...document.querySelectorAll(".bd-article .math")]
  .filter((node) => !node.querySelector("mjx-container") || node.querySelector("mjx-merror"))
  .map((node) => node.textContent.slice(0, 60))"""
# A phone zooms out until an overflowing page fits, and innerWidth grows with it: the layout's own width does not.
OVERFLOW = "() => { const e = document.documentElement; return e.scrollWidth - Math.min(e.clientWidth, innerWidth); }"
BRIGHTNESS = """() => getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3)
  .reduce((sum, value) => sum + Number(value), 0) / 3"""


def test_every_page_loads_with_the_network_off_and_shows_its_maths_and_figures(open_page, pages, address):
    page, trouble = open_page()
    found = []
    for name in pages:
        page.goto(address + name)
        page.evaluate(READY)
        found += [f"{name}: maths is not typeset: {text}" for text in page.evaluate(MATHS)]
        found += [f"{name}: figure: {text}" for text in page.evaluate(FIGURES)]
        found += [f"{name}: wider than the window by {extra} px" for extra in [page.evaluate(OVERFLOW)] if extra > 0]
        found += [f"{name}: {text}" for text in trouble]
        trouble.clear()
    assert not found, "\n".join(found)


def test_maths_is_there_at_all(open_page, address):
    page, _ = open_page()
    page.goto(address + "book/conventions.html")
    page.evaluate(READY)
    assert page.locator("mjx-container").count() >= 3


def test_phone_view_has_no_horizontal_overflow_in_light_and_dark(open_page, pages, address):
    page, _ = open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme="light")
    found = []
    for name in pages:
        page.emulate_media(color_scheme="light")
        page.goto(address + name)
        page.evaluate(READY)
        light = page.evaluate(OVERFLOW)
        page.emulate_media(color_scheme="dark")
        found += [
            f"{name}: {scheme}: {px} px"
            for scheme, px in [("light", light), ("dark", page.evaluate(OVERFLOW))]
            if px > 0
        ]
    assert not found, "\n".join(found)


def test_dark_mode_follows_the_system_and_the_button(open_page, address):
    page, _ = open_page(color_scheme="dark")
    page.goto(address + "book/index.html")
    assert page.evaluate(BRIGHTNESS) < 60
    button = page.locator("button.theme-switch-button:visible").first
    seen = set()
    for _ in range(3):
        button.click()
        page.mouse.move(0, 0)
        seen.add(page.evaluate("() => document.documentElement.dataset.theme"))
    assert seen == {"light", "dark"}


def _column(page, label):
    return page.eval_on_selector_all(
        f"#board tbody tr:not([hidden]) td[data-label={label}]",
        "cells => cells.map(c => c.dataset.sort ?? c.textContent)",
    )


def test_scoreboard_sorts_by_mouse_and_keyboard(open_page, address):
    page, _ = open_page()
    page.goto(address + "book/scoreboard.html")
    head = page.get_by_role("columnheader", name="Measured")
    head.get_by_role("button").click()
    values = [float(v) for v in _column(page, "Measured") if v]
    assert len(values) > 3 and values == sorted(values)
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    values = _column(page, "Measured")
    numbers = [float(v) for v in values if v]
    assert numbers == sorted(numbers, reverse=True) and all(values[: len(numbers)])
    assert head.get_attribute("aria-sort") == "descending"
    page.get_by_role("columnheader", name="Strongest rival").get_by_role("button").click()
    assert head.get_attribute("aria-sort") is None


def test_scoreboard_filters_by_words_chapter_and_verdict(open_page, address):
    page, _ = open_page()
    page.goto(address + "book/scoreboard.html")
    rows, shown = page.locator("#board tbody tr"), page.locator("#board tbody tr:not([hidden])")
    total = rows.count()
    assert total and shown.count() == total
    page.get_by_label("Filter by words").fill("avagrad a1")
    assert 0 < shown.count() < total and shown.first.get_attribute("id") == "avagrad-a1"
    assert page.locator("#board-count").text_content() == f"{shown.count()} of {total} claims shown."
    page.get_by_label("Filter by words").fill("no such words anywhere")
    assert shown.count() == 0
    page.get_by_label("Filter by words").fill("")
    page.get_by_label("Chapter", exact=True).select_option("avagrad")
    assert {row.get_attribute("data-system") for row in shown.all()} == {"avagrad"}
    page.get_by_label("Chapter", exact=True).select_option("")
    chip = page.locator("#board-controls [data-verdict]").first
    chip.focus()
    page.keyboard.press("Space")
    hidden = chip.get_attribute("data-verdict")
    assert chip.get_attribute("aria-pressed") == "false"
    assert hidden not in {row.get_attribute("data-verdict") for row in shown.all()}


def test_scoreboard_rows_are_readable_cards_on_a_phone(open_page, address):
    page, _ = open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.goto(address + "book/scoreboard.html")
    widths = "cells => cells.map(c => c.firstElementChild.getBoundingClientRect().width)"
    assert min(page.eval_on_selector_all("#board td[data-label=Claim]", widths)) > 180
    assert page.locator("#board thead").is_hidden()


def test_a_link_to_a_row_undoes_the_filter_that_hides_it(open_page, address):
    page, _ = open_page()
    page.goto(address + "book/scoreboard.html")
    page.get_by_label("Filter by words").fill("no such words anywhere")
    page.evaluate("() => { location.hash = '#avagrad-a1'; }")
    page.locator("#avagrad-a1:not([hidden])").wait_for(timeout=3000)


def test_failures_stand_before_the_table(open_page, address):
    page, _ = open_page()
    page.goto(address + "book/scoreboard.html")
    verdicts = page.eval_on_selector_all("#board tbody tr", "rows => rows.map(r => r.dataset.verdict)")
    missed = [v for v in verdicts if v not in ("reproduced", "checked-analytically")]
    assert page.locator(".eff-failures > li").count() == len(missed)
    if missed:
        order = "([a, b]) => Boolean(a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING)"
        nodes = [page.query_selector(".eff-failures"), page.query_selector("#board")]
        assert page.evaluate(order, nodes)


def test_search_finds_avagrad(open_page, address):
    page, trouble = open_page()
    page.goto(address + "search.html?q=AvaGrad")
    page.locator("#search-results li a").first.wait_for(timeout=8000)
    assert any("avagrad" in (a.get_attribute("href") or "") for a in page.locator("#search-results li a").all())
    assert trouble == []


def test_front_door_leads_to_the_landing_page(open_page, address):
    page, _ = open_page()
    page.goto(address)
    page.wait_for_url("**/book/index.html")
    assert page.locator("h1").first.text_content().startswith("Efficient deep learning")


def test_internal_links_and_anchors_resolve_and_nothing_is_fetched_from_elsewhere(site):
    assert links.problems(site) == []


def test_every_page_has_a_preview_card_and_its_address_once(site, pages):
    for name in (n for n in pages if n.startswith(("book/", "notebooks/"))):
        text = (site / name).read_text()
        for tag in ("og:title", "og:description", "og:image"):
            assert text.count(f'property="{tag}"') == 1, f"{name}: {tag}"


SVG = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='90' height='50'%3E"
BAD_PAGE = f"""<!DOCTYPE html><html><body style="margin:0"><div class="bd-article">
<img src="{SVG}%3C/svg%3E" alt="empty"><img src="{SVG}%3Cpath d='M0 0H50V50'/%3E%3C/svg%3E">
<span class="math">\\(a^2\\)</span><div style="width:3000px">wide</div></div>
<script src="http://cdn.example/x.js"></script><script>console.error("broken")</script></body></html>"""


def test_the_checks_themselves_find_a_bad_page(open_page, address):
    page, trouble = open_page()
    page.route("**/bad.html", lambda route: route.fulfill(body=BAD_PAGE, content_type="text/html"))
    page.goto(address + "bad.html")
    figures = page.evaluate(FIGURES)
    assert "blank: empty" in figures and any(text.startswith("no alternative text") for text in figures)
    assert page.evaluate(MATHS) == ["\\(a^2\\)"] and page.evaluate(OVERFLOW) > 1000
    assert "console: broken" in trouble and "request to another host: http://cdn.example/x.js" in trouble
