"""Ranges, lock file and conda environment in step; nothing in the tree that should not be."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata

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


def _with_requirements(names):
    """Names of distributions and of all that they require, in this environment."""
    found, left = set(), [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            for line in metadata.requires(name) or ():
                wanted = Requirement(line)
                if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                    left.append(canonicalize_name(wanted.name))
    return found


BARE = """
import sys
class Bare:  # stands for an environment with torch, numpy and scipy alone
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BARRED:
            raise ModuleNotFoundError(f"{name} is not installed in a bare environment", name=name)
sys.meta_path.insert(0, Bare())
import importlib, pathlib, effnb
home = pathlib.Path(effnb.__file__).parent
assert str(home).startswith(HERE), home
for part in sorted(p.parent.name for p in home.glob("*/__init__.py") if p.parent.name != "lab"):
    print(len(importlib.import_module(f"effnb.{part}").__all__) > 0, part)
"""


def test_the_wheel_alone_needs_torch_numpy_and_scipy_only(tmp_path):
    """The base dependencies are all that every part of the package needs, and the wheel holds what it imports."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "source"], check=True)
    changed = subprocess.run(["git", "diff", "HEAD", "--binary"], cwd=ROOT, capture_output=True, check=True).stdout
    if changed:
        subprocess.run(["git", "apply"], cwd=tmp_path / "source", input=changed, check=True)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path / "source"]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", tmp_path / "there", wheel], check=True, capture_output=True
    )
    base = _with_requirements([Requirement(line).name for line in PROJECT["dependencies"]])
    barred = sorted(
        name
        for name, owners in metadata.packages_distributions().items()
        if not base & {canonicalize_name(owner) for owner in owners} and name not in ("effnb", "_distutils_hack")
    )
    code = BARE.replace("BARRED", repr(set(barred))).replace("HERE", repr(str(tmp_path / "there")))
    environ = os.environ | {"PYTHONPATH": str(tmp_path / "there")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stderr
    assert "True optim" in done.stdout and "True solvers" in done.stdout and "False" not in done.stdout
    assert "pandas" in barred and "matplotlib" in barred


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
