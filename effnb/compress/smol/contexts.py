"""Rows and columns of a map that have few bits, and such that have many, coded apart.

One histogram for a whole layer wastes what its inputs and outputs have in common: weights of a black pixel, or of a
dead neuron, all have one bit. Rows and columns get a class, the rounded logarithm of their mean excess over the
fewest bits; the sum of both classes (the logarithm of a product) says which histogram an entry follows. In trained
layers that takes 20 to 40 % off the entropy of the map, the classes included, and does better than lzma.
"""

import struct
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from .rans import tally

Bytes = NDArray[np.uint8]
CLASSES = 8
_FORMS = ("constant", "fixed", "coded")
_PART = struct.Struct("<BI")
_TABLES = 8 * 25  # bits that a further histogram costs


def line_classes(excess: NDArray[np.int64]) -> Bytes:
    """Class of each line: 8 for the largest excess, one less for each halving, down to 2; 1 for none at all.

    Args:
        excess: sums of ``bits - fewest bits``, one for each row (or column).

    Reference: savarese2022bits

    >>> line_classes(np.array([0, 64, 31, 1])).tolist()
    [1, 8, 7, 2]
    """
    halvings = np.log2(np.maximum(excess, 1) / max(1, int(excess.max(initial=0))))
    return np.where(excess > 0, np.rint(CLASSES + halvings).clip(2), 1).astype(np.uint8)


def _blocks(rows: Bytes, columns: Bytes) -> Iterator[tuple[int, tuple]]:
    """Context and index of every block of rows and columns of one class each, in a fixed order."""
    for r in np.unique(rows):
        for c in np.unique(columns):
            context = max(1, int(r) + int(c) - CLASSES) if min(r, c) > 1 else 0
            yield context, np.ix_(rows == r, columns == c)


def _entropy_bits(levels: Bytes) -> float:
    counts = tally(levels)[1]
    return float(-(counts * np.log2(counts / max(1, levels.size))).sum())


def encode_lines(levels: Bytes, encode: Callable[[Bytes], tuple[str, bytes]]) -> bytes | None:
    """Code a map by the classes of its rows and columns.

    Args:
        levels: uint8 matrix, at least 2 rows.
        encode: codes a flat array, returns form and bytes.

    Returns:
        The bytes; ``None`` where this saves less than 2 %.

    Reference: savarese2022bits

    >>> from effnb.compress.smol.index import encode_map
    >>> levels = np.tile(np.array([1] * 50 + [5] * 50, np.uint8), (100, 1))
    >>> len(encode_lines(levels, encode_map))
    39
    """
    excess = levels - levels.min(initial=8)
    rows, columns = (line_classes(excess.sum(axis, dtype=np.int64)) for axis in (1, 0))
    if len(np.unique(rows)) == len(np.unique(columns)) == 1:
        return None
    found: dict[int, list[Bytes]] = {}
    for context, place in _blocks(rows, columns):
        found.setdefault(context, []).append(levels[place].reshape(-1))
    groups = [np.concatenate(found[context]) for context in sorted(found)]
    apart = sum(_entropy_bits(part) + _TABLES for part in (rows, columns, *groups))
    if apart > 0.98 * _entropy_bits(levels):
        return None
    parts = [encode(part) for part in (rows, columns, *groups)]
    return b"".join(_PART.pack(_FORMS.index(form), len(data)) + data for form, data in parts)


def decode_lines(data: bytes, shape: tuple[int, int], decode: Callable[[str, bytes, int], Bytes]) -> Bytes:
    """Inverse of :func:`encode_lines`.

    Args:
        data: the bytes.
        shape: of the matrix.
        decode: decodes ``(form, bytes, count)``.

    Returns:
        Levels, flat.

    Raises:
        ValueError: the bytes contradict each other or ``shape``.

    Reference: savarese2022bits

    >>> from effnb.compress.smol.index import decode_map, encode_map
    >>> levels = np.tile(np.array([1] * 50 + [5] * 50, np.uint8), (100, 1))
    >>> bool((decode_lines(encode_lines(levels, encode_map), (100, 100), decode_map) == levels.reshape(-1)).all())
    True
    """
    parts = _cut(data)
    if len(parts) < 3:
        raise ValueError(f"a map by lines must have at least 3 parts, got {len(parts)}: it is damaged")
    rows, columns = (decode(*part, count) for part, count in zip(parts, shape, strict=False))
    places: dict[int, list[tuple]] = {}
    for context, place in _blocks(rows, columns):
        places.setdefault(context, []).append(place)
    if len(parts) != 2 + len(places):
        raise ValueError(f"a map by lines must have {2 + len(places)} parts, got {len(parts)}: it is damaged")
    levels = np.empty(shape, np.uint8)
    for context, part in zip(sorted(places), parts[2:], strict=True):
        sizes = [(len(r), c.shape[1]) for r, c in places[context]]
        values = decode(*part, sum(a * b for a, b in sizes))
        ends = np.cumsum([a * b for a, b in sizes])
        for place, size, piece in zip(places[context], sizes, np.split(values, ends[:-1]), strict=True):
            levels[place] = piece.reshape(size)
    return levels.reshape(-1)


def _cut(data: bytes) -> list[tuple[str, bytes]]:
    parts, at = [], 0
    while at < len(data):
        if len(data) - at < _PART.size:
            raise ValueError("a map by lines must end with a whole part: it is damaged")
        form, size = _PART.unpack_from(data, at)
        at += _PART.size
        if form >= len(_FORMS) or size > len(data) - at:
            raise ValueError("a map by lines must name known forms and its own size: it is damaged")
        parts.append((_FORMS[form], data[at : at + size]))
        at += size
    return parts
