"""The closed forms against exact ridge solutions and the official dual form; downdates; sequences of requests."""

import copy
import itertools

import fast_ntk_oracles as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnb.unlearn import NTKUnlearner, ntk_delta, peft_parameters, retain_forget_split, solve_cost
from effnb.unlearn.fast_ntk.steps import trapezium
from effnb.unlearn.fast_ntk.sums import Sums

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


# ------------------------------------------------------------ a network: all forms against explicit algebra


def setting(n=20, seed=0, dtype=torch.float64, forget=(0, 3, 4, 11)):
    model, init = oracle.convnet(1, dtype), oracle.convnet(1, dtype)
    g = torch.Generator().manual_seed(5)
    names = peft_parameters(init, "bn+head")
    start = oracle.vector(init, names) + 0.2 * torch.randn(28, dtype=torch.float64, generator=g)
    oracle.set_vector(init, names, start)
    data = oracle.images(n, seed, dtype)
    return model, init, names, data, retain_forget_split(*data, list(forget))


def explicit(form, loss, hessian, at, lam=LAM, *, setup=None):
    """The step by dense matrices, all sets computed from their own data."""
    model, init, names, data, (retain, forget) = setup or setting()
    w, w0 = oracle.vector(model, names), oracle.vector(init, names)
    place = copy.deepcopy(model)
    oracle.set_vector(place, names, w0 if at == "init" else w)
    v = w0 if at == "init" else w

    def sums(part):
        jac = oracle.jacobian(place, names, part[0])
        out = place(part[0])
        h = oracle.hessians(out, loss, hessian)
        a = torch.einsum("nkp,nkl,nlq->pq", jac, h, jac) + len(jac) * lam * torch.eye(len(w), dtype=torch.float64)
        b = torch.einsum("nkp,nk->p", jac, oracle.residual(out, part[1], loss))
        return a, b, b + len(jac) * lam * (v - w0)

    (a, b, g), (ar, br, gr), (af, _, gf) = map(sums, (data, retain, forget))
    step = {
        "golatkar": lambda: torch.linalg.solve(a, b) - torch.linalg.solve(ar, br),
        "newton": lambda: -torch.linalg.solve(ar, gr) - (w - v),
        "newton-diff": lambda: torch.linalg.solve(a, g) - torch.linalg.solve(ar, gr),
        "influence": lambda: torch.linalg.solve(ar, gf + af @ (w - v)),
    }[form]()
    return step


@pytest.mark.parametrize("side", ["primal", "dual"])
@pytest.mark.parametrize(("loss", "hessian"), [("mse", "identity"), ("ce", "identity"), ("ce", "ggn"), ("mse", "ggn")])
@pytest.mark.parametrize(("form", "at"), list(itertools.product(FORMS, ["final", "init"])))
def test_forms_on_a_network(form, at, loss, hessian, side):
    setup = setting() if side == "primal" else setting(n=6, forget=(0, 3))
    model, init, names, data, (retain, forget) = setup
    wanted = explicit(form, loss, hessian, at, setup=setup)
    options = {"loss": loss, "hessian": hessian, "form": form, "at": at}
    options |= {"weight_decay": LAM, "init_state": init}
    fitted = NTKUnlearner(model, names, **options).fit(data)
    assert fitted._sums.is_dual == (side == "dual")
    torch.testing.assert_close(fitted.delta(forget), wanted, rtol=1e-8, atol=1e-9)
    afresh = NTKUnlearner(model, names, **options).delta(forget, retain)
    torch.testing.assert_close(afresh, wanted, rtol=1e-8, atol=1e-9)


def test_form_1_is_the_official_code():
    """The official notebook's route for cross-entropy: batch-1 Jacobians at the trained model, inverse of NK x NK."""
    model, init, names, data, (retain, forget) = setting()
    jac = [oracle.jacobian(model, names, part[0]) for part in (retain, forget)]
    r = [oracle.residual(model(part[0]), part[1], "ce") for part in (retain, forget)]
    wanted = official_delta(jac[0], r[0], jac[1], r[1], LAM)
    found = NTKUnlearner(model, names, loss="ce", form="golatkar", weight_decay=LAM, init_state=init).fit(data)
    assert found.hessian == "identity"  # the official code has no curvature of the loss
    torch.testing.assert_close(found.delta(forget), wanted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ntk_delta(jac[0], r[0], jac[1], r[1], LAM), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_newton_and_newton_diff_agree_where_the_gradient_vanishes(loss):
    model, init, names, data, (_, forget) = setting()
    model.relu = torch.nn.Softplus().eval()  # smooth, so that there is a point without gradient
    known = dict(model.named_parameters())
    leaves, w0 = [known[n] for n in names], oracle.vector(init, names)
    optimizer = torch.optim.LBFGS(
        leaves, max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        out = model(data[0])
        value = torch.nn.functional.cross_entropy(out, data[1])
        if loss == "mse":
            value = 0.5 * (out - oracle.one_hot(data[1], 4)).square().sum(1).mean()
        value = value + LAM / 2 * (torch.cat([p.reshape(-1) for p in leaves]) - w0).square().sum()
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    options = {"loss": loss, "weight_decay": LAM, "init_state": init}
    newton, diff, influence = (
        NTKUnlearner(model, names, form=form, **options).fit(data).delta(forget)
        for form in ("newton", "newton-diff", "influence")
    )
    torch.testing.assert_close(newton, diff, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(newton, influence, rtol=1e-5, atol=1e-7)


def test_centred_targets():
    model, init, names, data, (_, forget) = setting()
    options = {"weight_decay": LAM, "init_state": init, "form": "golatkar"}
    plain, centred = (NTKUnlearner(model, names, centred=c, **options).fit(data).delta(forget) for c in (False, True))
    jac = oracle.jacobian(model, names, data[0])
    r = oracle.residual(model(data[0]), data[1], "mse") + 0.25
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[0, 3, 4, 11]] = True
    torch.testing.assert_close(centred, ntk_delta(jac[~mask], r[~mask], jac[mask], r[mask], LAM), **TIGHT)
    assert (plain - centred).norm() > 1e-4


# ------------------------------------------------------------ sufficient statistics


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("batch", [1, 7, 20])
def test_batches_chunks_and_order_do_not_matter(form, loss, batch):
    model, init, names, (x, y), (_, forget) = setting()
    options = {"loss": loss, "form": form, "weight_decay": LAM, "init_state": init}
    wanted = NTKUnlearner(model, names, **options).fit((x, y)).delta(forget)
    perm = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    loader = [(x[i], y[i]) for i in perm.split(batch)]
    back = [(forget[0][i], forget[1][i]) for i in torch.tensor([3, 1, 0, 2]).split(batch)]
    found = NTKUnlearner(model, names, chunk_size=3, **options).fit(loader).delta(back)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [6, 20])  # dual and primal
def test_downdate_is_recompute(form, n):
    model, init, names, data, (retain, forget) = setting(n=n, forget=(0, 3))
    options = {"form": form, "weight_decay": LAM, "init_state": init}
    downdated = NTKUnlearner(model, names, **options).fit(data).delta(forget)
    recomputed = NTKUnlearner(model, names, **options).delta(forget, retain)
    torch.testing.assert_close(downdated, recomputed, rtol=1e-9, atol=1e-10)


def test_a_request_never_reads_the_retained_data():
    model, init, names, data, (_, forget) = setting()
    fitted = NTKUnlearner(model, names, weight_decay=LAM, init_state=init).fit(data)
    seen = []
    handle = model.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    fitted.delta(forget)
    handle.remove()
    assert max(seen) <= len(forget[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", ["final", "init"])
@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("n", [6, 20])
def test_two_requests_one_after_the_other_are_the_joint_one(form, at, loss, n):
    model, init, names, data, (_, forget) = setting(n=n, forget=(0, 3, 4))
    options = {"form": form, "loss": loss, "at": at, "weight_decay": LAM, "init_state": init}
    joint = NTKUnlearner(model, names, **options).fit(data).forget(forget)
    steps = NTKUnlearner(model, names, **options).fit(data)
    steps.forget((forget[0][:1], forget[1][:1]), commit=True)
    assert steps.count == n - 1
    last = steps.forget((forget[0][1:], forget[1][1:]), commit=True)
    torch.testing.assert_close(oracle.vector(last, names), oracle.vector(joint, names), rtol=1e-8, atol=1e-9)
    again = steps.forget((forget[0][:0], forget[1][:0]))
    torch.testing.assert_close(oracle.vector(again, names), oracle.vector(joint, names), rtol=1e-8, atol=1e-9)


def test_without_commit_a_request_leaves_no_trace():
    model, init, names, data, (_, forget) = setting()
    fitted = NTKUnlearner(model, names, weight_decay=LAM, init_state=init).fit(data)
    first = fitted.delta(forget)
    fitted.forget(forget)
    assert torch.equal(fitted.delta(forget), first) and fitted.count == 20


def test_duplicates_in_both_sets_are_legal():
    model, init, names, (x, y), _ = setting()
    doubled = torch.cat([x, x[:3]]), torch.cat([y, y[:3]])
    options = {"weight_decay": LAM, "init_state": init, "form": "golatkar"}
    found = NTKUnlearner(model, names, **options).fit(doubled).delta((x[:3], y[:3]))
    jac, r = oracle.jacobian(model, names, x), oracle.residual(model(x), y, "mse")
    torch.testing.assert_close(found, official_delta(jac, r, jac[:3], r[:3], LAM), rtol=1e-9, atol=1e-10)


def test_a_whole_class_may_go():
    model, init, names, (x, y), _ = setting()
    retain, forget = retain_forget_split(x, y, torch.nonzero(y == 2).flatten())
    options = {"weight_decay": LAM, "init_state": init, "loss": "ce"}
    found = NTKUnlearner(model, names, **options).fit((x, y)).delta(forget)
    torch.testing.assert_close(found, NTKUnlearner(model, names, **options).delta(forget, retain), **TIGHT)
    assert 2 not in retain[1] and torch.isfinite(found).all()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_forget(form):
    model, init, names, data, (_, (xf, yf)) = setting()
    fitted = NTKUnlearner(model, names, weight_decay=LAM, init_state=init, form=form).fit(data)
    for empty in ((xf[:0], yf[:0]), []):
        step = fitted.delta(empty)
        assert step.shape == (28,) and bool(step.any()) == (form == "newton")


@pytest.mark.parametrize("form", FORMS)
def test_everything_to_forget(form):
    model, init, names, data, _ = setting()
    options = {"weight_decay": LAM, "init_state": init, "form": form}
    back = NTKUnlearner(model, names, at="init", scale="trapezium", **options).fit(data).forget(data)
    torch.testing.assert_close(oracle.vector(back, names), oracle.vector(init, names), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="at='final'"):
        NTKUnlearner(model, names, **options).fit(data).delta(data)
    with pytest.raises(ValueError, match="both be empty"):
        NTKUnlearner(model, names, **options).delta([], [])


@pytest.mark.parametrize("form", FORMS)
def test_no_residual_no_step(form):
    model = torch.nn.Linear(3, 3).double().eval()
    oracle.set_vector(model, ["weight", "bias"], torch.cat([torch.eye(3).flatten(), torch.zeros(3)]))
    x, y = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 1]], torch.tensor([0, 1, 2, 1])
    fitted = NTKUnlearner(model, "all", weight_decay=0.1, init_state=model, form=form).fit((x, y))
    assert not fitted.delta((x[:2], y[:2])).any()


def test_the_step_shrinks_like_one_over_lam():
    model, _, names, data, (_, forget) = setting()
    steps = [
        NTKUnlearner(model, names, weight_decay=lam, init_state=model, form="golatkar").fit(data).delta(forget)
        for lam in (1e5, 1e6)
    ]
    torch.testing.assert_close(steps[0], 10 * steps[1], rtol=1e-3, atol=0)


def test_without_weight_decay_the_unlearner_has_minimum_norm():
    for n in (6, 20):
        model, init, names, data, (retain, forget) = setting(n=n, forget=(0, 3))
        jac = [oracle.jacobian(model, names, part[0]) for part in (retain, forget)]
        r = [oracle.residual(model(part[0]), part[1], "mse") for part in (retain, forget)]
        options = {"weight_decay": 0.0, "init_state": init, "form": "golatkar"}
        found = NTKUnlearner(model, names, **options).fit(data).delta(forget)
        torch.testing.assert_close(found, ntk_delta(jac[0], r[0], jac[1], r[1], 0.0), rtol=1e-6, atol=1e-7)


def test_weight_decay_towards_zero_would_be_another_solution():
    model, init, data, (_, forget) = fitted_linear()
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    right = unlearner(model, init, form="newton").fit(data).delta(forget)
    wrong = unlearner(model, zeros, form="newton").fit(data).delta(forget)
    assert (right - wrong).norm() > 0.05 * right.norm()


def test_sums_change_sides_when_rows_outnumber_parameters():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 6, dtype=torch.float64, generator=g)
    sums = Sums(6)
    for i, part in enumerate(rows.split(2)):
        sums.add(part, part.sum(0), 1)
        assert sums.is_dual == (i < 3)
        torch.testing.assert_close(sums.dense(), rows[: 2 * i + 2].T @ rows[: 2 * i + 2])
        torch.testing.assert_close(sums.times(rows[0]), sums.dense() @ rows[0])
    assert sums.count == 5 and len(sums.rows) == 0


# ------------------------------------------------------------ scale


@pytest.mark.parametrize("form", FORMS)
def test_trapezium_scale(form):
    model, init, names, data, (retain, forget) = setting()
    options = {"weight_decay": LAM, "init_state": init, "form": form, "loss": "ce", "hessian": "identity"}
    fitted = NTKUnlearner(model, names, scale="trapezium", **options).fit(data)
    step = fitted.delta(forget)
    w, w0 = oracle.vector(model, names), oracle.vector(init, names)
    jac = oracle.jacobian(model, names, retain[0])
    w_lin = oracle.official_step(jac, oracle.residual(model(retain[0]), retain[1], "ce"), LAM)
    e = (w - w0) - w_lin
    inner = torch.dot(step / step.norm(), e / e.norm())
    if inner < 0:  # both branches as in the official notebook
        norm = step.norm() + 2 * torch.sin(torch.arccos(inner) - torch.pi / 2) * e.norm()
    else:
        norm = step.norm() + 2 * torch.cos(torch.arccos(inner)) * e.norm()
    assert fitted.last_scale == pytest.approx(float(norm / step.norm()), rel=1e-8)
    moved = oracle.vector(fitted.forget(forget), names)
    torch.testing.assert_close(moved, w + fitted.last_scale * step, **TIGHT)


def test_trapezium_has_one_formula_for_both_branches():
    step, e = torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0])
    zero = torch.zeros(2)
    assert trapezium(step, e, zero) == pytest.approx(1 + 2 * 0.6 * 5 / 2)
    assert trapezium(step, -e, zero) == pytest.approx(1 + 2 * 0.6 * 5 / 2)
    assert trapezium(zero, e, zero) == trapezium(step, e, e) == 1.0


def test_scale_multiplies_the_step():
    model, init, names, data, (_, forget) = setting()
    options = {"weight_decay": LAM, "init_state": init}
    half = NTKUnlearner(model, names, scale=0.5, **options).fit(data)
    wanted = oracle.vector(model, names) + 0.5 * half.delta(forget)
    torch.testing.assert_close(oracle.vector(half.forget(forget), names), wanted, **TIGHT)
