"""Set the scores of `score_nas.py` against the accuracies of NAS-Bench-201; writes `book/results/scores/measured.csv`.

    EFFNB_DATA=... python data/correlate_nas.py

The table of accuracies is not part of the repository, what is measured on it is: rank correlations with bootstrap
intervals over cells, and the regrets of searches. Chapter 08 measures all of this again where the table is there.

| experiment | what |
| --- | --- |
| sample | correlation of each score over the 200 cells, and its difference to a rival's, by seed |
| connected | the same without the cells that lead nowhere |
| table | the number of parameters over all 15,625 cells |
| top | correlation within the best share of all cells, scores of `classes.csv` |
| skeleton | five cells a stage, one, and the network of nano-bench, on the same 100 cells |
| search | percentage points between the best cell within the budget and the one that a search returns |
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from effnb.lab.measure import data
from effnb.nas import CellSpace, evolve, random_search, rank_correlation, rank_table
from effnb.nas.nb201 import iso_class

SCORES = Path(__file__).resolve().parents[1] / "book" / "results" / "scores"
TARGETS = ("cifar10", "cifar100", "imagenet16_120")
RIVALS = ("params", "zico_floor", "naswot", "grad_norm", "snip", "fisher", "zico_mean", "zico_std", "zico_accumulated")
FRACTIONS = (1.0, 0.5, 0.2, 0.1, 0.05)
LOWER_IS_BETTER = ("ntk_condition",)
NOT_SCORES = ("edges", "cells", "connected", "seed", "zico_seconds")
KEYS = ["experiment", "method", "seed", "scores", "rival", "target"]
Rows = Iterator[dict[str, object]]


def read(name: str) -> pd.DataFrame:
    """A file of scores; for every column higher is better."""
    found = pd.read_csv(SCORES / f"{name}.csv", dtype={"edges": str})
    for column in found.columns.intersection(LOWER_IS_BETTER):
        found[column] = -found[column]
    return found


def accuracies() -> pd.DataFrame:
    """Test accuracies, parameters and multiply-adds by cell, columns named by the data set."""
    return data.load("nas-bench-201").table.set_index("edges").rename(columns=lambda c: c.removesuffix("_test"))


def sample(table: pd.DataFrame, bootstrap: int, name: str = "nb201") -> Rows:
    """Correlations on the cells of a file of scores, by seed and method, and differences of ZiCo to its rivals."""
    for seed, rows in read(name).groupby("seed"):
        for experiment, part in (("sample", rows), ("connected", rows[rows.connected == 1])):
            columns = part.drop(columns=list(NOT_SCORES), errors="ignore").dropna(axis=1)
            targets = {target: table.loc[part.edges, target].to_numpy() for target in TARGETS}
            rivals = [("zico", rival) for rival in RIVALS if rival in columns]
            for method in ("spearman", "kendall")[: 2 if seed == 0 else 1]:
                options = {"method": method, "bootstrap": bootstrap if experiment == "sample" else 0, "rivals": rivals}
                for row in rank_table({c: columns[c].to_numpy() for c in columns}, targets, **options):
                    yield {"experiment": experiment, "method": method, "seed": seed} | row


def whole(table: pd.DataFrame) -> Rows:
    """Parameters over the whole table; ZiCo, its floor and parameters within the best share of it."""
    for method in ("spearman", "kendall"):
        for row in rank_table({"params": table.params}, {t: table[t] for t in TARGETS}, method=method):
            yield {"experiment": "table", "method": method, "seed": 0} | row
    for seed, scores in by_class(table).items():
        for target in TARGETS:
            order = table[target].sort_values(ascending=False, kind="stable").index
            for fraction in FRACTIONS:
                best = order[: round(fraction * len(order))]
                for name in scores:
                    found = rank_correlation(scores.loc[best, name], table.loc[best, target]).estimate
                    key = {"experiment": f"top {100 * fraction:g} %", "method": "spearman", "seed": seed}
                    yield key | {"scores": name, "rival": "", "target": target, "estimate": found}


def by_class(table: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """Scores of all cells by seed; a cell has the score of its class, and its own parameters."""
    classes = read("classes")
    classes.index = classes.edges.map(iso_class)
    scores = classes.drop(columns="edges").loc[[iso_class(cell) for cell in table.index]].set_axis(table.index)
    seeds = sorted({int(column[-1]) for column in scores})
    return {
        seed: pd.DataFrame({n: scores[f"{n}_seed{seed}"] for n in ("zico", "zico_floor")} | {"params": table.params})
        for seed in seeds
    }


def skeleton(table: pd.DataFrame, bootstrap: int) -> Rows:
    """One cell a stage, and the network of nano-bench, against five cells a stage, over the same cells with seed 0."""
    five, every = read("skeleton").set_index("edges"), read("nb201")
    one = every[every.seed == 0].set_index("edges").loc[five.index]
    nano = by_class(table)[0].zico.loc[five.index]
    scores = {"one": one.zico.to_numpy(), "nano": nano.to_numpy(), "five": five.zico.to_numpy()}
    targets = {target: table.loc[five.index, target].to_numpy() for target in TARGETS} | {"five": five.zico.to_numpy()}
    for row in rank_table(scores, targets, rivals=[("one", "five"), ("nano", "five")], bootstrap=bootstrap):
        yield {"experiment": "skeleton", "method": "spearman", "seed": 0} | row


def search(table: pd.DataFrame, seeds: int = 10, steps: int = 300, population: int = 32, share: float = 0.6) -> Rows:
    """Regret of evolution by ZiCo and by parameters, and of random searches with the same number of draws."""
    scores = sum(frame.zico for frame in by_class(table).values())
    macs, limit = table.macs, share * table.macs.max()
    within = lambda cell: macs[cell] <= limit  # noqa: E731
    options = {"steps": steps, "budget_fn": within}
    best = table[macs <= limit][list(TARGETS)].max()
    for seed in range(seeds):
        for name, score in (("zico", scores), ("params", table.params)):
            evolved = evolve(CellSpace(), score.__getitem__, population=population, seed=seed, **options)
            drawn = random_search(CellSpace(), score.__getitem__, seed=seed, **options)
            for kind, found in (("evolution", evolved.best), ("random", drawn.best), ("draw", drawn.history[0][0])):
                for target in TARGETS:
                    key = {"experiment": "search", "method": kind, "seed": seed, "scores": name, "rival": found}
                    yield key | {"target": target, "estimate": best[target] - table.loc[found, target]}


def measured(bootstrap: int = 1000, name: str = "nb201") -> pd.DataFrame:
    """Everything, a row a figure; ``name`` is the file of the sample's scores."""
    table = accuracies()
    rows = [*sample(table, bootstrap, name), *whole(table), *skeleton(table, bootstrap), *search(table)]
    return pd.DataFrame(rows)[[*KEYS, "estimate", "lo", "hi"]]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    found = measured()
    found.to_csv(SCORES / "measured.csv", index=False, float_format="%.6f", lineterminator="\n")
    print(f"{len(found)} rows")
    assert np.isfinite(found.estimate).all()
