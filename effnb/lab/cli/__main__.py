"""``python -m effnb.lab.cli``, the same as ``effnb``."""

from effnb.lab.cli import app

app()
