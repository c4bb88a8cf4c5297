"""A finished sparse network: linear layers that multiply only what is left, and files as small as the zeros allow.

File: magic ``EFNBCS``, version (uint16), length of the index (uint32), JSON index, the tensors' bytes, CRC-32 of
all that (uint32); little endian. Each tensor takes the smallest of three forms: dense; *bitmap* (1 bit per entry and
the non-zero values); *csr* (uint16 column per value, uint32 row pointers), the better one below about 1/16 density.
"""

import json
import os
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from effnb.common import near, write_atomically

__all__ = ["SparseLinear", "load_sparse", "save_sparse", "sparsify_linears"]

MAGIC, VERSION = b"EFNBCS", 1
_TYPES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "int64": "<i8", "int32": "<i4"}
_TYPES |= {"uint8": "|u1", "bool": "|b1"}


class SparseLinear(nn.Module):
    r"""``x W^T + b`` with ``W`` in compressed-sparse-row form: ``density`` times the multiplications of a dense layer.

    The index traffic is 8 bytes a weight (int32 column and float32 value), so it pays at a few per cent of density
    and small batches. The weight is a buffer: the layer is for inference and cannot be trained.

    Args:
        weight: dense ``(out_features, in_features)``; its zeros are dropped.
        bias: ``(out_features,)`` or ``None``.

    Raises:
        ValueError: the weight is not a matrix.

    >>> layer = SparseLinear(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), bias=None)
    >>> layer.density, layer(torch.tensor([[1.0, 10.0]]))
    (0.25, tensor([[20.,  0.]]))
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        if weight.ndim != 2:
            raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support")  # torch says "beta" once per process
            csr = weight.detach().to_sparse_csr()
        # int32 indices: half the traffic, and what MKL's kernel takes without a conversion in every call.
        rows, columns = csr.crow_indices().to(torch.int32), csr.col_indices().to(torch.int32)
        with torch.sparse.check_sparse_tensor_invariants(enable=False):
            matrix = torch.sparse_csr_tensor(rows, columns, csr.values(), weight.shape)
        self.register_buffer("weight", matrix)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def density(self) -> float:
        """Fraction of weights that are stored."""
        return self.weight.values().numel() / (self.out_features * self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out_features)`` for ``(..., in_features)``."""
        weight, bias = self.weight, self.bias
        if x.numel() == self.in_features:  # one example: a matrix-vector product is faster than one of matrices
            column = x.reshape(-1)
            out = torch.mv(weight, column) if bias is None else torch.addmv(bias, weight, column)
        else:
            columns = x.reshape(-1, self.in_features).t()
            out = weight @ columns if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
        return out.t().reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes and density."""
        return f"in_features={self.in_features}, out_features={self.out_features}, density={self.density:.4f}"


def sparsify_linears(model: nn.Module, names: Sequence[str] | None = None) -> nn.Module:
    """Replace linear layers by :class:`SparseLinear`; convolutions stay dense (there is no CSR convolution).

    Args:
        model: changed in place, and returned; where it is a Linear itself, the new layer is.
        names: modules to look at; ``None`` for all.

    Raises:
        ValueError: a name that is not in the model.

    >>> sparsify_linears(nn.Sequential(nn.Linear(2, 3)))
    Sequential(
      (0): SparseLinear(in_features=2, out_features=3, density=1.0000)
    )
    """
    modules = dict(model.named_modules())
    names = list(modules) if names is None else names
    for name in names:
        if name not in modules:
            raise ValueError(f"names must be modules of the model, got {name!r}; {near(name, list(modules))}")
    for name, layer in modules.items():
        if not isinstance(layer, nn.Linear) or name not in names:
            continue
        new = SparseLinear(layer.weight, layer.bias).train(layer.training)
        if not name:
            return new
        model.set_submodule(name, new)
    return model


def encodings(tensor: Tensor) -> dict[str, int]:
    """Return the bytes that a tensor takes in each form; csr, of ``(first dimension, rest)``, below 65 536 columns."""
    size, numel, nnz = tensor.element_size(), tensor.numel(), int((tensor != 0).sum())
    found = {"dense": numel * size, "bitmap": (numel + 7) // 8 + nnz * size}
    rows = tensor.shape[0] if tensor.ndim else 1
    if rows and numel // rows < 2**16:  # columns are uint16
        found["csr"] = nnz * (size + 2) + 4 * (rows + 1)
    return found


def _encode(array: np.ndarray, form: str) -> bytes:
    """Bytes of an array in one of the three forms."""
    if form == "dense":
        return array.tobytes()
    values = array[array != 0]
    if form == "bitmap":
        return np.packbits(array.reshape(-1) != 0).tobytes() + values.tobytes()
    matrix = array.reshape(array.shape[0] if array.ndim else 1, -1)
    rows, columns = np.nonzero(matrix)
    # `rows` is sorted, so the first entry of each row is found by bisection.
    pointers = np.searchsorted(rows, np.arange(len(matrix) + 1))
    return pointers.astype("<u4").tobytes() + columns.astype("<u2").tobytes() + values.tobytes()


def _decode(data: bytes, entry: dict) -> Tensor:
    """The tensor of an entry of the index from its bytes."""
    dtype, shape = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"])
    if entry["form"] == "dense":
        # `frombuffer` gives read-only memory, which torch must not share.
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
    """Write parameters and buffers, each in its smallest form, whole or not at all; return the file's size in bytes.

    Args:
        state: ``state_dict``, or a plain module (after ``finalize()``).
        path: file to write.

    Raises:
        TypeError: a tensor of a type that the format does not know.

    >>> from tempfile import mktemp
    >>> file = mktemp()
    >>> save_sparse({"w": torch.zeros(1000, 1000)}, file) < 5000, load_sparse(file)["w"].shape
    (True, torch.Size([1000, 1000]))
    """
    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    index, parts = [], []
    for name, tensor in tensors.items():
        dtype = str(getattr(tensor, "dtype", type(tensor))).removeprefix("torch.")
        if dtype not in _TYPES or tensor.layout is not torch.strided:
            raise TypeError(f"{name!r} must be a dense tensor of one of {sorted(_TYPES)}, got {dtype}")
        sizes = encodings(tensor)  # on the tensor's own device
        form = min(sizes, key=sizes.get)
        parts.append(_encode(tensor.detach().cpu().contiguous().numpy().astype(_TYPES[dtype]), form))
        index.append({"name": name, "dtype": dtype, "shape": list(tensor.shape), "form": form, "bytes": len(parts[-1])})
    header = json.dumps(index, separators=(",", ":")).encode()
    body = MAGIC + struct.pack("<HI", VERSION, len(header)) + header + b"".join(parts)
    write_atomically(path, body + struct.pack("<I", zlib.crc32(body)))
    return len(body) + 4


def load_sparse(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return what :func:`save_sparse` wrote, name to dense tensor, for ``load_state_dict``.

    Args:
        path: the file.

    Raises:
        ValueError: not such a file, of another version, truncated or damaged.

    >>> from tempfile import mktemp
    >>> file = mktemp()
    >>> _ = save_sparse({"w": torch.eye(2)}, file)
    >>> load_sparse(file)["w"]
    tensor([[1., 0.],
            [0., 1.]])
    """
    data = Path(path).read_bytes()
    start = len(MAGIC) + 6
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path} must start with {MAGIC!r}: not a file of save_sparse")
    # The checksum before the header is believed: a damaged length would read anything.
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
