"""The file: magic ``EFNBSMOL``, version, sizes, a compressed index of entries, their bytes, CRC-32; little endian.

Nothing is ever unpickled. A file is refused, with the reason, unless magic, version, length and checksum fit.
"""

import json
import math
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

MAGIC, VERSION = b"EFNBSMOL", 1
_HEAD = struct.Struct("<HQI")  # version, length of the whole file, length of the index
_LARGEST_INDEX = 1 << 26
_TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_COMMON = {"name", "kind", "dtype", "shape", "parts"}
_PM1 = {"form": str, "map": list, "block": int | None, "scale": list, "bits": int}


@dataclass(frozen=True)
class Entry:
    """One tensor in the file: ``kind`` is ``"pm1"`` (scale, map of bits, digit planes) or ``"raw"`` (its bytes)."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    fields: dict = field(default_factory=dict)
    parts: tuple[bytes, ...] = ()


def raw_from_tensor(name: str, tensor: Tensor) -> Entry:
    """Entry of a tensor that is stored as it is."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _TYPES or tensor.layout is not torch.strided:
        raise TypeError(f"{name!r} must be a dense tensor of one of {_TYPES}, got {dtype}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return Entry(name, "raw", dtype, tuple(tensor.shape), {}, (flat.view(torch.uint8).numpy().tobytes(),))


def tensor_from_raw(entry: Entry) -> Tensor:
    """Inverse of :func:`raw_from_tensor`."""
    dtype, data = getattr(torch, entry.dtype), bytearray(entry.parts[0])
    if len(data) != math.prod(entry.shape) * dtype.itemsize:
        raise ValueError(f"{entry.name!r} must have {math.prod(entry.shape)} entries of {dtype}: the file is damaged")
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(entry.shape)


def to_bytes(entries: list[Entry]) -> bytes:
    """The whole file."""
    records = [
        {"name": e.name, "kind": e.kind, "dtype": e.dtype, "shape": e.shape, "parts": [len(p) for p in e.parts]}
        | e.fields
        for e in entries
    ]
    index = zlib.compress(json.dumps(records, separators=(",", ":")).encode(), 9)
    parts = [part for entry in entries for part in entry.parts]
    length = len(MAGIC) + _HEAD.size + len(index) + sum(map(len, parts)) + 4
    body = b"".join([MAGIC, _HEAD.pack(VERSION, length, len(index)), index, *parts])
    return body + struct.pack("<I", zlib.crc32(body))


def from_bytes(data: bytes, source: str = "data") -> list[Entry]:
    """Check a file's content and cut it into entries.

    Raises:
        ValueError: wrong magic, another version, truncated, damaged.
    """
    if not data.startswith(MAGIC):
        raise ValueError(f"{source} must start with {MAGIC!r}: not a packed model")
    start = len(MAGIC) + _HEAD.size
    if len(data) < start + 4:
        raise ValueError(f"{source} is truncated: it has {len(data)} bytes, the header alone takes {start}")
    version, length, size = _HEAD.unpack_from(data, len(MAGIC))
    if version != VERSION:
        raise ValueError(f"{source} must have version {VERSION}, got {version}")
    if len(data) < length:
        raise ValueError(f"{source} is truncated: it has {len(data)} of {length} bytes")
    if len(data) > length or zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise ValueError(f"{source} is damaged: its length or checksum does not fit")
    try:
        return _cut(data, start, size)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, zlib.error) as error:
        raise ValueError(f"{source} is damaged: its index cannot be read ({error})") from None


def _cut(data: bytes, start: int, size: int) -> list[Entry]:
    unzip = zlib.decompressobj()
    text = unzip.decompress(data[start : start + size], _LARGEST_INDEX)  # no bomb
    if not unzip.eof:
        raise ValueError("the index of the file is incomplete or too large: damaged")
    entries, at = [], start + size
    for record in json.loads(text):
        _check_record(record)
        parts = []
        for length in record["parts"]:
            parts.append(data[at : at + length])
            at += length
        rest = {key: value for key, value in record.items() if key not in _COMMON}
        shape = tuple(record["shape"])
        entries.append(Entry(record["name"], record["kind"], record["dtype"], shape, rest, tuple(parts)))
    if at != len(data) - 4:
        raise ValueError(f"the file must hold {at + 4} bytes by its index, got {len(data)}: damaged")
    return entries


def _check_record(record: dict) -> None:
    counts = [*record["shape"], *record["parts"], *record.get("map", []), *record.get("scale", [])]
    kinds = {"raw": 1, "pm1": 3}
    good = (
        isinstance(record["name"], str)
        and len(record["parts"]) == kinds.get(record["kind"])
        and record["dtype"] in _TYPES
        and all(type(count) is int and count >= 0 for count in counts)
        and (record["kind"] == "raw" or all(isinstance(record[key], kind) for key, kind in _PM1.items()))
    )
    if not good:
        raise ValueError(f"entry {record.get('name')!r} of the file has fields out of range: damaged")


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file beside ``path``, then rename."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
