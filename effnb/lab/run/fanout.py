"""One function over many items: on processes of this machine, or on a Ray cluster that is already running."""

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from effnb.lab.run import cluster

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
OnDone = Callable[[int, object], None]


def one_thread() -> None:
    """Give every numerical library of this process one thread, whether it is loaded already or not."""
    os.environ.update(dict.fromkeys(THREADS, "1"))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _begin() -> None:
    die_with_parent()
    one_thread()


def fan_out(
    function: Callable[[object], object],
    items: Iterable[object],
    jobs: int = 1,
    ray_address: str | None = None,
    on_done: OnDone | None = None,
) -> list[object]:
    """Call ``function`` on each item, in parallel; return results or exceptions in the order of the items.

    An item that raises, or kills its process, costs only itself: its place holds the exception. Locally each item runs
    in a freshly spawned process with one thread, so ``function`` and the items must be picklable, and a script must
    call this under ``if __name__ == "__main__"``.

    Args:
        function: of one item.
        items: any picklable values.
        jobs: processes at a time, >= 1; a Ray cluster schedules by its own CPUs instead.
        ray_address: address of a running cluster, or ``"auto"``; default processes of this machine.
        on_done: called in this process with (index, result or exception) as each item ends, in no fixed order.

    Returns:
        One result or exception an item.

    Raises:
        ValueError: if ``jobs < 1``, ``function`` cannot be pickled, or no cluster answers at ``ray_address``.
        ImportError: if ``ray_address`` is given and ray is not installed.

    >>> fan_out(abs, [-1, "x"], jobs=2)
    [1, TypeError("bad operand type for abs(): 'str'")]
    """
    if jobs < 1:
        raise ValueError(f"jobs must be >= 1, got {jobs}")
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"function must be picklable, a function of a module, got {function!r}") from error
    items = list(items)
    if not items:
        return []
    outcomes: list[object] = [None] * len(items)

    def done(index: int, outcome: object) -> None:
        outcomes[index] = outcome
        if on_done:
            on_done(index, outcome)

    if ray_address is None:
        _on_processes(function, items, jobs, done)
    else:
        _on_ray(function, items, ray_address, done)
    return outcomes


def _pool(jobs: int) -> ProcessPoolExecutor:
    # Spawn: a forked torch may hang on locks of threads that do not exist in the child.
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_begin)


def _on_processes(function: Callable, items: Sequence, jobs: int, done: OnDone) -> None:
    """Work through the items; those in flight when a process died are tried again, each in a pool of its own."""
    waiting, suspects = deque(range(len(items))), deque()
    while waiting:
        suspects.extend(_until_broken(function, items, min(jobs, len(waiting)), waiting, done))
    while suspects:
        index = suspects.popleft()
        if _until_broken(function, items, 1, deque([index]), done):
            done(index, RuntimeError("the process of this item died (killed, out of memory or crashed)"))


def _until_broken(function: Callable, items: Sequence, jobs: int, waiting: deque, done: OnDone) -> list[int]:
    """Empty ``waiting`` with one pool; if a process dies, return the items that were in flight, the rest stays."""
    running: dict[Future, int] = {}
    pool = _pool(jobs)
    try:
        while waiting or running:
            # Never more than `jobs` in flight, so that a death leaves few suspects.
            while waiting and len(running) < jobs:
                future = pool.submit(_guarded, function, items[waiting[0]])
                running[future] = waiting.popleft()
            ended = wait(running, return_when=FIRST_COMPLETED).done
            for future in sorted(ended, key=lambda f: f.exception() is not None):
                if isinstance(future.exception(), BrokenProcessPool):
                    return sorted(running.values())
                done(running.pop(future), future.exception() or future.result())
    except BrokenProcessPool:
        return sorted(running.values())
    finally:
        pool.shutdown(cancel_futures=True)
    return []


def _guarded(function: Callable, item: object) -> object:
    """Return the result, or the exception with its traceback as a note; what comes back can be unpickled."""
    try:
        return function(item)
    except Exception as error:
        error.add_note(traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            # An exception whose class cannot be rebuilt from its arguments would break the whole pool.
            return RuntimeError("".join(traceback.format_exception(error)))
        return error


def _on_ray(function: Callable, items: Sequence, address: str, done: OnDone) -> None:
    """Run one Ray task an item on a cluster that is already up; leave the cluster as it was."""
    with cluster.connected(address) as ray:
        task = ray.remote(num_cpus=1, max_retries=1)(_portable(ray.cloudpickle.dumps(function)))
        running = {task.remote(ray.cloudpickle.dumps(item)): index for index, item in enumerate(items)}
        while running:
            (ref,), _ = ray.wait(list(running), num_returns=1)
            try:
                outcome = pickle.loads(ray.get(ref))
            except Exception as error:
                outcome = error
            done(running.pop(ref), outcome)


def _portable(payload: bytes) -> Callable[[bytes], bytes]:
    """Return a function for a process that cannot import effnb yet; bytes in, bytes out.

    Ray ships it by value; it takes over this process's import path, and unpickles the pickled function only then.
    """
    folders = [str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]

    def run(item: bytes) -> bytes:
        import pickle
        import sys

        sys.path.extend(folder for folder in folders if folder not in sys.path)
        from effnb.lab.run import fanout

        fanout.one_thread()
        return pickle.dumps(fanout._guarded(pickle.loads(payload), pickle.loads(item)))

    return run
