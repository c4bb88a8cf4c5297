"""Finished rows as lines of JSON, so that a killed run goes on where it stopped."""

import functools
import hashlib
import json
import math
import os
import pickle
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

FORMAT = "effnb-scores/1"
Outcome = dict[str, float] | Exception
Run = Callable[..., Sequence[Any]]


class Task(NamedTuple):
    """One row: an item and its seed."""

    item: Any
    seed: int | None


def recorded(scorer: Any, tasks: list[Task], run: Run, path: str | Path | None) -> list[Outcome]:
    """Return the outcome of every task by ``run``; what the file at ``path`` holds is not run again.

    ``scorer`` is a dataclass: a change of any of its fields makes every row a new one.
    """
    if path is None:
        return list(run(scorer, tasks, on_done=lambda index, outcome: None))
    salt = fingerprint((FORMAT, sorted(vars(scorer).items())))
    keys = [fingerprint((salt, *task)) for task in tasks]
    with Journal(path) as journal:
        missing = [i for i, key in enumerate(keys) if key not in journal.found]

        def on_done(index: int, outcome: Any) -> None:
            # An exception is not written down: the next run tries again.
            if not isinstance(outcome, BaseException):
                journal.add(keys[missing[index]], tasks[missing[index]], outcome)

        outcomes: list[Outcome] = [journal.found.get(key) for key in keys]
        fresh = run(scorer, [tasks[i] for i in missing], on_done=on_done) if missing else []
        for i, outcome in zip(missing, fresh, strict=True):
            outcomes[i] = outcome
    return outcomes


class Journal:
    """A file with one line of JSON a finished row; what is after the last line's end is cut off when it is opened.

    ``found`` maps the keys of the rows that were there to their scores.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.found: dict[str, dict[str, float]] = {}

    def __enter__(self) -> "Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")
        self.file.seek(0)
        text = self.file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                self.found[record["key"]] = {name: float(value) for name, value in record["scores"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self.file.close()
                raise ValueError(f"resume must be a file of scores, line {number} of {self.path} is not one") from error
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def add(self, key: str, task: Task, scores: Mapping[str, float]) -> None:
        """Write one line, and have it on the disk before returning."""
        # JSON has no infinity; as text it is read back by `float`.
        values = {name: value if math.isfinite(value) else str(value) for name, value in scores.items()}
        item = task.item if isinstance(task.item, str | int) else type(task.item).__name__
        line = json.dumps({"key": key, "item": item, "seed": task.seed, "scores": values})
        self.file.write(line.encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def fingerprint(value: Any) -> str:
    """Return a hash of a value's content: the same for equal values in another process.

    Networks are hashed by printed form and state, functions by name and code.

    >>> fingerprint(("303030", 0)) == fingerprint(("303030", 0)) != fingerprint(("303030", 1))
    True
    """
    digest = hashlib.sha256()
    for part in parts(value):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def parts(value: Any) -> Iterator[bytes]:
    """Yield bytes that tell a value from others."""
    yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
    if isinstance(value, str | bytes | int | float | None):
        yield repr(value).encode()
    elif isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        yield f"{data.dtype} {tuple(data.shape)}".encode()
        yield data.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype} {value.shape}".encode()
        yield value.tobytes()
    else:
        pieces = inside(value)
        if pieces is None:
            yield pickle.dumps(value)
        else:
            yield str(len(pieces)).encode()
            for piece in pieces:
                yield from parts(piece)


def inside(value: Any) -> list[Any] | None:
    """Return what a composed value is made of, in a fixed order; None for a value that must be pickled."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, Mapping):
        return sorted(value.items(), key=lambda pair: repr(pair[0]))
    if isinstance(value, set | frozenset):
        return sorted(map(fingerprint, value))
    if isinstance(value, nn.Module):
        return [repr(value), dict(value.state_dict())]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.FunctionType):
        return [value.__module__, value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__]
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    return None
