"""Digits and their map as bytes: digit planes, an entropy coder, and the shortest form for a map of bits.

*Planes*: plane ``i`` holds the i-th digit of all weights with more than ``i`` of them, one bit each, in order.

*Entropy coder*: interleaved range asymmetric numeral systems (rANS) in plain numpy. zlib, bz2 and lzma stay 11 to 18 %
above the entropy of a map of bits (they look for repeats, and there are none) and are slow; rANS comes within 1 %.

*Lines*: one histogram for a whole layer wastes what its inputs and outputs have in common: weights of a black pixel, or
of a dead neuron, all have one bit. Rows and columns get a class, the rounded logarithm of their mean excess over the
fewest bits; the sum of both classes (the logarithm of a product) says which histogram an entry follows. In trained
layers that takes 20 to 40 % off the entropy of the map, the classes included, and does better than lzma.

Nothing here loops over weights, and a reader needs whole numbers only: a file means the same on every machine.
"""

import functools
import math
import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["decode_levels", "encode_levels"]

Bytes = NDArray[np.uint8]
Shape = tuple[int, ...]

# --- digit planes ----------------------------------------------------------------------------------------------------


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
    """Return the bytes of all planes, each padded to a whole byte, for the digits ``(n,)`` of every weight."""
    return sum((int(np.count_nonzero(bits > i)) + 7) // 8 for i in range(int(bits.max(initial=0))))


def pack_planes(codes: Bytes, bits: Bytes) -> bytes:
    """Return the leading ``bits`` (1 to 8) of every 8-bit code, plane by plane; both are uint8 ``(n,)``."""
    gather, _, ones = _tables()
    parts = []
    for i, mask, count in _masks(bits):
        digits = np.packbits(codes & np.uint8(128 >> i))
        if mask is None:
            parts.append(digits.tobytes())
            continue
        # Eight weights at a time: the table moves the digits of those that have one to the front of a byte. These bit
        # strings are joined with their neighbours twice, to strings of up to 32 bits.
        fields, lengths = gather.take((mask.astype(np.uint16) << 8) | digits), ones.take(mask)
        short = -len(fields) % 4
        fields, lengths = np.pad(fields, (0, short)), np.pad(lengths, (0, short))
        for wide in (np.uint16, np.uint32):
            width = wide(8 * fields.itemsize)
            fields = (fields[::2].astype(wide) << width) | ((fields[1::2].astype(wide) << width) >> lengths[::2])
            lengths = lengths[::2] + lengths[1::2]
        # What is left goes to its place in a row of 32-bit words by sums of numbers that share no bit: exact in the
        # float64 of bincount.
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        windows = fields.astype(np.uint64) << np.uint64(32) >> (starts & 31).astype(np.uint64)
        at, size = starts >> 5, (count + 7) // 8
        words = np.bincount(at, weights=windows >> np.uint64(32), minlength=size // 4 + 2)
        words += np.bincount(at + 1, weights=windows & np.uint64(0xFFFFFFFF), minlength=size // 4 + 2)
        parts.append(words.astype(">u4").tobytes()[:size])
    return b"".join(parts)


def unpack_planes(data: bytes | memoryview, bits: Bytes) -> Bytes:
    """Return the codes, uint8 ``(n,)``, that :func:`pack_planes` wrote; digits that a weight does not have are 0."""
    if len(data) != plane_bytes(bits):
        raise ValueError(f"data must hold {plane_bytes(bits)} bytes of digit planes, got {len(data)}")
    _, scatter, ones = _tables()
    codes, start = np.zeros(len(bits), np.uint8), 0
    for i, mask, count in _masks(bits):
        size = (count + 7) // 8
        digits = np.frombuffer(data, np.uint8, size, start)
        start += size
        if mask is not None:
            # Byte j and its successor as one number: the digits of eight weights are a window of it.
            pairs = np.zeros(size + 2, np.uint16)
            pairs[:size] = digits
            pairs[:-1] = (pairs[:-1] << 8) | pairs[1:]
            lengths = ones.take(mask)
            starts = np.cumsum(lengths, dtype=np.int64) - lengths
            window = (pairs.take(starts >> 3) << (starts & 7).astype(np.uint16)) >> np.uint16(8)
            digits = scatter.take((mask.astype(np.uint16) << 8) | window)
        codes |= np.unpackbits(digits, count=len(bits)) << np.uint8(7 - i)
    return codes


# --- the entropy coder -----------------------------------------------------------------------------------------------

_PRECISION = 16  # frequencies sum to 2^16; states are 32 bits, written 16 at a time
_LOW, _SHIFT, _MASK = np.uint32(1 << 16), np.uint32(16), np.uint32(0xFFFF)
_LARGEST_ALPHABET = 4096
_CODED = struct.Struct("<BBHI")  # levels - 1, block, lanes, words; then a uint8 level and a uint16 frequency for each


def tally(levels: Bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return values that occur, ascending, and how often; for few small values a scan each beats ``bincount``."""
    counts = np.array([np.count_nonzero(levels == v) for v in range(int(levels.max(initial=0)) + 1)])
    used = np.flatnonzero(counts)
    return used, counts[used]


def _entropy_bits(counts: NDArray[np.int64]) -> float:
    """Entropy of all entries together, from how often each value occurs."""
    return float(-(counts * np.log2(counts / max(1, int(counts.sum())))).sum())


def _block_model(frequencies: NDArray[np.int64], block: int) -> NDArray[np.uint32] | None:
    """Frequencies (sum 2^16, all >= 1) of blocks of independent levels; ``None`` if so many blocks do not fit.

    Only integers are involved, so that reader and writer agree on every machine.
    """
    fixed = np.array([1 << 32], np.uint64)  # 32 binary places
    for _ in range(block):
        fixed = ((fixed[:, None] * frequencies.astype(np.uint64)) >> np.uint64(_PRECISION)).reshape(-1)
    slots = ((fixed + np.uint64(1 << 15)) >> np.uint64(16)).astype(np.int64).clip(1)
    largest = int(slots.argmax())
    slots[largest] += (1 << _PRECISION) - int(slots.sum())
    return slots.astype(np.uint32) if slots[largest] >= 1 and slots.max() < 1 << _PRECISION else None


def encode_levels(levels: Bytes, payload_bits: float = 0.0) -> bytes | None:
    """Return small whole numbers coded at their entropy; ``None`` where fewer than two are different.

    Two things make it fast without a compiler: several levels form one symbol, and many independent coders ("lanes")
    advance together in one numpy call.

    Args:
        levels: uint8 ``(n,)``.
        payload_bits: size of what the levels belong to; the more, the more lanes are affordable.

    Reference: duda2013asymmetric

    >>> levels = np.random.default_rng(0).choice([1, 2, 8], 20_000, p=[0.9, 0.08, 0.02]).astype(np.uint8)
    >>> 8 * len(encode_levels(levels)) / 20_000 < 0.55  # entropy 0.541
    True
    """
    used, counts = tally(levels)
    if len(used) < 2:
        return None
    frequencies = np.maximum(1, (counts << _PRECISION) // counts.sum())
    frequencies[frequencies.argmax()] += (1 << _PRECISION) - frequencies.sum()
    # The longest block whose model costs at most 0.4 % above the entropy: longer blocks mean fewer steps.
    share = counts / counts.sum()
    entropy = -(share * np.log2(share)).sum()
    for block in (8, 4, 2, 1):
        slots = _block_model(frequencies, block) if len(used) ** block <= _LARGEST_ALPHABET else None
        if slots is None:
            continue
        joint = np.ones(1)
        for _ in range(block):
            joint = np.outer(joint, share).reshape(-1)
        if block == 1 or -(joint * np.log2(slots / (1 << _PRECISION))).sum() <= 1.004 * block * entropy:
            break
    rank = np.zeros(256, np.uint8)
    rank[used] = np.arange(len(used))
    ranks = np.pad(rank.take(levels), (0, -len(levels) % block))
    symbols = ranks[::block].astype(np.uint16)
    for i in range(1, block):
        symbols *= np.uint16(len(used))
        symbols += ranks[i::block]
    # A lane costs about 24 bits: all together at most 0.5 % of the file, unless that takes more than 4096 steps.
    budget = _entropy_bits(counts) + payload_bits
    lanes = int(min(1024, max(1, budget * 0.005 / 24, len(symbols) / 4096)))
    steps = -(-len(symbols) // lanes)
    filled = np.full(steps * lanes, slots.argmax(), np.uint16)
    filled[: len(symbols)] = symbols
    filled = filled.reshape(steps, lanes)
    starts = np.concatenate([[0], np.cumsum(slots)[:-1]]).astype(np.uint32)
    width, start = slots.take(filled), starts.take(filled)
    limit, rest = width << _SHIFT, np.uint32(1 << _PRECISION) - width
    states, words = np.full(lanes, _LOW, np.uint32), []
    for t in range(steps - 1, -1, -1):  # backwards, so that the decoder runs forwards
        full = np.flatnonzero(states >= limit[t])
        spill = states.take(full)
        words.append(spill.astype(np.uint16))
        states[full] = spill >> _SHIFT
        # state <- (state // width) * 2^16 + start + state % width, in three operations
        quotient = states // width[t]
        quotient *= rest[t]
        quotient += start[t]
        states += quotient
    written = np.concatenate(words[::-1])
    head = _CODED.pack(len(used) - 1, block, lanes, len(written))
    table = used.astype("u1").tobytes() + (frequencies - 1).astype("<u2").tobytes()
    return head + table + states.astype("<u4").tobytes() + written.astype("<u2").tobytes()


def decode_levels(data: bytes | memoryview, count: int) -> Bytes:
    """Return the levels, uint8, that :func:`encode_levels` wrote.

    Args:
        data, count: the bytes, and the number of levels.

    Raises:
        ValueError: the bytes contradict each other or ``count``.

    Reference: duda2013asymmetric

    >>> levels = np.tile(np.array([1, 1, 1, 4], np.uint8), 500)
    >>> bool((decode_levels(encode_levels(levels), 2000) == levels).all())
    True
    """
    if len(data) < _CODED.size:
        raise ValueError(f"index must have at least {_CODED.size} bytes, got {len(data)}")
    kinds, block, lanes, size = _CODED.unpack_from(data)
    kinds += 1
    at = np.cumsum([_CODED.size, kinds, 2 * kinds, 4 * lanes, 2 * size]).tolist()
    if len(data) != at[-1] or block not in (1, 2, 4, 8) or lanes < 1 or kinds**block > _LARGEST_ALPHABET:
        raise ValueError(f"index must have {at[-1]} bytes by its own header, got {len(data)}: it is damaged")
    used = np.frombuffer(data, "u1", kinds, at[0])
    frequencies = np.frombuffer(data, "<u2", kinds, at[1]).astype(np.int64) + 1
    slots = _block_model(frequencies, block) if frequencies.sum() == 1 << _PRECISION else None
    if slots is None:
        raise ValueError("index must hold frequencies that sum to 2^16: it is damaged")
    states = np.frombuffer(data, "<u4", lanes, at[2]).astype(np.uint32)
    words = np.frombuffer(data, "<u2", size, at[3]).astype(np.uint32)
    symbols = -(-count // block)
    found = np.empty((-(-symbols // lanes), lanes), np.uint32)  # the slot, 0 .. 2^16 - 1, of each symbol
    starts = np.repeat(np.concatenate([[0], np.cumsum(slots)[:-1]]), slots)
    table = (np.repeat(slots, slots) << _SHIFT) | (np.arange(1 << _PRECISION) - starts).astype(np.uint32)
    read = 0
    for slot in found:
        np.bitwise_and(states, _MASK, out=slot)
        both = table.take(slot)  # width and offset in one look-up
        states >>= _SHIFT
        states *= both >> _SHIFT
        both &= _MASK
        states += both
        empty = np.flatnonzero(states < _LOW)
        fresh = words[read : read + len(empty)]
        if len(fresh) < len(empty):
            raise ValueError("index must hold more words: it is damaged")
        states[empty] = (states.take(empty) << _SHIFT) | fresh
        read += len(empty)
    if read != len(words) or (states != _LOW).any():
        raise ValueError("index must end in the coder's first state: it is damaged")
    # All levels of a symbol at once: they are the bytes of one wide integer.
    digits = np.indices((kinds,) * block).reshape(block, -1).T
    wide = np.ascontiguousarray(used[digits]).view(f"u{block}").reshape(-1)
    return np.repeat(wide, slots).take(found.reshape(-1)[:symbols]).view(np.uint8)[:count]


# --- maps of bits ----------------------------------------------------------------------------------------------------

_FORMS = ("constant", "fixed", "coded")
_PART = struct.Struct("<BI")  # form, size
_CLASSES = 8
_TABLE_BITS = 8 * 25  # what a further histogram costs


def encode_map(levels: Bytes, payload_bits: float = 0.0) -> tuple[str, bytes]:
    """Return the shortest of four forms for levels 1 to 8, uint8 of any shape (rows first): its name and its bytes.

    ``constant`` is one byte. ``fixed`` has ``ceil(log2 k)`` bits per entry for ``k`` different levels. ``coded`` is
    within about a per cent of the entropy (see :func:`encode_levels`). ``lines`` codes rows and columns of few and of
    many bits apart, below that entropy where inputs or outputs differ.
    """
    flat = levels.reshape(-1)
    used = tally(flat)[0].astype(np.uint8)
    if len(used) < 2:
        return "constant", used.tobytes()
    # A coder's header and table alone can be longer than a small map. No padding between planes would need shifts; a
    # byte each is at most 3 bytes in all.
    ranks = np.searchsorted(used, flat).astype(np.uint8)
    planes = [np.packbits(ranks & np.uint8(1 << bit)).tobytes() for bit in range((len(used) - 1).bit_length())]
    forms = {"fixed": bytes([len(used)]) + used.tobytes() + b"".join(planes)}
    matrix = levels.reshape(len(levels), -1) if levels.ndim > 1 else levels[None]
    if len(matrix) > 1 and (apart := _encode_lines(matrix, payload_bits)):
        forms["lines"] = apart
    else:
        forms["coded"] = encode_levels(flat, payload_bits)
    form = min(forms, key=lambda name: len(forms[name]))
    return form, forms[form]


def decode_map(form: str, data: bytes, shape: Shape) -> Bytes:
    """Return the levels, uint8 of ``shape``, that :func:`encode_map` wrote; ValueError where anything does not fit."""
    count = math.prod(shape)
    if form == "constant":
        if len(data) != (count > 0):
            raise ValueError(f"a constant map must have one byte, got {len(data)}")
        levels = np.full(count, data[0] if data else 1, np.uint8)
    elif form == "fixed":
        kinds, size = data[0] if data else 0, (count + 7) // 8
        width = max(0, kinds - 1).bit_length()
        if kinds < 2 or len(data) != 1 + kinds + width * size:
            raise ValueError(f"a fixed-width map of {count} entries must have {1 + kinds + width * size} bytes")
        ranks = np.zeros(count, np.uint8)
        for bit in range(width):
            plane = np.frombuffer(data, np.uint8, size, 1 + kinds + bit * size)
            ranks |= np.unpackbits(plane, count=count) << np.uint8(bit)
        if count and ranks.max() >= kinds:
            raise ValueError("a fixed-width map must not name a level that it does not have")
        levels = np.frombuffer(data, np.uint8, kinds, 1).take(ranks)
    elif form == "coded":
        levels = decode_levels(data, count)
    elif form == "lines" and len(shape) > 1 and shape[0] > 1:
        levels = _decode_lines(data, (shape[0], count // shape[0]))
    else:
        raise ValueError(f"form of a map must be 'constant', 'fixed', 'coded' or 'lines', got {form!r}: damaged")
    if count and not 1 <= int(levels.min()) <= int(levels.max()) <= 8:
        raise ValueError(f"a map must hold 1 to 8 bits, got {levels.min()} to {levels.max()}")
    return levels.reshape(shape)


def _line_classes(excess: NDArray[np.int64]) -> Bytes:
    """Class of each line, by its sum of excess: 8 for the largest, one less for each halving, down to 2; 1 for none."""
    halvings = np.log2(np.maximum(excess, 1) / max(1, int(excess.max(initial=0))))
    return np.where(excess > 0, np.rint(_CLASSES + halvings).clip(2), 1).astype(np.uint8)


def _places(rows: Bytes, columns: Bytes) -> dict[int, list[tuple]]:
    """Context to indices of all blocks of rows and columns of one class each, both in a fixed order."""
    found: dict[int, list[tuple]] = {}
    for r in np.unique(rows):
        for c in np.unique(columns):
            context = max(1, int(r) + int(c) - _CLASSES) if min(r, c) > 1 else 0
            found.setdefault(context, []).append(np.ix_(rows == r, columns == c))
    return dict(sorted(found.items()))


def _encode_lines(levels: Bytes, payload_bits: float) -> bytes | None:
    """A matrix coded by the classes of its rows and columns; ``None`` where this saves less than 2 %."""
    excess = levels - levels.min(initial=8)
    rows, columns = (_line_classes(excess.sum(axis, dtype=np.int64)) for axis in (1, 0))
    if len(np.unique(rows)) == len(np.unique(columns)) == 1:
        return None
    groups = [np.concatenate([levels[p].reshape(-1) for p in places]) for places in _places(rows, columns).values()]
    parts = [rows, columns, *groups]
    apart = sum(_entropy_bits(tally(part)[1]) + _TABLE_BITS for part in parts)
    if apart > 0.98 * _entropy_bits(tally(levels)[1]):
        return None
    coded = [encode_map(part, payload_bits / 8) for part in parts]
    return b"".join(_PART.pack(_FORMS.index(form), len(data)) + data for form, data in coded)


def _decode_lines(data: bytes, shape: tuple[int, int]) -> Bytes:
    """Inverse of :func:`_encode_lines`; ValueError where the bytes contradict each other or ``shape``."""
    parts, at = [], 0
    try:
        while at < len(data):
            form, size = _PART.unpack_from(data, at)
            at += _PART.size + size
            parts.append((_FORMS[form], data[at - size : at]))
    except (struct.error, IndexError):
        raise ValueError("a map by lines must hold whole parts of known forms: it is damaged") from None
    if at != len(data) or len(parts) < 3:
        raise ValueError(f"a map by lines must have at least 3 whole parts, got {len(parts)}: it is damaged")
    rows, columns = (decode_map(*part, (length,)) for part, length in zip(parts, shape, strict=False))
    contexts = _places(rows, columns)
    if len(parts) != 2 + len(contexts):
        raise ValueError(f"a map by lines must have {2 + len(contexts)} parts, got {len(parts)}: it is damaged")
    levels = np.empty(shape, np.uint8)
    for places, part in zip(contexts.values(), parts[2:], strict=True):
        sizes = [(len(r), c.shape[1]) for r, c in places]
        ends = np.cumsum([a * b for a, b in sizes])
        values = decode_map(*part, (int(ends[-1]),))
        for place, size, piece in zip(places, sizes, np.split(values, ends[:-1]), strict=True):
            levels[place] = piece.reshape(size)
    return levels


def group_map(bits: Bytes, block: int | None = None) -> tuple[Bytes, int | None]:
    """Find out which weights share their bits, all, by row, by column or by ``block``, to store them once a group.

    Returns the levels per group, of a shape that broadcasts to the weight or ``(groups,)``, and the size of its blocks.
    """
    found: list[tuple[Bytes, int | None]] = [(bits, None)]
    for axis in (None, 0, 1):
        first = bits[tuple(slice(None) if i == axis else slice(1) for i in range(bits.ndim))]
        if (bits == first).all():
            found.append((first, None))
    if block and (bits.reshape(-1) == ungroup_map(bits.reshape(-1)[::block], block, bits.shape)).all():
        found.append((bits.reshape(-1)[::block], block))
    return min(found, key=lambda item: item[0].size)  # the first of the smallest


def ungroup_map(levels: Bytes, block: int | None, full: Shape) -> Bytes:
    """Return the levels of every weight, flat, from what :func:`group_map` returns and the weight's shape."""
    if block:
        return np.repeat(levels, block)[: math.prod(full)]
    return levels.reshape(-1) if levels.shape == full else np.broadcast_to(levels, full).flatten()
