"""One function over many items: on processes of this machine by joblib, or on a Ray cluster that is running already."""

import contextlib
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from types import ModuleType

from joblib import Parallel, delayed, parallel_config

from effnb.lab.run.process import die_with_parent, one_thread

OnDone = Callable[[int, object], None]
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def fan_out(
    function: Callable[[object], object],
    items: Iterable[object],
    jobs: int = 1,
    ray_address: str | None = None,
    on_done: OnDone | None = None,
) -> list[object]:
    """Call ``function`` on each item, in parallel; return results or exceptions in the order of the items.

    An item that raises, or kills its process, costs only itself: its place holds the exception. Every process has one
    thread.

    Args:
        function: of one item; picklable.
        items: any picklable values.
        jobs: processes at a time, >= 1; a Ray cluster schedules by its own CPUs instead.
        ray_address: ``"host:port"`` or ``"ray://host:port"`` of a running cluster, or ``"auto"``; default processes of
            this machine. A head on the loopback address alone (``ray start --head --node-ip-address=127.0.0.1`` with
            ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0``) is named by that address.
        on_done: called in this process with (index, result or exception) as each item ends, in no fixed order.

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
    outcomes: list[object] = [None] * len(items)

    def done(index: int, outcome: object) -> None:
        outcomes[index] = outcome
        if on_done:
            on_done(index, outcome)

    if items and ray_address is None:
        _on_processes(function, items, jobs, done)
    elif items:
        _on_ray(function, items, ray_address, done)
    return outcomes


def _on_processes(function: Callable, items: Sequence, jobs: int, done: OnDone) -> None:
    """Work through the items; those in flight when a process died are tried again, each by itself."""

    def tasks(left: dict[int, bool]) -> Iterator:
        for index in list(left):
            left[index] = True
            yield delayed(_numbered)(index, function, items[index])

    waiting, suspects = list(range(len(items))), []
    while waiting or suspects:
        # One by one first: a death then names its item, and the others go on together.
        alone = suspects[:1]
        at_once = 1 if alone else jobs
        left = dict.fromkeys(alone or waiting, False)  # what has no outcome yet, and whether it has been begun
        # Never one process, which joblib would take to be this one; few items in flight, for a death leaves suspects.
        with parallel_config("loky", inner_max_num_threads=1), contextlib.suppress(BrokenExecutor):
            pool = Parallel(max(2, at_once), return_as="generator_unordered", pre_dispatch=at_once, batch_size=1)
            for index, outcome in pool(tasks(left)):
                del left[index]
                done(index, outcome)
        if alone:
            suspects = suspects[1:]
            if left:
                done(alone[0], RuntimeError("the process of this item died (killed, out of memory or crashed)"))
        else:
            suspects = [index for index, begun in left.items() if begun]
            waiting = [index for index, begun in left.items() if not begun]


def _numbered(index: int, function: Callable, item: object) -> tuple[int, object]:
    die_with_parent()
    one_thread()
    return index, _guarded(function, item)


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
    """Run one Ray task an item on a cluster that is already up; leave it, and a connection that exists, as they were.

    Raises:
        ImportError: ray is not installed.
        ValueError: no cluster answers there.
    """
    try:
        ray = _import_ray(address)
        if mine := not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"ray_address {address!r}: no Ray cluster answers there ({error})") from error
    try:
        task = ray.remote(num_cpus=1, max_retries=1)(_portable(ray.cloudpickle.dumps(function)))
        running = {task.remote(ray.cloudpickle.dumps(item)): index for index, item in enumerate(items)}
        while running:
            (ref,), _ = ray.wait(list(running), num_returns=1)
            try:
                outcome = pickle.loads(ray.get(ref))
            except Exception as error:
                outcome = error
            done(running.pop(ref), outcome)
    finally:
        if mine:
            ray.shutdown()


def _portable(payload: bytes) -> Callable[[bytes], bytes]:
    """Return a function for a process that cannot import effnb yet; bytes in, bytes out.

    Ray ships it by value; it takes over this process's import path, and only then unpickles the pickled function.
    """
    folders = [str(Path(__file__).resolve().parents[3]), *filter(None, sys.path)]

    def run(item: bytes) -> bytes:
        import pickle
        import sys

        sys.path.extend(folder for folder in folders if folder not in sys.path)
        from effnb.lab.run import fanout

        fanout.one_thread()
        return pickle.dumps(fanout._guarded(pickle.loads(payload), pickle.loads(item)))

    return run


def _import_ray(address: str) -> ModuleType:
    """Return the module ray, set up for where the head listens."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if port.isdecimal() and "/" not in host:
        if not _listens(host, int(port)):  # ray itself would go on trying for minutes
            raise ConnectionError(f"nothing listens at {address}")
        if host in _LOOPBACK and not _listens(_outer_address(), int(port)):
            # Ray replaces 127.0.0.1 by the machine's outer address, where such a head does not listen, unless it is
            # told that this machine takes no part in clusters of several; it reads that when it is imported.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError("ray_address needs the extra `ray`: pip install 'effnb[ray]'") from error
    return ray


def _listens(host: str, port: int, timeout: float = 3.0) -> bool:
    try:
        with socket.create_connection((host, port), timeout):
            return True
    except OSError:
        return False


def _outer_address() -> str:
    """Return this machine's address on the way out; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address kept for documents
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostbyname(socket.gethostname())
