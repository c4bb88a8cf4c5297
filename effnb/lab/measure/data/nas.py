"""Tables of trained cells: NAS-Bench-201 (15,625 of them, optional) and our own nano-bench (embedded)."""

from io import BytesIO

import numpy as np
import pandas as pd

from . import files
from .kinds import NasTable

FILES = ("nas/nb201_accuracy.csv", "nas/nb201_latency_ms.npz")
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")


def nas_bench_201() -> NasTable:
    """Return the table with one row an architecture (columns: see `NasTable`).

    Latencies on pixel3 and raspi4 below 0.1 ms are NaN: the source holds near-zero values for disconnected cells.
    """
    name = "nas-bench-201"
    # `edges` has leading zeros: six digits, never a number.
    table = pd.read_csv(BytesIO(files.read(FILES[0], name)), dtype={"edges": str}, index_col="index")
    with np.load(BytesIO(files.read(FILES[1], name)), allow_pickle=False) as stored:
        latency = {device: stored[device].astype(np.float64) for device in stored.files}
    for device in ("pixel3", "raspi4"):
        latency[device][latency[device] < 0.1] = np.nan
    columns = {f"latency_{device}": pd.Series(ms, index=table.index) for device, ms in latency.items()}
    return NasTable(
        name, "NATS-Bench (Dong et al. 2021), HELP (Lee et al. 2021), from EFFNB_DATA", files.joint_digest(FILES),
        "MIT", pd.concat([table, pd.DataFrame(columns)], axis=1), tuple(latency), OPERATIONS,
    )  # fmt: skip


def nano_bench(name: str) -> NasTable:
    """Return our own table of small trained networks: ``nano-bench`` (400 cells) or ``nano-width`` (50 widths)."""
    relative = f"{name}.csv"
    table = pd.read_csv(BytesIO(files.read(relative, name)), dtype={"edges": str}, index_col="index")
    source = "trained by data/make_nano_bench.py on Fashion-MNIST (Xiao et al. 2017)"
    return NasTable(name, source, files.SHA256[relative], "MIT", table, (), OPERATIONS)
