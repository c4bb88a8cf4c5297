"""What a sweep measured: tidy table, intervals, figure, files."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from effnb.lab.judge import stats
from effnb.lab.measure import plot
from effnb.lab.run.store import Store

PANELS = 6


@dataclass(frozen=True, eq=False)
class SweepTable:
    """The outcome of a sweep.

    ``tidy`` has one row a measured value: ``system``, the grid's parameters, ``seed``, ``metric``, ``value``.
    ``intervals`` has one row a grid cell and metric: the parameters, ``metric``, ``n``, ``mean``, ``lo``, ``hi`` (95 %
    Student interval over seeds, NaN for one seed). ``failures`` lists the records of cells that did not end well.
    """

    system: str
    parameters: list[str]
    tidy: pd.DataFrame
    intervals: pd.DataFrame
    failures: list[dict] = field(default_factory=list)
    out: str = ""
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the table of intervals, the failures with the end of their errors, and where the files are."""
        shown = self.intervals.to_string(index=False, float_format=lambda v: f"{v:.6g}", na_rep="-")
        lines = [shown if len(self.intervals) else "no cell ended well"]
        for record in self.failures:
            last = record["error"].strip().splitlines()[-1:] or ["no message"]
            lines.append(f"{record['status']}: {label(record['parameters'])} seed {record['seed']}: {last[0]}")
        return "\n".join([*lines, *self.notes, f"written to {self.out}"])


def values_of(result: Mapping) -> dict[str, float]:
    """Return the figures of one run (one seed): the noted metrics, each claim's, then each claim's baseline's.

    A claim that was measured over more than the seed (timing pairs) gives its estimate; one not tested gives nothing.

    Args:
        result: a chapter's result record.

    >>> values_of({"claims": {"a/A1": {"measured": {"per_seed": [2.0]}}}, "metrics": {"loss": [0.5]}})
    {'loss': 0.5, 'a/A1': 2.0}
    """
    noted = {name: math.fsum(v) / len(v) for name, v in result.get("metrics", {}).items() if v}
    found, baselines = {}, {}
    for claim, entry in result.get("claims", {}).items():
        measured = entry.get("measured") or {}
        values = measured.get("per_seed") or []
        if len(values) == 1:
            found[claim] = values[0]
        elif values and measured.get("estimate") is not None:
            found[claim] = measured["estimate"]
        baseline = measured.get("baseline_per_seed") or []
        if baseline:
            baselines[f"{claim} baseline"] = math.fsum(baseline) / len(baseline)
    return {name: float(value) for name, value in (noted | found | baselines).items() if value is not None}


def column(values: Sequence[object]) -> list:
    """Return one parameter's values as a column of one type: all numbers stay, all else becomes text."""
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return list(values)
    return [str(v) for v in values]


def label(parameters: Mapping) -> str:
    """Return parameters as ``eps=1, lr=0.1``."""
    return ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                     for name, value in parameters.items()) or "defaults"  # fmt: skip


def intervals_of(tidy: pd.DataFrame, parameters: Sequence[str]) -> pd.DataFrame:
    """Return mean and 95 % Student interval over seeds for each grid cell and metric, in the order of the sweep."""
    rows = []
    for names, group in tidy.groupby([*parameters, "metric"], sort=False, dropna=False):
        values = group["value"].to_numpy()
        mean, lo, hi = values.mean(), math.nan, math.nan
        if len(values) > 1:
            found = stats.paired_t_interval(values)
            mean, lo, hi = found.estimate, found.lo, found.hi
        rows.append([*names, len(values), mean, lo, hi])
    return pd.DataFrame(rows, columns=[*parameters, "metric", "n", "mean", "lo", "hi"])


def tabulate(system: str, records: Sequence[Mapping], store: Store) -> SweepTable:
    """Return the table of all cells and write its files.

    Args:
        system: the chapter.
        records: one a cell, as ``sweep`` stores them.
        store: where the files go.
    """
    parameters = list(records[0]["parameters"])
    columns = {name: column([record["parameters"][name] for record in records]) for name in parameters}
    rows = [
        [system, *(columns[name][k] for name in parameters), record["seed"], metric, value]
        for k, record in enumerate(records)
        if record["status"] == "ok"
        for metric, value in values_of(record["result"]).items()
    ]
    tidy = pd.DataFrame(rows, columns=["system", *parameters, "seed", "metric", "value"])
    failures = [dict(record) for record in records if record["status"] != "ok"]
    table = SweepTable(system, parameters, tidy, intervals_of(tidy, parameters), failures, store.out)
    save(table, store)
    return table


def save(table: SweepTable, store: Store) -> None:
    """Write ``sweep.csv``, ``intervals.csv``, ``sweep.parquet`` and, if anything was measured, the figure."""
    store.write("sweep.csv", table.tidy.to_csv(index=False).encode())
    store.write("intervals.csv", table.intervals.to_csv(index=False).encode())
    buffer = io.BytesIO()
    try:
        table.tidy.to_parquet(buffer, index=False)
        store.write("sweep.parquet", buffer.getvalue())
    except ImportError:
        table.notes.append("sweep.parquet was not written: it needs pyarrow (pip install 'effnb[ray]')")
    if len(table.intervals):
        for kind, raw in figure(table).items():
            store.write(f"sweep.{kind}", raw)


def figure(table: SweepTable) -> dict[str, bytes]:
    """Return the figure as ``{"svg": ..., "png": ...}``: a panel a metric, the grid's first parameter on x.

    Combinations of the further parameters are lines; bars are the 95 % intervals, dots the seeds.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(table.intervals["metric"]))
    if len(metrics) > PANELS:
        table.notes.append(f"the figure shows {PANELS} of {len(metrics)} metrics; all are in sweep.csv")
    metrics = metrics[:PANELS]
    with mpl.rc_context():
        plot.style()
        columns = min(2, len(metrics))
        rows = math.ceil(len(metrics) / columns)
        canvas = Figure(figsize=(5.0 if columns == 1 else 7.2, 3.1 * rows))
        for k, metric in enumerate(metrics):
            panel(canvas.add_subplot(rows, columns, k + 1), table, metric)
        return {kind: saved(canvas, kind, table) for kind in ("svg", "png")}


def saved(canvas: object, kind: str, table: SweepTable) -> bytes:
    """Return a figure's bytes, without a date, with a description for those who cannot see it."""
    described = f"{table.system}: {', '.join(dict.fromkeys(table.tidy['metric']))} over {label_names(table)}"
    metadata = {"svg": {"Date": None, "Description": described}, "png": {"Description": described}}[kind]
    buffer = io.BytesIO()
    canvas.savefig(buffer, format=kind, metadata=metadata, dpi=150)
    return buffer.getvalue()


def label_names(table: SweepTable) -> str:
    """Return the names of the swept parameters."""
    return ", ".join(table.parameters) or "seeds"


def panel(axes: object, table: SweepTable, metric: str) -> None:
    """Draw one metric into one set of axes."""
    means = table.intervals[table.intervals["metric"] == metric]
    seeds = table.tidy[table.tidy["metric"] == metric]
    first, rest = (table.parameters[0], table.parameters[1:]) if table.parameters else (None, [])
    places, numeric = positions(means[first]) if first else ({}, False)
    groups = means.groupby(rest, sort=False, dropna=False) if rest else [((), means)]
    for names, group in groups:
        chosen = seeds[(seeds[rest] == pd.Series(names, index=rest)).all(axis=1)] if rest else seeds
        x = [places[v] for v in group[first]] if first else [0.0]
        error = [(group["mean"] - group["lo"]).fillna(0), (group["hi"] - group["mean"]).fillna(0)]
        line = axes.errorbar(x, group["mean"], error, marker="o", capsize=3, elinewidth=0.8, lw=1.4 if first else 0)
        dots = [places[v] for v in chosen[first]] if first else [0.0] * len(chosen)
        axes.plot(dots, chosen["value"], ".", color=line[0].get_color(), mec="white", mew=0.4)
        if rest:
            line.set_label(label(dict(zip(rest, names, strict=True))))
    axes.set(title=metric, xlabel=first or "")
    if numeric and min(places) > 0 and max(places) >= 50 * min(places):
        axes.set_xscale("log")
    elif not numeric:
        axes.set_xticks(list(places.values()), list(map(str, places)))
    if rest:
        axes.legend(fontsize=7)


def positions(values: pd.Series) -> tuple[dict, bool]:
    """Return where each value of the first parameter stands on x, and whether that is the value itself."""
    distinct = list(dict.fromkeys(values))
    numeric = pd.api.types.is_numeric_dtype(values)
    return {v: v if numeric else float(k) for k, v in enumerate(distinct)}, numeric
