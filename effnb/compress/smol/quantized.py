"""One weight in the +-1 format, and its three parts in a file: scale, map of bits, digit planes."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .digits import _check_broadcast, below_two, check_bits, quantize_pm1
from .index import decode_map, encode_map, group_map, map_size, ungroup_map
from .noise import check_scale
from .planes import pack_planes, unpack_planes
from .wire import Entry

_FLOATS = ("float64", "float32", "float16", "bfloat16")


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
        check_scale(self.scale)
        if str(self.u.dtype).removeprefix("torch.") not in _FLOATS:
            raise ValueError(f"u must be floating, got {self.u.dtype}")
        if self.u.numel() and not float(self.u.detach().abs().max()) <= 2:  # catches nan
            raise ValueError(f"u must be in [-2, 2], got magnitudes up to {float(self.u.detach().abs().max())}")
        for name in ("bits", "scale"):
            _check_broadcast(name, torch.as_tensor(getattr(self, name)).shape, self.u.shape)

    def dequantize(self) -> Tensor:
        """The weight, shape and type of ``u``."""
        scale = torch.as_tensor(self.scale, dtype=torch.float32).to(self.u.dtype)
        return quantize_pm1(self.u.detach(), self.bits) * scale.to(self.u.device)


def encode_tensor(name: str, item: QuantizedTensor) -> Entry:
    """Entry of a quantised tensor: scale, map of bits, digit planes."""
    u = item.u.detach().cpu()
    bits = torch.as_tensor(item.bits).to(torch.uint8).cpu().broadcast_to(u.shape).contiguous().numpy()
    # The p-digit code is the head of the 8-digit code, so one quantisation serves all p.
    codes = u.clamp(-2.0, below_two(u.dtype)).mul_(64).floor_().add_(128).to(torch.uint8).reshape(-1).numpy()
    flat = bits.reshape(-1)
    planes = pack_planes(codes, flat)
    levels, shape, block = group_map(bits, item.block)
    payload = int(flat.sum(dtype=np.int64))
    form, index = encode_map(levels, payload, _rows(shape))
    scale = torch.as_tensor(item.scale, dtype=torch.float32).detach().cpu()
    dtype = str(u.dtype).removeprefix("torch.")
    fields = {"form": form, "map": list(shape), "block": block, "scale": list(scale.shape), "bits": payload}
    parts = (scale.contiguous().numpy().astype("<f4").tobytes(), index, planes)
    return Entry(name, "pm1", dtype, tuple(u.shape), fields, parts)


def group_levels(entry: Entry) -> np.ndarray:
    """Bits as stored, one number a group."""
    shape = tuple(entry.fields["map"])
    count = map_size(shape, entry.fields["block"], entry.shape)
    return decode_map(entry.fields["form"], entry.parts[1], count, _rows(shape))


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def weight_levels(entry: Entry) -> np.ndarray:
    """Bits of every weight, flat."""
    return ungroup_map(group_levels(entry), tuple(entry.fields["map"]), entry.fields["block"], entry.shape)


def decode_tensor(entry: Entry) -> Tensor:
    """Inverse of :func:`encode_tensor`: the weight itself."""
    if math.prod(entry.shape) > 8 * len(entry.parts[2]):  # each weight has a digit: refuse before allocating
        raise ValueError(f"{entry.name!r} must have a digit for each of {entry.shape} weights: the file is damaged")
    bits = weight_levels(entry)
    codes = torch.from_numpy(unpack_planes(entry.parts[2], bits))
    halves = np.array([2.0 ** (1 - p) - 2 for p in range(9)], np.float32)
    values = codes.to(torch.float32).mul_(1 / 64).add_(torch.from_numpy(halves.take(bits)))
    scale = torch.from_numpy(np.frombuffer(entry.parts[0], "<f4").astype(np.float32)).reshape(entry.fields["scale"])
    dtype = getattr(torch, entry.dtype)
    return values.to(dtype).view(entry.shape).mul_(scale.to(dtype))
