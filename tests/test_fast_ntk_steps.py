"""The closed forms against exact ridge solutions and the official dual form; downdates; sequences of requests."""

import copy

import fast_ntk_oracles as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnb.unlearn import NTKUnlearner, ntk_delta, peft_parameters, retain_forget_split, solve_cost

FORMS = ["newton-diff", "golatkar", "newton", "influence"]
LAM = 0.05
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def problem(n=40, features=4, classes=2, seed=0):
    """A linear model away from ``w0``, data, and the split into retained and forgotten samples."""
    generator = torch.Generator().manual_seed(seed)
    model = oracle.Linear(features, classes, seed).eval()
    x = torch.randn(n, features, dtype=torch.float64, generator=generator)
    y = torch.randint(classes, (n,), generator=generator)
    init = copy.deepcopy(model)
    return model, init, (x, y), retain_forget_split(x, y, list(range(0, n, 5)))


def linear_solution(model, init, data, lam=LAM):
    names = peft_parameters(model, "all")
    return oracle.ridge_solution(model, names, oracle.vector(init, names), *data, lam, 2)


def unlearner(model, init, **options):
    return NTKUnlearner(model, "all", weight_decay=options.pop("lam", LAM), init_state=init, **options)


def fitted_linear(**options):
    model, init, data, parts = problem()
    oracle.set_vector(model, peft_parameters(model, "all"), linear_solution(model, init, data))
    return model, init, data, parts


# ------------------------------------------------------------ linear models: exact


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", ["final", "init"])
def test_every_form_is_exact_at_the_optimum_of_a_linear_model(form, at):
    model, init, data, (retain, forget) = fitted_linear()
    found = unlearner(model, init, form=form, at=at).fit(data).forget(forget)
    names = peft_parameters(model, "all")
    wanted = linear_solution(model, init, retain)
    if (form, at) == ("golatkar", "final"):
        assert (oracle.vector(found, names) - wanted).norm() > 1e-4  # see the test of the missing term
    else:
        torch.testing.assert_close(oracle.vector(found, names), wanted, **TIGHT)


def test_w0_plus_the_linear_step_is_the_ridge_solution():
    model, init, _, (retain, _) = problem()
    names = peft_parameters(model, "all")
    jac = oracle.jacobian(init, names, retain[0])
    r = oracle.residual(init(retain[0]), retain[1], "mse")
    step = oracle.official_step(jac, r, LAM)
    torch.testing.assert_close(oracle.vector(init, names) + step, linear_solution(model, init, retain), **TIGHT)
    ours = ntk_delta(jac[:0], r[:0], jac, r, LAM)
    torch.testing.assert_close(-ours, step, **TIGHT)


@pytest.mark.parametrize("at", ["final", "init"])
@pytest.mark.parametrize("seed", [1, 2])
def test_newton_is_exact_from_any_point(at, seed):
    model, init, data, (retain, forget) = problem()
    names = peft_parameters(model, "all")
    oracle.randomised(model, seed)
    found = unlearner(model, init, form="newton", at=at).fit(data).delta(forget)
    torch.testing.assert_close(found, linear_solution(model, init, retain) - oracle.vector(model, names), **TIGHT)


@pytest.mark.parametrize("at", ["final", "init"])
def test_newton_diff_is_the_difference_of_the_solutions_from_any_point(at):
    model, init, data, (retain, forget) = problem()
    oracle.randomised(model, 7)
    found = unlearner(model, init, at=at).fit(data).delta(forget)
    wanted = linear_solution(model, init, retain) - linear_solution(model, init, data)
    torch.testing.assert_close(found, wanted, **TIGHT)


def test_the_official_form_at_the_trained_weights_misses_the_stated_term():
    model, init, data, (retain, forget) = fitted_linear()
    names = peft_parameters(model, "all")
    w, w0 = oracle.vector(model, names), oracle.vector(init, names)
    found = unlearner(model, init, form="golatkar").fit(data).delta(forget)
    exact = linear_solution(model, init, retain) - w

    def inverse(part):
        jac = oracle.jacobian(model, names, part[0]).flatten(0, 1)
        return torch.linalg.inv(jac.T @ jac + len(part[0]) * LAM * torch.eye(len(w), dtype=torch.float64))

    n, n_r = len(data[0]), len(retain[0])
    term = LAM * (n_r * inverse(retain) - n * inverse(data)) @ (w - w0)
    torch.testing.assert_close(found - exact, term, rtol=1e-9, atol=1e-11)
    assert (found - exact).norm() > 0.01 * exact.norm()


def test_the_closed_form_is_where_gradient_descent_on_the_linearised_net_ends():
    model, (x, y) = oracle.convnet(), oracle.images(12)
    names, lam = peft_parameters(model, "bn+head"), 0.3
    jac = oracle.jacobian(model, names, x).flatten(0, 1)
    r = oracle.residual(model(x), y, "mse").flatten()
    curvature = jac.T @ jac / len(x)
    rate = 1 / (torch.linalg.eigvalsh(curvature)[-1] + lam)
    move = torch.zeros(jac.shape[1], dtype=torch.float64)
    for _ in range(6000):
        move -= rate * (jac.T @ (jac @ move + r) / len(x) + lam * move)
    options = {"weight_decay": lam, "init_state": model, "at": "init", "form": "golatkar"}
    found = NTKUnlearner(model, names, **options).fit((x, y)).delta((x, y))  # forget all: back to w0
    assert found.abs().max() == 0  # the model is still at w0
    empty = torch.zeros(0, 4, jac.shape[1])
    step = -ntk_delta(empty, torch.zeros(0, 4), jac.view(len(x), 4, -1), r.view(len(x), 4), lam)
    torch.testing.assert_close(step, move, rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------ primal, dual, block


def random_parts(n_r=5, n_f=3, k=2, p=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = [(n_r, k, p), (n_r, k), (n_f, k, p), (n_f, k)]
    return [torch.randn(*size, dtype=torch.float64, generator=g) for size in sizes]


def official_delta(jr, rr, jf, rf, lam):
    return oracle.official_step(jr, rr, lam) - oracle.official_step(torch.cat([jr, jf]), torch.cat([rr, rf]), lam)


@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 30), st.sampled_from([1e-3, 0.1, 5.0]))
def test_primal_and_dual_are_the_official_form(n_r, n_f, k, p, lam):
    parts = random_parts(n_r, n_f, k, p)
    if n_r == 0:
        wanted = -oracle.official_step(parts[2], parts[3], lam)
    else:
        wanted = official_delta(*parts, lam)
    for form in ("primal", "dual", "auto"):
        torch.testing.assert_close(ntk_delta(*parts, lam, form), wanted, rtol=1e-9, atol=1e-10)


def test_primal_is_dual_to_1e_10():
    parts = random_parts(30, 6, 3, 40)
    torch.testing.assert_close(ntk_delta(*parts, 0.1, "primal"), ntk_delta(*parts, 0.1, "dual"), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("p", [4, 40])
def test_block_form_is_form_1_with_a_common_ridge(p):
    parts = random_parts(p=p)
    block = ntk_delta(*parts, 0.1, "block", ridge=0.7)
    for form in ("primal", "dual", "auto"):
        torch.testing.assert_close(block, ntk_delta(*parts, 0.1, form, ridge=0.7), **TIGHT)
    torch.testing.assert_close(ntk_delta(*parts, 0.1, "block"), ntk_delta(*parts, 0.1, "block", ridge=0.8))
    assert (block - ntk_delta(*parts, 0.1)).norm() > 1e-3  # the ridges differ by the number of samples


def test_block_form_as_printed_with_its_sign():
    """The projection formula by explicit inverses; V with the opposite sign in front of r_f would be wrong."""
    jr, rr, jf, rf = random_parts()
    mu, rows = 0.7, [part.flatten(0, 1) for part in (jr, jf)]
    (a, b), eye = rows, lambda m: torch.eye(len(m), dtype=torch.float64)
    inverse = torch.linalg.inv(a @ a.T + mu * eye(a))
    projector = torch.eye(a.shape[1], dtype=torch.float64) - a.T @ inverse @ a
    schur = b @ b.T + mu * eye(b) - b @ a.T @ inverse @ a @ b.T
    v = rf.flatten() - b @ a.T @ inverse @ rr.flatten()
    wanted = projector @ b.T @ torch.linalg.inv(schur) @ v
    torch.testing.assert_close(ntk_delta(jr, rr, jf, rf, 0.1, "block", ridge=mu), wanted, **TIGHT)
    wrong = projector @ b.T @ torch.linalg.inv(schur) @ (v - 2 * rf.flatten())
    assert (wrong - wanted).norm() > 0.1


def test_the_ridge_counts_samples_not_outputs():
    jr, rr, jf, rf = random_parts()
    by_outputs = official_delta(jr, rr, jf, rf, 0.1 * jr.shape[1])
    assert (ntk_delta(jr, rr, jf, rf, 0.1) - by_outputs).norm() > 1e-3


@pytest.mark.parametrize("p", [4, 40])
def test_without_weight_decay_the_step_has_minimum_norm(p):
    jr, rr, jf, rf = random_parts(p=p)

    def least(jac, r):
        return -torch.linalg.lstsq(jac.flatten(0, 1), r.flatten()[:, None], driver="gelsd").solution[:, 0]

    wanted = least(jr, rr) - least(torch.cat([jr, jf]), torch.cat([rr, rf]))
    for form in ("primal", "dual", "auto"):
        torch.testing.assert_close(ntk_delta(jr, rr, jf, rf, 0.0, form), wanted, rtol=1e-7, atol=1e-9)


def test_limits_of_the_functional_form():
    jr, rr, jf, rf = random_parts()
    assert not ntk_delta(jr, rr, jf[:0], rf[:0], 0.1).any()
    assert not ntk_delta(jr, 0 * rr, jf, 0 * rf, 0.1).any()
    deltas = [ntk_delta(jr, rr, jf, rf, lam) for lam in (1e6, 1e7)]
    torch.testing.assert_close(deltas[0], 10 * deltas[1], rtol=1e-4, atol=0)  # like 1 / lam
    perm = torch.randperm(5)
    torch.testing.assert_close(ntk_delta(jr[perm], rr[perm], jf, rf, 0.1), ntk_delta(jr, rr, jf, rf, 0.1), **TIGHT)
    one = ntk_delta(jr[:, 0], rr[:, 0], jf[:, 0], rf[:, 0], 0.1)
    torch.testing.assert_close(one, ntk_delta(jr[:, :1], rr[:, :1], jf[:, :1], rf[:, :1], 0.1))
    assert one.dtype == ntk_delta(jr.float(), rr.float(), jf.float(), rf.float(), 0.1).dtype == torch.float64


def test_float64_sums_keep_what_float32_loses():
    """A float32 Gram matrix with a small ridge loses the solution: why everything is cast first."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 30, generator=g))[0]
    jac = (torch.randn(60, 30, generator=g) * torch.logspace(0, -4, 30)) @ basis
    r = torch.randn(60, generator=g)
    exact = ntk_delta(jac[:0, None], r[:0, None], jac[:, None], r[:, None], 1e-10)
    gram = (jac.T @ jac).double() + 60e-10 * torch.eye(30)
    rough = torch.linalg.solve(gram, (jac.T @ r).double())
    assert (rough - exact).norm() > 0.1 * exact.norm()


def test_costs_of_the_two_sides():
    assert solve_cost(300, 10, 506).macs == pytest.approx(8e8, rel=0.05)
    full = solve_cost(300, 10, 15_554, "dual")
    assert full.macs == pytest.approx(1.5e11, rel=0.05)
    assert full.macs / solve_cost(300, 10, 506).macs >= 100
    assert full.jacobian_bytes / solve_cost(300, 10, 506).jacobian_bytes >= 20
    large = solve_cost(5000, 10, 506, "dual")
    assert large.matrix_bytes == pytest.approx(20e9) and large.macs == pytest.approx(4.3e13, rel=0.02)


def test_weight_decay_towards_zero_would_be_another_solution():
    model, init, data, (_, forget) = fitted_linear()
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    right = unlearner(model, init, form="newton").fit(data).delta(forget)
    wrong = unlearner(model, zeros, form="newton").fit(data).delta(forget)
    assert (right - wrong).norm() > 0.05 * right.norm()
