"""Ranges, lock file and conda environment in step; nothing in the tree that should not be."""

import re
import subprocess
import sys
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from effnb.lab.paths import root
from effnb.lab.publish import site

ROOT = root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ranges():
    lines = PROJECT["dependencies"] + [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    return [Requirement(line) for line in lines]


def locked():
    lines = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line.strip()]
    return {canonicalize_name(r.name): r for r in lines if r.marker is None or r.marker.evaluate()}


def test_the_lock_satisfies_every_range():
    found = locked()
    for wanted in ranges():
        exact = next(iter(found[canonicalize_name(wanted.name)].specifier)).version
        assert wanted.specifier.contains(exact), f"{wanted} is locked at {exact}"


def test_the_lock_holds_exact_versions_and_no_addresses():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9-]+==[\w.+!]+( ; .+)?", line), line


def test_ranges_are_never_exact():
    assert all(s.operator != "==" for r in ranges() for s in r.specifier)


def test_conda_uses_the_same_lock_and_python():
    record = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert f"python{PROJECT['requires-python']}" in record["dependencies"]
    assert record["dependencies"][-1]["pip"] == ["-r requirements.lock", "-e ."]


def test_the_locked_torch_and_torchvision_load_together():
    done = subprocess.run([sys.executable, "-c", "import torchvision.ops"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_tracked_that_should_not_be():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    large = [p for p in tracked if (ROOT / p).is_file() and (ROOT / p).stat().st_size > 8_000_000]
    assert not large
    assert not [p for p in tracked if p.startswith(("_build/", ".venv/")) or p.endswith((".pt", ".pyc"))]


def test_the_example_of_the_readme_runs():
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout.split()[0]) < -60, done.stdout + done.stderr


def test_the_readme_shows_the_committed_results():
    assert not site.outdated(), "run `effnb claims --write`"
