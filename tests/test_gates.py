"""The gates themselves: each kind of wrong must turn its check red."""

import copy
import json
import shutil
import sys
import types

import pytest
import yaml
from toy import CLAIMS, make_toy_book, toy_notebook
from typer.testing import CliRunner

from effnb.lab.cli import app
from effnb.lab.judge.claims import Claim
from effnb.lab.judge.results import check, compare, result_path
from effnb.lab.paths import digest
from effnb.lab.run import chapter as runner
from effnb.lab.run import stale as key


def effnb(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    """The toy book with its chapter run and its outputs committed, made once."""
    book = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        make_toy_book(book, patch)
        assert effnb("run", "--update", "toy").exit_code == 0
    return book


@pytest.fixture
def published(run_once, toy_book):
    """A fresh copy of the published toy book."""
    shutil.copytree(run_once, toy_book, dirs_exist_ok=True)
    return toy_book


def committed(book):
    return result_path("toy", "book", book / "book" / "results")


def reseal(path, change):
    """Change a result and give it a fitting digest, as a careful forger would."""
    record = json.loads(path.read_text())
    change(record)
    record["digest"] = digest({k: v for k, v in record.items() if k != "digest"})
    path.write_text(json.dumps(record))


def test_a_sound_book_is_green(published):
    assert effnb("claims").exit_code == 0
    assert effnb("stale").exit_code == 0
    assert runner.stale() == {}


def test_a_broken_notebook_is_red_and_the_others_still_run(published):
    broken = toy_notebook({"print(2 + 2)": "raise RuntimeError('deliberately broken')"})
    (published / "notebooks" / "02_broken.ipynb").write_text(broken)
    shutil.rmtree(published / "_build")
    done = effnb("run", "broken", "toy")
    assert done.exit_code == 1 and "deliberately broken" in done.output
    assert (published / "_build" / "executed" / "01_toy.ipynb").exists()


def test_a_false_claim_is_red_unless_times_decide_it(published, monkeypatch):
    """The notebook now measures the opposite: `make book` compares with the committed verdict."""
    (published / "notebooks" / "01_toy.ipynb").write_text(toy_notebook({"gain: float = 1.0": "gain: float = -1.0"}))
    assert effnb("run", "toy").exit_code == 0
    built = published / "_build" / "results"
    assert compare(built) == ["toy/T1: not-reproduced-at-this-scale, was reproduced"]
    assert compare(built, excused=True) == []
    monkeypatch.setattr(Claim, "timed", property(lambda claim: claim.id == "toy/T1"))
    assert compare(built) == [] and len(compare(built, excused=True)) == 1


def test_a_claim_that_can_not_be_tested_here_is_told_but_not_red(published):
    """The data or package that it needs is missing on this machine: no crash, no failure."""
    built = published / "_build" / "results"
    (published / "notebooks" / "01_toy.ipynb").write_text(
        toy_notebook(
            {
                'record.record("T1", ours, baseline, {"small loss": [0.1 + 0.01 * s for s in seeds]})': (
                    'record.not_tested("T1", "needs the extra llm", "extra")'
                )
            }
        )
    )
    assert effnb("run", "toy").exit_code == 0
    assert compare(built) == []
    assert compare(built, excused=True) == ["toy/T1: not-tested, was reproduced"]


def test_a_worse_verdict_within_the_old_intervals_is_told_but_not_red(published):
    built = published / "_build" / "results"
    path = result_path("toy", "book", built)

    def worsen(record, shift, of="measured"):
        entry = record["claims"]["toy/T1"]
        entry["verdict"] = "partially"
        (entry if of == "measured" else entry["conditions"][0])["measured"]["estimate"] += shift

    reseal(path, lambda record: worsen(record, 0.01))
    assert compare(built) == [] and len(compare(built, excused=True)) == 1
    reseal(path, lambda record: worsen(record, 5.0, "condition"))
    assert len(compare(built)) == 1 and compare(built, excused=True) == []


def test_a_claimed_verdict_that_the_values_do_not_give_is_red(published):
    reseal(committed(published), lambda r: r["claims"]["toy/T1"]["measured"].update(per_seed=[-1.0, -1.1, -1.2]))
    assert "does not follow from per_seed" in "".join(check())
    assert effnb("claims").exit_code == 1


def test_a_softened_verdict_is_red(published):
    reseal(committed(published), lambda r: r["claims"]["toy/T2"].update(verdict="partially"))
    assert "the values give 'checked-analytically'" in "".join(check())


def test_a_result_edited_by_hand_is_red(published):
    text = committed(published).read_text()
    committed(published).write_text(text.replace('"estimate": 1.0', '"estimate": 1.5', 1))
    assert committed(published).read_text() != text
    assert "edited after it was written" in "".join(check())
    assert effnb("claims").exit_code == 1


def test_an_edited_output_of_a_committed_notebook_is_red(published):
    path = published / "notebooks" / "01_toy.ipynb"
    sound = path.read_text()
    path.write_text(sound.replace('"4\\n"', '"5\\n"'))
    assert path.read_text() != sound
    done = effnb("claims")
    assert done.exit_code == 1 and "the outputs are not those of the stored result" in " ".join(done.output.split())
    # The cells that show stored results are compared with what those give.
    path.write_text(sound.replace("reproduced", "Reproduced", 1))
    assert path.read_text() != sound
    done = effnb("claims")
    assert done.exit_code == 1 and "does not show the stored results" in " ".join(done.output.split())
    assert effnb("claims", "--write").exit_code == 0 and path.read_text() == sound


def test_a_benchmark_edited_by_hand_is_red(published):
    path = published / "book" / "results" / "bench" / "toy.json"
    path.parent.mkdir()
    content = {"rows": [{"name": "a", "ratio": 3.0, "target": 2.0, "better": "higher", "verdict": "met"}]}
    path.write_text(json.dumps(content | {"digest": digest(content)}))
    assert effnb("claims").exit_code == 0
    path.write_text(path.read_text().replace("3.0", "4.0"))
    assert effnb("claims").exit_code == 1


def test_a_stale_study_is_named_and_not_red(published):
    assert effnb("run", "toy", "--profile", "study", "--update").exit_code == 0
    assert effnb("claims").exit_code == effnb("stale").exit_code == 0
    (published / "notebooks" / "profiles.yaml").write_text("toy:\n  smoke: {seeds: [0]}\n  study: {seeds: [0, 1]}\n")
    done = effnb("stale")
    assert done.exit_code == 0 and "toy: study is older than: parameters" in done.output


def test_a_stale_chapter_is_red(published):
    path = published / "notebooks" / "01_toy.ipynb"
    path.write_text(path.read_text().replace("0.05 * seed", "0.04 * seed"))
    done = effnb("stale")
    assert done.exit_code == 1 and "notebook" in done.output


def test_prose_makes_nothing_stale_but_a_script_in_data_does(published, monkeypatch):
    path = published / "notebooks" / "01_toy.ipynb"
    path.write_text(path.read_text().replace("# Toy", "# A toy"))
    assert runner.stale() == {}
    script = published / "data" / "toy_script.py"
    script.parent.mkdir()
    script.write_text("VALUE = 1\n")
    module = types.ModuleType("toy_script")
    module.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "toy_script", module)
    assert "data/toy_script.py" in key.loaded_modules()
    before = key.module_hash("data/toy_script.py")
    script.write_text("VALUE = 2\n")
    assert key.module_hash("data/toy_script.py") != before
    assert key.module_hash("data/no_script.py") is None


def test_a_changed_lock_or_module_makes_a_chapter_stale(published, monkeypatch):
    (published / "requirements.lock").write_text("numpy==3\n")
    assert runner.stale() == {"toy": ["lock"]}
    assert effnb("stale").exit_code == 1 and effnb("stale", "--ignore", "lock").exit_code == 0
    monkeypatch.setattr("effnb.lab.run.stale.module_hash", lambda name: "other")
    changed = runner.stale()["toy"]
    assert "effnb.lab.run.record" in changed and not [part for part in changed if "publish" in part]


def test_a_claim_changed_after_its_result_is_red(published):
    changed = copy.deepcopy(CLAIMS)
    changed["claims"][0]["criterion"]["threshold"] = -5.0
    (published / "book" / "claims" / "toy.yaml").write_text(yaml.safe_dump(changed))
    assert check() == ["toy/T1: the claim was changed after it was measured: run the chapter again"]
    assert effnb("claims").exit_code == 1


def test_a_claim_without_result_and_a_result_without_claim_are_red(published):
    fewer = copy.deepcopy(CLAIMS)
    extra = copy.deepcopy(fewer["claims"].pop())
    (published / "book" / "claims" / "toy.yaml").write_text(yaml.safe_dump(fewer))
    assert check() == ["toy/T2: measured, but not registered"]
    fewer["claims"] += [extra, extra | {"id": "toy/T3"}]
    (published / "book" / "claims" / "toy.yaml").write_text(yaml.safe_dump(fewer))
    assert check() == ["toy/T3: registered, but the result does not hold it"]
    committed(published).unlink()
    assert "no result" in check()[0]


def test_nbval_turns_red_when_a_checked_output_changes(published):
    assert effnb("smoke").exit_code == 0
    path = published / "notebooks" / "01_toy.ipynb"
    path.write_text(path.read_text().replace('"4\\n"', '"5\\n"'))
    assert effnb("smoke").exit_code != 0
