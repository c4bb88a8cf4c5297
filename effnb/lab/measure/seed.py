"""Random streams: one helper that fixes everything global, and named streams for code that takes a generator."""

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, NumPy and torch, ask for deterministic algorithms, and return a fresh CPU generator with the seed.

    Deterministic algorithms are requested with ``warn_only=True``; TF32 and cuDNN's autotuner are switched off.
    Results are bit-equal on one machine at one thread count; between machines only claims are compared.

    Args:
        seed: integer in ``[0, 2**32)`` (NumPy's range).

    Raises:
        TypeError: ``seed`` is not an integer.
        ValueError: ``seed`` is out of range.

    >>> a, b = seed_everything(0), seed_everything(0)
    >>> torch.equal(torch.rand(2, generator=a), torch.rand(2, generator=b))
    True
    """
    seed = _checked(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party code may still draw from the legacy generator
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    return torch.Generator().manual_seed(seed)


def streams(seed: int, *names: str) -> dict[str, torch.Generator]:
    """Independent CPU generators, one for each name: a purpose such as ``"init"``, ``"data"``, ``"noise"``.

    A stream depends on ``(seed, name)`` alone: adding, dropping or reordering names shifts no other stream.
    torch's CPU generator keeps 32 bits of a seed, so two names meet by chance with probability ``2**-32``.

    Args:
        seed: integer in ``[0, 2**32)``.
        names: one or more distinct, non-empty purposes.

    Raises:
        TypeError: ``seed`` is not an integer, or a name is not a string.
        ValueError: ``seed`` is out of range; no name, an empty one or one given twice.

    >>> alone, both = streams(3, "data"), streams(3, "init", "data")
    >>> torch.equal(torch.rand(2, generator=alone["data"]), torch.rand(2, generator=both["data"]))
    True
    """
    seed = _checked(seed)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be strings, got {names}")
    if not names or "" in names or len(set(names)) < len(names):
        raise ValueError(f"names must be distinct and not empty, got {names}")
    found = {}
    for name in names:
        # The first word of the child of the seed's sequence whose spawn key is the name's digest.
        key = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4").tolist()
        child = np.random.SeedSequence(seed, spawn_key=tuple(key)).generate_state(1)[0]
        found[name] = torch.Generator().manual_seed(int(child))
    return found


def state_hash(state: nn.Module | Mapping[str, Any] | Tensor) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes: equal if and only if two states are bit-equal.

    Args:
        state: a module (its ``state_dict`` is taken), a tensor, or a nested ``state_dict``, also an optimizer's.
            Mappings are hashed in the order of their keys' text, sequences in their own order.

    Raises:
        TypeError: a leaf is neither a tensor nor a plain value (number, string, ``None``).

    >>> layer = nn.Linear(2, 2)
    >>> state_hash(layer) == state_hash(layer.state_dict())
    True
    """
    digest = hashlib.sha256()
    _feed(digest, state.state_dict() if isinstance(state, nn.Module) else state)
    return digest.hexdigest()


def _checked(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    return int(seed)


def _feed(digest: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        digest.update(flat.numpy().data)
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)};".encode())
        for key in sorted(value, key=str):
            digest.update(f"key {key!r};".encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"sequence {len(value)};".encode())
        for item in value:
            _feed(digest, item)
    elif value is None or isinstance(value, bool | int | float | complex | str):
        digest.update(f"{type(value).__name__} {value!r};".encode())
    else:
        raise TypeError(f"state must hold tensors and plain values, got {type(value).__name__}")
