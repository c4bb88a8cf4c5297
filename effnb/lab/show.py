"""What the notebooks share: how a chapter begins, tables and figures of usual kinds, verdicts on the page."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

import effnb
from effnb.common import check_choice
from effnb.lab.judge.claims import ClaimSet, load
from effnb.lab.judge.results import load_result
from effnb.lab.judge.stats import paired_t_interval
from effnb.lab.measure import plot
from effnb.lab.measure.data import Source
from effnb.lab.paths import committed_results
from effnb.lab.publish import verdicts
from effnb.lab.run.record import Recorder


class Html:
    """Markup for a page or a notebook, with a short text form for terminals."""

    def __init__(self, markup: str, told: str) -> None:
        self.markup, self.told = str(markup), told

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return f"<{self.told}>"


def begin(device: str = "auto", *datasets: Source) -> torch.device:
    """Begin a chapter: one thread, the book's look, one printed line of versions and data; return the device.

    Args:
        device: ``"auto"`` (CUDA where there is one), ``"cpu"`` or ``"cuda"``.
        datasets: what :func:`effnb.lab.measure.data.load` returned.

    Raises:
        ValueError: another device.
        RuntimeError: ``"cuda"`` on a machine without it; nothing falls back silently.

    >>> begin("cpu")
    effnb 0..., Python 3..., torch 2..., numpy 2..., 1 thread, cpu; data: generated
    device(type='cpu')
    """
    check_choice("device", device, ("auto", "cpu", "cuda"))
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise RuntimeError("device must be there: 'cuda' was asked for, and torch sees none; use 'auto' or 'cpu'")
    where = torch.device("cuda" if found and device != "cpu" else "cpu")
    torch.set_num_threads(1)  # sums depend on it: same threads, same bits
    plot.style()
    python = ".".join(platform.python_version_tuple()[:2])
    used = "; ".join(dataset.describe() for dataset in datasets) or "generated"
    versions = f"torch {torch.__version__.split('+')[0]}, numpy {np.__version__}"
    print(f"effnb {effnb.__version__}, Python {python}, {versions}, 1 thread, {where}; data: {used}")
    return where


def interval_of(values: ArrayLike) -> tuple[float, float, float]:
    """Return the mean and its 95 % t interval over the values; a single one stands for all three.

    >>> [round(v, 2) for v in interval_of([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return (float(values[0]),) * 3
    found = paired_t_interval(values)
    return found.estimate, found.lo, found.hi


def mean_text(values: ArrayLike, digits: int = 1, unit: str = "") -> str:
    """Return ``mean [lo, hi] unit`` over seeds, with a 95 % t interval; of one run just its value.

    >>> mean_text([80.0, 81.0, 82.0], unit="%")
    '81.0 [78.5, 83.5] %'
    """
    mean, low, high = interval_of(values)
    span = f" [{low:.{digits}f}, {high:.{digits}f}]" if np.size(values) > 1 else ""
    return f"{mean:.{digits}f}{span}{f' {unit}' if unit else ''}"


def table(
    rows: Sequence[Sequence | Mapping], columns: Sequence[str] | None = None, digits: int = 2, **options: Any
) -> Html:
    """Return a table for the page.

    Args:
        rows: cells, or mappings from column to cell; numbers are rounded to ``digits`` after the point, sequences of
            numbers shown by :func:`mean_text`, None is empty.
        columns: headings; those of the first row where rows are mappings.
        options: ``caption``, and ``best``, the ``(row, column)`` of cells to mark.

    >>> table([["a", 1.234]], ["method", "score"])
    <table, 1 row>
    """
    if columns is None:
        columns = list(rows[0])
    cells = [[row.get(c) for c in columns] if isinstance(row, Mapping) else list(row) for row in rows]

    def shown(cell: Any) -> Any:
        if isinstance(cell, bool | str | int | np.integer) or cell is None:
            return "" if cell is None else str(cell)
        if np.ndim(cell):
            return mean_text(cell, digits)
        return "" if np.isnan(cell) else f"{cell:.{digits}f}"

    markup = verdicts.table(columns, [[shown(c) for c in row] for row in cells], **options)
    return Html(markup, f"table, {len(cells)} row{'s' * (len(cells) != 1)}")


def dots(
    axes: Axes, results: Mapping[str, ArrayLike], colors: Sequence[str] | None = None, zero: float | None = 0.0
) -> None:
    """Draw one row a comparison (label to values): a tick for every seed or unit, the mean and its 95 % interval.

    The first is in our colour and the others grey unless ``colors`` has one a row; a reference line stands at ``zero``.

    >>> figure, axes = plot.single(); dots(axes, {"ours": [1.0, 2.0], "rival": [0.0, 1.0]})
    >>> [label.get_text() for label in axes.get_yticklabels()]
    ['ours', 'rival']
    """
    colors = colors or [plot.OURS, *[plot.BASELINE] * (len(results) - 1)]
    for row, (values, color) in enumerate(zip(results.values(), colors, strict=True)):
        ticks = np.tile([row + 0.15, row + 0.4, np.nan], len(values))  # one line with gaps: small files
        axes.plot(np.repeat(values, 3), ticks, color=color, alpha=0.6, linewidth=0.8)
        mean, low, high = interval_of(values)
        axes.plot([low, high], [row, row], color=color, linewidth=3, solid_capstyle="butt")
        axes.plot(mean, row, "D", color=color, markersize=5)
    if zero is not None:
        axes.axvline(zero, color=plot.REFERENCE, linestyle="--", linewidth=1, zorder=0)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()


def curve(axes: Axes, points: ArrayLike, color: str, label: str = "", marker: str = "o") -> np.ndarray:
    """Draw the means over seeds of ``(seeds, settings, 2)`` points (cost, quality) with 95 % intervals; return them.

    >>> figure, axes = plot.single(); curve(axes, [[[1, 80], [2, 90]], [[1, 82], [2, 92]]], plot.OURS).tolist()
    [[1.0, 81.0], [2.0, 91.0]]
    """
    points = np.asarray(points, dtype=float)
    spans = [interval_of(column) for column in points[..., 1].T]
    reach = [(high - low) / 2 for _, low, high in spans]
    axes.errorbar(*points.mean(0).T, reach, color=color, marker=marker, markersize=4, elinewidth=1, label=label)
    return points.mean(0)


def heat(axes: Axes, values: ArrayLike, rows: Sequence, columns: Sequence, best: str = "max", digits: int = 0) -> Any:
    """Draw a heat map with every value written in it; the best (``"max"`` or ``"min"``) of each row is framed.

    ``values`` are ``(rows, columns)``, NaN for runs that diverged; ``rows`` and ``columns`` are the labels.

    >>> figure, axes = plot.single(); image = heat(axes, [[1, 3], [2, 1]], ["a", "b"], [0.1, 1.0])
    >>> len(axes.patches), axes.texts[1].get_text()
    (2, '3')
    """
    check_choice("best", best, ("max", "min"))
    values = np.ma.masked_invalid(np.asarray(values, dtype=float))
    image = axes.imshow(values, cmap="cividis", aspect="auto")
    low, high = values.min(), values.max()
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            known = value is not np.ma.masked
            dark = known and (value - low) < 0.5 * (high - low)
            shown = f"{value:.{digits}f}" if known else "·"
            axes.text(j, i, shown, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        if row.count():
            j = int(row.argmax() if best == "max" else row.argmin())
            axes.add_patch(plot.frame(j - 0.5, i - 0.5))
    axes.set_xticks(range(len(columns)), [f"{c:g}" if isinstance(c, float | int) else c for c in columns])
    axes.set_yticks(range(len(rows)), [f"{r:g}" if isinstance(r, float | int) else r for r in rows])
    return image


# --- claims on the page ------------------------------------------------------------------------------------------


def at_a_glance(system: str, results: Path | None = None) -> Html:
    """Return *At a glance* of a chapter from the committed results; the runner refreshes it after a run.

    Args:
        system: the chapter's system.
        results: folder of a run whose results go before the committed ones.

    Raises:
        ValueError: unknown system, or a result that breaks a rule.
    """
    claims = load(system)
    return Html(verdicts.glance(claims, _entries(claims, results)), f"{system} at a glance")


def _entries(claims: ClaimSet, results: Path | None) -> dict[str, dict[str, Mapping | None]]:
    """Return the committed entries, and over them those of a run that has just ended."""
    entries = verdicts.entries_of(claims)
    if results is not None:
        for ident, fresh in verdicts.entries_of(claims, results).items():
            entries[ident] |= {profile: entry for profile, entry in fresh.items() if entry}
    return entries


def report(record: Recorder) -> Html:
    """Return the verdicts of this run, for the section *Claims*."""
    return Html(verdicts.report(record.registered, record.entries()), "verdicts of this run")


def shortfalls(record: Recorder) -> Html:
    """Return the claims of this run that fell short, each with its reason."""
    return Html(verdicts.shortfalls(record.registered, record.entries()), "claims that fell short")


def study(system: str, results: Path | None = None) -> Html:
    """Return the section *At study scale*: the stored verdicts, tables and figures of the chapter's last study run.

    Arguments are those of :func:`at_a_glance`.
    """
    claims = load(system)
    for folder in filter(None, (results, committed_results())):
        if result := load_result(system, "study", folder):
            break
    else:
        told = f"No study has been run yet: `effnb run {system} --profile study --update` runs it."
        return Html(f"<p>{verdicts.text(told)}</p>", "no study yet")
    figures = []
    for about in result["figures"]:
        svg = Path(folder, "study", system, f"{about['name']}.svg").read_bytes()
        figures.append(plot.Picture(svg, about["alt"], caption=about["caption"]))
    markup = verdicts.render("study.html", claims=claims, result=result, figures=figures)
    return Html(markup, f"{system} at study scale")


def lead(system: str, results: Path | None = None) -> Html:
    """Return what a chapter opens with, from the committed results: one sentence on the primary claim and its picture.

    The picture has a row for the claim at each scale: a tick a seed, mean and interval, and the side of the threshold
    where the criterion holds. Arguments are those of :func:`at_a_glance`.
    """
    claims = load(system)
    claim = next(claim for claim in claims.claims if claim.primary)
    entries = _entries(claims, results)[claim.id]
    profile, entry = verdicts.headline(claim, entries)
    picture = ""
    if entry and entry["measured"]["estimate"] is not None:
        plot.style()  # this cell stands before the chapter begins
        figure, axes = plot.single()
        shown = {f"{name} scale": e["measured"] for name, e in entries.items() if e and e["measured"]["per_seed"]}
        for row, (color, measured) in enumerate(zip((plot.OURS, plot.BASELINE), shown.values(), strict=False)):
            values, rival = np.asarray(measured["per_seed"]), measured["baseline_per_seed"]
            if rival:
                values = values / rival if claim.criterion.interval == "t-log" else values - rival
            ticks = np.tile([row + 0.12, row + 0.3, np.nan], len(values))
            axes.plot(np.repeat(values, 3), ticks, color=color, alpha=0.6, linewidth=0.8)
            axes.plot(measured["ci"] or [measured["estimate"]] * 2, [row] * 2, color=color, linewidth=3)
            axes.plot(measured["estimate"], row, "D", color=color, markersize=6)
        low, high = axes.get_xlim()
        bound, margin = claim.criterion.threshold, claim.criterion.margin or 0.0
        low, high = min(low, bound - margin), max(high, bound + margin)
        room = 0.06 * (high - low)
        sides = {">": (bound, high + room), ">=": (bound, high + room), "within": (bound - margin, bound + margin)}
        axes.axvspan(*sides.get(claim.criterion.op, (low - room, bound)), color=plot.THIRD, alpha=0.12, linewidth=0)
        axes.set(xlim=(low - room, high + room), ylim=(len(shown) - 0.4, -0.6), xlabel=claim.criterion.unit or "value")
        axes.set_yticks(range(len(shown)), list(shown))
        axes.set_title("The primary claim; shaded: where its criterion holds")
        figure.set_size_inches(5.0, 1.1 + 0.55 * len(shown))
        told = f"{claim.statement} Measured: {verdicts.format_measured(entry['measured'])}."
        picture = plot.show(figure, told)._repr_html_()
    sentence = verdicts.render("finding.html", claim=claim, profile=profile, entry=entry)
    return Html(f"{sentence}\n{picture}", f"lead of {system}")
