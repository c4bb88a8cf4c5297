"""The map of bits on disk: one level per group where groups share; constant, fixed width, coded, or by lines."""

import math

import numpy as np
from numpy.typing import NDArray

from .contexts import decode_lines, encode_lines
from .rans import decode_levels, encode_levels, tally

Bytes = NDArray[np.uint8]
Shape = tuple[int, ...]


def encode_map(levels: Bytes, payload_bits: float = 0.0, rows: int = 1) -> tuple[str, bytes]:
    """The shortest of four forms for levels 1 to 8.

    ``constant`` is one byte. ``fixed`` has ``ceil(log2 k)`` bits per entry for ``k`` different levels. ``coded`` is
    within about a per cent of the entropy (see :func:`encode_levels`). ``lines`` codes rows and columns of few and of
    many bits apart, below that entropy where inputs or outputs differ.

    Args:
        levels: bits of each entry, uint8 ``(n,)``.
        payload_bits: size of the digits that go with them.
        rows: of the matrix that the levels are; 1 for none.

    Returns:
        Name of the form and its bytes.

    Reference: savarese2022bits

    >>> encode_map(np.array([3, 3, 3], np.uint8))
    ('constant', b'\\x03')
    """
    used = tally(levels)[0].astype(np.uint8)
    if len(used) < 2:
        return "constant", used.tobytes()
    width = (len(used) - 1).bit_length()
    # A coder's header and table alone can be longer than a small map.
    forms = {"fixed": _fixed(levels, used, width)}
    apart = rows > 1 and encode_lines(levels.reshape(rows, -1), lambda part: encode_map(part, payload_bits / 8))
    if apart:
        forms["lines"] = apart
    elif (coded := encode_levels(levels, payload_bits)) is not None:
        forms["coded"] = coded
    form = min(forms, key=lambda name: len(forms[name]))
    return form, forms[form]


def _fixed(levels: Bytes, used: Bytes, width: int) -> bytes:
    ranks = np.searchsorted(used, levels).astype(np.uint8)
    planes = [np.packbits(ranks & np.uint8(1 << bit)).tobytes() for bit in range(width)]
    # No padding between planes would need shifts; a byte each is at most 3 bytes in all.
    return bytes([len(used)]) + used.tobytes() + b"".join(planes)


def decode_map(form: str, data: bytes, count: int, rows: int = 1) -> Bytes:
    """Inverse of :func:`encode_map`.

    Args:
        form: ``"constant"``, ``"fixed"``, ``"coded"`` or ``"lines"``.
        data: the bytes.
        count: number of entries.
        rows: of the matrix.

    Returns:
        Levels from 1 to 8, uint8 ``(count,)``.

    Raises:
        ValueError: unknown form, or bytes that do not fit it.

    Reference: savarese2022bits

    >>> decode_map("constant", b"\\x03", 2).tolist()
    [3, 3]
    """
    if form == "constant":
        if len(data) != (count > 0):
            raise ValueError(f"a constant map must have one byte, got {len(data)}")
        levels = np.full(count, data[0] if data else 1, np.uint8)
    elif form == "fixed":
        levels = _unfix(data, count)
    elif form == "coded":
        levels = decode_levels(data, count)
    elif form == "lines" and rows > 1 and count % rows == 0:
        levels = decode_lines(data, (rows, count // rows), decode_map)
    else:
        raise ValueError(f"form of a map must be 'constant', 'fixed', 'coded' or 'lines', got {form!r}: damaged")
    if count and not 1 <= int(levels.min()) <= int(levels.max()) <= 8:
        raise ValueError(f"a map must hold 1 to 8 bits, got {levels.min()} to {levels.max()}")
    return levels


def _unfix(data: bytes, count: int) -> Bytes:
    kinds, size = data[0] if data else 0, (count + 7) // 8
    width = max(0, kinds - 1).bit_length()
    if kinds < 2 or len(data) != 1 + kinds + width * size:
        raise ValueError(f"a fixed-width map of {count} entries must have {1 + kinds + width * size} bytes")
    used, ranks = np.frombuffer(data, np.uint8, kinds, 1), np.zeros(count, np.uint8)
    for bit in range(width):
        plane = np.frombuffer(data, np.uint8, size, 1 + kinds + bit * size)
        ranks |= np.unpackbits(plane, count=count) << np.uint8(bit)
    if count and ranks.max() >= kinds:
        raise ValueError("a fixed-width map must not name a level that it does not have")
    return used.take(ranks)


def group_map(bits: Bytes, block: int | None = None) -> tuple[Bytes, Shape, int | None]:
    """Find out which weights share their bits, so that the map is stored once per group.

    Args:
        bits: for every weight, uint8 of the weight's shape.
        block: size of the blocks to try.

    Returns:
        The levels per group (flat), the shape that broadcasts to the weight (``(groups,)`` for blocks), block size.

    Reference: zhou2023sysmol

    >>> group_map(np.array([[1, 4], [1, 4]], np.uint8))
    (array([1, 4], dtype=uint8), (1, 2), None)
    """
    full = bits.shape
    ones = (1,) * len(full)
    if bits.size and (bits == bits.flat[0]).all():
        return bits.reshape(-1)[:1], ones, None
    found = [(bits.reshape(-1), full, None)]
    for axis in range(min(2, len(full))):
        first = bits[tuple(slice(None) if i == axis else slice(1) for i in range(len(full)))]
        if bits.size and (bits == first).all():
            found.append((first.reshape(-1), first.shape, None))
    if block and bits.size and (shared := _blocks(bits.reshape(-1), block)) is not None:
        found.append((shared, (len(shared),), block))
    return min(found, key=lambda item: len(item[0]))


def _blocks(flat: Bytes, block: int) -> Bytes | None:
    first = flat[::block]
    return first if (np.repeat(first, block)[: len(flat)] == flat).all() else None


def ungroup_map(levels: Bytes, shape: Shape, block: int | None, full: Shape) -> Bytes:
    """Levels per group to levels per weight, flat.

    Args:
        levels: per group, flat.
        shape: of the groups.
        block: size of the blocks, or ``None``.
        full: shape of the weight.

    Returns:
        uint8 ``(weights,)``.

    Reference: zhou2023sysmol

    >>> ungroup_map(np.array([1, 4], np.uint8), (1, 2), None, (2, 2)).tolist()
    [1, 4, 1, 4]
    """
    if block:
        return np.repeat(levels, block)[: math.prod(full)]
    return levels if shape == full else np.broadcast_to(levels.reshape(shape), full).flatten()


def map_size(shape: Shape, block: int | None, full: Shape) -> int:
    """Number of levels of a map; raises ``ValueError`` where the groups do not fit the weight."""
    if block is not None:
        fits = block >= 1 and shape == (-(-math.prod(full) // block),)
    else:
        fits = len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))
    if not fits:
        raise ValueError(f"a map of shape {shape} must fit a weight of shape {full}: the file is damaged")
    return math.prod(shape)
