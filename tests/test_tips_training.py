"""Stacked supernets against a loop over operations; the trainer; what training must and must not share."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tips_oracles import dags, loop_conv, loop_mlp, operation

from effnb.anytime import (
    AnchoredSampler,
    AnytimeTrainer,
    DagConvNet,
    DagMLP,
    JointSampler,
    SandwichSampler,
    SuperGraph,
    UniformSampler,
    anytime_accuracy,
    candidate_subnetworks,
    layered_graph,
    mean_scores,
    most_important_path,
    sample_masks,
)
from effnb.lab.measure import data

G = layered_graph(4, 3, 0.6, min_edges=20, rng=0)
PATH = next(G.paths())
LOOSE = np.array([e[0] != 0 or e[1] == PATH[1] for e in G.edges])  # two nodes of the first layer have lost their input


def stream(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are slower on two threads, by far on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mlp(graph, copies=1):
    return DagMLP(graph, 6, width=4, classes=3, copies=copies, generator=[stream(k) for k in range(copies)]).double()


def masks_of(graph, copies=1, T=3):
    drawn = sample_masks(graph, 0.6, copies * T, rng=1).reshape(copies, T, -1)
    return torch.from_numpy(drawn if copies > 1 else drawn[0])


# ---------------------------------------------------------------- the stacked forward pass


@settings(max_examples=40)
@given(dags(most=7), st.integers(1, 3))
def test_stacked_mlp_is_the_loop(a, copies):
    """Any graph: operations that skip levels, from the input into the middle, from the input to the output."""
    graph = SuperGraph.from_adjacency(a)
    net, masks = mlp(graph, copies), masks_of(graph, copies)
    x = torch.randn(copies, 5, 6, generator=stream(9), dtype=torch.float64)
    found = net(x if copies > 1 else x[0], masks)
    for k, rows in enumerate(masks if copies > 1 else [masks]):
        for t, mask in enumerate(rows):
            torch.testing.assert_close((found[k] if copies > 1 else found)[t], loop_mlp(net, x[k], mask, k))


@settings(max_examples=15)
@given(dags(most=6), st.integers(1, 2))
def test_stacked_convolutions_are_the_loop(a, copies):
    a[0, -1] = 0
    a[0, 1] = a[1, -1] = len(a) > 2
    if len(a) == 2:
        return
    graph = SuperGraph.from_adjacency(a)
    net = DagConvNet(graph, 2, width=3, classes=4, copies=copies, generator=stream(0)).double()
    masks = masks_of(graph, copies, T=2)
    x = torch.randn(copies, 3, 2, 6, 6, generator=stream(9), dtype=torch.float64)
    found = net(x if copies > 1 else x[0], masks)
    for k, rows in enumerate(masks if copies > 1 else [masks]):
        for t, mask in enumerate(rows):
            torch.testing.assert_close((found[k] if copies > 1 else found)[t], loop_conv(net, x[k], mask, k))


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_gradients_are_those_of_the_loop(kind):
    net = mlp(G) if kind == "mlp" else DagConvNet(G, width=3, generator=stream(0)).double()
    x = torch.randn(4, *((6,) if kind == "mlp" else (1, 6, 6)), generator=stream(1), dtype=torch.float64)
    masks, loop = masks_of(G), loop_mlp if kind == "mlp" else loop_conv
    parameters = list(net.parameters())
    upstream = torch.randn(3, 4, net.sizes[2], generator=stream(2), dtype=torch.float64)
    fast = torch.autograd.grad((net(x, masks) * upstream).sum(), parameters)
    slow = torch.autograd.grad((torch.stack([loop(net, x, m) for m in masks]) * upstream).sum(), parameters)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)


def test_float32_kernels_are_close_to_float64():
    net, masks = mlp(G), masks_of(G)
    x = torch.randn(5, 6, generator=stream(1), dtype=torch.float64)
    torch.testing.assert_close(net.float()(x.float(), masks).double(), net.double()(x, masks), rtol=1e-5, atol=1e-5)


def test_a_subgraph_runs_inside_a_larger_layout():
    """The same operations give the same logits, whatever else the layout could hold."""
    layout = layered_graph(4, 3)
    small, large = mlp(G), mlp(layout)
    with torch.no_grad():
        for e, edge in enumerate(G.edges):
            for p, q in zip(operation(large, layout.edges.index(edge)), operation(small, e), strict=True):
                p.copy_(q)
    x, masks = torch.randn(5, 6, generator=stream(1), dtype=torch.float64), masks_of(G)
    inside = layout.masks(G.matrices(masks.numpy()))
    torch.testing.assert_close(large(x, inside), small(x, masks))


def test_subnetworks_do_not_influence_each_other():
    """No batch statistics: each answer is the same alone, in company, and in a smaller batch; no buffers are saved."""
    net, masks = mlp(G), masks_of(G, T=4)
    x = torch.randn(6, 6, generator=stream(1), dtype=torch.float64)
    together = net(x, masks)
    torch.testing.assert_close(together[1:2], net(x, masks[1:2]))
    torch.testing.assert_close(together[:, :2], net(x[:2], masks))
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}


def test_inactive_operations_get_no_gradient():
    net, masks = mlp(G), masks_of(G, T=1)
    net(torch.ones(3, 6, dtype=torch.float64), masks).square().sum().backward()
    norms = net.gradient_norms()[0]
    assert (norms[~masks[0]] == 0).all() and norms[masks[0]].max() > 0
    e = int(norms.argmax())
    (ops,) = (ops for ops in net.groups if e in ops.edges)
    assert norms[e] == pytest.approx(float(ops.weight.grad[0, ops.edges.index(e)].norm()))


def test_state_dict_round_trip_is_bit_identical():
    a, b = mlp(G), DagMLP(G, 6, 4, 3, generator=stream(7)).double()
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    x, masks = torch.randn(5, 6, generator=stream(1), dtype=torch.float64), masks_of(G)
    assert torch.equal(a(x, masks), b(x, masks))


def test_initial_weights_come_from_the_stream_of_each_copy():
    both, alone = mlp(G, copies=2), DagMLP(G, 6, 4, 3, generator=stream(1)).double()
    for p, q in zip(both.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p[1:], q)
    before = torch.get_rng_state()
    mlp(G)
    assert torch.equal(before, torch.get_rng_state())


def test_flops_are_counted_two_a_multiply_add():
    from effnb.lab.measure import cost

    net = DagMLP(layered_graph(4, 3), 64)
    assert sorted(set(net.edge_flops())) == [320, 512, 2048] and net.edge_flops().sum() == 3 * 2048 + 27 * 512 + 3 * 320
    full = net.graph.masks(net.graph.adjacency)[None]
    assert cost.count_flops(net, torch.zeros(8, 64), full).matmul_conv == 8 * net.edge_flops().sum()
    path = net.graph.path_edges(net.graph.random_path(0))  # nothing but the active operations (and the first level)
    spent = cost.count_flops(net, torch.zeros(8, 64), path[None]).matmul_conv
    assert spent == 8 * (net.edge_flops()[path].sum() + 2 * 2048)
    conv = DagConvNet(layered_graph(4, 3))
    assert cost.count_flops(conv, torch.zeros(2, 1, 14, 14), full).matmul_conv == 2 * conv.edge_flops().sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DagMLP(G, 0), "inputs must be >= 1, got 0"),
        (lambda: DagMLP(G, 6, copies=0), "copies must be >= 1, got 0"),
        (lambda: DagMLP(G, 6, copies=3, generator=[stream(0)] * 2), "generator must be one or 3"),
        (lambda: DagConvNet(SuperGraph(2, [(0, 1)])), "no operation from the input to the output"),
        (lambda: mlp(G)(torch.zeros(5, 6), torch.ones(3, 7)), "masks must have shape"),
        (lambda: mlp(G, 2)(torch.zeros(5, 6), masks_of(G)), "masks must have shape"),
        (
            lambda: mlp(G)(torch.zeros(5, 6), np.full((1, G.num_edges), np.nan)),
            "masks must be binary, got the value nan",
        ),
        (lambda: mlp(G)(torch.zeros(5, 6), torch.full((1, G.num_edges), -3)), "masks must be binary, got the value -3"),
        (lambda: mlp(G)(torch.zeros(5, 6).double(), G.path_edges(PATH)[None] ^ G.path_edges(PATH)), "pruned"),
        (lambda: mlp(G)(torch.zeros(5, 6).double(), LOOSE[None]), "pruned"),
        (lambda: mlp(G, 2)(torch.zeros(3, 5, 6), masks_of(G, 2)), "x must have 2 dimensions"),
        (lambda: mlp(G)(torch.zeros(1, 5, 2, 3), masks_of(G)), "x must have 2 dimensions"),
    ],
)
def test_bad_supernets(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- training

X = torch.randn(200, 6, generator=stream(3), dtype=torch.float64)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()


def trainer(net, samplers, lr=1e-2, **options):
    return AnytimeTrainer(net, torch.optim.Adam(net.parameters(), lr=lr), samplers, **options)


def sandwich(graph, seed=0):
    return SandwichSampler(UniformSampler(graph, rng=seed))


def fit(**options):
    return trainer(mlp(G), sandwich(G)).fit(X, Y, **{"steps": 1, "generator": stream(0)} | options)


def test_a_step_is_the_mean_of_the_losses():
    net = mlp(G)
    reference, subnetworks = copy.deepcopy(net), sandwich(G, 4)(4)
    losses = AnytimeTrainer(net, torch.optim.SGD(net.parameters(), lr=0.5), JointSampler(subnetworks)).step(
        X[:20], Y[:20]
    )
    each = [F.cross_entropy(loop_mlp(reference, X[:20], m), Y[:20]) for m in torch.from_numpy(G.masks(subnetworks))]
    torch.testing.assert_close(losses[0], torch.stack(each).detach())
    (sum(each) / 4).backward()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.5 * q.grad)


def test_copies_train_as_if_they_were_alone():
    layout, graphs = layered_graph(4, 3), [layered_graph(4, 3, 0.6, rng=k) for k in range(3)]
    together = mlp(layout, copies=3)
    history = trainer(together, [sandwich(g, k) for k, g in enumerate(graphs)]).fit(
        X, Y, steps=5, batch_size=32, generator=[stream(k + 10) for k in range(3)]
    )
    alone = DagMLP(layout, 6, 4, 3, generator=stream(1)).double()
    single = trainer(alone, sandwich(graphs[1], 1)).fit(X, Y, steps=5, batch_size=32, generator=stream(11))
    torch.testing.assert_close(history[:, 1:2], single)
    for p, q in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p[1:2], q)


def test_training_repeats_bit_for_bit():
    runs = [trainer(mlp(G), sandwich(G)).fit(X, Y, steps=4, generator=stream(1)) for _ in range(2)]
    assert torch.equal(*runs)


def test_distillation_learns_from_the_largest():
    net, subnetworks = mlp(G), sandwich(G, 4)(4)
    losses = trainer(net, JointSampler(subnetworks), distill=True).losses(X[:20], Y[:20])
    logits = net(X[:20], torch.from_numpy(G.masks(subnetworks)))
    soft = logits[0].detach().softmax(-1)
    expected = [F.cross_entropy(logits[0], Y[:20]), *(-(soft * z.log_softmax(-1)).sum(-1).mean() for z in logits[1:])]
    torch.testing.assert_close(losses[0], torch.stack(expected))
    found = torch.autograd.grad(losses[0, 1:].sum(), list(net.parameters()))
    wanted = torch.autograd.grad(sum(expected[1:]), list(net.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_distillation_needs_the_largest_first():
    subnetworks = sandwich(G, 4)(4)[::-1]
    with pytest.raises(ValueError, match="largest subnetwork first"):
        trainer(mlp(G), JointSampler(subnetworks.copy()), distill=True).step(X[:20], Y[:20])


def test_stand_alone_largest_only_and_single_random():
    """All are samplers of one subnetwork a step."""
    for sampler in (JointSampler([G.adjacency]), JointSampler(sandwich(G)(2)[1:]), UniformSampler(G, rng=0)):
        losses = trainer(mlp(G), sampler, T=1).fit(X, Y, steps=60, batch_size=50, generator=stream(0))
        assert losses.shape == (60, 1, 1) and losses[-5:].mean() < 0.9 * losses[:5].mean()


def test_fit_takes_every_sample_before_any_twice_and_calls_back():
    seen, called = [], []
    job = trainer(mlp(G), sandwich(G))
    job.step = lambda x, y: (seen.append(x), torch.zeros(1, 4))[1]
    job.fit(X, Y, steps=8, batch_size=50, generator=stream(0), cosine=False, on_step=called.append)
    rows = torch.cat(seen, 1)[0]
    assert called == list(range(8)) and len({tuple(r.tolist()) for r in rows[:200]}) == 200
    assert sorted(rows[:200, 0].tolist()) == sorted(rows[200:, 0].tolist())


def test_cosine_ends_at_zero():
    job = trainer(mlp(G), sandwich(G), lr=0.1)
    job.fit(X, Y, steps=7, generator=stream(0))
    assert job.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    job = trainer(mlp(G), sandwich(G), lr=0.1)
    job.fit(X, Y, steps=7, generator=stream(0), cosine=False)
    assert job.optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trainer(mlp(G), sandwich(G), T=0), "T must be >= 1"),
        (lambda: trainer(mlp(G, 2), sandwich(G)), "sampler must be one a copy, 2"),
        (lambda: trainer(mlp(G), sandwich(G)).fit(X, Y, steps=0, generator=stream(0)), "steps must be >= 1"),
        (
            lambda: trainer(mlp(G), sandwich(G)).fit(X, Y, steps=1, batch_size=201, generator=stream(0)),
            "batch_size must be from 1 to 200, got 201",
        ),
        (
            lambda: trainer(mlp(G), sandwich(G)).fit(X, Y, steps=1, generator=[stream(0)] * 2),
            "generator must be one a copy",
        ),
        (lambda: trainer(mlp(G), sandwich(layered_graph(4, 3))).step(X, Y), "edges of the supernet only"),
        (
            lambda: trainer(mlp(G), sandwich(G)).fit(X, Y.repeat(2), steps=1, generator=stream(0)),
            "y must hold one label",
        ),
        (lambda: anytime_accuracy(mlp(G), G.adjacency[None], X, Y, chunk=0), "chunk must be >= 1"),
    ],
)
def test_bad_training(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_accuracy_counts_hits():
    net, subnetworks = mlp(G), sandwich(G)(5)
    found = anytime_accuracy(net, subnetworks, X, Y, chunk=2, batch_size=30)
    expected = [(loop_mlp(net, X, m).argmax(-1) == Y).double().mean() for m in torch.from_numpy(G.masks(subnetworks))]
    np.testing.assert_allclose(found, 100 * np.array([float(e) for e in expected]), rtol=1e-6)
    both = mlp(G, copies=2)
    assert anytime_accuracy(both, np.stack([subnetworks] * 2), X, Y).shape == (2, 5) and found.grad_fn is None


def test_a_net_that_has_diverged_is_never_right():
    net = mlp(G)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(torch.nan)
    assert anytime_accuracy(net, sandwich(G)(3), X, torch.zeros_like(Y)).tolist() == [0, 0, 0]


# ---------------------------------------------------------------- direction


def test_an_anchor_helps_small_subnetworks_and_largest_only_does_not():
    """Three supernets on digits: anchored sampling beats uniform sampling at the smallest budget."""
    digits = data.load("digits").split(237, seed=0)
    x, y, seeds, layout = digits.x_train.flatten(1), digits.y_train, range(3), layered_graph(4, 3)
    graphs = [layered_graph(4, 3, 0.6, min_edges=20, rng=s) for s in seeds]
    scores = [mean_scores(sandwich(g, s)) for s, g in zip(seeds, graphs, strict=True)]
    anchors = [most_important_path(g.adjacency, t) for g, t in zip(graphs, scores, strict=True)]

    def accuracy(samplers, anchors, T=4):
        net = DagMLP(layout, 64, copies=3, generator=[stream(s) for s in seeds])
        trainer(net, samplers, lr=5e-3, T=T).fit(x, y, steps=120, generator=[stream(s + 50) for s in seeds])
        tested = [
            candidate_subnetworks(g, 0.25, t, anchor=a, rng=s)
            for s, g, t, a in zip(seeds, graphs, scores, anchors, strict=True)
        ]
        return anytime_accuracy(net, np.stack(tested), digits.x_val.flatten(1), digits.y_val).mean(1)

    uniform = accuracy([sandwich(g, s) for s, g in zip(seeds, graphs, strict=True)], [None] * 3)
    held = [SandwichSampler(AnchoredSampler(g, a, rng=s)) for s, g, a in zip(seeds, graphs, anchors, strict=True)]
    assert (accuracy(held, anchors) > uniform + 5).all()
    assert (accuracy([JointSampler([g.adjacency]) for g in graphs], [None] * 3, T=1) < uniform - 5).all()
