"""Real bit-packing: quantised tensors to one checked, versioned file, and back bit for bit.

The file, little endian: magic ``EFNBSMOL``, version, sizes, a compressed index of entries, their bytes, CRC-32. Nothing
is ever unpickled. A file is refused, with the reason, unless magic, version, length and checksum fit.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effnb.common import check_number, kind, write_atomically
from effnb.compress.smol import codec
from effnb.compress.smol.gate import SmolGate
from effnb.compress.smol.handle import map_entropy
from effnb.compress.smol.noise import below_two, check_bits, check_broadcast, quantize_pm1

__all__ = ["PackedModel", "QuantizedTensor", "pack"]

MAGIC, VERSION = b"EFNBSMOL", 1
_HEAD = struct.Struct("<HQI")  # version, length of the whole file, length of the index
_LARGEST_INDEX = 1 << 26
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_TYPES = (*_FLOATS, "int64", "int32", "int16", "int8", "uint8", "bool")

_PM1 = {"form": str, "map": list, "block": int | None, "scale": list, "bits": int}


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight in the +-1 format: ``scale * Q(u, bits)``.

    Args:
        u: normalised weights in [-2, 2], any shape; rounded to ``bits`` digits if they are not codes yet.
        bits: digits of each weight, whole numbers 1 to 8, a number or a tensor that broadcasts to ``u``.
        scale: positive number, or a tensor that broadcasts to ``u`` (one entry per output channel).
        block: weights share their bits in blocks of so many; lets the map be stored once per block.

    Raises:
        ValueError: bits that are not whole or out of 1 to 8, ``u`` outside [-2, 2], ``scale`` not positive.

    Reference: savarese2022bits

    >>> QuantizedTensor(torch.tensor([0.3, -1.9]), torch.tensor([1, 2]), 0.1).dequantize()
    tensor([ 0.1000, -0.1500])
    """

    u: Tensor
    bits: Tensor | int
    scale: Tensor | float = 1.0
    block: int | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits, 8, "bits")
        check_number("scale", torch.as_tensor(self.scale), gt=0)
        if _type_name(self.u) not in _FLOATS:
            raise ValueError(f"u must be floating, got {self.u.dtype}")
        if self.u.numel() and not float(self.u.detach().abs().max()) <= 2:  # catches nan
            raise ValueError(f"u must be in [-2, 2], got magnitudes up to {float(self.u.detach().abs().max())}")
        for name in ("bits", "scale"):
            check_broadcast(name, torch.as_tensor(getattr(self, name)).shape, self.u.shape)

    def dequantize(self) -> Tensor:
        """Return the weight, shape and type of ``u``."""
        # By way of fp32, which files hold: else a file would not give back the same bits.
        scale = torch.as_tensor(self.scale, dtype=torch.float32).to(self.u.dtype)
        return quantize_pm1(self.u.detach(), self.bits) * scale.to(self.u.device)


class Entry(NamedTuple):
    """One tensor in the file: ``kind`` is ``"pm1"`` (scale, map of bits, digit planes) or ``"raw"`` (its bytes)."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    fields: dict
    parts: tuple[bytes, ...]


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _encode(name: str, item: QuantizedTensor | Tensor) -> Entry:
    """A tensor as its bytes, a quantised one as scale, map of bits and digit planes."""
    if isinstance(item, Tensor):
        if _type_name(item) not in _TYPES or item.layout is not torch.strided:
            raise TypeError(f"{name!r} must be a dense tensor of one of {_TYPES}, got {_type_name(item)}")
        data = item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return Entry(name, "raw", _type_name(item), tuple(item.shape), {}, (data,))
    u = item.u.detach().cpu()
    bits = torch.as_tensor(item.bits).to(torch.uint8).cpu().broadcast_to(u.shape).contiguous().numpy()
    # The p-digit code is the head of the 8-digit code, so one quantisation serves all p.
    codes = u.clamp(-2.0, below_two(u.dtype)).mul_(64).floor_().add_(128).to(torch.uint8).reshape(-1).numpy()
    planes = codec.pack_planes(codes, bits.reshape(-1))
    levels, block = codec.group_map(bits, item.block)
    payload = int(bits.sum(dtype=np.int64))
    form, index = codec.encode_map(levels, payload)
    scale = torch.as_tensor(item.scale, dtype=torch.float32).detach().cpu().contiguous().numpy()
    fields = {"form": form, "map": list(levels.shape), "block": block, "scale": list(scale.shape), "bits": payload}
    parts = (scale.astype("<f4").tobytes(), index, planes)
    return Entry(name, "pm1", _type_name(u), tuple(u.shape), fields, parts)


def _group_levels(entry: Entry) -> np.ndarray:
    """Bits as stored, one number a group."""
    shape, block, full = tuple(entry.fields["map"]), entry.fields["block"], entry.shape
    if block is not None:
        fits = block >= 1 and shape == (-(-math.prod(full) // block),)
    else:
        fits = len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))
    if not fits:
        raise ValueError(f"a map of shape {shape} must fit a weight of shape {full}: the file is damaged")
    return codec.decode_map(entry.fields["form"], entry.parts[1], shape)


def _weight_levels(entry: Entry) -> np.ndarray:
    """Bits of every weight, flat."""
    return codec.ungroup_map(_group_levels(entry), entry.fields["block"], entry.shape)


def _decode(entry: Entry) -> Tensor:
    """Inverse of :func:`_encode`: the tensor, a quantised one as the weight itself."""
    name, form, dtype, shape, fields, parts = entry
    dtype, size = getattr(torch, dtype), math.prod(shape)
    if form == "raw":
        data = bytearray(parts[0])  # a copy: a tensor must not write into the file's bytes
        if len(data) != size * dtype.itemsize:
            raise ValueError(f"{name!r} must have {size} entries of {dtype}: the file is damaged")
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)
    if size > 8 * len(parts[2]):  # each weight has a digit: refuse before allocating
        raise ValueError(f"{name!r} must have a digit for each of {shape} weights: the file is damaged")
    scale = np.frombuffer(parts[0], "<f4").astype(np.float32)
    if scale.size != math.prod(fields["scale"]):
        raise ValueError(f"{name!r} must have a scale of shape {fields['scale']}: the file is damaged")
    check_broadcast(f"scale of {name!r}", fields["scale"], shape)
    bits = _weight_levels(entry)
    codes = torch.from_numpy(codec.unpack_planes(parts[2], bits))
    # The digits that a weight does not have are 0; half a step puts its value into the middle of its cell.
    halves = np.array([2.0 ** (1 - p) - 2 for p in range(9)], np.float32)
    values = codes.to(torch.float32).mul_(1 / 64).add_(torch.from_numpy(halves.take(bits)))
    return values.to(dtype).view(shape).mul_(torch.from_numpy(scale).reshape(fields["scale"]).to(dtype))


class PackedModel:
    """A model in the file format: quantised weights as digit planes with their map of bits, all else as it is.

    Args:
        entries: records of the file, one for each tensor; made by :func:`pack` or read from a file.

    >>> packed = pack({"w": QuantizedTensor(torch.tensor([0.25, -1.0]), torch.tensor([3, 1]))})
    >>> packed.payload_bits, packed.to_state_dict()["w"]
    (4, tensor([ 0.2500, -1.0000]))
    """

    def __init__(self, entries: list) -> None:
        self.entries = list(entries)
        self._data: bytes | None = None

    def _quantised(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind == "pm1"]

    @property
    def payload_bits(self) -> int:
        """Digits of all weights, ``sum(p_i)``, without padding."""
        return sum(entry.fields["bits"] for entry in self._quantised())

    @property
    def index_bits(self) -> int:
        """Bits that the maps of bits really take, their tables included."""
        return 8 * sum(len(entry.parts[1]) for entry in self._quantised())

    @property
    def entropy_bits(self) -> float:
        """Entropy of the maps, per tensor and at the level of groups: the least that an index could take."""
        found = [torch.from_numpy(_group_levels(entry)) for entry in self._quantised()]
        return sum(map_entropy(levels) * levels.numel() for levels in found)

    @property
    def weights(self) -> int:
        """Number of quantised weights."""
        return sum(math.prod(entry.shape) for entry in self._quantised())

    @property
    def raw_bytes(self) -> int:
        """Bytes of tensors that are not quantised: biases, normalisation, scales."""
        return sum(len(entry.parts[0]) for entry in self.entries)

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        if self._data is None:
            records = [
                dict(name=e.name, kind=e.kind, dtype=e.dtype, shape=e.shape, parts=[*map(len, e.parts)], **e.fields)
                for e in self.entries
            ]
            index = zlib.compress(json.dumps(records, separators=(",", ":")).encode(), 9)
            parts = [part for entry in self.entries for part in entry.parts]
            length = len(MAGIC) + _HEAD.size + len(index) + sum(map(len, parts)) + 4
            body = b"".join([MAGIC, _HEAD.pack(VERSION, length, len(index)), index, *parts])
            self._data = body + struct.pack("<I", zlib.crc32(body))
        return self._data

    def save(self, path: str | os.PathLike) -> int:
        """Write the file, whole or not at all; returns its size in bytes."""
        write_atomically(path, self.to_bytes())
        return self.nbytes

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PackedModel":
        """Read a file; ``ValueError`` if it is no such file, of another version, truncated or damaged."""
        return cls.from_bytes(Path(path).read_bytes(), str(path))

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "data") -> "PackedModel":
        """The same from the content of a file, which messages call ``source``."""
        if not data.startswith(MAGIC):
            raise ValueError(f"{source} must start with {MAGIC!r}: not a packed model")
        at = len(MAGIC) + _HEAD.size
        whole = len(data) >= at + 4
        version, length, size = _HEAD.unpack_from(data, len(MAGIC)) if whole else (VERSION, at + 4, 0)
        if version != VERSION:
            raise ValueError(f"{source} must have version {VERSION}, got {version}")
        if len(data) < length:
            raise ValueError(f"{source} is truncated: it has {len(data)} of {length} bytes")
        if len(data) > length or zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise ValueError(f"{source} is damaged: its length or checksum does not fit")
        # A checksum says nothing of intent: from here on each field is looked at before it is used.
        entries = []
        try:
            unzip = zlib.decompressobj()
            text = unzip.decompress(data[at : at + size], _LARGEST_INDEX)  # no bomb
            if not unzip.eof:
                raise ValueError(f"{source} is damaged: its index is incomplete or too large")
            at += size
            for record in json.loads(text):
                if not _is_sound(record):
                    raise ValueError(f"{source} is damaged: entry {record.get('name')!r} has fields out of range")
                parts = []
                for size in record.pop("parts"):
                    parts.append(data[at : at + size])
                    at += size
                name, form, dtype, shape = (record.pop(key) for key in ("name", "kind", "dtype", "shape"))
                entries.append(Entry(name, form, dtype, tuple(shape), record, tuple(parts)))
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, zlib.error) as error:
            raise ValueError(f"{source} is damaged: its index cannot be read ({error})") from None
        if at != len(data) - 4:
            raise ValueError(f"{source} is damaged: it must hold {at + 4} bytes by its index, got {len(data)}")
        packed = cls(entries)
        for entry in packed._quantised():
            if codec.plane_bytes(_weight_levels(entry)) != len(entry.parts[2]):
                raise ValueError(f"{source}: {entry.name!r} has a map of bits that does not fit its digits: damaged")
        return packed

    def to_state_dict(self) -> dict[str, Tensor]:
        """Return name to tensor, bit for bit what was packed, for ``load_state_dict`` of the plain model."""
        return {entry.name: _decode(entry) for entry in self.entries}


def _is_sound(record: dict) -> bool:
    """Whether a record of the index has fields of the right types and ranges; KeyError where one is missing."""
    counts = [*record["shape"], *record["parts"], *record.get("map", []), *record.get("scale", [])]
    quantised = record["kind"] == "pm1"
    return (
        isinstance(record["name"], str)
        and len(record["parts"]) == {"raw": 1, "pm1": 3}.get(record["kind"])
        and record["dtype"] in (_FLOATS if quantised else _TYPES)
        and all(type(count) is int and count >= 0 for count in counts)
        and (not quantised or all(isinstance(record[key], wanted) for key, wanted in _PM1.items()))
    )


@torch.no_grad()
def pack(model_or_tensors: nn.Module | Mapping[str, QuantizedTensor | Tensor | tuple]) -> PackedModel:
    """Pack a model whose bits are fixed (after ``handle.freeze()``), or tensors by name.

    Args:
        model_or_tensors: a module with frozen :class:`SmolGate`, before ``finalize()``; or a mapping from name to
            :class:`QuantizedTensor` or ``(u, bits, scale)`` (packed), or to a plain tensor (stored as it is).

    Raises:
        ValueError: no quantised tensor, bits not fixed yet, bits outside 1 to 8, or other values out of range.
        TypeError: an item is neither tensor nor quantised tensor.

    >>> from effnb.compress import uniform_qat
    >>> model = nn.Linear(8, 4)
    >>> handle = uniform_qat(model, bits=2)
    >>> packed = pack(model)
    >>> packed.payload_bits, bool((packed.to_state_dict()["weight"] == model.weight).all())
    (64, True)
    """
    if isinstance(model_or_tensors, nn.Module):
        items, hidden = {}, []
        for name, layer in model_or_tensors.named_modules():
            gate = layer.parametrizations.weight[0] if parametrize.is_parametrized(layer, "weight") else None
            if not isinstance(gate, SmolGate):
                continue
            if not gate.is_frozen:
                raise ValueError(f"bits of layer {name!r} must be fixed before packing: call freeze()")
            prefix = f"{name}.".removeprefix(".")
            # Fine-tuning may have moved a weight out of range; its code is the last one all the same.
            w = layer.parametrizations.weight.original
            u = (w / gate.scale.to(w.dtype)).clamp(-2, 2)
            items[f"{prefix}weight"] = QuantizedTensor(u, gate.weight_bits(), gate.scale, gate.groups.block)
            hidden.append(f"{prefix}parametrizations.weight.")
        state = model_or_tensors.state_dict()
        items |= {k: v for k, v in state.items() if not k.startswith(tuple(hidden)) and isinstance(v, Tensor)}
    else:
        items = {k: QuantizedTensor(*v) if isinstance(v, tuple) else v for k, v in model_or_tensors.items()}
    if not any(isinstance(item, QuantizedTensor) for item in items.values()):
        raise ValueError("pack needs at least one quantised weight: pack the model before finalize()")
    for name, item in items.items():
        if not isinstance(item, QuantizedTensor | Tensor):
            raise TypeError(f"{name!r} must be a tensor or a QuantizedTensor, got {kind(item)}")
    return PackedModel([_encode(name, item) for name, item in items.items()])
