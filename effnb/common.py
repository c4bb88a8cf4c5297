"""What all methods need: argument checks, modes restored after use, modules found by name, files written whole."""

import contextlib
import difflib
import fnmatch
import math
import numbers
import operator
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_RELATIONS = {"gt": (">", operator.gt), "ge": (">=", operator.ge), "lt": ("<", operator.lt), "le": ("<=", operator.le)}


def kind(value: Any) -> str:
    """Return how a message names a value: a tensor by its shape, anything else by its type.

    >>> kind(torch.zeros(2, 3)), kind("a")
    ('shape (2, 3)', 'str')
    """
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_number(
    name: str,
    value: Any,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
) -> None:
    """Raise unless ``value`` is a finite real number, or a tensor of such, within all the bounds given.

    Args:
        name: the argument, for the message.
        value: a number or a real tensor, all of whose entries are looked at.
        gt: it must be greater than this.
        ge: at least this.
        lt: less than this.
        le: at most this.

    Raises:
        TypeError: no real number (``bool`` is none).
        ValueError: not finite or out of bounds.

    >>> check_number("keep_ratio", 1.5, gt=0, le=1)
    Traceback (most recent call last):
    ...
    ValueError: keep_ratio must be finite, > 0 and <= 1, got 1.5
    """
    bounds = {key: bound for key, bound in (("gt", gt), ("ge", ge), ("lt", lt), ("le", le)) if bound is not None}
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must hold real numbers, got {value.dtype}")
        good = torch.isfinite(value)
        for key, bound in bounds.items():
            good = good & _RELATIONS[key][1](value, bound)
        wrong = None if good.all() else value.detach()[~good].flatten()[0].item()
    else:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        good = math.isfinite(value) and all(_RELATIONS[key][1](value, bound) for key, bound in bounds.items())
        wrong = None if good else value
    if wrong is not None:
        rules = ["finite", *(f"{_RELATIONS[key][0]} {bound:g}" for key, bound in bounds.items())]
        rule = " and ".join(filter(None, [", ".join(rules[:-1]), rules[-1]]))
        raise ValueError(f"{name} must be {rule}, got {wrong}")


def check_count(name: str, value: Any, ge: int = 1, le: int | None = None) -> None:
    """Raise unless ``value`` is an integer from ``ge`` to ``le`` (no upper bound where that is None).

    Raises:
        TypeError: no integer (``bool`` and ``2.0`` are none).
        ValueError: out of bounds.

    >>> check_count("num_parts", 0)
    Traceback (most recent call last):
    ...
    ValueError: num_parts must be >= 1, got 0
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < ge or (le is not None and value > le):
        raise ValueError(f"{name} must be {f'>= {ge}' if le is None else f'from {ge} to {le}'}, got {value}")


def check_choice(name: str, value: Any, choices: Iterable) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``.

    >>> check_choice("rounding", "up", ("round", "ceil"))
    Traceback (most recent call last):
    ...
    ValueError: rounding must be one of 'round', 'ceil', got 'up'
    """
    choices = tuple(choices)
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


@contextlib.contextmanager
def mode_restored(model: nn.Module, train: bool | None = None) -> Iterator[nn.Module]:
    """Put the whole model into train or eval mode; afterwards every submodule has its own mode again.

    A model in train mode may hold norms that somebody froze by ``eval()``: ``model.train()`` would lose that. The modes
    come back after an exception too.

    Args:
        model: any module.
        train: the mode inside; None leaves it as it is.

    >>> model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Linear(2, 1))
    >>> with mode_restored(model, train=True):
    ...     print(model[0].training)
    True
    >>> model[0].training
    False
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        if train is not None:
            model.train(train)
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


def find_modules(
    model: nn.Module, patterns: str | Sequence[str], argument: str, endings: bool = True, kinds: tuple = (nn.Module,)
) -> list[str]:
    """Return the names of the modules that any of ``patterns`` names, in the model's order.

    Args:
        model: any module.
        patterns: full names (``"blocks.0.fc1"``), shell patterns of them (``"*downsample*"``) and, with ``endings``,
            what a name ends in after a dot (``"fc1"``).
        argument: the caller's argument, for the message.
        endings: whether endings count.
        kinds: types of modules that count.

    Raises:
        TypeError: patterns that are no strings.
        ValueError: a pattern without a match; near names are listed.

    >>> find_modules(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 1))), ["1.1", "0"], "include")
    ['0', '1.0', '1.1']
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise TypeError(f"{argument} must hold names of modules, got {patterns!r}")
    names = [name for name, m in model.named_modules(remove_duplicate=False) if name and isinstance(m, kinds)]

    def hits(name: str, pattern: str) -> bool:
        whole = name == pattern or fnmatch.fnmatchcase(name, pattern)
        return whole or (endings and name.endswith(f".{pattern}"))

    for pattern in patterns:
        if not any(hits(name, pattern) for name in names):
            raise ValueError(f"{argument} must match a module, got {pattern!r}; {near(pattern, names)}")
    return [name for name in names if any(hits(name, pattern) for pattern in patterns)]


def near(wanted: str, names: Sequence[str]) -> str:
    """Return a hint for a message: the names, or last parts of names, that look most like ``wanted``.

    >>> near("fc3", ["fc1", "head"])
    "near names: ['fc1']"
    """
    parts = dict.fromkeys([*names, *(name.rpartition(".")[2] for name in names)])
    return f"near names: {difflib.get_close_matches(wanted, parts, 3, 0.4) or list(names)[:5]}"


def write_atomically(path: str | os.PathLike, data: str | bytes) -> None:
    """Write a file whole: to a temporary neighbour, then renamed, so that a kill leaves the old one or the new one.

    The file gets the mode that the umask gives, as with ``open``; missing folders are made.

    Args:
        path: the file.
        data: the whole content; text as UTF-8.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> write_atomically(folder / "a.txt", "done"); (folder / "a.txt").read_text()
    'done'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    # Not `tempfile`: it makes files that nobody else may read, whatever the umask.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
