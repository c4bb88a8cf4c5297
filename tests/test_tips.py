"""The chain and its paths: closed forms, slow oracles, limits, and every input that must be refused."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from tips_oracles import all_paths, best_path, dags, slow_chain, slow_pruned

from effnb import anytime
from effnb.anytime import (
    SuperGraph,
    anchor_path,
    hyper_adjacency,
    layered_graph,
    most_important_path,
    path_score,
    prune_to_terminals,
    stationary_distribution,
    topological_scores,
    transition_matrix,
    visit_probabilities,
)
from effnb.anytime.tips import graph, sampling, scores, training

DIAMOND = np.array([[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
CHAIN = np.eye(4, k=1, dtype=int)


def complete(n):
    return np.triu(np.ones((n, n), int), 1)


lams = st.floats(0.01, 100)
closures = st.sampled_from(["cyclic", "symmetric"])


@st.composite
def families(draw, most=7):
    """One to four subnetworks of the same size."""
    first = draw(dags(most=most))
    n = len(first)
    others = draw(st.lists(dags(least=n, most=n), max_size=3))
    return [first, *others]


# ---------------------------------------------------------------- where things stand


def test_the_names_of_the_specification_are_public_and_stand_where_they_belong():
    for module, names in {
        scores: "hyper_adjacency stationary_distribution topological_scores TopologicalScores "
        "path_score most_important_path",
        graph: "SuperGraph sample_subgraph prune_to_terminals",
        sampling: "UniformSampler TIPSSampler JointSampler SandwichSampler",
        training: "AnytimeTrainer",
    }.items():
        for name in names.split():
            assert getattr(anytime, name).__module__ == module.__name__ and name in anytime.__all__


# ---------------------------------------------------------------- closed forms


@given(dags())
def test_one_subnetwork_cyclic_is_the_visit_law(a):
    """T = 1: pi is proportional to the probability that a pass goes through the node; no coupling enters."""
    visits = visit_probabilities(a)
    assert visits[0] == 1 and visits[-1] == pytest.approx(1, abs=1e-12)
    for lam in (0.0, 3.0):
        np.testing.assert_allclose(topological_scores([a], lam).tas, visits / visits.sum(), atol=1e-12)


@given(dags())
def test_one_subnetwork_symmetric_is_the_degree_law(a):
    pruned = prune_to_terminals(a)
    degree = pruned.sum(0) + pruned.sum(1)
    np.testing.assert_allclose(topological_scores([a], 0.0, "symmetric").tas, degree / degree.sum(), atol=1e-12)


@given(dags(), st.integers(1, 5), lams)
def test_equal_subnetworks_have_a_closed_form(a, T, lam):
    """TAS is proportional to N_v (1 + lam (T - 1) / o_v), the return edge counted in the output's degree."""
    pruned = prune_to_terminals(a)
    degree = np.maximum(pruned.sum(1), 1)
    expected = visit_probabilities(a) * (1 + lam * (T - 1) / degree)
    np.testing.assert_allclose(topological_scores([a] * T, lam).tas, expected / expected.sum(), atol=1e-12)


def test_the_coupling_alone_favours_nodes_with_few_operations():
    a = layered_graph(3, 3, rng=0).adjacency
    visits, degree = visit_probabilities(a), np.maximum(a.sum(1), 1)
    for lam, law in ((1e-6, visits), (1e7, visits / degree)):
        np.testing.assert_allclose(topological_scores([a] * 4, lam).tas, law / law.sum(), atol=1e-5)


@given(families(), closures)
def test_strong_coupling_makes_copies_equal_and_lone_nodes_vanish(adjs, closure):
    found = topological_scores(adjs, 1e6, closure)
    for v in range(len(adjs[0])):
        copies = found.pi[found.present[:, v], v]
        if len(copies) > 1:
            np.testing.assert_allclose(copies, copies[0], rtol=1e-3)
    lone = found.present.sum(0) == 1
    if len(adjs) > 1:
        assert found.tas[lone].sum() < 1e-4


# ---------------------------------------------------------------- the matrix and its law


@given(families(), lams, closures)
def test_transition_matrix_is_that_of_the_slow_chain(adjs, lam, closure):
    H, present = hyper_adjacency(adjs, lam, closure)
    states, P = slow_chain(adjs, lam, closure)
    assert [tuple(s) for s in np.argwhere(present)] == states  # absent states are gone, in this order
    found = transition_matrix(H, present)
    np.testing.assert_allclose(found, P, atol=1e-12)
    assert (found >= 0).all() and not found.diagonal().any()  # no absorbing self-loops
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    assert sparse.csgraph.connected_components(sparse.csr_array(P), connection="strong")[0] == 1


@given(families(), st.floats(0.1, 10), closures)
def test_the_law_is_stationary_and_the_lazy_chain_has_the_same(adjs, lam, closure):
    found = topological_scores(adjs, lam, closure)
    P = transition_matrix(*hyper_adjacency(adjs, lam, closure))
    law = found.pi[found.present]
    np.testing.assert_allclose(law @ P, law, atol=1e-12)
    assert law.min() > 0 and law.sum() == pytest.approx(1) and not found.pi[~found.present].any()
    np.testing.assert_allclose(stationary_distribution(P, "lazy", tol=1e-14), law, atol=1e-9)
    np.testing.assert_allclose(topological_scores(adjs, lam, closure, method="lazy").tas, found.tas, atol=1e-9)
    np.testing.assert_allclose(found.tas, found.pi.sum(0))


def test_power_iteration_oscillates_with_the_period_of_the_layers():
    """All passes through L layers have L + 2 steps: P returns to the input after exactly that many."""
    layers = 3
    P = transition_matrix(*hyper_adjacency([layered_graph(layers, 2).adjacency], 0.0))
    returns = [np.linalg.matrix_power(P, k)[0, 0] for k in range(1, 2 * (layers + 2) + 1)]
    assert [k for k, r in enumerate(returns, start=1) if r > 0] == [layers + 2, 2 * (layers + 2)]
    law, start = stationary_distribution(P), np.eye(len(P))[0]
    assert np.abs(start @ np.linalg.matrix_power(P, 1000) - law).max() > 0.1
    lazy = (np.eye(len(P)) + P) / 2
    assert np.abs(start @ np.linalg.matrix_power(lazy, 1000) - law).max() < 1e-12


def test_a_long_walk_spends_its_time_as_the_law_says():
    rng = np.random.default_rng(0)
    adjs = [layered_graph(3, 3, 0.6, rng=k).adjacency for k in range(3)]
    P = transition_matrix(*hyper_adjacency(adjs, 1.0))
    law, cumulative = stationary_distribution(P), P.cumsum(1)
    counts, state = np.zeros(len(P)), 0
    for u in rng.random(100_000):
        state = int(np.searchsorted(cumulative[state], u))
        counts[state] += 1
    assert np.abs(counts / counts.sum() - law).max() < 2e-2


@pytest.mark.parametrize("closure", ["cyclic", "symmetric"])
def test_sparse_and_dense_solves_agree(closure, monkeypatch):
    adjs = [layered_graph(6, 4, 0.6, rng=k).adjacency for k in range(4)]
    dense = topological_scores(adjs, 0.7, closure)
    H, present = hyper_adjacency(adjs, 0.7, closure)
    S, _ = hyper_adjacency(adjs, 0.7, closure, sparse_output=True)
    np.testing.assert_array_equal(S.toarray(), H)
    monkeypatch.setattr(scores, "DENSE_LIMIT", 10)
    assert sparse.issparse(hyper_adjacency(adjs, 0.7, closure, sparse_output=None)[0])
    np.testing.assert_allclose(topological_scores(adjs, 0.7, closure).pi, dense.pi, atol=1e-13)
    P = transition_matrix(S, present)
    assert sparse.issparse(P)
    np.testing.assert_allclose(stationary_distribution(P), dense.pi[present], atol=1e-13)
    np.testing.assert_allclose(stationary_distribution(P.toarray()), dense.pi[present], atol=1e-13)
    np.testing.assert_allclose(stationary_distribution(P, "lazy"), dense.pi[present], atol=1e-9)


def test_more_than_2000_states_are_solved_sparsely():
    adjs = [layered_graph(20, 13, 0.3, rng=k).adjacency for k in range(8)]
    found = topological_scores(adjs)
    assert found.present.sum() > 2000
    P = transition_matrix(*hyper_adjacency(adjs, 1.0, sparse_output=True))
    law = found.pi[found.present]
    assert np.abs(law @ P - law).max() < 1e-14


def test_per_block_is_the_mean_of_the_single_chains():
    adjs = [DIAMOND, CHAIN]
    found = topological_scores(adjs, 0.0, method="per-block")
    np.testing.assert_allclose(found.tas, (topological_scores([DIAMOND]).tas + topological_scores([CHAIN]).tas) / 2)
    np.testing.assert_allclose(found.pi.sum(1), 0.5)


@given(families(), lams, st.data())
def test_relabelling_permutes_the_scores(adjs, lam, data):
    """Any order of the nodes that is again topological for all subnetworks."""
    n, union = len(adjs[0]), sum(np.asarray(a) for a in adjs) > 0
    order, left = [], set(range(1, n - 1))
    while left:
        free = sorted(v for v in left if not any(union[u, v] for u in left))
        order.append(data.draw(st.sampled_from(free)))
        left.remove(order[-1])
    order = [0, *order, n - 1]
    moved = [np.asarray(a)[np.ix_(order, order)] for a in adjs]
    np.testing.assert_allclose(topological_scores(moved, lam).tas, topological_scores(adjs, lam).tas[order], atol=1e-12)


@given(families(), lams, closures)
def test_dead_ends_change_nothing(adjs, lam, closure):
    """Nodes off all paths are pruned first, whatever edges they have."""
    pruned = [slow_pruned(a) for a in adjs]
    np.testing.assert_array_equal([prune_to_terminals(a) for a in adjs], pruned)
    assert topological_scores(adjs, lam, closure).tas.tolist() == topological_scores(pruned, lam, closure).tas.tolist()


def test_inputs_of_any_binary_kind_and_none_is_changed():
    adjs = [DIAMOND.astype(bool), DIAMOND.astype(float), torch.tensor(DIAMOND)]
    before = [np.asarray(a).copy() for a in adjs]
    tas = [topological_scores([a]).tas for a in adjs]
    assert all((t == tas[0]).all() for t in tas)
    assert all((np.asarray(a) == b).all() for a, b in zip(adjs, before, strict=True))
    assert prune_to_terminals(adjs[0]).dtype == bool and prune_to_terminals(adjs[1]).dtype == float


# ---------------------------------------------------------------- paths


@settings(max_examples=300)
@given(dags(most=8), st.data(), st.sampled_from(["sum", "mean"]))
def test_the_path_is_the_first_of_the_best(a, data, reduction):
    """Small integers make ties common; the enumeration breaks them by order."""
    scores = data.draw(st.lists(st.integers(-3, 3), min_size=len(a), max_size=len(a)))
    assert most_important_path(a, scores, reduction) == best_path(a, scores, reduction)


@given(families(), lams, st.sampled_from(["sum", "mean"]))
def test_the_path_of_real_scores_is_optimal(adjs, lam, reduction):
    a, tas = adjs[0], topological_scores(adjs, lam).tas
    path = most_important_path(a, tas, reduction)
    best = max(path_score(tas, p, reduction) for p in all_paths(a))
    assert path in list(all_paths(a)) and path_score(tas, path, reduction) >= best - 1e-10


def test_ten_nodes_against_brute_force():
    rng = np.random.default_rng(1)
    for _ in range(20):
        a = np.triu(rng.random((10, 10)) < 0.6, 1)
        a[0, 1] = a[8, 9] = a[0, 9] = True
        scores = rng.random(10)
        for reduction in ("sum", "mean"):
            assert most_important_path(a, scores, reduction) == best_path(a, scores, reduction)


def test_noise_of_the_solver_does_not_decide_a_tie():
    scores = np.array([0.3, 0.2, 0.2 + 1e-16, 0.3])
    assert most_important_path(DIAMOND, scores) == [0, 1, 3]
    assert most_important_path(DIAMOND, [0.3, 0.2, 0.2 + 1e-9, 0.3]) == [0, 2, 3]


@given(families(), lams)
def test_the_sum_grows_with_the_nodes(adjs, lam):
    tas = topological_scores(adjs, lam).tas
    paths = list(all_paths(prune_to_terminals(adjs[0])))
    for p, q in itertools.permutations(paths[:12], 2):
        if set(p) < set(q):
            assert path_score(tas, q) > path_score(tas, p)


@given(st.integers(3, 9))
def test_the_complete_graph_elects_its_longest_path_unless_means_are_taken(n):
    tas = topological_scores([complete(n)] * 2).tas
    assert most_important_path(complete(n), tas) == list(range(n))
    if n > 3:  # the input and the output have the most mass
        assert most_important_path(complete(n), tas, "mean") == [0, n - 1]


def test_millions_of_paths_need_no_enumeration():
    big = layered_graph(18, 11, 0.6, rng=0)
    assert big.n == 200 and big.count_paths() > 10**14
    path = most_important_path(big.adjacency, np.arange(200.0))
    assert len(path) == 20 and set(itertools.pairwise(path)) <= set(big.edges)


def test_anchor_paths():
    g = SuperGraph(5, [(0, 1), (0, 2), (1, 3), (2, 3), (2, 4), (3, 4)])
    tas = np.array([0.2, 0.1, 0.15, 0.05, 0.5])
    assert anchor_path(g, "tips", tas=tas) == [0, 2, 3, 4]
    assert anchor_path(g, "tips", tas=tas, reduction="mean") == [0, 2, 4]
    assert anchor_path(g, "anti", tas=tas) == [0, 1, 3, 4]
    assert anchor_path(g, "degree") == [0, 2, 3, 4]
    assert anchor_path(g, "longest") == [0, 1, 3, 4]
    rng = np.random.default_rng(0)
    drawn = [tuple(anchor_path(g, "random", rng=rng)) for _ in range(3000)]
    counts = [drawn.count(tuple(p)) for p in g.paths()]
    assert sum(counts) == 3000 and max(counts) - min(counts) < 200  # uniform over the three paths


# ---------------------------------------------------------------- bad input

BAD_ADJACENCY = [
    (np.ones((2, 3)), "square"),
    (np.ones((1, 1)), "square"),
    (complete(3) * 2, "binary"),
    (complete(3) * np.nan, "binary"),
    (np.array([[0, 1, 1], [1, 0, 1], [0, 0, 0]]), r"acyclic.*0 -> 1 -> 0"),
    (np.array([[1, 1], [0, 0]]), r"acyclic.*0 -> 0"),
    (np.array([[0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]), r"topological order.*2 -> 1"),
    (np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]]), "path from node 0 to node 2"),
]


@pytest.mark.parametrize(("a", "message"), BAD_ADJACENCY)
def test_bad_matrices_are_refused_everywhere(a, message):
    for call in (
        prune_to_terminals,
        lambda m: hyper_adjacency([m], 1.0),
        lambda m: topological_scores([m]),
        lambda m: most_important_path(m, np.ones(len(m))),
        visit_probabilities,
        SuperGraph.from_adjacency,
    ):
        with pytest.raises(ValueError, match=message):
            call(a)


def test_a_longer_cycle_is_named():
    a = np.zeros((6, 6), int)
    for i, j in [(0, 1), (1, 2), (2, 3), (3, 1), (3, 5), (0, 4)]:
        a[i, j] = 1
    with pytest.raises(ValueError, match="1 -> 2 -> 3 -> 1"):
        topological_scores([a])
    with pytest.raises(ValueError, match="1 -> 2 -> 3 -> 1"):
        SuperGraph(6, [(0, 1), (1, 2), (2, 3), (3, 1), (3, 5), (0, 4)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topological_scores([]), "at least one"),
        (lambda: hyper_adjacency([], 1.0), "at least one"),
        (lambda: topological_scores([complete(3), complete(4)]), "one size"),
        (lambda: topological_scores([DIAMOND], -0.1), "lam must be >= 0"),
        (lambda: topological_scores([DIAMOND], float("nan")), "lam must be >= 0"),
        (lambda: topological_scores([DIAMOND] * 2, 0.0), "lam must be > 0"),
        (lambda: hyper_adjacency([DIAMOND] * 2, 0.0), "lam must be > 0"),
        (lambda: topological_scores([DIAMOND] * 2, 1.0, method="per-block"), "lam must be 0"),
        (lambda: topological_scores([DIAMOND], closure="open"), "closure must be"),
        (lambda: topological_scores([DIAMOND], method="power"), "method must be"),
        (lambda: stationary_distribution(np.eye(2)), "irreducible, got 2 classes"),
        (lambda: stationary_distribution(np.ones((2, 2))), "rows that sum to 1"),
        (lambda: stationary_distribution(np.array([[-0.5, 1.5], [0.5, 0.5]])), "entries >= 0"),
        (lambda: stationary_distribution(np.ones((1, 2)) / 2), "square"),
        (lambda: stationary_distribution(np.ones((2, 2)) / 2, "power"), "method must be"),
        (lambda: transition_matrix(np.eye(3), np.ones((1, 2), bool)), "one entry a state"),
        (lambda: transition_matrix(np.zeros((2, 2)), np.ones((1, 2), bool)), "way out"),
        (lambda: path_score(np.ones(3), []), "distinct nodes"),
        (lambda: path_score(np.ones(3), [0, 3]), "distinct nodes"),
        (lambda: path_score(np.ones(3), [0, 0]), "distinct nodes"),
        (lambda: path_score(np.ones(3), [0], "max"), "reduction must be"),
        (lambda: most_important_path(DIAMOND, np.ones(4), "max"), "reduction must be"),
        (lambda: most_important_path(DIAMOND, np.ones(3)), "one finite score a node"),
        (lambda: most_important_path(DIAMOND, [1, np.nan, 1, 1]), "one finite score a node"),
        (lambda: anchor_path(SuperGraph(2, [(0, 1)]), "best"), "kind must be"),
        (lambda: anchor_path(SuperGraph(2, [(0, 1)]), "tips"), "tas must be given"),
        (lambda: anchor_path(SuperGraph(2, [(0, 1)]), "random"), "rng must be given"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_lazy_chain_that_has_not_converged_says_so():
    with pytest.raises(RuntimeError, match="method='solve'"):
        stationary_distribution(transition_matrix(*hyper_adjacency([complete(6)], 0.0)), "lazy", max_iter=3)


def test_one_state_is_a_chain():
    assert stationary_distribution(np.ones((1, 1))).tolist() == [1.0]
