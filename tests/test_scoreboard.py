"""Scoreboard, generated pages, pictures and link checks, on rows made by hand."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
from toy import CLAIMS

from effnb.lab.judge.claims import Claim, Criterion, validated
from effnb.lab.publish import links, performance, scoreboard, site, verdicts

CHAPTERS = {"avagrad": "13_avagrad", "unrolled_solvers": "01_unrolled_solvers"}


def joined(system, short, verdict, *, estimate=0.7342, ci=(0.61, 0.86), primary=False, op=">=", **entry):
    """One row as ``joined`` returns it."""
    raw = CLAIMS["claims"][0] | {
        "id": f"{system.replace('_', '-')}/{short}",
        "anchor": "theory-check",
        "primary": primary,
        "kind": "threshold",
        "statement": f"{short}: lr <best> & `eps`",
        "paper": "96.4 | 96.1 %",
        "criterion": {"metric": "gain", "op": op, "threshold": 0.5, "unit": "points"},
        "conditions": [],
    }
    measured = {"estimate": estimate, "ci": ci and list(ci), "ci_method": "t", "per_seed": [1.0] * 5, "unit": "pt"}
    entry = {
        "verdict": verdict,
        "measured": measured,
        "seeds": list(range(5)),
        "scale": {"dataset": "digits", "n_train": 1437},
        "contradicted": False,
        "note": "",
        "as_stated": None,
        "conditions": [],
    } | entry
    return {
        "system": system,
        "title": system,
        "method": f"{system}: a method",
        "claim": validated(Claim, raw, short),
        "entry": entry,
        "result": {"runtime_s": 12.4},
    }


def flatten(*found, chapters=CHAPTERS, **profiles):
    return scoreboard.flatten({"book": found} | profiles, chapters)


@pytest.fixture
def rows():
    return flatten(
        joined("avagrad", "A10", "reproduced"),
        joined("avagrad", "A2", "not-reproduced-at-this-scale", note="wrong side"),
        joined("avagrad", "A1", "reproduced", primary=True),
        joined("avagrad", "A3", "not-reproduced-at-this-scale", contradicted=True, note="whole interval"),
        joined("unrolled_solvers", "U1", "checked-analytically", primary=True, ci=None),
        joined("unrolled_solvers", "U2", "partially", note="interval straddles"),
        joined("unrolled_solvers", "U3", "not-tested", estimate=None, ci=None, note="needs data"),
    )


def test_rows_are_sorted_by_chapter_then_claim_number(rows):
    assert [r["id"].split("/")[1] for r in rows] == ["U1", "U2", "U3", "A1", "A2", "A3", "A10"]


def test_a_system_without_chapter_is_an_error():
    with pytest.raises(ValueError, match=r"avagrad.*no notebook"):
        flatten(joined("avagrad", "A1", "reproduced"), chapters={})


def test_a_claim_without_result_is_shown_as_not_yet_measured():
    row = joined("avagrad", "A1", "reproduced") | {"entry": None, "result": None}
    (flat,) = flatten(row)
    assert flat["verdict"] == "not-run"
    assert "not yet measured" in scoreboard.board([flat])
    assert verdicts.strip(flat["measured"], flat["criterion"]) == ""


def test_counts_add_up(rows):
    counts = scoreboard.tally(rows)
    assert (counts["total"], counts["confirmed"], counts["contradicted"]) == (7, 3, 1)
    assert (counts["primary_confirmed"], counts["primary_total"]) == (2, 2)
    assert sum(counts["verdicts"].values()) == sum(sum(c.values()) for c in counts["systems"].values()) == 7
    assert "2 not reproduced at this scale (1 contradicted)" in scoreboard.summary(counts)


def test_failures_come_worst_first_and_only_failures(rows):
    assert [r["id"].split("/")[1] for r in scoreboard.failures(rows)] == ["A3", "A2", "U2", "U3"]
    listed = scoreboard.blocks(rows, [], {})["failures"]
    assert all(note in listed for note in ("Wrong side.", "Whole interval.", "Interval straddles.", "Needs data."))
    assert "contradicted" in listed and "<p>None.</p>" in scoreboard.blocks([], [], {})["failures"]


def test_table_escapes_text_links_to_the_section_and_sorts_by_numbers(rows):
    table = scoreboard.board(rows)
    assert "lr &lt;best&gt; &amp; <code>eps</code>" in table and "<best>" not in table
    assert 'href="../notebooks/13_avagrad.html#theory-check"' in table
    assert table.count("<tr id=") == len(rows) and 'data-sort="0.7342"' in table and 'data-sort=""' in table
    assert table.count('aria-pressed="true"') == len(scoreboard.tally(rows)["verdicts"])


def test_table_shows_the_further_conditions_of_a_claim():
    measured = {"estimate": 1.5, "ci": [1.2, 1.8], "per_seed": [1.0] * 5, "unit": "decades"}
    conditions = [{"name": "Adam drifts more", "verdict": "reproduced", "measured": measured}]
    (row,) = flatten(joined("avagrad", "A1", "reproduced", conditions=conditions))
    assert "also ✓ Adam drifts more: 1.50 [1.20, 1.80] decades" in scoreboard.board([row])


def test_a_verdict_is_word_and_sign_not_colour_alone(rows):
    for row in rows:
        look, shown = verdicts.LOOKS[row["verdict"]], verdicts.badge(row["verdict"], row["contradicted"])
        assert look.sign in shown and look.words in shown
        assert ("contradicted" in shown) == row["contradicted"]


def test_the_same_results_give_the_same_text_in_any_order(rows):
    again = flatten(joined("unrolled_solvers", "U2", "partially", note="x"), joined("avagrad", "A1", "reproduced"))
    other = flatten(joined("avagrad", "A1", "reproduced"), joined("unrolled_solvers", "U2", "partially", note="x"))
    assert scoreboard.board(again) == scoreboard.board(other)
    assert scoreboard.machine_copy(again) == scoreboard.machine_copy(other)


def test_machine_copy_is_json_with_every_claim(rows):
    record = json.loads(json.dumps(scoreboard.machine_copy(rows), allow_nan=False))
    assert record["schema"] == "effnb-scoreboard/2" and len(record["claims"]) == record["total"] == 7
    assert record["claims"][0]["criterion"] == "gain ≥ 0.5 pt"


def test_readme_has_a_line_a_chapter_with_both_verdicts(rows):
    table = scoreboard.readme_table(rows, {"avagrad": "3.4× against torch"})
    assert len(table.splitlines()) == 2 + 2 and "notebooks/13_avagrad.ipynb" in table
    assert "96.4 \\| 96.1 %" in table and "3.4× against torch" in table and "✓ reproduced" in table
    assert "at book scale" in table


def test_the_readme_keeps_what_is_around_its_markers(toy_book):
    (toy_book / "README.md").write_text(f"above\n{site.TABLE_START}\nold\n{site.TABLE_END}\nbelow\n")
    site.refresh()
    once = (toy_book / "README.md").read_text()
    assert (
        once.startswith("above\n") and once.endswith("\nbelow\n") and "old" not in once and "notebooks/01_toy" in once
    )
    assert site.outdated() == {}
    (toy_book / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="claims-table"):
        site.outdated()


@pytest.mark.parametrize("op", [">=", "<="])
def test_strip_shades_the_side_where_the_criterion_holds(op):
    (row,) = flatten(joined("avagrad", "A1", "reproduced", op=op))
    drawing = ElementTree.fromstring(verdicts.strip(row["measured"], row["criterion"]))
    shaded, point = drawing.find("rect"), drawing.find("circle")
    left = float(shaded.get("x"))
    inside = left <= float(point.get("cx")) <= left + float(shaded.get("width"))
    assert inside == row["criterion"].holds(row["measured"]["estimate"]) == (op == ">=")
    assert "interval 0.61 to 0.86" in drawing.get("aria-label")


def test_strip_within_and_wide_positive_ranges_draw_a_band():
    (row,) = flatten(joined("avagrad", "A1", "reproduced", estimate=200.0, ci=(150.0, 300.0)))
    assert ElementTree.fromstring(verdicts.strip(row["measured"], row["criterion"])) is not None
    inside = Criterion("gain", "within", 0.0, margin=0.5)
    band = ElementTree.fromstring(verdicts.strip({"estimate": 0.0, "ci": None}, inside)).find("rect")
    assert float(band.get("x")) > 0 and float(band.get("width")) < 190


def test_pictures_are_valid_svg_that_names_what_it_shows(rows):
    found = scoreboard.pictures(rows)
    picture = ElementTree.fromstring(found["scoreboard.svg"])
    text = " ".join(node.text for node in picture.iter() if node.text)
    assert "3 of 7 claims confirmed, 3 as stated" in picture.get("aria-label") and "✗ A2" in text and "✓ A1★" in text
    badge = ElementTree.fromstring(found["claims.svg"])
    assert badge.get("aria-label") == "claims: 3/7 as stated, 3/7 strongest rival"


def test_the_study_speaks_where_it_was_tested_and_both_are_shown():
    stated = {"name": "plain", "verdict": "reproduced", "measured": None}
    book = [joined("avagrad", "A1", "reproduced", primary=True), joined("avagrad", "A2", "partially")]
    study = [
        joined("avagrad", "A1", "not-reproduced-at-this-scale", estimate=0.2, primary=True, as_stated=stated),
        joined("avagrad", "A2", "not-tested", estimate=None, ci=None),
    ]
    first, second = flatten(*book, study=study)
    assert (first["profile"], first["verdict"], first["stated"]) == (
        "study",
        study[0]["entry"]["verdict"],
        "reproduced",
    )
    assert (second["profile"], second["verdict"]) == ("book", "partially")
    counts = scoreboard.tally([first, second])
    assert (counts["confirmed"], counts["stated"], counts["studied"]) == (0, 1, 2)
    table = scoreboard.board([first, second])
    assert 'data-verdict="not-reproduced-at-this-scale" data-stated="reproduced"' in table
    assert "As stated" in table and "Strongest rival" in table and "book: 0.73" in table
    line = scoreboard.readme_table([first, second]).splitlines()[2]
    assert "at study scale | ✓ reproduced | ✗ not reproduced at this scale" in line
    assert "**0 of 2** claims are confirmed against the strongest rival, **1** as the papers state them" in (
        scoreboard.summary(counts)
    )


def test_pages_name_the_block_they_lack():
    with pytest.raises(ValueError, match=r"\['tally'\], got 'tallly'"):
        site.fill("<!-- generated: tallly -->", {"tally": ""})


def test_every_marker_in_the_book_is_generated(rows):
    blocks = scoreboard.blocks(rows, [], {"parts": []})
    made = {"bench", "bench-summary", "failure-count", "stale-studies", *blocks}
    for page in (site.root() / "book").rglob("*.md"):
        site.fill(page.read_text(), dict.fromkeys(made, ""))


def test_cards_show_primary_claims_and_their_part(rows):
    toc = {"parts": [{"caption": "V · Optimisers", "chapters": [{"file": "notebooks/13_avagrad"}]}]}
    cards = scoreboard.blocks(rows, [], toc)["cards"]
    assert cards.count('class="eff-card"') == 2 and "V · Optimisers" in cards
    assert cards.count("scoreboard.html#") == len(rows)


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
    assert verdict in performance.page({"a": [row]}, {})


def test_performance_page_counts_targets_and_follows_the_book():
    row = {"name": "step", "ours": "a", "peer": "b", "ratio": 3.0, "target": 2.0, "better": "higher", "unit": "x"}
    bench = {"b": {"rows": [row]}, "a": [row | {"ratio": 1.0}]}
    assert performance.summary(bench).startswith("**1 of 2** targets")
    page = performance.page(bench, {"b": "First", "a": "Second"})
    assert page.index("## First") < page.index("## Second")
    assert performance.headline(bench) == {"b": "step: 3.0× against b", "a": "step: 1.00× against b"}
    assert "make bench" in performance.summary({})


def test_the_environment_overrides_the_one_repository_address(monkeypatch):
    config = site.load_yaml(site.root() / "_config.yml")
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
    monkeypatch.setattr(site, "check", lambda **_: ["avagrad/A1: stored verdict does not fit"])
    assert site.build(out=tmp_path / "html") == 1
    assert (tmp_path / "html" / "index.html").read_text() == "old"
    assert "stored verdict does not fit" in capsys.readouterr().err


def test_publish_swaps_whole_folders(tmp_path):
    for name, text in (("new", "2"), ("out", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text(text)
    site.publish(tmp_path / "new", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "index.html").read_text() == "2"
