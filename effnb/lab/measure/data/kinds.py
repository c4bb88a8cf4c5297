"""What `load` returns: labelled sets, running text, graphs and the table of architectures."""

from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Source:
    """Where a data set comes from: its name, origin, the SHA-256 of its files, and its licence."""

    name: str
    source: str
    sha256: str
    licence: str

    def describe(self) -> str:
        """Return one line that is the same on every machine: name, size, licence, start of the checksum."""
        return f"{self.name}: {self.size()}, {self.licence}, sha256 {self.sha256[:8]}"

    def size(self) -> str:
        """Return the size in words, such as the numbers of examples, nodes or rows."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.describe()}>"


@dataclass(frozen=True, eq=False, repr=False)
class Dataset(Source):
    """Inputs and labels, split into train, test and, after `split`, validation.

    Images are float32 in [0, 1] of shape ``(N, C, H, W)``, labels int64 ``(N,)``. Sentences are lists of strings,
    with tokens split by spaces. The two photos are float32 ``(H, W)`` and have no labels.
    """

    x_train: Tensor | list[str]
    y_train: Tensor | None
    x_test: Tensor | list[str]
    y_test: Tensor | None
    classes: tuple[str, ...] = ()
    x_val: Tensor | list[str] | None = None
    y_val: Tensor | None = None

    def size(self) -> str:
        if self.y_train is None:
            return " and ".join(f"{tuple(x.shape)}" for x in (self.x_train, self.x_test))
        val = "" if self.x_val is None else f" / {len(self.x_val):,} validation"
        shape = f", {tuple(self.x_train.shape[1:])}" if isinstance(self.x_train, Tensor) else ""
        return f"{len(self.x_train):,} train{val} / {len(self.x_test):,} test{shape}, {len(self.classes)} classes"

    def split(self, n_val: int, seed: int = 0) -> "Dataset":
        """Return the same set with `n_val` examples moved from train to validation, stratified by class.

        ``seed`` is of the shuffle that picks them; the order of the rest is kept. ValueError if there is a validation
        split already, no labels, or `n_val` is not below the number of training examples.

        >>> from effnb.lab import data
        >>> data.load("digits").split(200, seed=0).describe()
        'digits: 1,237 train / 200 validation / 360 test, (1, 8, 8), 10 classes, CC BY 4.0, sha256 ...'
        """
        if self.x_val is not None or self.y_train is None:
            raise ValueError(f"{self.name} must have labels and no validation split yet")
        if not 1 <= n_val < len(self.x_train):
            raise ValueError(f"n_val must be in [1, {len(self.x_train) - 1}], got {n_val}")
        (x_train, y_train), (x_val, y_val) = parted(self.x_train, self.y_train, n_val, seed)
        return replace(self, x_train=x_train, y_train=y_train, x_val=x_val, y_val=y_val)


@dataclass(frozen=True, eq=False, repr=False)
class Text(Source):
    """Running text, one paragraph a line."""

    text: str

    def size(self) -> str:
        return f"{len(self.text):,} characters, {len(set(self.text))} distinct"


@dataclass(frozen=True, eq=False, repr=False)
class RatedSnippets(Source):
    """Sentences that people rated: ``table`` has ``set``, ``rating`` (mean, in [-4, 4]) and ``text``, a row each."""

    table: pd.DataFrame

    def size(self) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in self.table["set"].value_counts(sort=False).items())


@dataclass(frozen=True, eq=False, repr=False)
class Graph(Source):
    """One undirected graph with labelled nodes.

    ``edge_index`` is int64 ``(2, E)`` with both directions of each edge, sorted, without loops or repeats; ``y`` int64
    ``(N,)``; ``x`` float32 ``(N, F)`` or None where there are no features; the masks bool ``(N,)``. ``padded`` marks
    nodes for which the source has neither features nor label: zero rows, and label 0 that means nothing.
    """

    edge_index: Tensor
    y: Tensor
    train_mask: Tensor
    val_mask: Tensor
    test_mask: Tensor
    padded: Tensor
    classes: tuple[str, ...]
    x: Tensor | None = None

    def size(self) -> str:
        features = "no features" if self.x is None else f"{self.x.shape[1]:,} features"
        parts = " / ".join(f"{int(m.sum()):,}" for m in (self.train_mask, self.val_mask, self.test_mask))
        edges = self.edge_index.shape[1] // 2
        return f"{len(self.y):,} nodes, {edges:,} edges, {features}, {len(self.classes)} classes, split {parts}"


@dataclass(frozen=True, eq=False, repr=False)
class NasTable(Source):
    """Trained networks, one row each.

    ``table`` always has ``edges`` (text of six digits, operations of the edges 0>1, 0>2, 1>2, 0>3, 1>3, 2>3 as indices
    into ``operations``), ``params`` and ``macs``. NAS-Bench-201, indexed by the benchmark's architecture number, adds
    ``iso_class``, ``cifar10_test``, ``cifar100_test``, ``imagenet16_120_test`` (percent) and ``latency_<device>`` (ms,
    NaN where missing). nano-bench adds ``width1``, ``width2``, ``depth``, ``epochs``, ``connected``, ``train_seconds``,
    ``acc_seed0`` .. ``acc_seed2``, ``acc_mean`` (percent) and ``loss_mean``.
    """

    table: pd.DataFrame
    devices: tuple[str, ...]
    operations: tuple[str, ...]

    def size(self) -> str:
        distinct = f", {self.table['iso_class'].nunique():,} distinct" if "iso_class" in self.table else ""
        devices = f", latency on {len(self.devices)} devices" if self.devices else ""
        return f"{len(self.table):,} architectures{distinct}{devices}"


def parted(x: Tensor | list, y: Tensor, n: int, seed: int) -> tuple[tuple, tuple]:
    """Return ``(x, y)`` without `n` examples, in their order, and the `n` that `stratified` draws."""
    held = stratified(y, n, seed)
    kept = torch.ones(len(y), dtype=torch.bool).index_fill_(0, held, False).nonzero().flatten()
    return tuple((x[i] if isinstance(x, Tensor) else [x[k] for k in i.tolist()], y[i]) for i in (kept, held))


def stratified(labels: Tensor, n: int, seed: int) -> Tensor:
    """Return `n` of the indices of `labels` in random order by `seed`, every class in its share to within one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    # Evenly spaced places in a list sorted by class hit every class in proportion.
    order = order[labels[order].argsort(stable=True)]
    chosen = order[((torch.arange(n) + 0.5) * (len(labels) / n)).long()]
    return chosen[torch.randperm(n, generator=generator)]
