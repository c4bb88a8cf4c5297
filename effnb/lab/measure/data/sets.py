"""The sets that `load` knows: images, texts, tables of trained networks and graphs."""

import pickle
from collections import defaultdict
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from effnb.common import check_choice
from effnb.lab.measure.data import files
from effnb.lab.measure.data.kinds import Dataset, Graph, NasTable, RatedSnippets, Text, parted

FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def scaled(pixels: np.ndarray, top: float = 255.0) -> Tensor:
    """Return uint8 images ``(N, H, W)`` or ``(N, H, W, C)`` as float32 ``(N, C, H, W)`` in [0, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(pixels))
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return x.to(torch.float32).div_(top).contiguous()


def labels(values: np.ndarray) -> Tensor:
    """Return class numbers as int64 ``(N,)``."""
    return torch.from_numpy(values.astype(np.int64))


def npz_images(relative: str, name: str) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Return train and test tensors of a verified npz file, and the file's other arrays."""
    with np.load(BytesIO(files.read(relative, name)), allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    tensors = {f"x_{part}": scaled(arrays.pop(f"x_{part}")) for part in ("train", "test")}
    return tensors | {f"y_{part}": labels(arrays.pop(f"y_{part}")) for part in ("train", "test")}, arrays


def digits() -> Dataset:
    """Return scikit-learn's 8x8 digits, 1,437 train and 360 test, always the same ones."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels, y = bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
    key = "scikit-learn/digits"
    files.verify(key, pixels.tobytes() + y.tobytes(), files.SHA256[key], files.remedy("digits"))
    # Every fifth of the list sorted by class: stratified, and independent of any random generator.
    test = np.sort(np.argsort(y, kind="stable")[::5])
    train = np.setdiff1d(np.arange(len(y)), test)
    return Dataset(
        "digits", "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits)", files.SHA256[key],
        "CC BY 4.0", scaled(pixels[train], 16), labels(y[train]), scaled(pixels[test], 16), labels(y[test]),
        tuple("0123456789"),
    )  # fmt: skip


def fashion_mnist_10k() -> Dataset:
    """Return the embedded class-balanced subset of Fashion-MNIST, 10,000 train and 2,000 test."""
    relative = "fashion-mnist-10k.npz"
    tensors, _ = npz_images(relative, "fashion-mnist-10k")
    return Dataset(
        "fashion-mnist-10k", f"embedded: data/{relative}", files.SHA256[relative], "MIT", **tensors,
        classes=FASHION_CLASSES,
    )  # fmt: skip


def idx(relative: str) -> np.ndarray:
    """Return the array of a verified idx file: uint8, with the shape that its header states."""
    raw = files.read(relative, "fashion-mnist")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()


def fashion_mnist() -> Dataset:
    """Return the full Fashion-MNIST, 60,000 train and 10,000 test."""
    x_train, y_train, x_test, y_test = (idx(relative) for relative in files.FASHION)
    where = files.find(files.FASHION[0]).parent
    return Dataset(
        "fashion-mnist", f"Zalando Research, from {where}", files.joint_digest(files.FASHION), "MIT",
        scaled(x_train), labels(y_train), scaled(x_test), labels(y_test), FASHION_CLASSES,
    )  # fmt: skip


def cifar10() -> Dataset:
    """Return a class-balanced subset of CIFAR-10, 10,000 train and 2,000 test (re-encoded through JPEG)."""
    relative = "cifar10/cifar10_subset.npz"
    tensors, others = npz_images(relative, "cifar10")
    return Dataset(
        "cifar10", "class-balanced subset of CIFAR-10 (Krizhevsky 2009), from EFFNB_DATA", files.SHA256[relative],
        "research use", **tensors, classes=tuple(others["classes"].tolist()),
    )  # fmt: skip


def photo(name: str) -> Tensor:
    """Return one of scikit-learn's photographs in grey (ITU-R 601 weights), float32 ``(427, 640)`` in [0, 1]."""
    import sklearn.datasets
    from PIL import Image

    key = f"scikit-learn/{name}.jpg"
    if not (path := Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg").is_file():
        raise files.DataError(f"{path} (SHA-256 {files.SHA256[key]}) not found. {files.remedy('photos')}")
    raw = files.verify(path, path.read_bytes(), files.SHA256[key], files.remedy("photos"))
    rgb = np.asarray(Image.open(BytesIO(raw)).convert("RGB"), dtype=np.float64)
    return torch.from_numpy((rgb @ [0.299, 0.587, 0.114] / 255).astype(np.float32))


def photos() -> Dataset:
    """Return scikit-learn's two photographs in grey: `china` as ``x_train``, `flower` as ``x_test``."""
    keys = ("scikit-learn/china.jpg", "scikit-learn/flower.jpg")
    return Dataset(
        "photos", "scikit-learn load_sample_images: china (danielbuechele), flower (vultilion)",
        files.joint_digest(keys), "CC BY 2.0", photo("china"), None, photo("flower"), None,
    )  # fmt: skip


SENTENCE_CLASSES = {
    "trec": ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"),
    "sst2": ("negative", "positive"),
    "mr": ("negative", "positive"),
    "subj": ("subjective", "objective"),
}
CITED = {
    "trec": "Li and Roth 2002", "sst2": "Socher et al. 2013", "mr": "Pang and Lee 2005", "subj": "Pang and Lee 2004",
}  # fmt: skip


def fields(relative: str, name: str, count: int) -> list[list[str]]:
    """Return the lines of a verified text file, each split at its first tabs into `count` fields."""
    lines = files.read(relative, name).decode("utf-8").removesuffix("\n").split("\n")
    return [line.split("\t", count - 1) for line in lines]


def python_topics() -> Text:
    """Return about 180,000 characters of ASCII English prose from the documentation of Python."""
    relative = "python-topics.txt"
    text = files.read(relative, "python-topics").decode("ascii")
    return Text("python-topics", f"embedded: data/{relative}", files.SHA256[relative], "PSF-2.0", text)


def rated_snippets() -> RatedSnippets:
    """Return 10,605 sentences of film reviews and 5,190 of editorials with the mean of about 20 human ratings."""
    relative = "snippets.tsv.xz"
    table = pd.DataFrame(fields(relative, "rated-snippets", 3), columns=["set", "rating", "text"])
    return RatedSnippets(
        "rated-snippets", f"Hutto and Gilbert 2014, embedded: data/{relative}", files.SHA256[relative], "MIT",
        table.astype({"rating": float}),
    )  # fmt: skip


def sentences(relative: str, name: str) -> tuple[list[str], torch.Tensor]:
    """Return the sentences of a verified file of ``label<TAB>sentence`` lines, and the labels, int64 ``(N,)``."""
    pairs = fields(relative, name, 2)
    return [sentence for _, sentence in pairs], torch.tensor([int(label) for label, _ in pairs])


def classification(name: str, n_test: int = 1000, seed: int = 0) -> Dataset:
    """Return a sentence classification set.

    TREC and SST-2 come with their official splits (SST-2 with a validation split). MR and Subj have none:
    `n_test` sentences, stratified by class, are drawn for test by `seed`.
    """
    relatives = sentence_files(name)
    train, *others = (sentences(relative, name) for relative in relatives)
    if not others:
        if not 1 <= n_test < len(train[0]):
            raise ValueError(f"n_test must be in [1, {len(train[0]) - 1}], got {n_test}")
        train, test = parted(*train, n_test, seed)
    else:
        test = others[0]
    val = others[1] if len(others) == 2 else (None, None)
    return Dataset(
        name, f"{CITED[name]}, from EFFNB_DATA", files.joint_digest(relatives), "research use", *train, *test,
        SENTENCE_CLASSES[name], *val,
    )  # fmt: skip


def sentence_files(name: str) -> tuple[str, ...]:
    """Return the files of a set, in the order train, test, validation."""
    suffixes = {"trec": ("train", "test"), "sst2": ("train", "test", "dev")}.get(name)
    return tuple(f"text/{name}.{suffix}.tsv" for suffix in suffixes) if suffixes else (f"text/{name}.tsv",)


NAS_FILES = ("nas/nb201_accuracy.csv", "nas/nb201_latency_ms.npz")
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")


def nas_bench_201() -> NasTable:
    """Return the table with one row an architecture (columns: see `NasTable`).

    Latencies on pixel3 and raspi4 below 0.1 ms are NaN: the source holds near-zero values for disconnected cells.
    """
    name = "nas-bench-201"
    # `edges` has leading zeros: six digits, never a number.
    table = pd.read_csv(BytesIO(files.read(NAS_FILES[0], name)), dtype={"edges": str}, index_col="index")
    with np.load(BytesIO(files.read(NAS_FILES[1], name)), allow_pickle=False) as stored:
        latency = {device: stored[device].astype(np.float64) for device in stored.files}
    for device in ("pixel3", "raspi4"):
        latency[device][latency[device] < 0.1] = np.nan
    columns = {f"latency_{device}": pd.Series(ms, index=table.index) for device, ms in latency.items()}
    return NasTable(
        name, "NATS-Bench (Dong et al. 2021), HELP (Lee et al. 2021), from EFFNB_DATA", files.joint_digest(NAS_FILES),
        "MIT", pd.concat([table, pd.DataFrame(columns)], axis=1), tuple(latency), OPERATIONS,
    )  # fmt: skip


def nano_bench(name: str) -> NasTable:
    """Return our own table of small trained networks: ``nano-bench`` (400 cells) or ``nano-width`` (50 widths)."""
    relative = f"{name}.csv"
    table = pd.read_csv(BytesIO(files.read(relative, name)), dtype={"edges": str}, index_col="index")
    source = "trained by data/make_nano_bench.py on Fashion-MNIST (Xiao et al. 2017)"
    return NasTable(name, source, files.SHA256[relative], "MIT", table, (), OPERATIONS)


# --- graphs ------------------------------------------------------------------------------------------------------

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
        """Return the object that `ALLOWED` has for a name; UnpicklingError for any other."""
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"a data file may not ask for {module}.{name}") from None


def unpickle(raw: bytes) -> object:
    """Return the content of a Python 2 pickle of Planetoid; sparse matrices come back as `csr_matrix`."""
    value = SafeUnpickler(BytesIO(raw), encoding="latin1").load()
    if isinstance(value, Record):
        return csr_matrix((value.data, value.indices, value.indptr), shape=value._shape)
    return value


def graph_files(name: str) -> tuple[str, ...]:
    """Return the files of Cora or CiteSeer."""
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


def planetoid(name: str, split: str = "public") -> Graph:
    """Return Cora or CiteSeer, read without torch_geometric and without trusting a pickle.

    ``split`` is ``"public"`` (20 training nodes a class / 500 / 1,000) or ``"full"`` (all other nodes train).

    Reference: yang2016planetoid.
    """
    check_choice("split", split, SPLITS)
    *pickles, index = (files.read(relative, name) for relative in graph_files(name))
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
        name, "Planetoid (Yang et al. 2016), from EFFNB_DATA", files.joint_digest(graph_files(name)), "MIT",
        both_directions(pairs, n), torch.from_numpy(onehot.argmax(1)),
        **masks(n, train, np.arange(len(y), len(y) + 500), np.sort(test), split),
        padded=padded, classes=tuple(map(str, range(y.shape[1]))), x=torch.from_numpy(features),
    )  # fmt: skip


def pubmed_structure(split: str = "public") -> Graph:
    """Return PubMed's graph, labels and split as `planetoid` does, without features."""
    check_choice("split", split, SPLITS)
    name = "pubmed-structure"
    with np.load(BytesIO(files.read(PUBMED, name)), allow_pickle=False) as stored:
        n, edges, y = len(stored["y"]), both_directions(stored["edges"], len(stored["y"])), stored["y"]
        parts = masks(n, stored["train_index"], stored["val_index"], stored["test_index"], split)
    return Graph(
        name, "Planetoid (Yang et al. 2016), from EFFNB_DATA", files.joint_digest((PUBMED,)), "MIT", edges,
        torch.from_numpy(y.astype(np.int64)), **parts, padded=torch.zeros(n, dtype=torch.bool),
        classes=tuple(map(str, range(int(y.max()) + 1))),
    )  # fmt: skip
