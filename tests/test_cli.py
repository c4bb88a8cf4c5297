"""The command line: help that reads well, errors in one line that name what is wrong, tables, the skeleton."""

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml
from toy import CLAIMS
from typer.testing import CliRunner

from effnb.lab import cli
from effnb.lab.cli import app
from effnb.lab.judge.claims import load
from effnb.lab.paths import root
from effnb.lab.run import parameters, process, skeleton
from effnb.lab.run.chapter import RunRecord

COMMANDS = ("list", "run", "book", "smoke", "sweep", "claims", "stale", "data", "site", "bench", "new")


def effnb(*arguments):
    return CliRunner().invoke(app, list(arguments))


def told(done) -> str:
    return re.sub(r"\s+", " ", done.output)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    done = effnb(command, "--help")
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.output)
    assert done.exit_code == 0 and "Usage:" in text
    first = next(line.strip() for line in text.splitlines() if line.strip() and "Usage" not in line)
    assert first[0].isupper() and len(first) > 20


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "nope"], "system must be one of ['toy'], got 'nope'"),
        (["run", "toy", "-p", "gain"], "NAME=VALUE"),
        (["run", "toy", "-p", "gian=3"], "must be among ['gain', 'profile', 'seeds'], got 'gian'"),
        (["run", "toy", "-p", "gain=high"], "gain of toy must be of type float, got 'high'"),
        (["run", "toy", "--update", "--profile", "smoke"], "--update publishes the book or the study profile"),
        (["run", "toy", "--update", "-p", "gain=2"], "--update publishes the book or the study profile"),
        (["run", "toy", "--profile", "paper"], "profile of toy must be one of"),
        (["sweep", "toy", "--grid", "gain"], "gain"),
        (["sweep", "toy", "--grid", "gian=1"], "got 'gian'"),
        (["sweep", "toy", "--grid", "gain=1", "--seeds", "0-99999999999"], "seeds must be at most"),
        (["sweep", "toy", "--grid", "gain=1", "--ray", "127.0.0.1:9"], "no Ray cluster answers there"),
        (["data", "fetch"], "effnb data fetch NAME"),
        (["data", "fetch", "nope"], "nope"),
        (["claims", "--diff", "nope"], "revision must be"),
        (["bench", "toy"], "systems must be among"),
        (["new", "Nope", "--part", "optim", "--number", "30"], "name must be lower case"),
        (["new", "class", "--part", "optim", "--number", "30"], "no word of Python, got 'class'"),
        (["new", "thing", "--part", "lab", "--number", "30"], "part must be a package of methods"),
        (["new", "thing", "--part", "optim", "--number", "1"], "number must be new, got 1, which 01_toy.ipynb has"),
        (["new", "toy", "--part", "optim", "--number", "3"], "exists already: chapter toy"),
        (["new", "thing", "--part", "optim", "--number", "3", "--title", "a\nb"], "title must be one line"),
    ],
)
def test_errors_name_what_is_wrong_in_one_line(toy_book, arguments, named):
    done = effnb(*arguments)
    assert done.exit_code != 0 and named in told(done) and "Traceback" not in done.output
    assert done.output.count("error:") == 1 or "Usage:" in done.output


def test_the_place_of_an_error_is_shown_on_request(toy_book):
    assert isinstance(effnb("--debug", "run", "nope").exception, ValueError)


@pytest.mark.parametrize("command", [["list"], ["claims"], ["stale"], ["run", "toy"], ["smoke"]])
def test_a_root_that_points_nowhere_is_an_error(monkeypatch, tmp_path, command):
    monkeypatch.setenv("EFFNB_ROOT", str(tmp_path / "nowhere"))
    done = effnb(*command)
    assert done.exit_code == 2 and "EFFNB_ROOT must be a checkout of the book" in told(done)
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "_toc.yml").touch()
    done = effnb(*command)
    assert done.exit_code == 2 and ("no chapters in" in told(done) or "system must be one of []" in told(done))


def test_a_relative_root_means_the_same_everywhere(toy_book, monkeypatch):
    monkeypatch.chdir(toy_book.parent)
    monkeypatch.setenv("EFFNB_ROOT", toy_book.name)
    assert root() == toy_book.resolve()


@pytest.mark.parametrize("command", ["list", "claims"])
def test_a_missing_claims_file_is_an_error(toy_book, command):
    (toy_book / "book" / "claims" / "toy.yaml").unlink()
    done = effnb(command)
    assert done.exit_code != 0 and "got 'toy'" in told(done)


def test_one_bad_claims_file_does_not_hide_the_others(toy_book):
    shutil.copy(toy_book / "notebooks" / "01_toy.ipynb", toy_book / "notebooks" / "02_bad.ipynb")
    (toy_book / "book" / "claims" / "bad.yaml").write_text("schema: 3")
    done = effnb("list")
    assert done.exit_code == 1 and "Toy" in done.output and "bad.yaml" in told(done)


def test_claims_without_a_chapter_are_named(toy_book):
    other = yaml.safe_dump(CLAIMS).replace("toy/", "other/").replace("system: toy", "system: other")
    (toy_book / "book" / "claims" / "other.yaml").write_text(other)
    assert cli.chosen(None) == ["toy"]
    assert effnb("claims").exit_code == 1


def test_list_shows_the_chapters(toy_book):
    assert "toy" in effnb("list").output
    assert json.loads(effnb("list", "--json", "--profile", "study").output) == ["toy"]
    (toy_book / "notebooks" / "profiles.yaml").write_text("toy:\n  smoke: {seeds: [0]}\n")
    assert json.loads(effnb("list", "--json", "--profile", "study").output) == []
    assert json.loads(effnb("list", "--json").output) == ["toy"]


# ---- the end of `effnb book` -----------------------------------------------------------------------------------------
def test_the_table_of_the_book_fits_80_columns(toy_book, monkeypatch):
    wide = cli.Console(width=80, record=True)
    name = "continuous_sparsification"
    monkeypatch.setattr(cli, "_counts", lambda *_: ("13/2/1/1", "14/1/1/1"))
    record = RunRecord(name, "book", "ok", 119.6, toy_book / "x.ipynb")
    wide.print(cli._counts_table({name: record, "toy": record}, toy_book))
    text = wide.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(rf"{name} +13/2/1/1 +14/1/1/1 +13/2/1/1 +14/1/1/1 +120", text), text


def entry(verdict, stated=None, not_tested=None):
    return {"verdict": verdict, "as_stated": stated and {"verdict": stated}, "not_tested": not_tested}


def test_each_change_of_a_verdict_is_told(toy_book, monkeypatch):
    claims = load("toy")
    then = {"toy/T1": entry("partially", "reproduced"), "toy/T2": entry("checked-analytically")}
    now = {
        "toy/T1": entry("reproduced", "not-reproduced-at-this-scale"),
        "toy/T2": entry("not-tested", not_tested="data"),
    }

    def joined(results=None, profile="book"):
        found = now if results else then
        return [{"claim": claim, "entry": found[claim.id], "system": "toy"} for claim in claims.claims]

    monkeypatch.setattr(cli, "joined", joined)
    assert cli._changes(toy_book, []) == [
        "toy/T1, strongest rival: partially -> reproduced (better)",
        "toy/T1, as stated: reproduced -> not-reproduced-at-this-scale (worse, within its noise)",
        "toy/T2, strongest rival: checked-analytically; data not here",
        "toy/T2, as stated: checked-analytically; data not here",
    ]
    then, now = now, then
    lines = cli._changes(toy_book, ["toy/T1: partially, was reproduced"])
    assert lines[0] == "toy/T1, strongest rival: reproduced -> partially ([red]worse, a failure[/red])"


# ---- a new chapter ---------------------------------------------------------------------------------------------------
@pytest.fixture
def extended(toy_book):
    """The toy book with the files that a new chapter extends."""
    for name in ("_toc.yml", "book/references.bib", "book/api/index.md", "book/api/optim.md", "pyproject.toml"):
        (toy_book / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Checkout / name, toy_book / name)
    return toy_book


Checkout = root()
TITLE = 'A "new": {system} #1'


@pytest.mark.parametrize(("part", "folder"), [("optim", False), ("brand_new", True)])
def test_the_skeleton_makes_all_of_a_chapter_and_passes_lint(extended, monkeypatch, part, folder):
    made = skeleton.create("new_system", part, 30, TITLE, folder)
    names = {str(path.relative_to(extended)) for path in made}
    assert names >= {
        f"effnb/{part}/new_system/new_system.py" if folder else f"effnb/{part}/new_system.py",
        f"effnb/{part}/__init__.py",
        "tests/test_new_system.py",
        "book/claims/new_system.yaml",
        "benchmarks/bench_new_system.py",
        "notebooks/30_new_system.ipynb",
        "notebooks/profiles.yaml",
        "book/references.bib",
        f"book/api/{part}.md",
        "_toc.yml",
    }
    claims = load("new_system")
    assert claims.title == TITLE and claims.claims[0].as_stated.against == "baseline"
    assert set(parameters.profiles("new_system")) == {"smoke", "study"}
    assert parameters.injected("new_system", "study")["seeds"] == list(range(10))
    contents = yaml.safe_load((extended / "_toc.yml").read_text())
    old = yaml.safe_load((Checkout / "_toc.yml").read_text())
    chapters = [c for p in contents["parts"] for c in p["chapters"]]
    assert {"file": "notebooks/30_new_system", "title": f"30 {TITLE}"} in chapters
    assert len(chapters) == 1 + sum(len(p["chapters"]) for p in old["parts"])
    (reference,) = (c for c in chapters if c["file"] == "book/api/index")
    assert {"file": f"book/api/{part}"} in reference["sections"]
    assert f"effnb.{part}.new_system_value" in (extended / "book" / "api" / f"{part}.md").read_text()
    assert claims.claims[0].source.key in (extended / "book" / "references.bib").read_text()
    monkeypatch.delenv("EFFNB_ROOT")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=extended, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    with monkeypatch.context() as patch, pytest.raises(FileExistsError, match="new_system"):
        patch.setenv("EFFNB_ROOT", str(extended))
        skeleton.create("new_system", part, 31)


def test_the_skeletons_notebook_is_in_the_house_style(extended):
    skeleton.create("new_system", "optim", 30)
    cells = nbformat.read(extended / "notebooks" / "30_new_system.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(len(line) <= 88 for cell in code for line in cell.source.splitlines())
    assert all(len(cell.source.splitlines()) <= 20 for cell in code)
    headings = re.findall(r"^## (.+)$", "\n".join(c.source for c in cells if c.cell_type == "markdown"), re.MULTILINE)
    assert headings == [
        "At a glance", "Idea", "Method", "Experiment", "Cost", "Theory check", "Claims", "At study scale",
        "Where it breaks, and what did not reproduce", "Paper against official code", "Use it on your model", "Try it",
        "References",
    ]  # fmt: skip


def test_what_must_be_filled_in_says_so(extended):
    made = skeleton.create("new_system", "brand_new", 30)
    silent = [p.name for p in made if "PLACEHOLDER" not in p.read_text()]
    assert sorted(silent) == ["__init__.py", "_toc.yml", "profiles.yaml"]


@pytest.mark.parametrize("folder", [False, True])
def test_the_skeleton_runs(extended, folder):
    """Module, test, benchmark and chapter of a new system work as made; its package is a throw-away one."""
    skeleton.create("new_system", "brand_new", 30, folder=folder)
    path = f"import effnb; effnb.__path__.append({str(extended / 'effnb')!r})"
    script = f"{path}; import pytest, sys; sys.exit(pytest.main(['-p', 'no:cacheprovider', 'tests']))"
    done = subprocess.run([sys.executable, "-c", script], cwd=extended, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
    bench = f"{path}; sys_path = __import__('sys').path; sys_path.insert(0, 'benchmarks'); import bench_new_system"
    done = subprocess.run(
        [sys.executable, "-c", f"{bench}; print(bench_new_system.run(quick=True)[0]['name'])"],
        cwd=extended,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "new_system", done.stderr
    if not folder:
        # The kernel finds the throw-away part by a file of its own on the path.
        hook = extended / "hook" / "sitecustomize.py"
        hook.parent.mkdir()
        hook.write_text(path + "\n")
        further = {"PYTHONPATH": f"{hook.parent}:{Checkout}"}
        command = [sys.executable, "-m", "effnb.lab.cli", "run", "new_system", "--profile", "smoke"]
        code, output = process.call(command, further, timeout=600)
        assert code == 0, output
