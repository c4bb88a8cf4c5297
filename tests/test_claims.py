"""The verdict engine against its rules, the registry and the result files against damage."""

import copy
import json
import math
import subprocess

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from toy import CLAIMS

from effnb.lab.judge import claims
from effnb.lab.claims import Criterion, combine, evaluate, format_measured
from effnb.lab.judge.registry import parse
from effnb.lab.judge.results import parse_result, result_path
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
    found = evaluate(Criterion("speed", ">", 1.5, against="peer", interval="paired-t-log"), [4.0, 9.0], [2.0, 3.0])
    assert found.estimate == pytest.approx(math.sqrt(6)) and found.ci_method == "paired-t-log"


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
    found = evaluate(Criterion("speed-up", ">=", 1.8, interval="order-statistic"), ratios)
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
        ({"op": "="}, "op must be"),
        ({"op": "within"}, "margin must be"),
        ({"margin": 1.0}, "margin must be"),
        ({"interval": "sd"}, "interval must be"),
        ({"threshold": math.nan}, "threshold must be finite"),
        ({"seeds_fraction": 1.5}, "seeds_fraction must be"),
        ({"level": 0.4}, "level must be"),
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
        evaluate(Criterion("m", ">", 0.0, against="b", interval="paired-t-log"), [1.0, 2.0], [1.0, -1.0])


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
        (lambda r: r["claims"][0].update(id="toy/t1"), "does not match"),
        (lambda r: r["claims"][1].update(id="toy/T1"), "ids must be unique"),
        (lambda r: r["claims"][1].update(id="other/T1"), "start with 'toy/'"),
        (lambda r: r["claims"][0].update(primary=False), "exactly one claim must be primary, got 0"),
        (lambda r: r["claims"][0].pop("paper_value_reason"), "paper_value_reason"),
        (lambda r: r["claims"][0].update(extra=1), "extra"),
        (lambda r: r["claims"][1]["criterion"].update(interval="paired-t"), "kind exact and interval none"),
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
    recorder = claims.Recorder("toy", "book", [0, 1, 2])
    values = {"per_seed": [1.0, 1.1, 1.2], "baseline": [0.0, 0.0, 0.1], "conditions": {"small loss": [0.1, 0.2, 0.1]}}
    recorder.record("T1", **(values | changes))
    recorder.record("T2", [4.0, 4.0, 4.0])
    return recorder


def test_a_result_round_trips_and_passes_the_check(toy_book):
    recorder = _record()
    recorder.save(toy_book / "book" / "results")
    stored = claims.load_result("toy")
    assert stored["claims"]["toy/T1"]["verdict"] == "reproduced"
    assert stored["claims"]["toy/T2"]["verdict"] == "checked-analytically"
    assert stored["key"]["notebook"] and "effnb.lab.run.recorder" in stored["key"]["modules"]
    assert claims.check() == []
    assert "reproduced" in claims.at_a_glance("toy")._repr_html_()
    assert [row["entry"]["n_seeds"] for row in claims.joined()] == [3, 3]


def test_smoke_never_gives_a_verdict(toy_book):
    recorder = claims.Recorder("toy", "smoke", [0])
    assert recorder.record("T1", [1.0], [0.0], {"small loss": [0.1]}) == "smoke"
    recorder.record("T2", [4.0])
    recorder.save()
    assert claims.check(profile="smoke", results=toy_book / "_build" / "results") == []


def test_the_recorder_names_what_is_wrong(toy_book):
    recorder = claims.Recorder("toy", "book", [0, 1, 2])
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
        claims.Recorder("toy", "full", [0])
    with pytest.raises(ValueError, match="seeds must hold"):
        claims.Recorder("toy", "book", [])
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


def test_diff_tells_what_changed_since_a_revision(toy_book):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *identity, *arguments], cwd=toy_book, check=True, capture_output=True)

    git("init")
    _record().save(toy_book / "book" / "results")
    git("add", ".")
    git("commit", "-m", "first")
    assert claims.diff("HEAD") == []
    _record(per_seed=[-1.0, -1.1, -1.2]).save(toy_book / "book" / "results")
    assert claims.diff("HEAD") == ["toy/T1: reproduced -> not-reproduced-at-this-scale"]
    changed = copy.deepcopy(CLAIMS)
    changed["claims"][0]["criterion"]["threshold"] = -5.0
    (toy_book / "book" / "claims" / "toy.yaml").write_text(yaml.safe_dump(changed))
    assert "criterion 'gain minus baseline > 0 pt' -> 'gain minus baseline > -5 pt'" in claims.diff("HEAD")[0]
    with pytest.raises(ValueError, match="revision must be"):
        claims.diff("no-such-revision")


def test_digest_needs_finite_numbers():
    with pytest.raises(ValueError, match="Out of range"):
        digest({"a": math.inf})
    assert digest({"a": 1.0}) == digest(json.loads('{"a": 1.0}'))
