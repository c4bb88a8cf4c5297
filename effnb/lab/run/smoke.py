"""Chapters at smoke scale through nbval: every cell must run, and marked outputs must equal the committed ones."""

import os
import subprocess
import sys
from collections.abc import Sequence

from effnb.lab.judge.results import check
from effnb.lab.paths import root
from effnb.lab.run import chapter as runner
from effnb.lab.run.notebooks import prepare
from effnb.lab.run.stale import chapters


def run(systems: Sequence[str]) -> int:
    """Prepare a copy of each chapter with its ``smoke`` parameters, run nbval on the copies, check the results.

    Args:
        systems: the chapters.

    Returns:
        0 if all passed, as pytest's exit code otherwise; 1 if a result breaks a rule.

    Raises:
        ValueError: a chapter has no smoke profile.
    """
    build = root() / "_build"
    copies = []
    for system in systems:
        copies.append(build / "smoke" / chapters()[system].name)
        prepare(chapters()[system], runner.parameters_of(system, "smoke"), copies[-1])
    environment = runner.environment(build / "results", {})
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-cell-timeout=120", "--durations=5"]
    plain = ["-p", "no:doctest", "-o", "addopts=", "-q", "-c", os.devnull, "--rootdir", str(build / "smoke")]
    code = subprocess.run([*command, *plain, *map(str, copies)], cwd=build / "smoke", env=environment).returncode
    problems = check(list(systems), "smoke", build / "results")
    print("\n".join(problems))
    return code or (1 if problems else 0)
