"""Subprocesses: the one module that starts any, and the one that lists the thread variables.

Every command runs under a keeper, this very file run as a program: it adopts whatever its command starts, and when the
command ends, when it is told to stop, or when its own parent dies, it kills all of that. A process group would not do:
a kernel has a session of its own, and one that holds the interpreter's lock never notices that its parent is gone.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import psutil

# Nothing of effnb up here: the keeper must stand before its command starts, and `effnb.lab` takes seconds to import.

#: What gives every numerical library one thread.
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
_QUIET = {"PYTHONHASHSEED": "0", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
_LINES, _WIDTH = 20_000, 1 << 16  # of a command's output that are kept; a reader never waits for more in one piece
_STOPPED = 128 + signal.SIGTERM
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # of prctl(2)
_keepers: set[subprocess.Popen] = set()


def one_thread() -> None:
    """Give every numerical library of this process one thread, whether it is loaded already or not."""
    os.environ.update(THREADS)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def die_with_parent(sign: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process ``sign`` when the one that started it is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, sign)


def git(*arguments: str) -> str | None:
    """Return what git prints for the checkout, or None where git or the repository is missing, or git refuses."""
    from effnb.lab.paths import root

    try:
        done = subprocess.run(["git", *arguments], cwd=root(), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def environment(further: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a worker: one thread, fixed hashing, this checkout's package, and ``further``."""
    from effnb.lab.paths import root

    package = str(Path(__file__).resolve().parents[3])
    paths = dict.fromkeys(filter(None, [str(root()), package, os.environ.get("PYTHONPATH")]))
    ours = {"EFFNB_ROOT": str(root()), "PYTHONPATH": os.pathsep.join(paths)}
    return os.environ | THREADS | _QUIET | ours | dict(further or {})


def call(
    command: Sequence[str | Path],
    further: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float | None = None,
    on_line: Callable[[str], object] | None = None,
) -> tuple[int, str]:
    """Run a command; nothing that it starts outlives it, this call's time or this process.

    Returns its exit code and what it printed, at most the last 20,000 lines, standard error among the output.

    Args:
        command: program and arguments.
        further: variables over those of :func:`environment`.
        cwd: folder to run in.
        timeout: seconds; None waits for ever.
        on_line: called with each line as it is printed, from another thread.

    Raises:
        TimeoutError: the time is up and everything is killed; the message is what was printed until then.

    >>> call([sys.executable, "-c", "print(1 + 1)"])
    (0, '2\\n')
    """
    keeper = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).resolve()), str(os.getpid()), *map(str, command)],
        env=environment(further),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C in a terminal is for the command that waits here
    )
    _keepers.add(keeper)
    said: deque[str] = deque(maxlen=_LINES)

    def read() -> None:
        with contextlib.suppress(ValueError):  # the pipe is closed below where somebody else holds its other end
            while line := keeper.stdout.readline(_WIDTH):
                said.append(line)
                if on_line:
                    on_line(line)

    reader, expired = threading.Thread(target=read, daemon=True), False
    reader.start()
    try:
        keeper.wait(timeout)
    except subprocess.TimeoutExpired:
        expired = True
    finally:
        _stop(keeper)
        _keepers.discard(keeper)
    reader.join(5)
    if expired:
        raise TimeoutError("".join(said))
    return keeper.returncode, "".join(said)


def on_threads(function: Callable, items: Sequence, jobs: int) -> Iterator[tuple[Any, Future]]:
    """Call ``function``, which runs commands, on each item; yield each item and its future as it ends."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(function, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future
        except BaseException:  # Ctrl-C: without this the pool would wait for the commands to end
            pool.shutdown(wait=False, cancel_futures=True)
            for keeper in list(_keepers):
                _stop(keeper)
            raise


def _stop(keeper: subprocess.Popen) -> None:
    if keeper.poll() is None:
        keeper.terminate()
        try:
            keeper.wait(10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(psutil.NoSuchProcess):
                _kill_below(psutil.Process(keeper.pid))
            keeper.kill()
            keeper.wait()


def _kill_below(process: psutil.Process, seconds: float = 5.0) -> None:
    """Kill all descendants; again and again, for those that start others meanwhile."""
    end = time.monotonic() + seconds
    while (found := process.children(recursive=True)) and time.monotonic() < end:
        for one in found:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(found, timeout=0.2)


def _keep(parent: int, command: list[str]) -> int:
    """Run a command as its keeper; return its exit code."""
    for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sign, lambda *_: sys.exit(_STOPPED))
    try:
        die_with_parent(signal.SIGTERM)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_SUBREAPER, 1)  # orphans below become children of this process, not of init
        if os.getppid() != parent:
            return _STOPPED
        code = subprocess.Popen(command, preexec_fn=die_with_parent).wait()
        return code if code >= 0 else 128 - code
    except OSError as error:
        print(error, flush=True)
        return 127
    finally:
        for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(sign, signal.SIG_IGN)
        _kill_below(psutil.Process())


if __name__ == "__main__":
    sys.exit(_keep(int(sys.argv[1]), sys.argv[2:]))
