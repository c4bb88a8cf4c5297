"""Score untrained networks for the chapters on architecture search; writes `book/results/scores/*.csv`.

    python data/score_nas.py --jobs 2                     # every table; resumable
    python data/score_nas.py --table nb201 --ray auto     # one table, on a Ray cluster that is running
    python data/score_nas.py --check 5                    # scores some networks again and compares with the files

| table | networks | batches | seeds |
| --- | --- | --- | --- |
| nb201 | 200 cells of NAS-Bench-201, drawn uniformly; 16 channels, one cell a stage | 2 of 64 CIFAR-10 images | 5 |
| skeleton | 100 of them with five cells a stage | the same | 1 |
| classes | one cell of each of 6,466 classes of equal function, in nano-bench's network | 2 of 64 Fashion-MNIST | 3 |
| nano-bench, nano-width | all networks of our own two tables | 2 of 64 Fashion-MNIST | 3 |
| paper | all 15,625 cells, five cells a stage; only if named, some forty core-hours | 2 of 128 CIFAR-10 images | 3 |

A seed fixes the initial weights (Kaiming-normal) and the batches. Proxies that are slow have one seed, the slowest see
8 images (GraSP, and those that need a gradient for every sample). The files hold scores, no accuracies.
"""

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor, nn

from effnb.lab.measure import data
from effnb.lab.measure.seed import streams
from effnb.lab.run.fanout import fan_out, one_thread
from effnb.nas import nanobench, score_all
from effnb.nas.nb201 import all_cells, build_cell_net, is_connected, iso_class
from effnb.nas.proxies import count_macs, count_params
from effnb.nas.zico import VARIANTS, gradient_moments, zico, zico_terms
from effnb.nas.zico.score import per_layer

ROOT = Path(__file__).resolve().parents[1]
OUT, CACHE = ROOT / "book" / "results" / "scores", ROOT / "_build" / "scores"
COUNTS, WIDTHS = (3, 4, 6, 8), (4, 6, 8, 12, 16)
SHARED = ("zico", "zico_floor", "grad_norm", "snip", "plain", "fisher", "naswot")
PAIR = ("zico", "zico_floor")
SLOW = ("l2_norm", "synflow", "jacob_cov", "zen_score")
FEW_IMAGES = ("grasp", "ntk_condition", "grad_sign", "knas")
# Relative, between processors or numbers of threads. A quotient of ZiCo has a heavy tail: where two gradients nearly
# coincide, their rounding rules the sum. `plain` is a small difference of large terms and not compared.
TOLERANCE = {"zico": 0.1, "grad_norm": 0.02, "snip": 0.02, "fisher": 0.02, "zico_floor": 1e-3, "naswot": 1e-3}
Item = tuple[Any, ...]
Batch = tuple[Tensor, Tensor]


@functools.cache
def cifar() -> Batch:
    """CIFAR-10 training images, standardised by channel."""
    found = data.load("cifar10")
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    return (found.x_train - mean.view(3, 1, 1)) / std.view(3, 1, 1), found.y_train


@functools.cache
def fashion() -> Batch:
    """Fashion-MNIST as nano-bench sees it; the embedded training images."""
    found = data.load("fashion-mnist-10k")
    return nanobench.images(found.x_train), found.y_train


def batches(images: Callable[[], Batch], seed: int, count: int = 2, size: int = 64) -> list[Batch]:
    """``count`` batches of one seed; the first ones are the same for every count."""
    x, y = images()
    chosen = torch.randperm(len(x), generator=streams(seed, "batches")["batches"])[: count * size].split(size)
    return [(x[i].contiguous(memory_format=torch.channels_last), y[i]) for i in chosen]


def build_nb201(item: Item, generator: Generator | None = None) -> nn.Module:
    """Network of an ``(edges, cells a stage)``."""
    edges, cells = item
    return build_cell_net(edges, 16, cells, generator=generator).to(memory_format=torch.channels_last)


def build_nano(item: Item, generator: Generator | None = None) -> nn.Module:
    """Network of an ``(edges, width, width, depth)``."""
    edges, first, second, depth = item
    return nanobench.build_net(edges, (first, second), depth, generator).to(memory_format=torch.channels_last)


def nb201_cells(count: int = 200, seed: int = 20240602) -> list[str]:
    """Cells drawn uniformly without replacement from all 15,625."""
    return [list(all_cells())[i] for i in np.random.default_rng(seed).choice(5**6, count, replace=False)]


def class_cells() -> list[str]:
    """The first cell of each class of equal function."""
    first: dict[str, str] = {}
    for cell in all_cells():
        first.setdefault(iso_class(cell), cell)
    return list(first.values())


@dataclass(frozen=True)
class Table:
    """One file: its networks, how they are built, the images, scores of every seed; and others, most of seed 0."""

    name: str
    items: Callable[[], list[Item]]
    build: Callable[..., nn.Module]
    images: Callable[[], Batch]
    seeds: int
    shared: Sequence[str] = SHARED
    once: bool = True
    size: int = 64


def nano_widths() -> list[Item]:
    """The size space of nano-width: one cell, five widths for each of two stages, one or two cells a stage."""
    return [("333333", a, b, depth) for depth in (1, 2) for a in WIDTHS for b in WIDTHS]


TABLES = {
    table.name: table
    for table in (
        Table("nb201", lambda: [(c, 1) for c in nb201_cells()], build_nb201, cifar, 5),
        Table("skeleton", lambda: [(c, 5) for c in nb201_cells()[:100]], build_nb201, cifar, 1, once=False),
        Table("classes", lambda: [(c, 8, 16, 1) for c in class_cells()], build_nano, fashion, 3, PAIR, False),
        Table("nano-bench", lambda: [(c, 8, 16, 1) for c in nanobench.sample_cells()], build_nano, fashion, 3),
        Table("nano-width", nano_widths, build_nano, fashion, 3),
        Table("paper", lambda: [(c, 5) for c in all_cells()], build_nb201, cifar, 3, once=False, size=128),
    )
}


@dataclass(frozen=True)
class Variants:
    """Further readings of ZiCo for one ``(item, seed)``; with more than two batches also the score of each number.

    It holds all that it needs, so that it can travel to another machine.
    """

    build: Callable[..., nn.Module]
    batches: Sequence[Batch]

    def __call__(self, task: tuple[Item, int]) -> dict[str, float]:
        item, seed = task
        start, pair = process_time(), self.batches[:2]
        model = self.build(item, Generator().manual_seed(seed))
        terms = zico_terms(model, pair, variants=VARIANTS, seed=seed)
        found = {f"zico_{name}": value for name, value in terms.items() if name not in ("code", "floor")}
        found["zico_seconds"] = round(process_time() - start, 4)
        if seed < 3:
            found["zico_accumulated"] = zico(model, pair, accumulate=True, seed=seed)
        return found | (by_count(model, self.batches) if len(self.batches) > 2 else {})


def by_count(model: nn.Module, many: Sequence[Batch]) -> dict[str, float]:
    """ZiCo after 3, 4, 6 and 8 batches, from one stream of moments."""
    found = {}
    for moments in gradient_moments(model, many, seed=0):
        if moments.count in COUNTS:
            found[f"zico_n{moments.count}"] = math.fsum(per_layer(moments, model).values())
    return found


def score(table: Table, run: Callable[..., list]) -> pd.DataFrame:
    """All scores of one table, a row a network and seed; what lies in the cache is not computed again."""
    items, parts = table.items(), []
    for seed in range(table.seeds):
        pair = batches(table.images, seed, size=table.size)
        groups = [(table.shared, pair)]
        if seed == 0 and table.once:
            # A second derivative, or a backward pass for every sample.
            small = [tuple(part[:8] for part in pair[0])]
            groups += [(SLOW, pair), (FEW_IMAGES, small)]
        columns = {"seed": [seed] * len(items)}
        for number, (names, data_) in enumerate(groups):
            if not names:
                continue
            resume = CACHE / f"{table.name}-{seed}-{number}.jsonl"
            rows = score_all(items, data_, names, build=table.build, seed=seed, run=run, resume=resume)
            columns |= {name: [checked(row)[name] for row in rows] for name in names}
        if table.once:
            variants = Variants(table.build, batches(table.images, seed, max(COUNTS) if seed == 0 else 2, table.size))
            resume = CACHE / f"{table.name}-variants-{seed}.jsonl"
            rows = [checked(row) for row in resumed(variants, [(item, seed) for item in items], run, resume)]
            columns |= {name: [row[name] for row in rows] for name in rows[0]}
        names = ("edges", "cells") if table.build is build_nb201 else ("edges", "width1", "width2", "depth")
        frame = pd.DataFrame(items, columns=list(names))
        parts.append(pd.concat([frame, fixed(table, items), pd.DataFrame(columns)], axis=1))
    return pd.concat(parts, ignore_index=True)


def resumed(function: Variants, tasks: list[tuple[Item, int]], run: Callable[..., list], path: Path) -> list[Any]:
    """`run` over the tasks that the file does not hold yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    if path.exists():
        stored = pd.read_json(path, lines=True, dtype=False).to_dict("records")
        done = {(tuple(row.pop("item")), row.pop("seed")): row for row in stored}
    missing = [task for task in tasks if task not in done]
    with path.open("a") as file:

        def keep(index: int, outcome: Any) -> None:
            item, seed = missing[index]
            done[missing[index]] = outcome
            if not isinstance(outcome, BaseException):
                line = pd.DataFrame([{"item": list(item), "seed": seed} | outcome])
                file.write(line.to_json(orient="records", lines=True, double_precision=15))
                file.flush()

        run(function, missing, on_done=keep)
    return [done[task] for task in tasks]


def checked(outcome: Any) -> dict[str, float]:
    """A row of scores; an exception of a worker is raised here."""
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def fixed(table: Table, items: list[Item]) -> pd.DataFrame:
    """What needs no data: connectedness, parameters and multiply-adds (of the full network for cells)."""
    rows = []
    for item in items:
        full = build_nb201((item[0], 5)) if table.build is build_nb201 else table.build(item)
        x = table.images()[0][:1]
        rows.append((int(is_connected(item[0])), count_params(full, (x, None)), count_macs(full, (x, None))))
    return pd.DataFrame(rows, columns=["connected", "params", "macs"])


def write(table: Table, run: Callable[..., list]) -> None:
    """Score one table and write its file."""
    OUT.mkdir(parents=True, exist_ok=True)
    frame = score(table, run)
    if table.name == "classes":
        # The largest table: its seeds side by side, and nothing that follows from the cell.
        frame = frame.pivot(index="edges", columns="seed", values=list(PAIR))
        frame.columns = [f"{name}_seed{seed}" for name, seed in frame.columns]
        frame = frame.reset_index()
    frame.to_csv(OUT / f"{table.name}.csv", index=False, float_format="%.9g", lineterminator="\n")
    print(f"{table.name}: {len(frame)} rows")


def check(table: Table, count: int) -> None:
    """Score ``count`` networks again with seed 0; the scores must agree with the file within `TOLERANCE`."""
    stored = pd.read_csv(OUT / f"{table.name}.csv", dtype={"edges": str})
    stored = stored.rename(columns={f"{name}_seed0": name for name in PAIR})
    stored = stored[stored["seed"] == 0] if "seed" in stored else stored
    places = np.linspace(0, len(stored) - 1, count).round().astype(int)
    chosen, items = stored.iloc[places].to_dict("records"), table.items()
    if table.name == "classes":
        items = sorted(items)
    pair = batches(table.images, 0, size=table.size)
    rows = score_all([items[i] for i in places], pair, table.shared, build=table.build, seed=0)
    for name in [name for name in table.shared if name in TOLERANCE]:
        pairs = [(row[name], old[name]) for row, old in zip(rows, chosen, strict=True)]
        worst = max((abs(new / old - 1) for new, old in pairs if old and math.isfinite(old)), default=0.0)
        print(f"{table.name}, {name}: largest relative difference {worst:.1e}")
        if worst > TOLERANCE[name]:
            raise SystemExit(f"{table.name}.csv does not hold what this machine scores")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=list(TABLES), action="append", help="only this table (may be repeated)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--ray", metavar="ADDRESS", help="address of a running Ray cluster, or auto")
    parser.add_argument("--check", type=int, metavar="N", help="score N networks of each table again and compare")
    arguments = parser.parse_args()
    one_thread()
    run = functools.partial(fan_out, jobs=arguments.jobs, ray_address=arguments.ray)
    for name in arguments.table or [name for name in TABLES if name != "paper"]:
        check(TABLES[name], arguments.check) if arguments.check else write(TABLES[name], run)


if __name__ == "__main__":
    main()
