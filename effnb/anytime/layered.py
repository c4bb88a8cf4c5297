"""Random layered supernets."""

from itertools import pairwise

from effnb.anytime.adjacency import Rng, as_rng
from effnb.anytime.graph import SuperGraph


def layered_graph(layers: int, width: int, p: float = 1.0, *, min_edges: int = 0, rng: Rng = 0) -> SuperGraph:
    """A random layered supernet: input, ``layers`` layers of ``width`` nodes, output.

    Input and output are joined to their whole neighbouring layer, nodes of neighbouring layers with probability ``p``.
    Draws in which a node lies on no path, or with fewer than ``min_edges`` edges, are rejected.

    Args:
        layers: >= 1.
        width: nodes of a layer, >= 1.
        p: probability of a connection, in (0, 1].
        min_edges: least number of operations.
        rng: generator or seed.

    Raises:
        ValueError: an argument out of range, ``min_edges`` above what the layout holds, or no draw in 10 000 passes.

    Reference: li2023tips.

    >>> layered_graph(4, 3).num_edges, layered_graph(4, 3, 0.6, rng=0).n
    (33, 14)
    """
    if min(layers, width) < 1 or not 0 < p <= 1:
        raise ValueError(f"layers and width must be >= 1 and p in (0, 1], got {layers}, {width}, {p}")
    most = 2 * width + (layers - 1) * width**2
    if min_edges > most:
        raise ValueError(f"min_edges must be at most {most} for this layout, got {min_edges}")
    rows = [range(1 + k * width, 1 + (k + 1) * width) for k in range(layers)]
    rng, last = as_rng(rng), 1 + layers * width
    fixed = [(0, v) for v in rows[0]] + [(u, last) for u in rows[-1]]
    between = [(u, v) for a, b in pairwise(rows) for u in a for v in b]
    for _ in range(10_000):
        chosen = rng.random(len(between)) < p
        edges = [*fixed, *(e for e, kept in zip(between, chosen, strict=True) if kept)]
        inner = {u for u, _ in edges} & {v for _, v in edges}
        if len(edges) >= min_edges and len(inner) == layers * width:
            return SuperGraph(last + 1, tuple(edges))
    raise ValueError(f"p must leave every node on a path with at least {min_edges} edges, got {p}")
