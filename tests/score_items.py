"""What lists of networks are built from in tests; a module of its own, so that a spawned process can import it."""

import os
import signal
from pathlib import Path

from effnb.nas.nanobench import build_net


def build(edges, generator):
    """A network of nano-bench; some descriptions raise, or kill their process."""
    if edges == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return build_net(edges, (2, 4), generator=generator)


def build_and_note(edges, generator):
    """As `build`; writes what it built to the file in ``SCORE_LOG``, fails on ``SCORE_FAIL``, dies on ``SCORE_DIE``."""
    if edges == os.environ.get("SCORE_FAIL"):
        raise OSError("no memory today")
    if edges == os.environ.get("SCORE_DIE"):
        os.kill(os.getpid(), signal.SIGKILL)
    with Path(os.environ["SCORE_LOG"]).open("a") as file:
        file.write(f"{edges}\n")
    return build(edges, generator)
