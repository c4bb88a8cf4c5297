"""Real bit-packing: quantised tensors to one checked, versioned file, and back bit for bit."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .gate import SmolGate
from .planes import plane_bytes
from .quantized import QuantizedTensor, decode_tensor, encode_tensor, group_levels, weight_levels
from .storage_cost import map_entropy
from .wire import Entry, from_bytes, raw_from_tensor, tensor_from_raw, to_bytes, write_atomically


class PackedModel:
    """A model in the file format: quantised weights as digit planes with their map of bits, all else as it is.

    Args:
        entries: records of the file, one for each tensor; made by :func:`pack` or read from a file.

    Reference: savarese2022bits

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
        found = [torch.from_numpy(group_levels(entry)) for entry in self._quantised()]
        return sum(map_entropy(levels) * levels.numel() for levels in found)

    @property
    def weights(self) -> int:
        """Number of quantised weights."""
        return sum(math.prod(entry.shape) for entry in self._quantised())

    @property
    def raw_bytes(self) -> int:
        """Bytes of tensors that are not quantised: biases, normalisation, scales."""
        return sum(len(part) for e in self.entries for part in (e.parts if e.kind == "raw" else e.parts[:1]))

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's content."""
        if self._data is None:
            self._data = to_bytes(self.entries)
        return self._data

    def save(self, path: str | os.PathLike) -> int:
        """Write the file, whole or not at all; returns its size in bytes."""
        write_atomically(Path(path), self.to_bytes())
        return self.nbytes

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PackedModel":
        """Read a file; ``ValueError`` if it is no such file, of another version, truncated or damaged."""
        return cls.from_bytes(Path(path).read_bytes(), str(path))

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "data") -> "PackedModel":
        """The same from the content of a file."""
        packed = cls(from_bytes(data, source))
        for entry in packed._quantised():
            if plane_bytes(weight_levels(entry)) != len(entry.parts[2]):
                raise ValueError(f"{source}: {entry.name!r} has a map of bits that does not fit its digits: damaged")
        return packed

    def to_state_dict(self) -> dict[str, Tensor]:
        """Name to tensor, bit for bit what was packed, for ``load_state_dict`` of the plain model."""
        return {e.name: decode_tensor(e) if e.kind == "pm1" else tensor_from_raw(e) for e in self.entries}


def pack(model_or_tensors: nn.Module | Mapping[str, QuantizedTensor | Tensor | tuple]) -> PackedModel:
    """Pack a model whose bits are fixed (after ``handle.freeze()``), or tensors by name.

    Args:
        model_or_tensors: a module with frozen :class:`SmolGate`, before ``finalize()``; or a mapping from name to
            :class:`QuantizedTensor` or ``(u, bits, scale)`` (packed), or to a plain tensor (stored as it is).

    Returns:
        The packed model; its ``to_state_dict()`` has the plain model's names.

    Raises:
        ValueError: no quantised tensor, bits not fixed yet, bits outside 1 to 8, or other values out of range.
        TypeError: an item is neither tensor nor quantised tensor.

    Reference: savarese2022bits

    >>> from effnb.compress import uniform_qat
    >>> model = nn.Linear(8, 4)
    >>> handle = uniform_qat(model, bits=2)
    >>> packed = pack(model)
    >>> packed.payload_bits, bool((packed.to_state_dict()["weight"] == model.weight).all())
    (64, True)
    """
    items = gated_tensors(model_or_tensors) if isinstance(model_or_tensors, nn.Module) else dict(model_or_tensors)
    items = {name: QuantizedTensor(*item) if isinstance(item, tuple) else item for name, item in items.items()}
    if not any(isinstance(item, QuantizedTensor) for item in items.values()):
        raise ValueError("pack needs at least one quantised weight: pack the model before finalize()")
    entries = []
    for name, item in items.items():
        if not isinstance(item, QuantizedTensor | Tensor):
            raise TypeError(f"{name!r} must be a tensor or a QuantizedTensor, got {type(item).__name__}")
        entries.append(encode_tensor(name, item) if isinstance(item, QuantizedTensor) else raw_from_tensor(name, item))
    return PackedModel(entries)


@torch.no_grad()
def gated_tensors(model: nn.Module) -> dict[str, QuantizedTensor | Tensor]:
    """What :func:`pack` stores of a model, by the names that the plain model has.

    Args:
        model: with frozen gates.

    Returns:
        Quantised weights and all other tensors of the ``state_dict``.

    Raises:
        ValueError: bits not fixed yet.

    Reference: savarese2022bits

    >>> from effnb.compress import uniform_qat
    >>> handle = uniform_qat(nn.Sequential(nn.Linear(2, 2)), bits=1)
    >>> list(gated_tensors(handle.model))
    ['0.weight', '0.bias']
    """
    found: dict[str, QuantizedTensor | Tensor] = {}
    gates = {
        f"{name}.".removeprefix("."): layer.parametrizations.weight
        for name, layer in model.named_modules()
        if parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], SmolGate)
    }
    for prefix, slot in gates.items():
        gate, w = slot[0], slot.original
        if not gate.is_frozen:
            raise ValueError(f"bits of layer {prefix.rstrip('.')!r} must be fixed before packing: call freeze()")
        u = (w / gate.scale.to(w.dtype)).clamp(-2, 2)
        found[f"{prefix}weight"] = QuantizedTensor(u, gate.weight_bits(), gate.scale, gate.groups.block)
    hidden = tuple(f"{prefix}parametrizations.weight." for prefix in gates)
    plain = {k: v for k, v in model.state_dict().items() if not k.startswith(hidden) and isinstance(v, Tensor)}
    return found | plain
