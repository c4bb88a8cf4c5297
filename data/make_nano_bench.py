"""Train nano-bench: every cell of `effnb.nas.nanobench.sample_cells` and a grid of widths, three seeds each.

    python data/make_nano_bench.py --jobs 2            # writes nano-bench.csv and nano-width.csv; resumable
    python data/make_nano_bench.py --check 5           # trains five networks again and compares with the file

Needs the full Fashion-MNIST. Networks that are done lie in `_build/nano_bench.jsonl`, so a killed run goes on where it
was. One thread a network, channels-last, torch's default initialisation; seconds are CPU seconds of one training.
"""

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from time import process_time

import pandas as pd
import torch
from rich.progress import Progress
from torch import Tensor

from effnb.lab.measure import cost, data
from effnb.lab.measure.seed import seed_everything
from effnb.lab.run.fanout import fan_out, one_thread
from effnb.nas.nanobench import build_net, images, sample_cells, train_net
from effnb.nas.nb201 import is_connected

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / "_build" / "nano_bench.jsonl"
SEEDS = (0, 1, 2)
WIDTHS = (4, 6, 8, 12, 16)
N_TRAIN, N_TEST = 4096, 5000
# The cells differ less than the widths: at 3 epochs two seeds of the cells agree at Spearman .73, at 5 at .83.
EPOCHS_CELLS, EPOCHS_WIDTHS = 5, 3
Item = tuple[str, tuple[int, int], int, int]


@cache
def fashion() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First 4,096 training and first 5,000 test images as nano-bench sees them, with labels."""
    full = data.load("fashion-mnist")
    train, test = full.x_train[:N_TRAIN], full.x_test[:N_TEST]
    return images(train), full.y_train[:N_TRAIN], images(test), full.y_test[:N_TEST]


def train_one(edges: str, widths: tuple[int, int], depth: int, epochs: int, seed: int) -> dict:
    """Train one network once; returns test accuracy in percent, last epoch's loss and CPU seconds."""
    x, y, x_test, y_test = fashion()
    seed_everything(seed)
    net = build_net(edges, widths, depth).to(memory_format=torch.channels_last)
    start = process_time()
    losses = train_net(net, x, y, seed, epochs)
    seconds = process_time() - start
    net.eval()
    with torch.no_grad():
        hits = (net(x_test).argmax(1) == y_test).double().mean()
    return {"acc": round(100 * float(hits), 4), "loss": round(losses[-1], 6), "seconds": round(seconds, 3)}


def row(item: Item) -> dict:
    """One row of the table: a network, trained with every seed."""
    edges, widths, depth, epochs = item
    one_thread()
    net = build_net(edges, widths, depth)
    runs = [train_one(edges, widths, depth, epochs, seed) for seed in SEEDS]
    flops = cost.count_flops(net.eval(), torch.zeros(1, 1, 14, 14))
    mean = {key: sum(run[key] for run in runs) / len(runs) for key in ("acc", "loss", "seconds")}
    return {
        "edges": edges, "width1": widths[0], "width2": widths[1], "depth": depth, "epochs": epochs,
        "connected": int(is_connected(edges)), "params": cost.count_params(net).trainable,
        "macs": int(flops.matmul_conv) // 2,
        "train_seconds": round(mean["seconds"], 3),
        **{f"acc_seed{seed}": run["acc"] for seed, run in zip(SEEDS, runs, strict=True)},
        "acc_mean": round(mean["acc"], 4), "loss_mean": round(mean["loss"], 6),
    }  # fmt: skip


def items() -> Iterator[Item]:
    """The 400 cells at (8, 16), then the all-3x3 cell in 25 pairs of widths and two depths."""
    yield from ((edges, (8, 16), 1, EPOCHS_CELLS) for edges in sample_cells())
    yield from (("333333", (a, b), depth, EPOCHS_WIDTHS) for depth in (1, 2) for a in WIDTHS for b in WIDTHS)


def key(found: dict) -> Item:
    return found["edges"], (found["width1"], found["width2"]), found["depth"], found["epochs"]


def train_all(jobs: int) -> None:
    """Train what is missing, then write both tables."""
    CACHE.parent.mkdir(exist_ok=True)
    lines = CACHE.read_text().splitlines() if CACHE.exists() else []
    done = {key(found): found for found in map(json.loads, lines)}
    missing = [item for item in items() if item not in done]
    with Progress() as progress, CACHE.open("a") as cache_file:
        bar = progress.add_task("train", total=len(missing))

        def keep(_: int, outcome: object) -> None:
            if isinstance(outcome, Exception):
                raise outcome
            cache_file.write(json.dumps(outcome) + "\n")
            cache_file.flush()
            done[key(outcome)] = outcome
            progress.advance(bar)

        fan_out(row, missing, jobs, on_done=keep)
    everything = list(items())
    for name, wanted in (("nano-bench.csv", everything[:400]), ("nano-width.csv", everything[400:])):
        table = pd.DataFrame([done[item] for item in wanted])
        table.to_csv(HERE / name, index_label="index", lineterminator="\n")


def check(count: int) -> None:
    """Train the first rows again; accuracies must agree to 1.5 points (rounding differs between processors)."""
    stored = pd.read_csv(HERE / "nano-bench.csv", dtype={"edges": str}).head(count)
    for found in stored.to_dict("records"):
        again = row(key(found))
        worst = max(abs(again[f"acc_seed{s}"] - found[f"acc_seed{s}"]) for s in SEEDS)
        print(f"{found['edges']}: largest difference {worst:.2f} points")
        if worst > 1.5:
            raise SystemExit("nano-bench.csv does not hold what this machine trains")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--check", type=int, metavar="N", help="train the first N rows again and compare")
    arguments = parser.parse_args()
    check(arguments.check) if arguments.check else train_all(arguments.jobs)
