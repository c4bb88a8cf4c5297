"""The slow obvious versions: paths by enumeration, walks step by step, subnetworks one operation at a time."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st


@st.composite
def dags(draw, least=2, most=8):
    """Binary, topologically ordered adjacency matrices with a path from the first to the last node."""
    n = draw(st.integers(least, most))
    bits = draw(st.lists(st.booleans(), min_size=n * n, max_size=n * n))
    a = np.triu(np.array(bits).reshape(n, n), 1).astype(int)
    if not any(True for _ in all_paths(a)):
        a[0, -1] = 1
    return a


def all_paths(a, path=(0,)):
    if path[-1] == len(a) - 1:
        yield list(path)
        return
    for j in range(path[-1] + 1, len(a)):
        if a[path[-1]][j]:
            yield from all_paths(a, (*path, j))


def best_path(a, scores, reduction):
    """First of the best in lexicographic order; scores must be such that ties are exact."""
    value = {"sum": sum, "mean": lambda v: sum(v) / len(v)}[reduction]
    paths = list(all_paths(a))
    top = max(value([scores[v] for v in p]) for p in paths)
    return next(p for p in paths if abs(value([scores[v] for v in p]) - top) <= 1e-12 * max(1, abs(top)))


def slow_pruned(a):
    """Edges on some path, found by listing all paths."""
    out = np.zeros_like(a)
    for path in all_paths(a):
        out[path[:-1], path[1:]] = 1
    return out


def slow_chain(adjs, lam, closure):
    """Transition matrix over the present states (k, v), entry by entry."""
    pruned = [slow_pruned(np.asarray(a).astype(int)) for a in adjs]
    n = len(pruned[0])
    states = [(k, v) for k, a in enumerate(pruned) for v in range(n) if a[v].any() or a[:, v].any()]
    rows = []
    for k, v in states:
        row = []
        for m, w in states:
            if m == k:
                back = pruned[k][w, v] if closure == "symmetric" else (v == n - 1 and w == 0)
                row.append(float(pruned[k][v, w]) + float(back))
            else:
                row.append(lam if w == v else 0.0)
        rows.append(row)
    P = np.array(rows)
    return states, P / P.sum(1, keepdims=True)


def operation(net, e):
    """Weight ``(copies, in, out)`` and bias ``(copies, out)`` of edge ``e``, wherever the supernet keeps it."""
    (ops,) = (ops for ops in net.groups if e in ops.edges)
    both = ops.weight[:, ops.edges.index(e)]
    return both[:, :-1], both[:, -1]


def loop_mlp(net, x, mask, copy=0):
    """One subnetwork of a DagMLP, one operation after the other."""
    graph, values = net.graph, {0: x}
    for v in range(1, graph.n):
        terms = []
        for e, (i, j) in enumerate(graph.edges):
            if j == v and mask[e]:
                weight, bias = operation(net, e)
                terms.append(F.linear(values[i], weight[copy].T, bias[copy]))
        if terms:
            mean = torch.stack(terms).mean(0)
            values[v] = mean if v == graph.n - 1 else F.relu(F.layer_norm(mean, mean.shape[-1:]))
    return values[graph.n - 1]


def loop_conv(net, x, mask, copy=0):
    """One subnetwork of a DagConvNet, one operation after the other."""
    half = {v: net.halves[level] for level, nodes in enumerate(net.levels) for v in nodes}
    graph, values = net.graph, {0: x}
    for v in range(1, graph.n):
        terms = []
        for e, (i, j) in enumerate(graph.edges):
            if j != v or not mask[e]:
                continue
            weight, bias = operation(net, e)
            if v == graph.n - 1:
                terms.append(F.linear(values[i].mean((2, 3)), weight[copy].T, bias[copy]))
            else:
                h = F.avg_pool2d(values[i], 2) if half[v] > half[i] else values[i]
                kernel = weight[copy].view(-1, 3, 3, weight.shape[-1]).permute(3, 0, 1, 2)
                terms.append(F.conv2d(h, kernel, bias[copy], padding=1))
        if terms:
            mean = torch.stack(terms).mean(0)
            values[v] = mean if v == graph.n - 1 else F.relu(F.layer_norm(mean, mean.shape[1:]))
    return values[graph.n - 1]
