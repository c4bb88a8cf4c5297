"""NTKUnlearner on a network against explicit algebra; downdates, sequences of requests, edge cases, the scale."""

import copy
import itertools

import fast_ntk_oracles as oracle
import pytest
import torch

from effnb.models import SmallCNN
from effnb.unlearn import NTKUnlearner, ntk_delta, peft_parameters, retain_forget_split
from effnb.unlearn.fast_ntk.closed_form import Sums
from effnb.unlearn.fast_ntk.unlearner import trapezium

FORMS = ["newton-diff", "golatkar", "newton", "influence"]
LAM = 0.05
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def official_delta(jr, rr, jf, rf, lam):
    return oracle.official_step(jr, rr, lam) - oracle.official_step(torch.cat([jr, jf]), torch.cat([rr, rf]), lam)


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


@pytest.mark.parametrize("which", ["bn+head", "all"])
@pytest.mark.parametrize("lam", [LAM, 1e-3])
def test_one_sample_of_a_float32_network(which, lam):
    """A batch of one is rounded otherwise than the same sample in a large batch: too little to refuse the request."""
    model = SmallCNN(1, 10, (8, 16, 32, 32), generator=torch.Generator().manual_seed(0)).eval()
    x, y = torch.rand(10, 1, 14, 14, generator=torch.Generator().manual_seed(1)), torch.arange(10)
    options = {"weight_decay": lam, "init_state": model}
    fitted = NTKUnlearner(model, which, **options).fit((x, y))
    for i in (0, 7):
        found = fitted.delta((x[i : i + 1], y[i : i + 1]))
        rest = torch.arange(10) != i
        wanted = NTKUnlearner(model, which, **options).delta((x[i : i + 1], y[i : i + 1]), (x[rest], y[rest]))
        assert torch.linalg.vector_norm(found - wanted) < 1e-3 * torch.linalg.vector_norm(wanted)  # float32 Jacobians
    with pytest.raises(ValueError, match="samples that fit has seen"):
        fitted.delta((1 - x[:1], y[:1]))


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
