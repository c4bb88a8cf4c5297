"""Data by name, verified on every load: `load("fashion-mnist-10k")`, `available("cifar10")`, `fetch("fashion-mnist")`.

Files are searched in ``$EFFNB_DATA``, in the checkout's ``data/`` and in the system's ``/usr/share/datasets``. The
first one found must have the SHA-256 of `files.SHA256`; otherwise `DataError` says which file, what was expected and
found, and what to do. Nothing is downloaded by `load`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import sklearn

from effnb.common import check_choice
from effnb.lab.measure.data import files, sets
from effnb.lab.measure.data.files import DataError
from effnb.lab.measure.data.kinds import Dataset, Graph, NasTable, RatedSnippets, Source, Text

__all__ = [
    "NAMES", "DataError", "Dataset", "Graph", "NasTable", "RatedSnippets", "Source", "Text", "available", "fetch",
    "load",
]  # fmt: skip


class Entry(NamedTuple):
    """How a name is loaded and which files of `files.SHA256` it needs."""

    loader: Callable[..., Source]
    files: tuple[str, ...] = ()


ENTRIES = {
    "digits": Entry(sets.digits),
    "photos": Entry(sets.photos),
    "fashion-mnist-10k": Entry(sets.fashion_mnist_10k, ("fashion-mnist-10k.npz",)),
    "python-topics": Entry(sets.python_topics, ("python-topics.txt",)),
    "rated-snippets": Entry(sets.rated_snippets, ("snippets.tsv.xz",)),
    "fashion-mnist": Entry(sets.fashion_mnist, files.FASHION),
    "cifar10": Entry(sets.cifar10, ("cifar10/cifar10_subset.npz",)),
    **{name: Entry(partial(sets.nano_bench, name), (f"{name}.csv",)) for name in ("nano-bench", "nano-width")},
    "nas-bench-201": Entry(sets.nas_bench_201, sets.NAS_FILES),
    **{name: Entry(partial(sets.planetoid, name), sets.graph_files(name)) for name in sets.FOLDERS},
    "pubmed-structure": Entry(sets.pubmed_structure, (sets.PUBMED,)),
    **{name: Entry(partial(sets.classification, name), sets.sentence_files(name)) for name in sets.SENTENCE_CLASSES},
}
NAMES = tuple(ENTRIES)


def entry(name: str) -> Entry:
    """Return the entry of a name; ValueError for an unknown one, listing those there are."""
    check_choice("name", name, NAMES)
    return ENTRIES[name]


def load(name: str, **options: object) -> Source:
    """Return a data set, after its files have been verified.

    Args:
        name: one of `NAMES`.
        options: ``split="public" | "full"`` for the graphs; ``n_test`` and ``seed`` for ``mr`` and ``subj``.

    Returns:
        `Dataset` for images and sentences, `Text`, `RatedSnippets`, `Graph` or `NasTable`.

    Raises:
        ValueError: for an unknown name or a bad option.
        TypeError: for an option that the set does not have.
        DataError: if a file is missing, cut short, corrupt or another version.

    >>> load("fashion-mnist-10k").describe()
    'fashion-mnist-10k: 10,000 train / 2,000 test, (1, 28, 28), 10 classes, MIT, sha256 9f671137'
    """
    return entry(name).loader(**options)


def available(name: str) -> bool:
    """Return whether the files of a data set are there; only `load` tells whether they are sound.

    Raises:
        ValueError: for an unknown name.
        DataError: if ``EFFNB_DATA`` names no folder.

    >>> available("digits")
    True
    """
    return all(files.find(relative) is not None for relative in entry(name).files)


def fetch(name: str) -> Path:
    """Make a data set available and return the folder that holds it; the only function here that downloads.

    Every file is written under a temporary name, verified, then renamed: a killed download leaves nothing that `load`
    could take for data.

    Raises:
        ValueError: for an unknown name.
        DataError: if it cannot be downloaded, or not automatically; the message says what to do by hand.
    """
    relatives = entry(name).files
    places = [files.find(relative) for relative in relatives]
    if all(places):
        entry(name).loader()
        return places[0].parent if places else Path(sklearn.__file__).parent / "datasets"
    if name == "fashion-mnist":
        files.download(relatives, root := files.target())
        return root / "fashion-mnist"
    if name not in files.ORIGINS:
        raise DataError(files.remedy(name))
    listed = "\n".join(f"  {relative}  SHA-256 {files.SHA256[relative]}" for relative in relatives)
    raise DataError(
        f"{name} cannot be fetched automatically: {files.ORIGINS[name]} (data/README.md says how).\n"
        f"Put these files into a folder and set EFFNB_DATA to it:\n{listed}"
    )
