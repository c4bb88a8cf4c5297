"""Subprocesses: the one module that starts any."""

import os
import subprocess

from effnb.lab.paths import root


def git(*arguments: str) -> str | None:
    """Return what git prints for the checkout, or None where git or the repository is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root(), capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def call(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run a command with one thread and return its exit code and all that it printed."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root())} | environment
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout
