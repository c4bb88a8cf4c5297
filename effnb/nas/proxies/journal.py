"""Finished scores as lines of JSON, so that a killed run goes on where it stopped."""

import functools
import hashlib
import json
import math
import os
import pickle
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class Journal:
    """A file with one line of JSON a finished item; a half-written last line is cut off when it is opened.

    ``found`` maps the keys of the file's lines to their scores.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.found: dict[str, dict[str, float]] = {}

    def __enter__(self) -> "Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")
        self.file.seek(0)
        whole, _, _ = text.rpartition(b"\n") if (text := self.file.read()) else (b"", b"", b"")
        self.file.truncate(len(whole) + 1 if whole else 0)
        for line in whole.splitlines():
            record = json.loads(line)
            self.found[record["key"]] = {name: float(value) for name, value in record["scores"].items()}
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def add(self, key: str, task: tuple[Any, int | None], scores: Mapping[str, float]) -> None:
        """Write one line and have it on the disk before returning."""
        item, seed = task
        # JSON has no infinity; as text it is read back by `float`.
        plain = {name: value if math.isfinite(value) else str(value) for name, value in scores.items()}
        label = item if isinstance(item, str | int) else type(item).__name__
        line = json.dumps({"key": key, "item": label, "seed": seed, "scores": plain})
        self.file.write(line.encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def fingerprint(value: Any) -> str:
    """Return a hash of a value's content: the same for equal values in another process, on another machine.

    Networks are hashed by class, printed form and state, functions by name and code.

    >>> fingerprint(("303030", 0)) == fingerprint(("303030", 0)) != fingerprint(["303030", 0])
    True
    """
    digest = hashlib.sha256()
    for part in parts(value):
        digest.update(part)
    return digest.hexdigest()[:32]


def parts(value: Any) -> Iterator[bytes]:
    """Yield bytes that tell a value from others."""
    yield f"<{type(value).__module__}.{type(value).__qualname__}>".encode()
    if isinstance(value, torch.Tensor):
        yield from parts(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        yield f"{value.dtype}{tuple(value.shape)}".encode()
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode() + value.tobytes()
    elif isinstance(value, nn.Module):
        yield from parts([repr(value), dict(value.state_dict())])
    elif isinstance(value, Mapping):
        yield from parts([pair for pair in value.items()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from (b"(", *parts(item), b")")
    elif isinstance(value, functools.partial):
        yield from parts([value.func, value.args, sorted(value.keywords.items())])
    elif isinstance(value, types.FunctionType):
        yield from parts([value.__module__, value.__qualname__, value.__code__, value.__defaults__])
    elif isinstance(value, types.CodeType):
        yield from parts([value.co_code, value.co_names, value.co_consts])
    elif isinstance(value, str | bytes | int | float | None):
        yield repr(value).encode()
    else:
        yield pickle.dumps(value)
