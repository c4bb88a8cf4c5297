"""What the fan-out is tried on; a module of its own, so that a spawned process imports nothing heavy."""

import os
import signal
import time


class Unbuildable(Exception):
    """Cannot be rebuilt from its message: its pickle would break the pool."""

    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


def act(item):
    """Divide, raise, die or tell, as the item says."""
    if item == "unbuildable":
        raise Unbuildable(1, 2)
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "threads":
        return os.environ["OMP_NUM_THREADS"]
    return 10 / item


def tell_and_sleep(path):
    """Write this process's number, then wait to be killed."""
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
