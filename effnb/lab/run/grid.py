"""Grids of parameters and lists of seeds, as they are typed on a command line."""

import ast
from collections.abc import Sequence

_WORDS = {"true": True, "false": False, "null": None, "none": None}


def _value(text: str) -> object:
    word = text.strip()
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def _split(text: str) -> list[str]:
    """Split at commas that stand outside brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[({") - (char in "])}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def parse_grid(entries: Sequence[str]) -> dict[str, list]:
    """Return the grid that lines such as ``"eps=1e-8,1e-2,1"`` describe.

    Values are Python literals, ``true``, ``false``, ``null`` or bare words; lists keep their commas. Where one number
    of a parameter is a float, all become floats.

    Args:
        entries: ``NAME=V1,V2,...``, one parameter each.

    Raises:
        ValueError: for a line of another form, an empty value, a name or a value given twice.

    >>> parse_grid(["eps=1e-8,1e-2,1", "widths=[8,16],[16,32]", "norm=lagged"])
    {'eps': [1e-08, 0.01, 1.0], 'widths': [[8, 16], [16, 32]], 'norm': ['lagged']}
    """
    grid: dict[str, list] = {}
    for entry in entries:
        name, sign, text = entry.partition("=")
        parts = _split(text)
        if not sign or not name.strip().isidentifier() or not all(part.strip() for part in parts):
            raise ValueError(f"grid must read NAME=V1,V2,..., got {entry!r}")
        if name.strip() in grid:
            raise ValueError(f"grid must name each parameter once, got {name.strip()!r} twice")
        values = [_value(part) for part in parts]
        if any(isinstance(v, float) for v in values) and all(type(v) in (int, float) for v in values):
            values = [float(v) for v in values]
        grid[name.strip()] = values
    return grid


def parse_seeds(text: str) -> list[int]:
    """Return the seeds that ``"0-2,5"`` describes.

    Args:
        text: numbers and ranges ``a-b`` (both ends included), separated by commas.

    Raises:
        ValueError: for another form, a range that falls, or a seed given twice.

    >>> parse_seeds("0-2,5")
    [0, 1, 2, 5]
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, sign, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (sign and not last.isdecimal()) or (sign and int(last) < int(first)):
            raise ValueError(f"seeds must read like 0-9 or 0,1,5, got {text!r}")
        seeds.extend(range(int(first), int(last or first) + 1))
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must differ, got {text!r}")
    return seeds
