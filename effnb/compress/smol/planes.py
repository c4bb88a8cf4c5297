"""Digit planes: plane ``i`` holds the i-th digit of all weights with more than ``i`` of them, one bit each, in order.

Nothing here loops over weights. Eight weights at a time, a table of 64 KB moves the digits of those that have one to
the front of a byte (or back), and a running count of digits tells where that byte's bits go.
"""

import functools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@functools.cache
def _tables() -> tuple[Bytes, Bytes, Bytes]:
    """Gather and scatter for (mask, byte) pairs, most significant bit first, and the number of ones of a mask."""
    rows = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    gather, scatter = np.zeros((256, 256), np.uint8), np.zeros((256, 256), np.uint8)
    for mask in range(256):
        places = np.flatnonzero(rows[mask])
        packed, spread = np.zeros((256, 8), np.uint8), np.zeros((256, 8), np.uint8)
        packed[:, : len(places)] = rows[:, places]
        spread[:, places] = rows[:, : len(places)]
        gather[mask], scatter[mask] = np.packbits(packed, axis=1)[:, 0], np.packbits(spread, axis=1)[:, 0]
    return gather.reshape(-1), scatter.reshape(-1), rows.sum(1).astype(np.uint8)


def _masks(bits: Bytes) -> Iterator[tuple[int, Bytes | None, int]]:
    """Digit ``i``, the packed mask of weights that have it (``None``: all), and their number; until none is left."""
    low, high = (int(bits.min()), int(bits.max())) if len(bits) else (0, 0)
    for i in range(high):
        if i < low:
            yield i, None, len(bits)
        else:
            owners = bits > i
            yield i, np.packbits(owners), int(np.count_nonzero(owners))


def plane_bytes(bits: Bytes) -> int:
    """Bytes of all planes: each is padded to a whole byte.

    Args:
        bits: digits of every weight, uint8 ``(n,)``.

    Reference: savarese2022bits

    >>> plane_bytes(np.array([1, 3, 3], np.uint8))
    3
    """
    counts = [np.count_nonzero(bits > i) for i in range(int(bits.max(initial=0)))]
    return int(sum((count + 7) // 8 for count in counts))


def pack_planes(codes: Bytes, bits: Bytes) -> bytes:
    """Write the leading ``bits`` bits of every code, plane by plane.

    Args:
        codes: 8-bit codes, most significant digit first, uint8 ``(n,)``.
        bits: how many digits of each to keep, 1 to 8, uint8 ``(n,)``.

    Returns:
        ``plane_bytes(bits)`` bytes.

    Reference: savarese2022bits

    >>> pack_planes(np.array([0b10100000, 0b11000000], np.uint8), np.array([3, 1], np.uint8)).hex()
    'c00080'
    """
    gather, _, ones = _tables()
    parts = []
    for i, mask, count in _masks(bits):
        digits = np.packbits(codes & np.uint8(128 >> i))
        if mask is None:
            parts.append(digits.tobytes())
            continue
        moved = gather.take((mask.astype(np.uint16) << 8) | digits)
        parts.append(_join(moved, ones.take(mask), (count + 7) // 8))
    return b"".join(parts)


def _join(pieces: Bytes, lengths: Bytes, size: int) -> bytes:
    """Bit strings (each at the front of a byte) one after the other.

    Neighbours are joined twice to strings of up to 32 bits; what is left goes to its place by sums of numbers that
    share no bit, exact in the float64 of ``bincount``.
    """
    short = -len(pieces) % 4
    fields, lengths = np.pad(pieces, (0, short)), np.pad(lengths, (0, short))
    for wide in (np.uint16, np.uint32):
        width = wide(8 * fields.itemsize)
        fields = (fields[::2].astype(wide) << width) | ((fields[1::2].astype(wide) << width) >> lengths[::2])
        lengths = lengths[::2] + lengths[1::2]
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    windows = fields.astype(np.uint64) << np.uint64(32) >> (starts & 31).astype(np.uint64)
    at, words = starts >> 5, size // 4 + 2
    whole = np.bincount(at, weights=windows >> np.uint64(32), minlength=words)
    whole += np.bincount(at + 1, weights=windows & np.uint64(0xFFFFFFFF), minlength=words)
    return whole.astype(">u4").tobytes()[:size]


def unpack_planes(data: bytes | memoryview, bits: Bytes) -> Bytes:
    """Inverse of :func:`pack_planes`; digits that a weight does not have are 0.

    Args:
        data: the planes.
        bits: digits of every weight, uint8 ``(n,)``.

    Returns:
        Codes, uint8 ``(n,)``.

    Raises:
        ValueError: ``data`` has another length than ``bits`` asks for.

    Reference: savarese2022bits

    >>> unpack_planes(bytes.fromhex("c00080"), np.array([3, 1], np.uint8)).tolist()
    [160, 128]
    """
    if len(data) != plane_bytes(bits):
        raise ValueError(f"data must hold {plane_bytes(bits)} bytes of digit planes, got {len(data)}")
    _, scatter, ones = _tables()
    codes, start = np.zeros(len(bits), np.uint8), 0
    for i, mask, count in _masks(bits):
        size = (count + 7) // 8
        digits = np.frombuffer(data, np.uint8, size, start)
        start += size
        if mask is not None:
            pairs = np.zeros(size + 2, np.uint16)  # byte j and its successor, as one number
            pairs[:size] = digits
            pairs[:-1] = (pairs[:-1] << 8) | pairs[1:]
            lengths = ones.take(mask)
            starts = np.cumsum(lengths, dtype=np.int64) - lengths
            window = (pairs.take(starts >> 3) << (starts & 7).astype(np.uint16)) >> np.uint16(8)
            digits = scatter.take((mask.astype(np.uint16) << 8) | window)
        codes |= np.unpackbits(digits, count=len(bits)) << np.uint8(7 - i)
    return codes
