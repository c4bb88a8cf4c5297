"""Write a sparse network to disk in as few bytes as its zeros allow, and read it back bit for bit.

File: magic ``EFNBCS``, version (uint16), length of the index (uint32), JSON index, the tensors' bytes, CRC-32 of
all that (uint32); little endian. Each tensor takes the smallest of three forms: dense; *bitmap* (1 bit per entry and
the non-zero values); *csr* (uint16 column per value, uint32 row pointers), the better one below about 1/16 density.
"""

import json
import os
import struct
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

MAGIC, VERSION = b"EFNBCS", 1
_TYPES = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "int64": "<i8",
    "int32": "<i4",
    "uint8": "|u1",
    "bool": "|b1",
}


def encodings(tensor: Tensor) -> dict[str, int]:
    """Bytes that a tensor takes in each form.

    Args:
        tensor: any shape; a matrix ``(first dimension, rest)`` for the csr form, offered below 65 536 columns.

    Returns:
        Name of the form to bytes, without the file's header.

    Reference: savarese2020winning

    >>> encodings(torch.eye(64))
    {'dense': 16384, 'bitmap': 768, 'csr': 644}
    """
    size, numel, nnz = tensor.element_size(), tensor.numel(), int((tensor != 0).sum())
    bytes_ = {"dense": numel * size, "bitmap": (numel + 7) // 8 + nnz * size}
    rows = tensor.shape[0] if tensor.ndim else 1
    if rows and numel // rows < 2**16:
        bytes_["csr"] = nnz * (size + 2) + 4 * (rows + 1)
    return bytes_


def _encode(array: np.ndarray, form: str) -> bytes:
    if form == "dense":
        return array.tobytes()
    values = array[array != 0]
    if form == "bitmap":
        return np.packbits(array.reshape(-1) != 0).tobytes() + values.tobytes()
    rows, columns = np.nonzero(array.reshape(array.shape[0] if array.ndim else 1, -1))
    pointers = np.searchsorted(rows, np.arange((array.shape[0] if array.ndim else 1) + 1))
    return pointers.astype("<u4").tobytes() + columns.astype("<u2").tobytes() + values.tobytes()


def _decode(data: bytes, entry: dict) -> Tensor:
    dtype, shape = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"])
    if entry["form"] == "dense":
        return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).copy())
    flat = np.zeros(int(np.prod(shape, dtype=np.int64)), dtype)
    if entry["form"] == "bitmap":
        cut = (flat.size + 7) // 8
        where = np.unpackbits(np.frombuffer(data[:cut], np.uint8), count=flat.size).astype(bool)
    else:
        rows = shape[0] if shape else 1
        pointers = np.frombuffer(data, "<u4", rows + 1)
        columns = np.frombuffer(data, "<u2", pointers[-1], 4 * (rows + 1))
        cut = 4 * (rows + 1) + 2 * len(columns)
        where = np.repeat(np.arange(rows), np.diff(pointers)) * (flat.size // rows) + columns
    flat[where] = np.frombuffer(data[cut:], dtype)
    return torch.from_numpy(flat.reshape(shape))


def save_sparse(state: Mapping[str, Tensor] | nn.Module, path: str | os.PathLike) -> int:
    """Write parameters and buffers, each in its smallest form; the file appears whole or not at all.

    Args:
        state: ``state_dict``, or a plain module (after ``finalize()``).
        path: file to write.

    Returns:
        Size of the file in bytes.

    Raises:
        TypeError: a tensor of a type that the format does not know.

    Reference: savarese2020winning

    >>> file = tempfile.mktemp()
    >>> save_sparse({"w": torch.zeros(1000, 1000)}, file) < 5000, load_sparse(file)["w"].shape
    (True, torch.Size([1000, 1000]))
    """
    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    index, parts = [], []
    for name, tensor in tensors.items():
        dtype = str(getattr(tensor, "dtype", type(tensor))).removeprefix("torch.")
        if dtype not in _TYPES or tensor.layout is not torch.strided:
            raise TypeError(f"{name!r} must be a dense tensor of one of {sorted(_TYPES)}, got {dtype}")
        sizes = encodings(tensor)
        form = min(sizes, key=sizes.get)
        parts.append(_encode(tensor.detach().cpu().contiguous().numpy().astype(_TYPES[dtype]), form))
        index.append({"name": name, "dtype": dtype, "shape": list(tensor.shape), "form": form, "bytes": len(parts[-1])})
    header = json.dumps(index, separators=(",", ":")).encode()
    body = MAGIC + struct.pack("<HI", VERSION, len(header)) + header + b"".join(parts)
    _write_atomically(Path(path), body + struct.pack("<I", zlib.crc32(body)))
    return len(body) + 4


def _write_atomically(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load_sparse(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read what :func:`save_sparse` wrote.

    Args:
        path: the file.

    Returns:
        Name to dense tensor, for ``load_state_dict``.

    Raises:
        ValueError: not such a file, of another version, truncated or damaged.

    Reference: savarese2020winning

    >>> file = tempfile.mktemp()
    >>> _ = save_sparse({"w": torch.eye(2)}, file)
    >>> load_sparse(file)["w"]
    tensor([[1., 0.],
            [0., 1.]])
    """
    data = Path(path).read_bytes()
    start = len(MAGIC) + 6
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path} must start with {MAGIC!r}: not a file of save_sparse")
    if len(data) < start + 4 or zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise ValueError(f"{path} is truncated or damaged: its checksum does not fit; write it anew")
    version, length = struct.unpack("<HI", data[len(MAGIC) : start])
    if version != VERSION:
        raise ValueError(f"{path} must have version {VERSION}, got {version}")
    tensors, at = {}, start + length
    for entry in json.loads(data[start:at]):
        tensors[entry["name"]] = _decode(data[at : at + entry["bytes"]], entry)
        at += entry["bytes"]
    return tensors
