"""Citation graphs in Planetoid's split, read without torch_geometric and without trusting a pickle."""

import pickle
from collections import defaultdict
from io import BytesIO

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from effnb.lab.measure.data import files
from effnb.lab.measure.data.kinds import Graph

FOLDERS = {"cora": "Cora", "citeseer": "CiteSeer"}
PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
PUBMED = "planetoid/pubmed_structure/pubmed_graph.npz"
SPLITS = ("public", "full")


class Record:
    """Holds the attributes of a pickled object and runs none of its class's code."""


# Names that Python 2, numpy 1 and old scipy wrote, and what stands for them today.
ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("scipy.sparse.csr", "csr_matrix"): Record,
    ("collections", "defaultdict"): defaultdict,
    ("__builtin__", "list"): list,
}


class SafeUnpickler(pickle.Unpickler):
    """Unpickles arrays, sparse matrices and dicts of lists; refuses every other name."""

    def find_class(self, module: str, name: str) -> object:
        """Return the allowed object of that name.

        Raises:
            pickle.UnpicklingError: for any name that is not in `ALLOWED`.
        """
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"a data file may not ask for {module}.{name}") from None


def unpickle(raw: bytes) -> object:
    """Return the content of a Python 2 pickle of Planetoid; sparse matrices come back as `csr_matrix`.

    Raises:
        pickle.UnpicklingError: if it asks for anything but arrays, sparse matrices and dicts of lists.
    """
    value = SafeUnpickler(BytesIO(raw), encoding="latin1").load()
    if isinstance(value, Record):
        return csr_matrix((value.data, value.indices, value.indptr), shape=value._shape)
    return value


def set_files(name: str) -> tuple[str, ...]:
    """Return the files of a graph."""
    if name == "pubmed-structure":
        return (PUBMED,)
    return tuple(f"planetoid/{FOLDERS[name]}/raw/ind.{name}.{part}" for part in PARTS)


def masks(n: int, train: np.ndarray, val: np.ndarray, test: np.ndarray, split: str) -> dict[str, Tensor]:
    """Return the three masks, bool ``(n,)``; ``split="full"`` trains on every node that is in no other part."""
    parts = {}
    for key, index in (("train_mask", train), ("val_mask", val), ("test_mask", test)):
        parts[key] = torch.zeros(n, dtype=torch.bool)
        parts[key][torch.as_tensor(np.asarray(index, dtype=np.int64))] = True
    if split == "full":
        parts["train_mask"] = ~(parts["val_mask"] | parts["test_mask"])
    return parts


def both_directions(pairs: np.ndarray, n: int) -> Tensor:
    """Return int64 ``(2, E)``: every pair in both directions, sorted, without loops or repeats."""
    u, v = pairs[pairs[:, 0] != pairs[:, 1]].astype(np.int64).T
    codes = np.unique(np.concatenate([u * n + v, v * n + u]))
    return torch.from_numpy(np.stack([codes // n, codes % n]))


def check_split(split: str) -> None:
    """Raise ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")


def planetoid(name: str, split: str = "public") -> Graph:
    """Return Cora or CiteSeer.

    Args:
        name: ``"cora"`` or ``"citeseer"``.
        split: ``"public"`` (20 training nodes a class / 500 / 1,000) or ``"full"`` (all other nodes train).

    Raises:
        ValueError: for another split.

    Reference: yang2016planetoid.
    """
    check_split(split)
    raw = [files.read(relative, name) for relative in set_files(name)]
    *pickles, index = raw
    x, tx, allx, y, ty, ally, graph = (unpickle(part) for part in pickles)
    test = np.array(index.split(), dtype=np.int64)
    n = int(test.max()) + 1
    features, onehot = np.zeros((n, x.shape[1]), np.float32), np.zeros((n, y.shape[1]), np.int64)
    known = np.concatenate([np.arange(allx.shape[0]), test])
    # CiteSeer: 15 ids of the test range occur nowhere and keep their zero rows.
    features[known], onehot[known] = vstack([allx, tx]).toarray(), np.concatenate([ally, ty])
    padded = torch.ones(n, dtype=torch.bool)
    padded[torch.from_numpy(known)] = False
    pairs = np.array([(u, v) for u, neighbours in graph.items() for v in neighbours], dtype=np.int64)
    train = np.arange(len(y))
    return Graph(
        name, "Planetoid (Yang et al. 2016), from EFFNB_DATA", files.joint_digest(set_files(name)), "MIT",
        both_directions(pairs, n), torch.from_numpy(onehot.argmax(1)),
        **masks(n, train, np.arange(len(y), len(y) + 500), np.sort(test), split),
        padded=padded, classes=tuple(map(str, range(y.shape[1]))), x=torch.from_numpy(features),
    )  # fmt: skip


def pubmed_structure(split: str = "public") -> Graph:
    """Return PubMed's graph, labels and split, without features.

    Args:
        split: ``"public"`` (60 / 500 / 1,000) or ``"full"`` (all other nodes train).

    Raises:
        ValueError: for another split.

    Reference: yang2016planetoid.
    """
    check_split(split)
    name = "pubmed-structure"
    with np.load(BytesIO(files.read(PUBMED, name)), allow_pickle=False) as stored:
        n, edges, y = len(stored["y"]), both_directions(stored["edges"], len(stored["y"])), stored["y"]
        parts = masks(n, stored["train_index"], stored["val_index"], stored["test_index"], split)
    return Graph(
        name, "Planetoid (Yang et al. 2016), from EFFNB_DATA", files.joint_digest((PUBMED,)), "MIT", edges,
        torch.from_numpy(y.astype(np.int64)), **parts, padded=torch.zeros(n, dtype=torch.bool),
        classes=tuple(map(str, range(int(y.max()) + 1))),
    )  # fmt: skip
