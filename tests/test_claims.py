"""The verdict engine against its rules, the registry and the result files against damage."""

import copy
import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from toy import CLAIMS

from effnb import lab
from effnb.lab.judge.claims import ClaimSet, Criterion, Sample, combine, evaluate, holm, parse
from effnb.lab.judge.results import (
    check,
    format_measured,
    joined,
    load_result,
    parse_result,
    result_path,
    stated_verdict,
)
from effnb.lab.paths import digest

VALUES = st.lists(st.floats(-100, 100).map(lambda v: round(v, 3)), min_size=2, max_size=8)
ORDERED = ("not-reproduced-at-this-scale", "partially", "reproduced")


@pytest.mark.parametrize(
    ("op", "values", "verdict", "contradicted"),
    [
        (">", [1.0, 1.1, 0.9], "reproduced", False),
        (">", [2.0, 0.1, 0.2], "partially", False),  # the interval straddles
        (">", [-1.0, -1.1, -0.9], "not-reproduced-at-this-scale", True),
        (">", [-1.0, 0.9, -0.5], "not-reproduced-at-this-scale", False),
        ("<", [-1.0, -1.1, -0.9], "reproduced", False),
        (">=", [0.0, 0.0, 0.0], "reproduced", False),
        (">", [0.0, 0.0, 0.0], "not-reproduced-at-this-scale", True),
    ],
)
def test_rules_of_direction(op, values, verdict, contradicted):
    found = evaluate(Criterion("gain", op, 0.0), values)
    assert (found.verdict, found.contradicted) == (verdict, contradicted)


def test_estimate_and_interval_are_students():
    found = evaluate(Criterion("gain", ">", 0.0, against="baseline"), [3.0, 5.0], [1.0, 1.0])
    half = 12.706204736 * math.sqrt(2) / math.sqrt(2)
    assert found.estimate == 3.0 and found.ci == pytest.approx([3 - half, 3 + half])


def test_ratio_uses_the_geometric_mean():
    found = evaluate(Criterion("speed", ">", 1.5, against="peer", interval="t-log"), [4.0, 9.0], [2.0, 3.0])
    assert found.estimate == pytest.approx(math.sqrt(6)) and found.method == "t-log"


def test_too_few_single_seeds_is_partial():
    values = [1.0] * 7 + [-0.05] * 3
    found = evaluate(Criterion("gain", ">", 0.0), values)
    assert found.ci[0] > 0 and found.verdict == "partially" and "7 of 10" in found.reason


def test_equivalence_uses_the_90_percent_interval():
    values = [0.1, -0.1, 0.2, -0.2, 0.0]
    wide = evaluate(Criterion("gain", "within", 0.0, margin=0.2, seeds_fraction=0.0), values)
    t_90, sd = 2.131846786, math.sqrt(0.1 / 4)
    assert wide.ci[1] == pytest.approx(t_90 * sd / math.sqrt(5)) and wide.verdict == "reproduced"
    assert evaluate(Criterion("gain", "within", 0.0, margin=0.1), values).verdict == "partially"
    assert evaluate(Criterion("gain", "within", 5.0, margin=0.1), values).contradicted


def test_order_statistics_for_timing():
    ratios = [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 1.9]
    found = evaluate(Criterion("speed-up", ">=", 1.8, interval="order"), ratios)
    assert (found.estimate, found.ci, found.verdict) == (2.2, [1.9, 2.5], "reproduced")


def test_exact_is_checked_analytically():
    exact = Criterion("sum", "within", 4.0, margin=1e-9, interval="none")
    assert evaluate(exact, [4.0]).verdict == "checked-analytically"
    assert evaluate(exact, [4.0, 4.1]).contradicted


def test_one_run_is_never_a_reproduction():
    assert evaluate(Criterion("gain", ">", 0.0), [1.0]).verdict == "partially"


@given(VALUES, st.floats(0, 50), st.sampled_from([">", ">=", "<", "<="]))
def test_a_shift_in_the_good_direction_never_worsens(values, shift, op):
    criterion = Criterion("gain", op, 0.0)
    better = [v + shift * (1 if ">" in op else -1) for v in values]
    before, after = (ORDERED.index(evaluate(criterion, v).verdict) for v in (values, better))
    assert after >= before


@given(VALUES, st.randoms())
def test_the_order_of_seeds_does_not_matter(values, random):
    shuffled = random.sample(values, len(values))
    a, b = (evaluate(Criterion("gain", ">", 0.0), v) for v in (values, shuffled))
    assert a.verdict == b.verdict and a.estimate == pytest.approx(b.estimate)


def test_conditions_turn_a_reproduction_into_a_partial_one_and_are_named():
    good, bad = (evaluate(Criterion("m", ">", 0.0), v) for v in ([1.0, 1.1, 0.9], [-1.0, -1.1, -0.9]))
    assert combine(good, {"other": bad})[0] == "partially" and "other" in combine(good, {"other": bad})[2]
    assert combine(bad, {"other": good})[0] == "not-reproduced-at-this-scale"
    assert combine(good, {"other": good})[0] == "reproduced"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"op": "="}, "op\n.*should be"),
        ({"op": "within"}, "margin must be"),
        ({"margin": 1.0}, "margin must be"),
        ({"interval": "sd"}, "interval\n.*should be"),
        ({"threshold": math.nan}, "threshold must be finite"),
        ({"seeds_fraction": 1.5}, "seeds_fraction\n.*less than or equal"),
        ({"level": 0.4}, "level\n.*greater than"),
    ],
)
def test_bad_criteria_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        Criterion(**({"metric": "m", "op": ">", "threshold": 0.0} | arguments))


@pytest.mark.parametrize(
    ("values", "baseline", "named"),
    [
        ([], None, "per_seed must hold"),
        ([1.0, math.nan], None, "per_seed must be finite"),
        ([1.0, 2.0], [1.0, 2.0], "baseline must be given exactly"),
    ],
)
def test_bad_values_are_named(values, baseline, named):
    with pytest.raises(ValueError, match=named):
        evaluate(Criterion("m", ">", 0.0), values, baseline)


def test_unequal_lengths_and_ratios_of_negative_values_are_named():
    with pytest.raises(ValueError, match="length of per_seed 2, got 1"):
        evaluate(Criterion("m", ">", 0.0, against="b"), [1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="positive for ratios"):
        evaluate(Criterion("m", ">", 0.0, against="b", interval="t-log"), [1.0, 2.0], [1.0, -1.0])


@pytest.mark.parametrize(
    ("measured", "text"),
    [
        ({"estimate": 86.123, "ci": [85.9, 86.4], "per_seed": [1, 2], "unit": "%"}, "86.12 [85.90, 86.40] % (n = 2)"),
        ({"estimate": 120.4, "ci": [100.0, 150.0], "per_seed": [1], "unit": "x"}, "120 [100, 150] x (n = 1)"),
        ({"estimate": 3.0, "ci": None, "per_seed": [3.0], "unit": ""}, "3.00 (n = 1)"),
        ({"estimate": -0.0001, "ci": [-0.1, 0.1], "per_seed": [0], "unit": ""}, "0.00 [-0.10, 0.10] (n = 1)"),
        ({"estimate": None, "ci": None, "per_seed": []}, "-"),
    ],
)
def test_rounding_follows_the_interval(measured, text):
    assert format_measured(measured) == text


def _edit(path, change):
    record = copy.deepcopy(CLAIMS)
    change(record)
    return yaml.safe_dump(record)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r["claims"][0].update(id="toy/t1"), r"claims\.0\.id: String should match"),
        (lambda r: r["claims"][1].update(id="toy/T1"), "ids must be unique"),
        (lambda r: r["claims"][1].update(id="other/T1"), "start with 'toy/'"),
        (lambda r: r["claims"][0].update(primary=False), "exactly one claim must be primary, got 0"),
        (lambda r: r["claims"][0].pop("paper_value_reason"), "paper_value_reason"),
        (lambda r: r["claims"][0].update(extra=1), "extra"),
        (lambda r: r["claims"][1]["criterion"].update(interval="t"), "kind exact and interval none"),
        (lambda r: r["claims"][0]["criterion"].update(op="within"), "margin must be"),
    ],
)
def test_a_bad_registry_is_refused(change, named):
    with pytest.raises(ValueError, match=named):
        parse(_edit(None, change), "toy.yaml")


def test_yaml_is_loaded_safely():
    with pytest.raises(ValueError, match="not valid YAML"):
        parse("!!python/object/apply:os.system ['true']", "toy.yaml")


def _record(**changes):
    recorder = lab.Recorder("toy", "book", [0, 1, 2])
    values = {"per_seed": [1.0, 1.1, 1.2], "baseline": [0.0, 0.0, 0.1], "conditions": {"small loss": [0.1, 0.2, 0.1]}}
    recorder.record("T1", **(values | changes))
    recorder.record("T2", [4.0, 4.0, 4.0])
    return recorder


def test_a_result_round_trips_and_passes_the_check(toy_book):
    recorder = _record()
    recorder.save(toy_book / "book" / "results")
    stored = load_result("toy")
    assert stored["claims"]["toy/T1"]["verdict"] == "reproduced"
    assert stored["claims"]["toy/T2"]["verdict"] == "checked-analytically"
    assert stored["key"]["notebook"] and "effnb.lab.run.record" in stored["key"]["modules"]
    assert check() == []
    assert "reproduced" in lab.show.at_a_glance("toy")._repr_html_()
    assert [len(row["entry"]["seeds"]) for row in joined()] == [3, 3]


def test_smoke_never_gives_a_verdict(toy_book):
    recorder = lab.Recorder("toy", "smoke", [0])
    assert recorder.record("T1", [1.0], [0.0], {"small loss": [0.1]}) == "smoke"
    recorder.record("T2", [4.0])
    recorder.save()
    assert check(profile="smoke", results=toy_book / "_build" / "results") == []


def test_the_recorder_names_what_is_wrong(toy_book):
    recorder = lab.Recorder("toy", "book", [0, 1, 2])
    with pytest.raises(ValueError, match="conditions of toy/T1 must be"):
        recorder.record("T1", [1.0] * 3, [0.0] * 3)
    with pytest.raises(ValueError, match="one value a seed, 3, got 2"):
        recorder.record("T1", [1.0] * 2, [0.0] * 2, {"small loss": [0.1] * 3})
    with pytest.raises(KeyError, match="no claim 'T9'"):
        recorder.record("T9", [1.0] * 3)
    with pytest.raises(ValueError, match="reason must say why"):
        recorder.not_tested("T1", " ")
    recorder.not_tested("T1", "no data here")
    with pytest.raises(ValueError, match="recorded already"):
        recorder.not_tested("T1", "again")
    with pytest.raises(ValueError, match=r"missing \['T2'\]"):
        recorder.save()
    with pytest.raises(ValueError, match="profile must be"):
        lab.Recorder("toy", "full", [0])
    with pytest.raises(ValueError, match="seeds must hold"):
        lab.Recorder("toy", "book", [])
    assert not result_path("toy", "book").exists()


def test_an_interrupted_write_leaves_the_old_result(toy_book, monkeypatch):
    target = toy_book / "book" / "results"
    _record().save(target)
    before = result_path("toy", "book", target).read_text()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        _record(per_seed=[2.0, 2.1, 2.2]).save(target)
    assert result_path("toy", "book", target).read_text() == before
    assert [p.name for p in (target / "book").iterdir()] == ["toy.json"]


def test_a_truncated_result_is_named(toy_book):
    _record().save(toy_book / "book" / "results")
    text = result_path("toy", "book", toy_book / "book" / "results").read_text()
    with pytest.raises(ValueError, match=r"toy\.json: not valid JSON"):
        parse_result(text[: len(text) // 2], "toy.json")


# --- two verdicts, preconditions, families, items, counts, units ---------------------------------------------------


def _book(toy_book, **changes):
    """The toy's claims with changes of its first claim, written; returns a recorder with T2 recorded."""
    record = copy.deepcopy(CLAIMS)
    record["claims"][0].update(changes)
    (toy_book / "book" / "claims" / "toy.yaml").write_text(yaml.safe_dump(record))
    recorder = lab.Recorder("toy", "book", [0, 1, 2])
    recorder.record("T2", [4.0] * 3)
    return recorder


OURS, RIVAL, LOSS = [1.0, 1.1, 1.2], [0.0, 0.0, 0.1], {"small loss": [0.1, 0.2, 0.1]}


def test_a_comparative_claim_without_as_stated_is_refused():
    record = copy.deepcopy(CLAIMS)
    del record["claims"][0]["as_stated"]
    with pytest.raises(ValueError, match="as_stated must be given for a comparative claim"):
        parse(yaml.safe_dump(record), "toy.yaml")


def test_the_two_verdicts_neither_lower_nor_lift_each_other(toy_book):
    stated = {"metric": "gain", "op": ">", "threshold": 0.0, "against": "plain"}
    recorder = _book(toy_book, as_stated=stated)
    assert recorder.record("T1", [-1.0, -1.1, -1.2], RIVAL, LOSS, as_stated=(OURS, RIVAL)) == ORDERED[0]
    recorder.save(toy_book / "book" / "results")
    entry = load_result("toy")["claims"]["toy/T1"]
    assert (entry["verdict"], entry["as_stated"]["verdict"], entry["as_stated"]["name"]) == (*ORDERED[::2], "plain")
    assert check() == []
    with pytest.raises(ValueError, match="as_stated of toy/T1 must be given exactly"):
        _book(toy_book, as_stated=stated).record("T1", OURS, RIVAL, LOSS)


def test_as_stated_is_the_same_or_a_reason(toy_book):
    for stated, verdict in (("same", "reproduced"), ({"reason": "no such data"}, "not-tested")):
        recorder = _book(toy_book, as_stated=stated)
        recorder.record("T1", OURS, RIVAL, LOSS)
        claim = recorder.registered["T1"]
        assert stated_verdict(claim, recorder.entries()[claim.id]) == verdict
        assert stated_verdict(claim, None) is None


def test_an_unmet_precondition_means_not_tested(toy_book):
    sensitive = [{"name": "room to see", "metric": "full - head", "op": ">", "threshold": 5.0}]
    for room, verdict in (([6.0, 6.1, 6.2], "reproduced"), ([4.0, 6.1, 6.2], "not-tested")):
        recorder = _book(toy_book, preconditions=sensitive)
        assert recorder.record("T1", OURS, RIVAL, LOSS, preconditions={"room to see": room}) == verdict
        recorder.save(toy_book / "book" / "results")
        assert check() == []
    assert "Precondition not met: room to see" in recorder.entries()["toy/T1"]["note"]
    with pytest.raises(ValueError, match="preconditions of toy/T1 must be"):
        _book(toy_book, preconditions=sensitive).record("T1", OURS, RIVAL, LOSS)


@given(st.lists(st.floats(1e-6, 0.2), min_size=1, max_size=6))
def test_holm_by_intervals_is_holm_by_p_values(p):
    """Against the textbook's adjusted p values; a claim holds at a level where its p is at most one minus it."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, worst = {}, 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[str(i)] = worst
    assume_clear = [name for name, value in adjusted.items() if abs(value - 0.05) > 1e-9]
    held = holm({str(i): lambda level, p=p[i]: p <= 1 - level for i in range(len(p))})
    assert held & set(assume_clear) == {name for name in assume_clear if adjusted[name] <= 0.05}


def test_a_family_is_corrected_by_the_judge(toy_book):
    weak = [0.8, 1.0, 1.2]  # holds at 95 %, not at 97.5 %
    narrow = {"metric": "gain", "op": ">", "threshold": 0.5, "unit": "pt", "against": "baseline"}
    record = copy.deepcopy(CLAIMS)
    record["claims"][0].update(criterion=narrow, conditions=[], family="both")
    other = copy.deepcopy(record["claims"][0]) | {"id": "toy/T3", "primary": False}
    record["claims"].append(other)
    (toy_book / "book" / "claims" / "toy.yaml").write_text(yaml.safe_dump(record))
    zero = [0.0, 0.0, 0.0]
    for third, verdicts in (
        ([1.0, 1.0001, 1.0002], ["reproduced", "reproduced"]),
        ([-1.0, 2.0, 1.0], ["partially", "partially"]),
    ):
        recorder = lab.Recorder("toy", "book", [0, 1, 2])
        recorder.record("T2", [4.0] * 3)
        assert recorder.record("T1", weak, zero) == "reproduced"
        recorder.record("T3", third, zero)
        recorder.save(toy_book / "book" / "results")
        entries = load_result("toy")["claims"]
        assert [entries[i]["verdict"] for i in ("toy/T1", "toy/T3")] == verdicts and check() == []
    assert "Holm" in entries["toy/T1"]["note"]


def _stored(toy_book, criterion, sample):
    """Record the toy's first claim with another criterion, store and read it back; returns the stored record."""
    fields = {"metric": "share", "op": ">", "threshold": 0.5} | criterion
    recorder = _book(toy_book, criterion=fields, conditions=[], as_stated=None)
    recorder.record("T1", sample, seeds=range(len(sample.per_seed)))
    recorder.save(toy_book / "book" / "results")
    assert check() == []
    return load_result("toy")


def test_items_counts_and_units_are_stored_and_judged_again(toy_book):
    import numpy as np

    rng = np.random.default_rng(0)
    hits = (rng.random((3, 200)) < 0.8).astype(float)
    found = _stored(toy_book, {"interval": "t-items"}, Sample.of_items(hits))["claims"]["toy/T1"]["measured"]
    assert found["items"] == pytest.approx([hits.mean(0).var(ddof=1), 200])
    found = _stored(toy_book, {"interval": "binomial"}, Sample.of_counts([(9, 10), (8, 10)]))
    assert found["claims"]["toy/T1"]["measured"]["counts"] == [[9, 10], [8, 10]]
    target = rng.normal(size=50)
    scores = target + 0.3 * rng.normal(size=(2, 50))
    sample = Sample.of_units(scores, target=target, statistic="spearman")
    found = _stored(toy_book, {"interval": "bootstrap-units", "statistic": "spearman"}, sample)
    assert found["units_sha256"] and (toy_book / "book" / "results" / "book" / "toy.npz").is_file()
    path = toy_book / "book" / "results" / "book" / "toy.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "toy.npz: missing, or not the file" in check()[0]


@pytest.mark.parametrize(
    ("interval", "sample", "named"),
    [
        ("t-items", Sample([1.0, 2.0]), "items must be given"),
        ("binomial", Sample([1.0, 2.0]), "counts must be given"),
        ("bootstrap-units", Sample([1.0, 2.0]), "units must be given"),
        ("t", Sample([1.0, 2.0], items=(1.0, 5)), "items must be given exactly"),
        ("t", Sample([1.0, 2.0], rivals=["a"]), "rivals must have the length"),
    ],
)
def test_a_sample_must_fit_its_interval(interval, sample, named):
    with pytest.raises(ValueError, match=named):
        evaluate(Criterion("m", ">", 0.0, interval=interval), sample)


@pytest.mark.parametrize(
    "forge",
    [
        lambda e: e.update(verdict="partially"),
        lambda e: e.update(verdict="not-tested", not_tested="data"),
        lambda e: e["measured"].update(estimate=9.0),
        lambda e: e["measured"].update(ci=[0.5, 9.0]),
        lambda e: e["conditions"][0].update(verdict="partially"),
        lambda e: e["conditions"][0]["measured"].update(estimate=0.05),
        lambda e: e["conditions"][0]["measured"].update(ci=[0.0, 0.1]),
        lambda e: e["seeds"].pop(),
        lambda e: e.update(registered_hash="0" * 64),
    ],
)
def test_what_a_forger_changes_is_found_even_with_a_new_digest(toy_book, forge):
    _record().save(toy_book / "book" / "results")
    path = result_path("toy", "book", toy_book / "book" / "results")
    record = json.loads(path.read_text())
    forge(record["claims"]["toy/T1"])
    record["digest"] = digest({k: v for k, v in record.items() if k != "digest"})
    path.write_text(json.dumps(record))
    assert len(check()) >= 1


def test_a_study_needs_no_result_but_is_checked_where_there_is_one(toy_book):
    assert check(profile="study") == []
    recorder = lab.Recorder("toy", "study", [0, 1, 2])
    recorder.record("T1", OURS, RIVAL, LOSS)
    recorder.record("T2", [4.0] * 3)
    figure, _ = lab.plot.single()
    recorder.figure(figure, "a-curve", alt="nothing drawn")
    recorder.table("a-table", ["name", "value"], [["a", 1.5], ["b", None]], caption="two rows")
    recorder.save(toy_book / "book" / "results")
    assert check(profile="study") == []
    page = lab.show.study("toy")._repr_html_()
    assert "nothing drawn" in page and "two rows" in page and "reproduced" in page
    picture = toy_book / "book" / "results" / "study" / "toy" / "a-curve.svg"
    picture.write_text("<svg/>")
    assert "figure a-curve is missing or not the one of this run" in check(profile="study")[0]
    with pytest.raises(ValueError, match="alt must say"):
        recorder.figure(figure, "b", alt=" ")
    with pytest.raises(ValueError, match="must have 2 cells"):
        recorder.table("c", ["name", "value"], [["a"]])


def test_the_schema_is_generated_from_the_model():
    schema = ClaimSet.model_json_schema()
    assert set(schema["properties"]) == {"schema", "system", "title", "method", "claims"}
    assert {"as_stated", "preconditions", "family"} <= set(schema["$defs"]["Claim"]["properties"])


def test_digest_needs_finite_numbers():
    with pytest.raises(ValueError, match="Out of range"):
        digest({"a": math.inf})
    assert digest({"a": 1.0}) == digest(json.loads('{"a": 1.0}'))
