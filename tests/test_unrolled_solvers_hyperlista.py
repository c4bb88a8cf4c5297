"""HyperLISTA: the formula, the fast path, the invariances, tuning and training."""

import functools
import math

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
    SingleSolver,
    SparseProblem,
    TiLISTA,
    analytic_weights,
    mutual_coherence,
    nmse_db,
    recovery_score,
    soft_threshold,
    support_select,
    train_layerwise,
    tune_hyperlista,
)
from effnb.solvers.unrolled_solvers.hyperlista import FrozenSupport, select_in_place

F64 = torch.float64
quick = settings(max_examples=20, deadline=None)
C = (0.07, 0.016, 20.0)
LISTASS = functools.partial(LISTA, select=(0.012, 0.13))


def problem(m=40, n=80, **options):
    return SparseProblem(m, n, dtype=F64, **options)


def solve(A, b, **options):
    with torch.no_grad():
        return HyperLISTA(A, C, **options)(b, return_all=True)


def hyperlista_slowly(A, b, c, layers, symmetric):
    """The paper's formula, one instance at a time, with an explicit pseudo-inverse."""
    W, pinv, n = analytic_weights(A, symmetric), torch.linalg.pinv(A), A.shape[1]
    mu, outputs = mutual_coherence(A, W), []
    for row in b:
        x = old = torch.zeros(n, dtype=F64)
        for _ in range(layers):
            r = A @ x - row
            size, start = (pinv @ r).abs().sum(), (pinv @ row).abs().sum()
            p = int(min(max(c[2] * min(math.log(start / size), n), 0), n))
            z = x - W.T @ r + c[1] * mu * (x != 0).sum() * (x - old)
            old, x = x, support_select(z[None], float(c[0] * mu * size), p)[0]
        outputs.append(x)
    return torch.stack(outputs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_formula_readable_path_and_fast_path_agree(symmetric):
    problem_ = problem()
    _, b = problem_.sample(7)
    expected = hyperlista_slowly(problem_.A, b, C, 10, symmetric)
    net = HyperLISTA(problem_.A, C, 10, symmetric)
    readable = net(b)
    assert readable.requires_grad
    with torch.no_grad():
        fast = net(b)
    assert torch.allclose(readable, expected, atol=1e-9)
    assert torch.allclose(fast, expected, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("c", [C, (0.07, 0.016, 2.0), (0.0, 0.01, 5.0)])
def test_single_solver_equals_the_network(symmetric, c):
    problem_ = problem()
    _, b = problem_.sample(5)
    b[0] = 0
    scale = torch.linspace(0.5, 2, 80, dtype=F64)
    for A, options in ((problem_.A, {}), (problem_.A * scale, {"normalize": True})):
        net = HyperLISTA(A, c, 6, symmetric, **options)
        one_by_one = torch.stack([torch.as_tensor(SingleSolver(net)(row.numpy())) for row in b])
        assert torch.allclose(one_by_one, net(b), atol=1e-9)


@quick
@given(st.integers(0, 10_000))
def test_selection_kernel_equals_support_select(seed):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(6, 11, generator=g, dtype=F64)
    theta = torch.rand(6, 1, generator=g, dtype=F64)
    p = torch.randint(0, 12, (6, 1), generator=g)
    for counts in (p, torch.zeros_like(p), torch.full_like(p, 11)):
        fast = z.clone()
        nonzeros = select_in_place(fast, theta, counts, torch.empty_like(z), torch.empty_like(z))
        assert torch.allclose(fast, support_select(z, theta, counts), atol=1e-14)
        assert torch.equal(nonzeros.squeeze(1).long(), (fast != 0).sum(1))


@quick
@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.booleans())
def test_scale_and_sign_equivariance(seed, scale, symmetric):
    problem_ = problem(seed=seed)
    _, b = problem_.sample(3)
    base = solve(problem_.A, b, layers=6, symmetric=symmetric)
    assert torch.allclose(solve(problem_.A, scale * b, layers=6, symmetric=symmetric), scale * base, atol=1e-8 * scale)
    assert torch.allclose(solve(problem_.A, -b, layers=6, symmetric=symmetric), -base, atol=1e-10)


@quick
@given(st.integers(0, 1000), st.booleans())
def test_permutation_and_column_signs(seed, symmetric):
    problem_ = problem(seed=seed)
    A, (_, b) = problem_.A, problem_.sample(3)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(80, generator=g)
    signs = torch.where(torch.rand(80, generator=g) < 0.5, -1.0, 1.0).to(F64)
    base = solve(A, b, layers=6, symmetric=symmetric)
    assert torch.allclose(solve(A[:, order], b, layers=6, symmetric=symmetric), base[..., order], atol=1e-8)
    assert torch.allclose(solve(A * signs, b, layers=6, symmetric=symmetric), base * signs, atol=1e-8)


@quick
@given(st.integers(0, 1000), st.booleans())
def test_preconditioning_changes_nothing(seed, symmetric):
    """(T A, T b) gives the same iterates; T is orthogonal so that the columns keep their length."""
    problem_ = problem(seed=seed)
    A, (_, b) = problem_.A, problem_.sample(3)
    T = torch.linalg.qr(torch.randn(40, 40, dtype=F64, generator=torch.Generator().manual_seed(seed)))[0]
    base = solve(A, b, layers=6, symmetric=symmetric)
    assert torch.allclose(solve(T @ A, b @ T.T, layers=6, symmetric=symmetric), base, atol=1e-8)
    alista = ALISTA(A, layers=6)
    turned = ALISTA(T @ A, layers=6)
    assert torch.allclose(alista(b), turned(b @ T.T), atol=1e-8)


def test_general_preconditioning_of_weights_and_pseudo_inverse():
    """For any invertible T: W of T A is T^-T W, so W^T r and A^+ r stay; checked on the formulas themselves."""
    A = problem().A
    T = torch.eye(40, dtype=F64) + 0.1 * torch.randn(40, 40, dtype=F64, generator=torch.Generator().manual_seed(3))
    r = torch.randn(5, 40, dtype=F64, generator=torch.Generator().manual_seed(4))

    def closed(B):
        P = torch.linalg.solve(B @ B.T, B)
        return P / (B * P).sum(0)

    assert torch.allclose(r @ closed(A), (r @ T.T) @ closed(T @ A), atol=1e-8)
    assert torch.allclose(r @ torch.linalg.pinv(A).T, (r @ T.T) @ torch.linalg.pinv(T @ A).T, atol=1e-8)


def test_alista_is_not_scale_equivariant():
    problem_ = problem()
    _, b = problem_.sample(3)
    net = ALISTA(problem_.A, layers=6)
    assert not torch.allclose(net(5 * b), 5 * net(b), rtol=1e-2)


def check_first_threshold(net, b, norm):
    """With c2 = c3 = 0 the first layer is a soft threshold at c1 mu times the norm of A^+ b, on both paths."""
    expected = soft_threshold(b @ net.W, net.c[0].item() * net.mu * norm)
    assert expected.any() and (expected == 0).any()
    assert torch.allclose(net(b), expected, atol=1e-10)
    with torch.no_grad():
        assert torch.allclose(net(b), expected, atol=1e-10)


def test_pseudo_inverse_from_the_weights():
    """A^+ r = diag(K) * W^T r elementwise for the free closed form."""
    A = problem().A
    r = torch.randn(5, 40, dtype=F64, generator=torch.Generator().manual_seed(0))
    exact = (r @ torch.linalg.pinv(A).T).abs().sum(1, keepdim=True)
    net = HyperLISTA(A, C, symmetric=False)
    assert torch.allclose((r @ net.W * net.pinv_diagonal).abs().sum(1, keepdim=True), exact, atol=1e-10)
    for symmetric in (True, False):
        check_first_threshold(HyperLISTA(A, (0.07, 0, 0), 1, symmetric), r, exact)


@quick
@given(st.integers(0, 10_000), st.booleans())
def test_oracle_has_no_false_positives(seed, symmetric):
    """With theta = mu ||x - x*||_1 and no momentum the support never leaves the true one (the papers' lemma)."""
    problem_ = problem(seed=seed)
    x, b = problem_.sample(4)
    net = HyperLISTA(problem_.A, (1 + 1e-9, 0.0, 5.0), layers=8, symmetric=symmetric, oracle=True)
    for estimate in net(b, return_all=True, x_true=x):
        assert ((estimate != 0) <= (x != 0)).all()


def test_zero_measurements_give_zero():
    A = problem().A
    b = torch.zeros(3, 40, dtype=F64)
    b[1] = problem().sample(1)[1]
    for options in ({}, {"symmetric": False}, {"cg_after": 3}):
        net = HyperLISTA(A, C, **options)
        for x in (net(b), net(b).detach()):
            assert torch.isfinite(x).all()
            assert not x[[0, 2]].any() and x[1].any()
    with torch.no_grad():
        assert not HyperLISTA(A, C)(b)[[0, 2]].any()
    assert not HyperLISTA(A, C)(b[:0]).numel()


def test_conjugate_gradients_finish_the_job_and_repair_wrong_supports():
    problem_ = problem(250, 500)
    x, b = problem_.sample(24)
    with torch.no_grad():
        switched = HyperLISTA(problem_.A, (0.07, 0.0164, 388.0), 50, cg_after=8)(b)
        plain = HyperLISTA(problem_.A, (0.07, 0.0164, 388.0), 24)(b)
    assert nmse_db(switched, x, "instance").median() < -250  # rounding level: conjugate gradients end
    assert nmse_db(switched, x) < nmse_db(plain, x)


def test_conjugate_gradients_are_those_of_the_textbook():
    problem_ = problem()
    A, (x, b) = problem_.A, problem_.sample(1)
    state, S = FrozenSupport(A, b, patience=1), (x != 0)[0]
    estimate = torch.where(x != 0, 0.1, 0.0).to(F64)
    assert torch.equal(state.advance(estimate, estimate, may_freeze=True), estimate)  # stood still once: frozen
    assert state.frozen.all()
    inner, y = A[:, S], torch.full((int(S.sum()),), 0.1, dtype=F64)
    r = inner.T @ (b[0] - inner @ y)
    d = r.clone()
    for _ in range(3):
        length = (r @ r) / (d @ (inner.T @ (inner @ d)))
        y, new = y + length * d, r - length * (inner.T @ (inner @ d))
        d, r = new + (new @ new) / (r @ r) * d, new
        estimate = state.advance(estimate, estimate, may_freeze=True)
        assert torch.allclose(estimate[0, S], y, atol=1e-10)


def test_layers_are_a_prefix_and_return_all_stacks():
    problem_ = problem()
    _, b = problem_.sample(3)
    for net in (HyperLISTA(problem_.A, C, 5), LISTACPSS(problem_.A, 5), LISTA(problem_.A, 5)):
        outputs = net(b, return_all=True)
        assert outputs.shape == (5, 3, 80)
        assert torch.equal(net(b, n_layers=3), outputs[2])
        assert not net(b, n_layers=0).any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (F64, 1e-10)])
def test_normalize_rescales_back(dtype, tolerance):
    problem_ = SparseProblem(40, 80, dtype=dtype)
    A, (_, b) = problem_.A, problem_.sample(3)
    scale = torch.linspace(0.5, 2, 80, dtype=dtype)
    for Net in (HyperLISTA, LISTA, LISTACP, LISTASS, TiLISTA, ALISTA):
        plain, scaled = Net(A, layers=5), Net(A * scale, layers=5, normalize=True)
        assert torch.allclose(scaled(b), plain(b) / scale, atol=tolerance * 10)


@pytest.mark.parametrize("Net", [HyperLISTA, LISTA, LISTACP, LISTASS, LISTACPSS, TiLISTA, ALISTA])
def test_state_dict_round_trip(Net):
    problem_ = problem()
    _, b = problem_.sample(3)
    net, other = Net(problem_.A, layers=4), Net(problem(seed=1).A, layers=4)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.01)
    missing = other.load_state_dict(net.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    if Net is not HyperLISTA:
        assert torch.equal(other(b), net(b))


def test_official_variant_of_the_residual_norm():
    A = problem().A
    _, b = problem().sample(3)
    net = HyperLISTA(A, (0.07, 0, 0), 1, pinv_of="transformed")
    M = net.W @ torch.linalg.pinv(A)  # W = M A and A A^+ = I
    values, vectors = torch.linalg.eigh((M + M.T) / 2)
    G = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    expected = (torch.linalg.pinv(A) @ G @ b.T).T.abs().sum(1, keepdim=True)
    check_first_threshold(net, b, expected)


# --- tuning and training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random", "grid", "backprop"])
def test_tuning_finds_good_numbers(method):
    problem_ = SparseProblem(50, 100, p=0.06)
    x, b = problem_.sample(64, "tune")
    result = tune_hyperlista(problem_.A, x, b, method, n_trials=64, local_trials=20, layers=10, score="robust")
    again = tune_hyperlista(problem_.A, x, b, method, n_trials=64, local_trials=20, layers=10, score="robust")
    assert result == again
    assert (*result.c, result.score) in result.trials
    x, b = problem_.sample(64, "test")
    assert recovery_score(HyperLISTA(problem_.A, result.c, 10)(b).detach(), x) < -15


def test_recovery_scores():
    x = torch.ones(200, 4)
    estimate = x.clone()
    estimate[0] = 100.0
    assert recovery_score(estimate, x, "nmse") > 10
    assert recovery_score(estimate, x, "robust") == pytest.approx((-100 * 199 + 20) / 200, abs=1e-3)
    assert recovery_score(estimate, x, "p99") == -100


@pytest.mark.parametrize("Net", [LISTA, LISTACP, LISTASS, LISTACPSS, TiLISTA, ALISTA])
def test_layerwise_training_helps(Net):
    problem_ = SparseProblem(25, 50)
    net = Net(problem_.A, layers=3)
    x, b = problem_.sample(200, "validation")
    with torch.no_grad():
        before = nmse_db(net(b), x)
    losses = train_layerwise(net, problem_.sample, ((30, 1.0), (10, 0.2)), lr=5e-3, validation=(x, b))
    with torch.no_grad():
        assert nmse_db(net(b), x) < before
    assert len(losses) == 3
    assert all(p.grad is None for p in net.parameters())


def test_first_stage_leaves_earlier_layers_alone():
    problem_ = SparseProblem(25, 50)
    net = LISTACP(problem_.A, layers=2)
    seen = {}
    train_layerwise(net, problem_.sample, ((0, 1.0),), lr=1e-3)
    before = net.W[0].detach().clone()

    def sampler(batch):
        seen["calls"] = seen.get("calls", 0) + 1
        if seen["calls"] == 6:  # first step of layer 1
            seen["first"] = net.W[0].detach().clone()
        return problem_.sample(batch)

    train_layerwise(net, sampler, ((5, 1.0),), lr=1e-3)
    assert not torch.equal(seen["first"], before)
    assert torch.equal(net.W[0], seen["first"]) and not torch.equal(net.W[1], net.W[0])


def test_readout_is_trained_on_the_signal():
    problem_ = SparseProblem(25, 50)
    D = torch.nn.Linear(50, 30, bias=False)
    start = D.weight.detach().clone()

    def sampler(batch):
        x, b = problem_.sample(batch)
        return x @ start.T, b

    train_layerwise(LISTACPSS(problem_.A, layers=2, tied=True), sampler, ((10, 1.0),), readout=D)
    assert not torch.equal(D.weight, start)


def test_nothing_touches_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    problem_ = SparseProblem(20, 40, snr=20, cond=5)
    x, b = problem_.sample(16)
    tune_hyperlista(problem_.A, x, b, n_trials=5, local_trials=2)
    train_layerwise(ALISTA(problem_.A, 2), problem_.sample, ((3, 1.0),))
    assert torch.equal(before, torch.get_rng_state())
