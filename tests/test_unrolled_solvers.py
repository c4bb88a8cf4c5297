"""Identities of the solvers: oracles, limits, laws that hold for every input."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.solvers import (
    ALISTA,
    LISTA,
    LISTACP,
    LISTACPSS,
    HyperLISTA,
    SparseProblem,
    TiLISTA,
    analytic_weights,
    fista,
    ista,
    mutual_coherence,
    nmse_db,
    omp,
    soft_threshold,
    support_least_squares,
    support_select,
)

F64 = torch.float64
quick = settings(max_examples=25, deadline=None)


def problem(m=30, n=60, **options):
    return SparseProblem(m, n, dtype=F64, **options)


# --- thresholds -------------------------------------------------------------------------------------------------

rows = hnp.arrays(np.float64, (3, 7), elements=st.floats(-5, 5, width=32))


def select_slowly(z, theta, p):
    """Support selection, entry by entry."""
    out = torch.empty_like(z)
    for i, row in enumerate(z):
        ranked = sorted((abs(float(v)) for v in row), reverse=True)
        tau = ranked[p - 1] if p else math.inf
        for j, v in enumerate(row.tolist()):
            keep = abs(v) >= tau and abs(v) >= theta
            out[i, j] = v if keep else math.copysign(max(abs(v) - theta, 0.0), v)
    return out


@quick
@given(rows, st.floats(0, 3), st.integers(0, 7))
def test_support_selection_against_loop(z, theta, p):
    z = torch.from_numpy(z)
    out = support_select(z, theta, p)
    assert torch.allclose(out, select_slowly(z, theta, p), atol=1e-12)
    soft = soft_threshold(z, theta)
    assert ((out != 0) <= (z.abs() >= theta)).all()
    assert ((out - z).abs() <= theta + 1e-12).all()
    assert torch.equal(support_select(z, theta, 0), soft)
    hard = torch.where(z.abs() >= theta, z, 0.0)
    assert torch.equal(support_select(z, theta, 7), hard)


def test_support_selection_per_instance_matches_single():
    z = torch.randn(4, 9, dtype=F64, generator=torch.Generator().manual_seed(0))
    theta, p = torch.tensor([0.1, 0.5, 0.9, 0.0], dtype=F64), torch.tensor([0, 2, 9, 3])
    together = support_select(z, theta, p)
    for i in range(4):
        assert torch.equal(together[i : i + 1], support_select(z[i : i + 1], float(theta[i]), int(p[i])))


def test_quantile_mode_is_the_official_one():
    z = torch.randn(5, 50, dtype=F64, generator=torch.Generator().manual_seed(1))
    for p in (0.0, 0.13, 0.5, 1.0):
        size = z.abs()
        tau = torch.quantile(size, 1 - p, dim=1, keepdim=True)
        expected = torch.where((size >= tau) & (size >= 0.2), z, soft_threshold(z, 0.2))
        assert torch.allclose(support_select(z, 0.2, p, mode="quantile"), expected, atol=1e-12)
    top = support_select(z, 0.2, 0.0, mode="quantile")
    assert ((top == z) & (z != 0)).sum(1).tolist() == [1] * 5  # the maximum passes even at p = 0
    strict = support_select(z, 0.2, 0.0, mode="quantile-strict")
    assert torch.equal(strict, soft_threshold(z, 0.2))


def test_selection_mask_carries_no_gradient_but_the_values_do():
    z = torch.tensor([[3.0, -2.0, 0.1]], dtype=F64, requires_grad=True)
    theta = torch.tensor(1.0, dtype=F64, requires_grad=True)
    support_select(z, theta, 1).sum().backward()
    assert z.grad.tolist() == [[1.0, 1.0, 0.0]]
    assert theta.grad.item() == 1.0  # only the soft-thresholded -2 depends on it


# --- classic solvers --------------------------------------------------------------------------------------------


def lasso_objective(A, b, x, lam):
    return (x @ A.T - b).square().sum(-1) / 2 + lam * x.abs().sum(-1)


def lasso_by_coordinates(A, b, lam, sweeps=4000):
    """Coordinate descent, one entry at a time."""
    x = torch.zeros(A.shape[1], dtype=F64)
    r = b.clone()
    for _ in range(sweeps):
        for j in range(A.shape[1]):
            a = A[:, j]
            rho = a @ r + x[j]
            new = torch.sign(rho) * max(abs(float(rho)) - lam, 0.0)
            r += a * (x[j] - new)
            x[j] = new
    return x


def test_ista_and_fista_reach_the_lasso_solution():
    problem_ = problem(8, 14, p=0.2)
    _, b = problem_.sample(2)
    expected = torch.stack([lasso_by_coordinates(problem_.A, row, 0.05, 400) for row in b])
    assert torch.allclose(ista(problem_.A, b, 0.05, 20000), expected, atol=1e-8)
    for options in ({}, {"restart": "gradient"}, {"continuation": 0.98}, {"restart": "gradient", "continuation": 0.9}):
        assert torch.allclose(fista(problem_.A, b, 0.05, 5000, **options), expected, atol=1e-7)


@quick
@given(st.integers(0, 1000), st.floats(0.01, 0.3))
def test_objective_gap_obeys_the_bounds(seed, lam):
    problem_ = problem(10, 20, p=0.2, seed=seed)
    A, (_, b) = problem_.A, problem_.sample(3)
    best = fista(A, b, lam, 3000, restart="gradient")
    lowest, radius = lasso_objective(A, b, best, lam), best.square().sum(1)
    L = torch.linalg.matrix_norm(A, 2) ** 2
    for k in (1, 5, 40):
        gap_ista = lasso_objective(A, b, ista(A, b, lam, k), lam) - lowest
        gap_fista = lasso_objective(A, b, fista(A, b, lam, k), lam) - lowest
        assert (gap_ista <= L * radius / (2 * k) + 1e-9).all()
        assert (gap_fista <= 2 * L * radius / (k + 1) ** 2 + 1e-9).all()


def test_one_step_of_fista_is_one_of_ista_and_gram_changes_nothing():
    problem_ = problem()
    _, b = problem_.sample(4)
    A = problem_.A
    assert torch.allclose(fista(A, b, 0.1, 1), ista(A, b, 0.1, 1), atol=1e-14)
    for solver in (ista, fista):
        plain = solver(A, b, 0.02, 50, gram=False)
        assert torch.allclose(solver(A, b, 0.02, 50, gram=True), plain, atol=1e-12)
        assert torch.allclose(solver(A, b, 0.02, 50, gram=A.T @ A), plain, atol=1e-12)


def test_restart_and_continuation_are_per_instance():
    problem_ = problem()
    _, b = problem_.sample(5)
    options = {"restart": "gradient", "continuation": 0.98}
    together = fista(problem_.A, b, 1e-3, 300, **options)
    alone = torch.cat([fista(problem_.A, row[None], 1e-3, 300, **options) for row in b])
    assert torch.allclose(together, alone, atol=1e-10)


def test_callback_counts_and_stops():
    seen = []
    fista(torch.eye(3), torch.ones(1, 3), 0.1, 50, callback=lambda k, x: seen.append(k) or k == 4)
    assert seen == [1, 2, 3, 4]


def omp_slowly(A, b, k):
    """Orthogonal matching pursuit with a fresh least squares each time."""
    support, r, x = [], b.clone(), torch.zeros(A.shape[1], dtype=F64)
    for _ in range(k):
        size = (A.T @ r).abs()
        size[support] = -1
        support.append(int(size.argmax()))
        values = torch.linalg.lstsq(A[:, support], b[:, None]).solution[:, 0]
        r = b - A[:, support] @ values
    x[support] = values
    return x


def test_omp_against_refitting_every_time():
    problem_ = problem(12, 25, p=0.3)
    _, b = problem_.sample(4)
    expected = torch.stack([omp_slowly(problem_.A, row, 6) for row in b])
    assert torch.allclose(omp(problem_.A, b, 6), expected, atol=1e-10)


def test_omp_is_exact_on_easy_problems_and_stops_there():
    problem_ = problem(60, 80, p=0.05)
    x, b = problem_.sample(20)
    assert nmse_db(omp(problem_.A, b, 30), x) < -200
    assert torch.equal(omp(problem_.A, torch.zeros(2, 60, dtype=F64), 5), torch.zeros(2, 80, dtype=F64))


def test_least_squares_on_the_true_support_recovers_exactly():
    problem_ = problem()
    x, b = problem_.sample(6)
    assert torch.allclose(support_least_squares(problem_.A, b, x != 0), x, atol=1e-10)


# --- networks at their start ------------------------------------------------------------------------------------


@pytest.mark.parametrize("Net", [LISTA, LISTACP])
@pytest.mark.parametrize("tied", [True, False])
def test_untrained_network_is_ista(Net, tied):
    problem_ = problem()
    _, b = problem_.sample(4)
    outputs = Net(problem_.A, layers=6, lam=0.1, tied=tied)(b, return_all=True)
    for k in range(6):
        assert torch.allclose(outputs[k], ista(problem_.A, b, 0.1, k + 1, gram=False), atol=1e-12)


def test_layers_match_their_formulas():
    problem_ = problem()
    A, (_, b) = problem_.A, problem_.sample(4)
    net = ALISTA(A, layers=3, lam=0.4)
    W, L = analytic_weights(A), float(torch.linalg.matrix_norm(A, 2)) ** 2
    x = torch.zeros(4, 60, dtype=F64)
    for k in range(3):
        x = support_select(x + (W.T @ (b - x @ A.T).T).T, 0.4 / L, math.floor(min(0.012 * (k + 1), 0.13) * 60 + 1e-9))
    assert torch.allclose(net(b), x, atol=1e-12)


def test_parameter_counts_are_the_papers():
    A = SparseProblem(250, 500).A
    counts = {
        LISTA: 4_125_016,
        LISTACP: 2_000_016,
        TiLISTA: 125_032,
        ALISTA: 32,
        HyperLISTA: 3,
    }
    for Net, count in counts.items():
        assert sum(p.numel() for p in Net(A).parameters()) == count
    assert sum(p.numel() for p in LISTACPSS(A, tied=True).parameters()) == 125_016
    with_support = LISTA(A, select=(0.012, 0.13)).counts  # LISTA-SS
    assert with_support == LISTACPSS(A, tied=True).counts == [min(6 * (k + 1), 65) for k in range(16)]


# --- analytic weights -------------------------------------------------------------------------------------------


def test_closed_form_weights_against_projected_gradient():
    A = problem(10, 18).A
    slow = analytic_weights(A, method="pgd", step=0.05, steps=20000)
    assert torch.allclose(analytic_weights(A), slow, atol=1e-8)


def frame_by_descent(A, steps=60):
    """min over G of ||A^T G^T G A - I||^2 with unit columns of GA: penalty, driven up (as the official MATLAB)."""
    m, n = A.shape
    G = torch.eye(m, dtype=F64, requires_grad=True)
    dual = torch.zeros(n, dtype=F64)
    for _ in range(steps):
        optimizer = torch.optim.LBFGS(
            [G], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def loss():
            optimizer.zero_grad()  # noqa: B023
            cross = A.T @ G.T @ G @ A
            gap = cross.diagonal() - 1
            value = (cross - torch.eye(n, dtype=F64)).square().sum() + dual @ gap + 50 * gap.square().sum()  # noqa: B023
            value.backward()
            return value

        optimizer.step(loss)
        dual = dual + 100 * ((A.T @ G.T @ G @ A).diagonal() - 1).detach()
    return (G.T @ G @ A).detach()


def test_symmetric_closed_form_against_descent_on_the_frame():
    A = problem(8, 14).A
    assert torch.allclose(analytic_weights(A, symmetric=True), frame_by_descent(A), atol=1e-5)


@quick
@given(st.integers(0, 10_000), st.sampled_from([(6, 10), (9, 12), (12, 30)]))
def test_laws_of_the_analytic_weights(seed, shape):
    A = problem(*shape, seed=seed).A
    m, n = A.shape
    H = A @ A.T
    K = A.T @ torch.linalg.solve(H, A)
    assert torch.allclose(K @ K, K, atol=1e-10)
    assert torch.linalg.matrix_rank(K) == m
    W = analytic_weights(A)
    cross = W.T @ A
    assert torch.allclose(cross.diagonal(), torch.ones(n, dtype=F64), atol=1e-12)
    off = (cross - torch.eye(n, dtype=F64)).square().sum()
    assert off >= n * n / m - n - 1e-9  # Welch
    HW = H @ W
    assert torch.allclose(HW / HW.norm(dim=0), A, atol=1e-10)  # KKT: H w_j parallel to a_j
    change = torch.randn(m, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    change -= (change * A).sum(0) * A
    worse = ((W + 1e-3 * change).T @ A - torch.eye(n, dtype=F64)).square().sum()
    assert worse > off


@quick
@given(st.integers(0, 10_000))
def test_laws_of_the_symmetric_weights(seed):
    A = problem(12, 24, seed=seed).A
    W = analytic_weights(A, symmetric=True)
    cross = W.T @ A
    assert torch.allclose(cross, cross.T, atol=1e-10)
    assert torch.allclose(cross.diagonal(), torch.ones(24, dtype=F64), atol=1e-9)
    assert torch.linalg.eigvalsh(cross)[0] > -1e-9
    free = analytic_weights(A)
    assert cross.square().sum() >= (free.T @ A).square().sum() - 1e-9


def indefinite_dictionary():
    """A dictionary with two nearly equal columns for which the closed form has a negative eigenvalue."""
    g = torch.Generator().manual_seed(0)
    while True:
        A = torch.randn(3, 5, dtype=F64, generator=g)
        A[:, 1] = A[:, 0] + 0.1 * A[:, 1]
        A = A / A.norm(dim=0)
        P = torch.linalg.solve(A @ A.T, A)
        nu = torch.linalg.solve((A.T @ P).square(), torch.ones(5, dtype=F64))
        if torch.linalg.eigvalsh((P * nu) @ P.T)[0] < -0.1:
            return A


def test_symmetric_weights_fall_back_and_say_so():
    A = indefinite_dictionary()
    with pytest.warns(UserWarning, match="positive semidefinite"):
        W = analytic_weights(A, symmetric=True)
    cross = W.T @ A
    assert torch.allclose(cross, cross.T, atol=1e-9)
    assert torch.allclose(cross.diagonal(), torch.ones(5, dtype=F64), atol=1e-9)
    assert torch.linalg.eigvalsh(cross)[0] > -1e-3
    descent = frame_by_descent(A, 200)
    eye = torch.eye(5, dtype=F64)
    assert (cross - eye).square().sum() == pytest.approx(float((descent.T @ A - eye).square().sum()), rel=1e-5)


def test_objectives_at_the_papers_size():
    A = SparseProblem(250, 500, dtype=F64).A
    eye = torch.eye(500, dtype=F64)
    plain, free, symmetric = (
        float((W.T @ A - eye).square().sum()) for W in (A, analytic_weights(A), analytic_weights(A, symmetric=True))
    )
    assert 500 < free < symmetric < 505 < 990 < plain
    assert 0.15 < mutual_coherence(A, analytic_weights(A)) < 0.3
