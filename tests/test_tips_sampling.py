"""Supergraphs, random subnetworks, equal cost, budgets and samplers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tips_oracles import all_paths, dags, slow_pruned

from effnb.anytime import (
    AnchoredSampler,
    JointSampler,
    SandwichSampler,
    SuperGraph,
    TIPSSampler,
    UniformSampler,
    candidate_subnetworks,
    layered_graph,
    mean_scores,
    most_important_path,
    sample_masks,
    sample_subgraph,
    shares,
    topological_scores,
)
from effnb.anytime.tips.sampling import expected_share, fill_budget, matched_keep

G = layered_graph(4, 3, 0.6, min_edges=20, rng=0)
PATH = next(G.paths())


# ---------------------------------------------------------------- the graph


@given(dags())
def test_graph_and_matrix_are_one(a):
    graph = SuperGraph.from_adjacency(a)
    np.testing.assert_array_equal(graph.adjacency, a)
    assert graph.num_edges == a.sum() and graph.masks(a).all()
    assert list(graph.paths()) == list(all_paths(a)) and graph.count_paths() == len(list(graph.paths()))
    assert SuperGraph(graph.n, tuple(reversed(graph.edges))) == graph  # kept sorted


@given(dags(), st.data())
def test_pruning_many_masks_is_pruning_one_at_a_time(a, data):
    graph = SuperGraph.from_adjacency(a)
    bits = st.lists(st.booleans(), min_size=graph.num_edges, max_size=graph.num_edges)
    masks = np.array(data.draw(st.lists(bits, min_size=1, max_size=5)))
    np.testing.assert_array_equal(graph.matrices(graph.prune(masks)), [slow_pruned(m) for m in graph.matrices(masks)])


def test_layered_graphs_are_layered_seeded_and_whole():
    for seed in range(20):
        g = layered_graph(4, 3, 0.6, min_edges=20, rng=seed)
        assert g.num_edges >= 20 and (slow_pruned(g.adjacency) == g.adjacency).all()
        assert {len(p) for p in g.paths()} == {6}
    assert layered_graph(4, 3, 0.6, rng=3) == layered_graph(4, 3, 0.6, rng=3) != layered_graph(4, 3, 0.6, rng=4)
    assert layered_graph(1, 2).edges == ((0, 1), (0, 2), (1, 3), (2, 3))


@pytest.mark.parametrize(
    ("n", "edges", "message"),
    [
        (1, [], "n must be >= 2"),
        (3, [(0, 3)], "join nodes in 0..2"),
        (3, [(-1, 2)], "join nodes in 0..2"),
        (3, [(0, 2), (0, 2)], "distinct"),
        (3, [(0, 1)], "path from node 0 to node 2"),
        (3, [], "path from node 0 to node 2"),
        (4, [(0, 2), (2, 1), (1, 3)], "topological order"),
        (3, [(0, 1), (1, 0), (1, 2)], "cycle"),
    ],
)
def test_bad_graphs(n, edges, message):
    with pytest.raises(ValueError, match=message):
        SuperGraph(n, edges)


def test_bad_layouts_masks_and_paths():
    for call, message in (
        (lambda: layered_graph(0, 3), "layers must be >= 1, got 0"),
        (lambda: layered_graph(3, 0), "width must be >= 1, got 0"),
        (lambda: layered_graph(2, 2, 0.0), "p must be finite, > 0 and <= 1"),
        (lambda: layered_graph(2, 2, min_edges=9), "at most 8"),
        (lambda: layered_graph(3, 3, 0.01, min_edges=20, rng=0), "at least 20 edges"),
        (lambda: G.masks(np.ones((3, 3))), "must end in"),
        (lambda: G.masks(np.ones((14, 14))), "edges of the supernet only"),
        (lambda: G.path_edges([0, 13]), "path must lead"),
        (lambda: G.path_edges([]), "path must lead"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---------------------------------------------------------------- random subnetworks


@given(dags(), st.floats(0.3, 1.0), st.integers(0, 100))
def test_samples_are_pruned_subgraphs_and_repeat_with_the_seed(a, keep, seed):
    graph = SuperGraph.from_adjacency(a)
    found = sample_subgraph(graph, keep, rng=seed)
    assert (found <= a).all() and (slow_pruned(found) == found).all() and found.any()
    np.testing.assert_array_equal(found, sample_subgraph(graph, keep, rng=seed))
    path = graph.random_path(seed)
    held = sample_subgraph(graph, keep, anchor=path, rng=seed)
    assert held[path[:-1], path[1:]].all() and (slow_pruned(held) == held).all()


def test_rejection_keeps_the_conditional_law():
    """Kept with q, given that a path is left: compared with all 2^E masks."""
    graph, q = SuperGraph(4, [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]), 0.4
    masks = np.array([[bool(k >> e & 1) for e in range(5)] for k in range(32)])
    chance = np.prod(np.where(masks, q, 1 - q), axis=1)
    pruned = graph.prune(masks)
    law = {}
    for mask, p in zip(pruned, chance, strict=True):
        if mask.any():
            law[tuple(mask)] = law.get(tuple(mask), 0) + p
    drawn = [tuple(m) for m in sample_masks(graph, q, 20_000, rng=0)]
    total = sum(law.values())
    assert set(drawn) == set(law)
    for mask, p in law.items():
        assert drawn.count(mask) / 20_000 == pytest.approx(p / total, abs=0.02)


def test_the_global_generator_is_left_alone():
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    TIPSSampler(G, rng=0)(4)
    candidate_subnetworks(G, 0.5, np.ones(G.n), rng=0)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_anchored_samples_with_a_loose_anchor():
    masks = sample_masks(G, 0.9, 400, anchor=PATH, anchor_keep=0.5, rng=0)
    assert masks.any(1).all() and 0 < masks[:, G.path_edges(PATH)].all(1).mean() < 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_subgraph(G, 0.0, rng=0), r"keep must be in \(0, 1\]"),
        (lambda: sample_subgraph(G, 1.1, rng=0), "keep must be in"),
        (lambda: sample_subgraph(G, float("nan"), rng=0), "keep must be in"),
        (lambda: sample_subgraph(G, -0.1, anchor=PATH, rng=0), r"keep must be in \[0, 1\]"),
        (lambda: sample_subgraph(G, 0.5, anchor=[0, 13], rng=0), "path must lead"),
        (
            lambda: sample_subgraph(G, 0.5, anchor=PATH, anchor_keep=0.0, rng=0),
            "anchor_keep must be finite, > 0 and <= 1",
        ),
        (lambda: sample_masks(G, 0.5, 0, rng=0), "count must be >= 1"),
        (lambda: sample_subgraph(layered_graph(12, 1), 0.01, rng=0), "leave a path"),
        (lambda: UniformSampler(G, (), rng=0), "at least one"),
        (lambda: UniformSampler(G, (0.0,), rng=0), "keep must be in"),
        (lambda: AnchoredSampler(G, [0, 13], rng=0), "path must lead"),
        (lambda: matched_keep(G, 0.1, PATH, rng=0), "between the cost of the anchor"),
        (lambda: matched_keep(G, 1.1, PATH, rng=0), "between the cost of the anchor"),
        (lambda: SandwichSampler(UniformSampler(G, rng=0))(1), "T must be >= 2"),
        (lambda: JointSampler([]), "at least one"),
        (lambda: JointSampler([np.zeros((3, 3))]), "path from node 0"),
        (lambda: JointSampler([G.adjacency])(2), "T must be the number"),
        (lambda: mean_scores(UniformSampler(G, rng=0), blocks=0), "blocks must be >= 1"),
        (
            lambda: fill_budget(G, 0.2, [PATH], np.ones((1, G.num_edges))),
            "budget must lie between the cost of its path",
        ),
        (lambda: fill_budget(G, 1.1, [PATH], np.ones((1, G.num_edges))), "budget must lie"),
        (lambda: fill_budget(G, 0.5, [PATH], np.ones(3)), "priority must have shape"),
        (lambda: fill_budget(G, 0.5, [PATH], np.full((1, G.num_edges), np.nan)), "no nan"),
        (lambda: UniformSampler(G, rng=0)(-1), "T must be >= 0, got -1"),
        (lambda: fill_budget(G, 0.5, [[0, 13]], np.ones((1, G.num_edges))), "path must lead"),
        (lambda: candidate_subnetworks(G, 0.1, np.ones(G.n), rng=0), "budget must lie"),
        (lambda: candidate_subnetworks(G, 0.5, np.ones(3), rng=0), "tas must hold 14 scores"),
        (lambda: candidate_subnetworks(G, 0.5, np.ones(G.n), k=0, rng=0), "k must be >= 1"),
        (lambda: shares(G, np.ones(G.num_edges), np.zeros(G.num_edges)), "positive numbers"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_generators_of_torch_serve_too():
    drawn = [UniformSampler(G, 0.5, rng=torch.Generator().manual_seed(k))(5) for k in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
    stream = torch.Generator().manual_seed(0)
    assert (sample_subgraph(G, 0.5, rng=stream) != sample_subgraph(G, 0.5, rng=stream)).any()


def test_no_seed_is_refused():
    for call in (
        lambda: sample_subgraph(G, 0.5, rng=None),
        lambda: UniformSampler(G, rng=None),
        lambda: TIPSSampler(G, rng=None),
    ):
        with pytest.raises(TypeError, match="rng must be"):
            call()


# ---------------------------------------------------------------- equal cost


@pytest.mark.parametrize("weighted", [False, True])
def test_anchored_sampling_costs_what_uniform_sampling_costs(weighted):
    costs = np.where(G.ends[0] == 0, 4.0, 1.0) if weighted else None
    for keep in (0.25, 0.5, 0.75):
        uniform = expected_share(G, keep, costs=costs, draws=4000, rng=0)
        q = matched_keep(G, uniform, PATH, costs=costs, draws=4000, rng=1)
        anchored = shares(G, sample_masks(G, q, 4000, anchor=PATH, rng=2), costs).mean()
        assert anchored == pytest.approx(uniform, abs=0.01) and q < keep
        unmatched = shares(G, sample_masks(G, keep, 4000, anchor=PATH, rng=2), costs).mean()
        assert unmatched > uniform  # what would make the comparison unfair


def test_a_sampler_matches_by_itself_unless_told_not_to():
    assert AnchoredSampler(G, PATH, (0.5,), rng=0).keeps[0] < 0.5
    assert AnchoredSampler(G, PATH, (0.5,), match=False, rng=0).keeps[0] == 0.5


def test_shares():
    assert shares(G, G.masks(G.adjacency)) == pytest.approx(1)
    assert shares(G, G.path_edges(PATH)) == pytest.approx(5 / G.num_edges)


# ---------------------------------------------------------------- budgets


@given(st.integers(0, 50), st.floats(0.25, 1.0))
def test_candidates_stay_within_the_budget_and_cannot_grow(seed, budget):
    g = layered_graph(4, 3, 0.6, min_edges=20, rng=seed)
    tas = mean_scores(SandwichSampler(UniformSampler(g, rng=seed)), blocks=2)
    anchor = most_important_path(g.adjacency, tas)
    found = candidate_subnetworks(g, budget, tas, anchor=anchor, k=4, rng=seed)
    masks = g.masks(found)
    assert masks.shape == (4, g.num_edges) and masks[:, g.path_edges(anchor)].all()
    assert (shares(g, masks) <= budget + 1e-9).all() and (g.prune(masks) == masks).all()
    for mask in masks:
        for e in np.flatnonzero(~mask):
            more = mask.copy()
            more[e] = True
            grown = g.prune(more[None])[0]
            assert (grown == mask).all() or shares(g, grown) > budget


def test_candidates_without_anchor_start_from_paths_of_their_own():
    found = candidate_subnetworks(G, 5 / G.num_edges, np.ones(G.n), k=8, rng=0)
    assert (found.sum((1, 2)) == 5).all() and len({m.tobytes() for m in found}) > 3


def test_the_first_candidate_is_greedy_by_the_scores_of_the_ends():
    g = SuperGraph(5, [(0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 4)])
    tas = np.array([1.0, 0.1, 0.2, 0.3, 1.0])
    (first,) = candidate_subnetworks(g, 4 / 6, tas, anchor=[0, 1, 4], k=1, rng=0)
    assert g.masks(first).tolist() == [True, False, True, True, False, True]  # the branch through node 3
    costs = np.array([1.0, 1.0, 9.0, 1.0, 1.0, 9.0])
    (first,) = candidate_subnetworks(g, 0.5, tas, anchor=[0, 1, 4], k=1, costs=costs, rng=0)
    assert g.masks(first).tolist() == [True, True, False, True, True, False]  # which is too dear here


def test_a_whole_budget_is_the_whole_supernet():
    assert (candidate_subnetworks(G, 1.0, np.ones(G.n), k=3, rng=0) == G.adjacency).all()


# ---------------------------------------------------------------- samplers


def test_uniform_sampler_is_seeded_and_draws_from_the_grid():
    a, b = (UniformSampler(G, (0.3, 1.0), rng=5) for _ in range(2))
    first = np.concatenate([a(3) for _ in range(100)])
    np.testing.assert_array_equal(first, np.concatenate([b(3) for _ in range(100)]))
    whole = (first == G.adjacency).all((1, 2)).mean()
    assert 0.4 < whole < 0.6
    assert a(1000).shape == (1000, 14, 14)  # more than the stock


def test_single_random_training_is_one_uniform_subnetwork():
    assert UniformSampler(G, rng=0)(1).shape == (1, 14, 14)


def test_sandwich_holds_the_largest_and_the_smallest():
    free = SandwichSampler(UniformSampler(G, rng=0))
    steps = [free(4) for _ in range(20)]
    assert all((s[0] == G.adjacency).all() and s[1].sum() == 5 for s in steps)
    assert len({s[1].tobytes() for s in steps}) > 5  # no fixed smallest path: it would be an anchor
    held = SandwichSampler(AnchoredSampler(G, PATH, rng=0))
    for s in (held(4) for _ in range(20)):
        assert (G.masks(s)[:, G.path_edges(PATH)]).all() and (G.masks(s[1]) == G.path_edges(PATH)).all()
    assert free(2).shape == (2, 14, 14)


def test_tips_sampler_holds_the_important_path():
    sampler = TIPSSampler(G, rng=0)
    assert sampler.anchor == most_important_path(G.adjacency, sampler.tas)
    assert G.masks(sampler(50))[:, G.path_edges(sampler.anchor)].all()
    assert sampler.tas.sum() == pytest.approx(1)
    anti = TIPSSampler(G, rng=0, reduction="mean", closure="symmetric", lam=10.0, T=2, blocks=3)
    assert anti.anchor in list(G.paths())


def test_tips_sampler_refreshes_its_scores():
    sampler = TIPSSampler(G, rng=0, refresh_every=3)
    first = sampler.tas
    sampler(2), sampler(2)
    assert sampler.tas is first
    sampler(2)
    assert sampler.tas is not first and np.abs(sampler.tas - first).max() < 0.05
    fixed = TIPSSampler(G, rng=0)
    before = fixed.tas
    for _ in range(10):
        fixed(2)
    assert fixed.tas is before


def test_joint_sampler_repeats_its_list():
    subnetworks = [G.adjacency, G.matrices(G.path_edges(PATH))]
    sampler = JointSampler(subnetworks)
    np.testing.assert_array_equal(sampler(2), subnetworks)
    np.testing.assert_array_equal(sampler(2), subnetworks)


def test_mean_scores_average_chains():
    sampler = JointSampler([G.adjacency] * 3)
    np.testing.assert_allclose(
        mean_scores(sampler, T=3, blocks=4, lam=2.0), topological_scores([G.adjacency] * 3, 2.0).tas
    )
