"""Texts: the embedded English prose and rated snippets, and the four sentence classification sets."""

import pandas as pd
import torch

from . import files
from .kinds import Dataset, RatedSnippets, Text, rows, stratified

CLASSES = {
    "trec": ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"),
    "sst2": ("negative", "positive"),
    "mr": ("negative", "positive"),
    "subj": ("subjective", "objective"),
}
CITED = {
    "trec": "Li and Roth 2002",
    "sst2": "Socher et al. 2013",
    "mr": "Pang and Lee 2005",
    "subj": "Pang and Lee 2004",
}


def python_topics() -> Text:
    """Return about 180,000 characters of ASCII English prose from the documentation of Python."""
    relative = "python-topics.txt"
    text = files.read(relative, "python-topics").decode("ascii")
    return Text("python-topics", f"embedded: data/{relative}", files.SHA256[relative], "PSF-2.0", text)


def rated_snippets() -> RatedSnippets:
    """Return 10,605 sentences of film reviews and 5,190 of editorials with the mean of about 20 human ratings."""
    relative = "snippets.tsv.xz"
    lines = files.read(relative, "rated-snippets").decode("utf-8").removesuffix("\n").split("\n")
    table = pd.DataFrame([line.split("\t", 2) for line in lines], columns=["set", "rating", "text"])
    return RatedSnippets(
        "rated-snippets", f"Hutto and Gilbert 2014, embedded: data/{relative}", files.SHA256[relative], "MIT",
        table.astype({"rating": float}),
    )  # fmt: skip


def sentences(relative: str, name: str) -> tuple[list[str], torch.Tensor]:
    """Return the sentences of a verified file of ``label<TAB>sentence`` lines, and the labels, int64 ``(N,)``."""
    lines = files.read(relative, name).decode("utf-8").removesuffix("\n").split("\n")
    pairs = [line.split("\t", 1) for line in lines]
    return [sentence for _, sentence in pairs], torch.tensor([int(label) for label, _ in pairs])


def classification(name: str, n_test: int = 1000, seed: int = 0) -> Dataset:
    """Return a sentence classification set.

    TREC and SST-2 come with their official splits (SST-2 with a validation split). MR and Subj have none:
    `n_test` sentences, stratified by class, are drawn for test by `seed`.

    Args:
        name: ``"trec"``, ``"sst2"``, ``"mr"`` or ``"subj"``.
        n_test: size of the test split, only for MR and Subj.
        seed: that draws it.

    Raises:
        ValueError: if `n_test` is out of range.
    """
    relatives = set_files(name)
    parts = {relative: sentences(relative, name) for relative in relatives}
    train = parts[relatives[0]]
    if len(relatives) == 1:
        if not 1 <= n_test < len(train[0]):
            raise ValueError(f"n_test must be in [1, {len(train[0]) - 1}], got {n_test}")
        held = stratified(train[1], n_test, seed)
        kept = torch.ones(len(train[1]), dtype=torch.bool).index_fill_(0, held, False).nonzero().flatten()
        train, test = [(rows(train[0], index), train[1][index]) for index in (kept, held)]
    else:
        test = parts[relatives[1]]
    val = parts[relatives[2]] if len(relatives) == 3 else (None, None)
    return Dataset(
        name, f"{CITED[name]}, from EFFNB_DATA", files.joint_digest(relatives), "research use", *train, *test,
        CLASSES[name], *val,
    )  # fmt: skip


def set_files(name: str) -> tuple[str, ...]:
    """Return the files of a set, in the order train, test, validation."""
    suffixes = {"trec": ("train", "test"), "sst2": ("train", "test", "dev")}.get(name)
    return tuple(f"text/{name}.{suffix}.tsv" for suffix in suffixes) if suffixes else (f"text/{name}.tsv",)
