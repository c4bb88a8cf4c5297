"""Scoreboard, generated pages, pictures and link checks, on rows made by hand."""

import json
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import nbformat
import pytest

from effnb.lab.claims import Criterion
from effnb.lab.publish import links, markup, pages, performance, pictures, scoreboard, site

CHAPTERS = {"avagrad": "13_avagrad", "unrolled_solvers": "01_unrolled_solvers"}


def joined(system, short, verdict, *, estimate=0.7342, ci=(0.61, 0.86), primary=False, op=">=", **entry):
    """One row as ``claims.joined`` returns it."""
    claim = SimpleNamespace(
        id=f"{system.replace('_', '-')}/{short}",
        anchor="theory-check",
        primary=primary,
        kind="threshold",
        statement=f"{short}: lr <best> & `eps`",
        paper="96.4 | 96.1 %",
        criterion=Criterion("gain", op, 0.5, "points"),
        raw={"registered": "2026-11-21"},
    )
    measured = {
        "estimate": estimate,
        "ci": ci and list(ci),
        "ci_method": "paired-t",
        "per_seed": [1.0] * 5,
        "unit": "pt",
    }
    entry = {
        "verdict": verdict,
        "measured": measured,
        "n_seeds": 5,
        "scale": {"dataset": "digits", "n_train": 1437},
    } | entry
    result = {"runtime_s": 12.4}
    return {
        "system": system,
        "title": system,
        "method": f"{system}: a method",
        "claim": claim,
        "entry": entry,
        "result": result,
    }


@pytest.fixture
def rows():
    found = [
        joined("avagrad", "A10", "reproduced"),
        joined("avagrad", "A2", "not-reproduced-at-this-scale", note="wrong side"),
        joined("avagrad", "A1", "reproduced", primary=True),
        joined("avagrad", "A3", "not-reproduced-at-this-scale", contradicted=True, note="whole interval"),
        joined("unrolled_solvers", "U1", "checked-analytically", primary=True, ci=None),
        joined("unrolled_solvers", "U2", "partially", note="interval straddles"),
        joined("unrolled_solvers", "U3", "not-tested", estimate=None, ci=None, note="needs data"),
    ]
    return scoreboard.flatten(found, CHAPTERS)


def test_rows_are_sorted_by_chapter_then_claim_number(rows):
    assert [r["id"].split("/")[1] for r in rows] == ["U1", "U2", "U3", "A1", "A2", "A3", "A10"]


def test_a_system_without_chapter_is_an_error():
    with pytest.raises(ValueError, match=r"avagrad.*no notebook"):
        scoreboard.flatten([joined("avagrad", "A1", "reproduced")], {})


def test_a_claim_without_result_is_shown_as_not_yet_measured():
    row = joined("avagrad", "A1", "reproduced") | {"entry": None, "result": None}
    (flat,) = scoreboard.flatten([row], CHAPTERS)
    assert flat["verdict"] == "not-run"
    assert "not yet measured" in markup.table_html([flat]) and pictures.strip(flat) == ""


def test_counts_add_up(rows):
    counts = scoreboard.tally(rows)
    assert (counts["total"], counts["confirmed"], counts["contradicted"]) == (7, 3, 1)
    assert (counts["primary_confirmed"], counts["primary_total"]) == (2, 2)
    assert sum(counts["verdicts"].values()) == sum(sum(c.values()) for c in counts["systems"].values()) == 7
    assert "2 not reproduced at this scale (1 contradicted)" in pages.summary(counts)


def test_failures_come_worst_first_and_only_failures(rows):
    assert [r["id"].split("/")[1] for r in scoreboard.failures(rows)] == ["A3", "A2", "U2", "U3"]
    listed = markup.failures_html(rows)
    assert all(note in listed for note in ("Wrong side.", "Whole interval.", "Interval straddles.", "Needs data."))
    assert "contradicted" in listed and markup.failures_html([]) == "<p>None.</p>"


def test_table_escapes_text_links_to_the_section_and_sorts_by_numbers(rows):
    table = markup.table_html(rows)
    assert "lr &lt;best&gt; &amp; <code>eps</code>" in table and "<best>" not in table
    assert 'href="../notebooks/13_avagrad.html#theory-check"' in table
    assert table.count("<tr id=") == len(rows) and 'data-sort="0.7342"' in table and 'data-sort=""' in table
    assert table.count('aria-pressed="true"') == len(scoreboard.tally(rows)["verdicts"])


def test_table_shows_the_further_conditions_of_a_claim():
    measured = {"estimate": 1.5, "ci": [1.2, 1.8], "per_seed": [1.0] * 5, "unit": "decades"}
    conditions = [{"name": "Adam drifts more", "verdict": "reproduced", "measured": measured}]
    (row,) = scoreboard.flatten([joined("avagrad", "A1", "reproduced", conditions=conditions)], CHAPTERS)
    assert "also ✓ Adam drifts more: 1.50 [1.20, 1.80] decades" in markup.table_html([row])


def test_a_verdict_is_word_and_sign_not_colour_alone(rows):
    for row in rows:
        sign, word = scoreboard.WORDS[row["verdict"]]
        assert sign in markup.badge(row) and word in markup.badge(row)


def test_the_same_results_give_the_same_text_in_any_order(rows):
    again = scoreboard.flatten(
        [joined("unrolled_solvers", "U2", "partially", note="x"), joined("avagrad", "A1", "reproduced")], CHAPTERS
    )
    other = scoreboard.flatten(
        [joined("avagrad", "A1", "reproduced"), joined("unrolled_solvers", "U2", "partially", note="x")], CHAPTERS
    )
    assert markup.table_html(again) == markup.table_html(other)
    assert scoreboard.machine_copy(again) == scoreboard.machine_copy(other)


def test_machine_copy_is_json_with_every_claim(rows):
    record = json.loads(json.dumps(scoreboard.machine_copy(rows), allow_nan=False))
    assert record["schema"] == "effnb-scoreboard/1" and len(record["claims"]) == record["total"] == 7
    assert record["claims"][0]["criterion"] == "gain ≥ 0.5 pt"


def test_readme_has_a_line_a_chapter_and_keeps_what_is_around_the_markers(rows):
    table = scoreboard.readme_table(rows, {"avagrad": "3.4× against torch"})
    assert len(table.splitlines()) == 2 + 2 and "notebooks/13_avagrad.ipynb" in table
    assert "96.4 \\| 96.1 %" in table and "3.4× against torch" in table and "✓ reproduced" in table
    page = f"above\n{scoreboard.TABLE_START}\nold\n{scoreboard.TABLE_END}\nbelow\n"
    once = scoreboard.replace_block(page, table)
    assert once.startswith("above\n") and once.endswith("\nbelow\n") and "old" not in once
    assert scoreboard.replace_block(once, table) == once
    with pytest.raises(ValueError, match="claims-table"):
        scoreboard.replace_block("no markers", table)


@pytest.mark.parametrize("op", [">=", "<="])
def test_strip_shades_the_side_where_the_criterion_holds(op):
    (row,) = scoreboard.flatten([joined("avagrad", "A1", "reproduced", op=op)], CHAPTERS)
    drawing = ElementTree.fromstring(pictures.strip(row))
    shaded, point = drawing.find("rect"), drawing.find("circle")
    left = float(shaded.get("x"))
    inside = left <= float(point.get("cx")) <= left + float(shaded.get("width"))
    assert inside == row["criterion"].holds(row["measured"]["estimate"]) == (op == ">=")
    assert "interval 0.61 to 0.86" in drawing.get("aria-label")


def test_strip_within_and_wide_positive_ranges_draw_a_band():
    (row,) = scoreboard.flatten([joined("avagrad", "A1", "reproduced", estimate=200.0, ci=(150.0, 300.0))], CHAPTERS)
    assert ElementTree.fromstring(pictures.strip(row)) is not None
    row["criterion"] = Criterion("gain", "within", 0.0, margin=0.5)
    band = ElementTree.fromstring(pictures.strip(row | {"measured": {"estimate": 0.0, "ci": None}})).find("rect")
    assert float(band.get("x")) > 0 and float(band.get("width")) < 190


def test_pictures_are_valid_svg_that_names_what_it_shows(rows):
    counts = scoreboard.tally(rows)
    picture = ElementTree.fromstring(pictures.scoreboard_svg(rows, counts, scoreboard.WORDS))
    text = " ".join(node.text for node in picture.iter() if node.text)
    assert "3 of 7 claims confirmed" in picture.get("aria-label") and "✗ A2" in text and "✓ A1★" in text
    assert ElementTree.fromstring(pictures.badge_svg(19, 22)).get("aria-label") == "claims: 19/22 confirmed"


def test_pages_name_the_block_they_lack():
    with pytest.raises(ValueError, match=r"\['tally'\], got 'tallly'"):
        pages.fill("<!-- generated: tallly -->", {"tally": ""})


def test_every_marker_in_the_book_is_generated(rows):
    blocks = pages.blocks(rows, [], {"parts": []})
    made = {"bench", "bench-summary", "paper-scale", *blocks}
    for page in (site.root() / "book").rglob("*.md"):
        pages.fill(page.read_text(), dict.fromkeys(made, ""))


def test_cards_show_primary_claims_and_their_part(rows):
    toc = {"parts": [{"caption": "V · Optimisers", "chapters": [{"file": "notebooks/13_avagrad"}]}]}
    cards = pages.cards(rows, pages.captions(toc))
    assert cards.count('class="eff-card"') == 2 and "V · Optimisers" in cards
    assert cards.count("scoreboard.html#") == len(rows)


def test_paper_scale_shows_default_and_larger_value(tmp_path):
    cell = nbformat.v4.new_code_cell("epochs: int = 12  # passes over the data\nseeds: list = [0, 1]  # runs")
    cell.metadata["tags"] = ["parameters"]
    path = tmp_path / "13_avagrad.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    assert pages.parameters(path)["epochs"] == ("12", "passes over the data")
    text = pages.paper_scale({"avagrad": {"paper": {"epochs": 200}}}, {"avagrad": path}, {"avagrad": "AvaGrad"})
    assert "| `epochs` | `12` | `200` | passes over the data |" in text


@pytest.mark.parametrize(
    ("ratio", "target", "better", "verdict"),
    [
        ({"median": 3.0, "lo": 2.5, "hi": 3.5}, 2.0, "higher", "met"),
        ({"median": 2.1, "lo": 1.9, "hi": 2.5}, 2.0, "higher", "median only"),
        ({"median": 1.5, "lo": 1.4, "hi": 1.6}, 2.0, "higher", "not met"),
        ({"median": 1.0, "lo": 0.9, "hi": 1.05}, 1.1, "lower", "met"),
        ({"median": 1.0, "lo": 0.9, "hi": 1.2}, 1.1, "lower", "median only"),
        (1.3, 1.1, "lower", "not met"),
        (2.0, None, "higher", "no target"),
        (None, 2.0, "higher", "not measured"),
    ],
)
def test_a_target_is_met_by_the_whole_interval(ratio, target, better, verdict):
    row = {"name": "step", "ours": "a", "peer": "b", "ratio": ratio, "target": target, "better": better, "unit": "x"}
    assert performance.judge(row) == verdict
    assert verdict in performance.table([row])


def test_performance_page_counts_targets_and_follows_the_book():
    row = {"name": "step", "ours": "a", "peer": "b", "ratio": 3.0, "target": 2.0, "better": "higher", "unit": "x"}
    bench = {"b": {"rows": [row]}, "a": [row | {"ratio": 1.0}]}
    assert performance.summary(bench).startswith("**1 of 2** targets")
    page = performance.page(bench, {"b": "First", "a": "Second"})
    assert page.index("## First") < page.index("## Second")
    assert performance.headline(bench) == {"b": "step: 3.0× against b", "a": "step: 1.00× against b"}
    assert "make bench" in performance.summary({})


def test_the_environment_overrides_the_one_repository_address(monkeypatch):
    config = pages.load_yaml(site.root() / "_config.yml")
    monkeypatch.setenv("EFFNB_REPOSITORY_URL", "https://example.org/me/book.git")
    monkeypatch.setenv("EFFNB_SITE_URL", "https://me.example.org/book/")
    changed = site.configure(config)
    assert changed["repository"]["url"] == "https://example.org/me/book"
    assert changed["html"]["baseurl"] == "https://me.example.org/book"
    monkeypatch.delenv("EFFNB_REPOSITORY_URL")
    assert site.configure(config)["repository"]["url"] == config["repository"]["url"]


def test_link_check_finds_dead_links_anchors_and_outside_fetches(tmp_path):
    (tmp_path / "b.html").write_text('<h2 id="here">x</h2>')
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">good</a><a href="b.html#gone">x</a><a href="c.html">x</a>'
        '<a href="https://x.org">fine</a>'
        '<script src="https://cdn.example/x.js"></script><img src="missing.png">'
        '<link rel="stylesheet" href="//f.io/a.css">'
    )
    (tmp_path / "s.css").write_text("@import url('https://fonts.example/f.css');")
    found = links.problems(tmp_path)
    assert found == [
        "a.html: b.html#gone: no such anchor",
        "a.html: c.html: no such file",
        "a.html: missing.png: no such file",
        "a.html: fetches https://cdn.example/x.js",
        "a.html: fetches //f.io/a.css",
        "s.css: fetches https://fonts.example/f.css",
    ]


def test_a_problem_keeps_the_published_site_and_ends_non_zero(tmp_path, monkeypatch, capsys):
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "index.html").write_text("old")
    monkeypatch.setattr(site.claims, "check", lambda **_: ["avagrad/A1: stored verdict does not fit"])
    assert site.build(out=tmp_path / "html") == 1
    assert (tmp_path / "html" / "index.html").read_text() == "old"
    assert "stored verdict does not fit" in capsys.readouterr().err


def test_publish_swaps_whole_folders(tmp_path):
    for name, text in (("new", "2"), ("out", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text(text)
    site.publish(tmp_path / "new", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "index.html").read_text() == "2"
