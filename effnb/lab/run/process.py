"""Subprocesses: the one module that starts any."""

import subprocess

from effnb.lab.paths import root


def git(*arguments: str) -> str | None:
    """Return what git prints for the checkout, or None where git or the repository is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root(), capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
