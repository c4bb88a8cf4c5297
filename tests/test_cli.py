"""The command line: help that reads well, errors that name what is wrong, the skeleton."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from effnb.lab.cli import app
from effnb.lab.judge.registry import load
from effnb.lab.paths import root
from effnb.lab.run import skeleton

COMMANDS = ("list", "run", "book", "smoke", "sweep", "claims", "stale", "data", "site", "bench", "new")


def effnb(*arguments):
    return CliRunner().invoke(app, list(arguments))


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
        (["run", "nope"], "no chapter 'nope'"),
        (["run", "toy", "-p", "gain"], "NAME=VALUE"),
        (["run", "toy", "--update", "--profile", "smoke"], "--update publishes the book profile"),
        (["run", "toy", "--profile", "paper"], "profile of toy must be one of"),
        (["sweep", "toy", "--grid", "gain"], "gain"),
        (["data", "fetch"], "effnb data fetch NAME"),
        (["data", "fetch", "nope"], "nope"),
        (["claims", "--diff", "nope"], "revision must be"),
        (["new", "Nope", "--part", "optim", "--number", "30"], "name must be lower case"),
    ],
)
def test_errors_name_what_is_wrong(toy_book, arguments, named):
    done = effnb(*arguments)
    assert done.exit_code != 0 and named in re.sub(r"\s+", " ", done.output)


def test_list_shows_the_chapters(toy_book):
    assert "toy" in effnb("list").output


def test_the_skeleton_passes_lint_and_registers(toy_book, monkeypatch):
    made = skeleton.create("new_system", "optim", 30)
    assert {str(path.relative_to(toy_book)) for path in made} >= {
        "effnb/optim/new_system.py",
        "tests/test_new_system.py",
        "book/claims/new_system.yaml",
        "benchmarks/bench_new_system.py",
        "notebooks/30_new_system.ipynb",
    }
    assert load("new_system").title == "New system"
    monkeypatch.delenv("EFFNB_ROOT")
    settings = ["--config", str(root() / "pyproject.toml")]
    for command in (["check"], ["format", "--check"]):
        lint = [sys.executable, "-m", "ruff", *command, *settings, str(toy_book)]
        done = subprocess.run(lint, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    with monkeypatch.context() as patch, pytest.raises(FileExistsError, match=r"new_system\.py"):
        patch.setenv("EFFNB_ROOT", str(toy_book))
        skeleton.create("new_system", "optim", 30)


def test_the_skeleton_runs(toy_book):
    """Module, test and benchmark of a new chapter work as made; its package is a throw-away one."""
    skeleton.create("new_system", "brand_new", 30)
    path = f"import effnb; effnb.__path__.append({str(toy_book / 'effnb')!r})"
    script = f"{path}; import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests']))"
    done = subprocess.run([sys.executable, "-c", script], cwd=toy_book, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
    bench = f"{path}; sys_path = __import__('sys').path; sys_path.insert(0, 'benchmarks'); import bench_new_system"
    done = subprocess.run(
        [sys.executable, "-c", f"{bench}; print(bench_new_system.run(quick=True)[0]['name'])"],
        cwd=toy_book,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "new_system", done.stderr
