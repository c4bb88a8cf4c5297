"""One look for all figures: sizes, colours, direct labels, SVG with alternative text."""

import base64
import io
import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

#: Colour-blind-safe (Okabe and Ito): ours, baseline, second and third baseline, reference line, further lines.
OURS, BASELINE, SECOND, THIRD, REFERENCE = "#0072B2", "#7A7A7A", "#D55E00", "#009E73", "#000000"
MORE = ("#CC79A7", "#E69F00", "#56B4E9")


def style() -> None:
    """Set matplotlib's defaults for the book; call it once at the top of a notebook.

    >>> style(); plt.rcParams["svg.hashsalt"]
    'effnb'
    """
    plt.rc("figure", dpi=100)
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("font", size=9)
    plt.rc("axes", titlesize=10, titlelocation="left", titleweight="bold")
    plt.rc("axes", prop_cycle=plt.cycler(color=[OURS, BASELINE, SECOND, THIRD, *MORE]))
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("legend", frameon=False)
    plt.rc("lines", linewidth=1.6)
    plt.rc("svg", fonttype="none", hashsalt="effnb")  # text as text: as outlines it would make a chapter too large
    plt.rc("savefig", facecolor="white")


def single() -> tuple[Figure, Axes]:
    """A figure with one set of axes, 5.0 x 3.1 in.

    >>> figure, axes = single(); [float(x) for x in figure.get_size_inches()]
    [5.0, 3.1]
    """
    return plt.subplots(figsize=(5.0, 3.1))


def pair(**options: object) -> tuple[Figure, Sequence[Axes]]:
    """A figure with two sets of axes side by side, 7.2 x 3.1 in; ``options`` go to ``plt.subplots``.

    >>> figure, axes = pair(sharey=True); len(axes)
    2
    """
    return plt.subplots(1, 2, figsize=(7.2, 3.1), **options)


def label_end(axes: Axes, x: float, y: float, text: str, color: str = REFERENCE, dy: float = 0.0) -> None:
    """Write ``text`` just right of a line's last point ``(x, y)``, in the line's colour, instead of a legend.

    ``dy`` shifts it upwards by points, to part labels that would overlap.

    >>> figure, axes = single(); label_end(axes, 1.0, 2.0, "ours", OURS); axes.texts[0].get_text()
    'ours'
    """
    place = {"xytext": (4, dy), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    axes.annotate(text, (x, y), color=color, **place)


def band(axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], color: str, **options: object) -> list:
    """Draw the mean of ``values``, ``(seeds, len(x))``, with a dot for each seed; return the means.

    ``options`` of ``axes.plot`` are for the mean's line.

    Raises:
        ValueError: a row's length is not that of ``x``.

    >>> figure, axes = single(); band(axes, [0, 1], [[1.0, 2.0], [3.0, 4.0]], OURS)
    [2.0, 3.0]
    """
    if any(len(row) != len(x) for row in values):
        raise ValueError(f"values must have rows of length {len(x)}, got {[len(row) for row in values]}")
    mean = [math.fsum(column) / len(values) for column in zip(*values, strict=True)]
    for row in values:
        axes.plot(x, row, ".", color=color, markersize=3.5, alpha=0.55)
    axes.plot(x, mean, color=color, **options)
    return mean


def frame(x: float, y: float, width: float = 1.0, height: float = 1.0) -> Rectangle:
    """Return a frame around a cell of a heat map, to mark it.

    >>> frame(0, 0).get_fill()
    False
    """
    return Rectangle((x, y), width, height, fill=False, edgecolor=SECOND, linewidth=2)


class Picture:
    """A finished figure as an ``<img>`` with alternative text, for a notebook's output."""

    def __init__(self, svg: bytes, alt: str, wide: bool = False, caption: str = "") -> None:
        self.svg, self.alt, self.wide, self.caption = svg, alt, wide, caption

    def _repr_html_(self) -> str:
        alt = self.alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        source, kind = base64.b64encode(self.svg).decode(), "figure wide" if self.wide else "figure"
        look = f'class="{kind}" alt="{alt}" style="max-width:100%;background:#fff"'
        return f'<img {look} src="data:image/svg+xml;base64,{source}">'

    def __repr__(self) -> str:
        return f"<figure: {self.alt}>"


def show(figure: Figure, alt: str) -> Picture:
    """Turn a figure into SVG with alternative text and close it; the last line of a figure's cell.

    The same data give the same bytes: no date and no random ids inside. ``alt`` is what a reader who cannot see the
    figure should know, generated from the data; an empty one is a ValueError.

    >>> figure, axes = single(); show(figure, "an empty plot")
    <figure: an empty plot>
    """
    if not alt.strip():
        raise ValueError(f"alt must describe the figure, got {alt!r}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return Picture(buffer.getvalue(), alt, wide=figure.get_figwidth() > 6)
