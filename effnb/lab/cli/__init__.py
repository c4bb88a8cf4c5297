"""The ``effnb`` command: list, run, sweep, judge, publish and extend the book."""

from effnb.lab.cli import chapters, publishing
from effnb.lab.cli.common import app

__all__ = ["app", "chapters", "publishing"]
