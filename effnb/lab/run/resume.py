"""Work that a cut-off study need not do again: results of functions on disk, and how far the run has come.

The runner opens a folder named by everything that the figures depend on (notebook, parameters, lock, Python, the
package's code), so a change of any of them starts afresh; joblib writes a result beside its place and renames it, so
one whose writing was killed is never read.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from joblib import Memory

from effnb.common import write_atomically
from effnb.lab.paths import digest, root
from effnb.lab.run.stale import all_modules, staleness_key

FOLDER, PROGRESS = "EFFNB_RESUME", "EFFNB_PROGRESS"
F = TypeVar("F", bound=Callable)
_SPENT = "spent.json"
_now = {"done": 0, "calls": 0, "seconds": 0.0, "cpu": 0.0, "inside": False}


def folder_of(system: str, parameters: Mapping[str, Any]) -> Path:
    """Return where finished work of a chapter with these parameters and today's code is kept.

    >>> folder_of("avagrad", {"epochs": 1}) == folder_of("avagrad", {"epochs": 2})
    False
    """
    key = digest(staleness_key(system, all_modules(), parameters))
    return root() / "_build" / "resume" / system / key[:16]


def resumable(function: F | None = None, *, calls: int | None = None) -> F:
    """Make a function keep its results through a study that is cut off; elsewhere return the function as it is.

    What it returns must follow from its arguments and the chapter's parameters alone, and be picklable as they are:
    one seed, or one arm of one seed, is a good piece. Works for functions of notebook cells, and as a decorator.

    Args:
        function: what to keep the results of.
        calls: how often the run will call it, for the time that remains.

    >>> resumable(abs)(-2)
    2
    """
    if function is None:
        return functools.partial(resumable, calls=calls)
    if not (folder := os.environ.get(FOLDER)):
        return function
    kept = Memory(folder, verbose=0).cache(function)
    _now["calls"] += calls or 0

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        known, begun = kept.check_call_in_cache(*args, **kwargs), (time.perf_counter(), time.process_time())
        outer, _now["inside"] = not _now["inside"], True
        try:
            found = kept(*args, **kwargs)
        finally:
            _now["inside"] = not outer
        if outer and not known:
            _spend(Path(folder), time.perf_counter() - begun[0], time.process_time() - begun[1])
        if calls:
            _now["done"] += 1
            _tell()
        return found

    _tell()
    return call


@functools.cache
def earlier() -> tuple[float, float]:
    """Return the seconds and CPU seconds that cut-off runs before this process spent on what is now read from disk.

    >>> earlier()
    (0.0, 0.0)
    """
    folder = os.environ.get(FOLDER)
    try:
        spent = json.loads((Path(folder) / _SPENT).read_text()) if folder else {}
        return float(spent.get("seconds", 0)), float(spent.get("cpu", 0))
    except (OSError, ValueError):
        return 0.0, 0.0


def _spend(folder: Path, seconds: float, cpu: float) -> None:
    before = earlier()
    _now["seconds"], _now["cpu"] = _now["seconds"] + seconds, _now["cpu"] + cpu
    spent = {"seconds": before[0] + _now["seconds"], "cpu": before[1] + _now["cpu"]}
    write_atomically(folder / _SPENT, json.dumps(spent))


def _tell() -> None:
    if path := os.environ.get(PROGRESS):
        write_atomically(path, json.dumps({"done": _now["done"], "calls": _now["calls"]}))
