"""Data by name, verified on every load: `load("fashion-mnist-10k")`, `available("cifar10")`, `fetch("fashion-mnist")`.

Files are searched in ``$EFFNB_DATA``, in the checkout's ``data/`` and in the system's ``/usr/share/datasets``. The
first one found must have the SHA-256 of `files.SHA256`; otherwise `DataError` says which file, what was expected and
found, and what to do. Nothing is downloaded by `load`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from . import files, graphs, images, nas, text
from .fetching import fetch
from .files import DataError
from .kinds import Dataset, Graph, NasTable, RatedSnippets, Source, Text

__all__ = [
    "NAMES", "DataError", "Dataset", "Graph", "NasTable", "RatedSnippets", "Source", "Text", "available", "fetch",
    "load",
]  # fmt: skip


class Entry(NamedTuple):
    """How a name is loaded and which files of `files.SHA256` it needs."""

    loader: Callable[..., Source]
    files: tuple[str, ...] = ()


ENTRIES = {
    "digits": Entry(images.digits),
    "photos": Entry(images.photos),
    "fashion-mnist-10k": Entry(images.fashion_mnist_10k, ("fashion-mnist-10k.npz",)),
    "python-topics": Entry(text.python_topics, ("python-topics.txt",)),
    "rated-snippets": Entry(text.rated_snippets, ("snippets.tsv.xz",)),
    "fashion-mnist": Entry(images.fashion_mnist, files.FASHION),
    "cifar10": Entry(images.cifar10, ("cifar10/cifar10_subset.npz",)),
    **{name: Entry(partial(nas.nano_bench, name), (f"{name}.csv",)) for name in ("nano-bench", "nano-width")},
    "nas-bench-201": Entry(nas.nas_bench_201, nas.FILES),
    **{name: Entry(partial(graphs.planetoid, name), graphs.set_files(name)) for name in graphs.FOLDERS},
    "pubmed-structure": Entry(graphs.pubmed_structure, graphs.set_files("pubmed-structure")),
    **{name: Entry(partial(text.classification, name), text.set_files(name)) for name in text.CLASSES},
}
NAMES = tuple(ENTRIES)


def entry(name: str) -> Entry:
    """Return the entry of a name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in ENTRIES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}; got {name!r}")
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
    """Tell whether the files of a data set are there; only `load` tells whether they are sound.

    Raises:
        ValueError: for an unknown name.
        DataError: if ``EFFNB_DATA`` names no folder.

    >>> available("digits")
    True
    """
    return all(files.find(relative) is not None for relative in entry(name).files)
