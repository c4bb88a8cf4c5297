"""Bad input is refused by name, rule and value; checkpoints; stale sums; the guards against leaking statistics."""

import copy
import io
import warnings

import fast_ntk_oracles as oracle
import pytest
import torch
from torch import nn

from effnb.unlearn import (
    NTKUnlearner,
    empirical_ntk,
    iter_jacobian,
    ntk_delta,
    per_sample_jacobian,
    retain_forget_split,
    solve_cost,
)


@pytest.fixture
def model():
    return oracle.convnet()


@pytest.fixture
def data():
    return oracle.images(12)


def part(data, *indices):
    return data[0][list(indices)], data[1][list(indices)]


def fitted(model, data, **options):
    options = {"weight_decay": 0.1, "init_state": model, **options}
    return NTKUnlearner(model, "bn+head", **options).fit(data)


# ------------------------------------------------------------ models


USERS = {
    "jacobian": lambda m, x, y: per_sample_jacobian(m, "head", x),
    "iterator": lambda m, x, y: iter_jacobian(m, "head", x),
    "kernel": lambda m, x, y: empirical_ntk(m, "head", x),
    "unlearner": lambda m, x, y: NTKUnlearner(m, "head", weight_decay=0.1, init_state=m),
}


@pytest.fixture(params=USERS)
def use(request):
    return USERS[request.param]


def test_train_mode(model, data, use):
    with pytest.raises(ValueError, match="eval mode"):
        use(model.train(), *data)
    assert model.training


def test_one_submodule_in_train_mode(model, data, use):
    model.bn2.train()
    with pytest.raises(ValueError, match="'bn2'"):
        use(model, *data)


def test_active_dropout(model, data, use):
    model.dropout.train()
    with pytest.raises(ValueError, match="active dropout"):
        use(model, *data)


def test_dropout_that_no_flag_shows(data):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(36, 4)

        def forward(self, x):
            return self.head(nn.functional.dropout(x.flatten(1), 0.5, training=True))

    model, state = Noisy().double().eval(), torch.get_rng_state()
    with pytest.raises(ValueError, match="random numbers"):
        per_sample_jacobian(model, "head", data[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_without_running_statistics(model, data, use):
    model.bn1 = nn.BatchNorm2d(3, momentum=None, track_running_stats=False).double().eval()
    with pytest.raises(ValueError, match=r"running statistics.*'bn1'"):
        use(model, *data)


def test_cumulative_running_statistics_are_fine(model, data):
    model.bn1.momentum = None
    assert per_sample_jacobian(model, "bn", data[0]).shape == (12, 4, 12)


def test_non_finite_model(model, data, use):
    model.bn1.running_mean[0] = float("nan")
    with pytest.raises(ValueError, match=r"finite.*bn1.running_mean"):
        use(model, *data)


def test_models_that_are_not_real_floating_point(data):
    complex_model = nn.Linear(3, 2, dtype=torch.complex64).eval()
    with pytest.raises(TypeError, match="floating-point"):
        per_sample_jacobian(complex_model, ["weight"], torch.ones(2, 3))
    integer = nn.Linear(3, 2).requires_grad_(False).to(torch.float32).eval()
    integer.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError, match="floating-point"):
        per_sample_jacobian(integer, ["weight"], torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        per_sample_jacobian("model", ["weight"], torch.ones(2, 3))


def test_parameters_of_two_dtypes():
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()).eval()
    with pytest.raises(TypeError, match="one dtype"):
        per_sample_jacobian(mixed, "all", torch.ones(2, 2))


def test_outputs_that_are_not_n_by_k(data):
    class Flat(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1))[:, 0]

    with pytest.raises(ValueError, match=r"outputs \(n, K\)"):
        per_sample_jacobian(Flat(36, 2).double().eval(), "head", data[0])


# ------------------------------------------------------------ subsets, inputs, options


@pytest.mark.parametrize(
    ("params", "match"),
    [([], "at least one"), (["bn3.weight"], "'bn3.weight'"), (["bn1.bias"] * 2, "distinct"), (["bn1"], "'bn1'")],
)
def test_bad_names(model, data, params, match):
    with pytest.raises(ValueError, match=match):
        per_sample_jacobian(model, params, data[0])
    with pytest.raises(ValueError, match=match):
        NTKUnlearner(model, params, weight_decay=0.1, init_state=model)


@pytest.mark.parametrize("names", [["conv1.weight"], ["bn1.weight", "conv2.weight"]])
def test_norm_affine_with_other_parameters(model, data, names):
    with pytest.raises(ValueError, match=r"norm_affine.*conv"):
        per_sample_jacobian(model, names, data[0], method="norm_affine")


def test_norm_affine_takes_the_head_and_no_other_linear_layer():
    stack = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2)).eval()
    with pytest.raises(ValueError, match=r"norm_affine.*0\.weight"):
        per_sample_jacobian(stack, "all", torch.ones(2, 2), method="norm_affine")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "fast"}, "method must be one of"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": True}, "chunk_size"),
        ({"chunk_size": "many"}, "chunk_size"),
        ({"memory_budget": 0}, "memory_budget"),
        ({"memory_budget": 1e9}, "memory_budget"),
    ],
)
def test_bad_jacobian_options(model, data, options, match):
    for function in (per_sample_jacobian, iter_jacobian, empirical_ntk):
        with pytest.raises(ValueError, match=match):
            function(model, "bn", data[0], **options)


def test_the_iterator_checks_at_once(model):
    with pytest.raises(ValueError, match="at least one sample"):
        iter_jacobian(model, "bn", torch.zeros(0, 1, 6, 6))
    with pytest.raises(TypeError, match="tensor"):
        iter_jacobian(model, "bn", [[1.0]])


@pytest.mark.parametrize("method", ["loop", "vmap", "norm_affine"])
def test_nan_in_the_jacobian(model, data, method):
    data[0][3, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="Jacobian must be finite"):
        per_sample_jacobian(model, "bn", data[0], method=method)
    with pytest.raises(ValueError, match="Jacobian must be finite"):
        fitted(model, data, method=method)


# ------------------------------------------------------------ the unlearner


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"weight_decay": -0.1}, ValueError, r"weight_decay must be finite and >= 0, got -0\.1"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay"),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay"),
        ({"loss": "hinge"}, ValueError, "loss must be one of 'mse', 'ce', got 'hinge'"),
        ({"form": "fisher"}, ValueError, "form must be one of"),
        ({"hessian": "full"}, ValueError, "hessian must be one of"),
        ({"at": "middle"}, ValueError, "at must be one of"),
        ({"scale": "trapezoid"}, TypeError, "scale"),
        ({"scale": -1.0}, ValueError, "scale"),
        ({"dtype": torch.float16}, ValueError, "dtype must be one of"),
        ({"loss": "ce", "centred": True}, ValueError, "centred"),
        ({"method": "fast"}, ValueError, "method must be one of"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"memory_budget": 0}, ValueError, "memory_budget"),
        ({"init_state": {}}, ValueError, "init_state must hold every name"),
        ({"init_state": None}, TypeError, "init_state"),
    ],
)
def test_bad_settings(model, options, error, match):
    with pytest.raises(error, match=match):
        NTKUnlearner(model, "bn", **{"weight_decay": 0.1, "init_state": model, **options})


def test_bad_initial_values(model):
    state = copy.deepcopy(model.state_dict())
    state["bn1.weight"][0] = float("inf")
    with pytest.raises(ValueError, match=r"finite.*bn1.weight"):
        NTKUnlearner(model, "bn", weight_decay=0.1, init_state=state)
    state["bn1.weight"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"shapes.*bn1.weight"):
        NTKUnlearner(model, "bn", weight_decay=0.1, init_state=state)


def test_weight_decay_and_init_state_have_no_default(model):
    with pytest.raises(TypeError):
        NTKUnlearner(model, "bn", weight_decay=0.1)
    with pytest.raises(TypeError):
        NTKUnlearner(model, "bn", init_state=model)


@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        (lambda x, y: (x, y - 1), ValueError, "labels from 0 to 3, got -1"),
        (lambda x, y: (x, y + 3), ValueError, "labels from 0 to 3, got 6"),
        (lambda x, y: (x, y[:-1]), ValueError, "n inputs with n labels"),
        (lambda x, y: (x, y[:, None]), ValueError, "n inputs with n labels"),
        (lambda x, y: (x, y.double()), TypeError, "integer labels"),
        (lambda x, y: [x], TypeError, "pairs"),
        (lambda x, y: [(x, y, y)], TypeError, "pairs"),
    ],
)
def test_bad_batches(model, data, batch, error, match):
    ready = fitted(model, data)
    wrong = batch(
        data[0], data[1].clone().clamp(min=0).index_fill_(0, torch.tensor([0]), 0).index_fill_(0, torch.tensor([1]), 3)
    )
    for call in (lambda: fitted(model, wrong), lambda: ready.delta(wrong), lambda: ready.forget(wrong)):
        with pytest.raises(error, match=match):
            call()


def test_requests_need_sums(model, data):
    fresh = NTKUnlearner(model, "bn", weight_decay=0.1, init_state=model)
    with pytest.raises(ValueError, match="fit must be called first"):
        fresh.delta(part(data, 0))
    with pytest.raises(ValueError, match="at least one sample"):
        fresh.fit([])
    assert fresh.count == 0


def test_a_fit_that_fails_leaves_no_sums(model, data):
    ready = fitted(model, data)
    with pytest.raises(ValueError, match="labels"):
        ready.fit((data[0], data[1] + 9))
    assert ready.count == 0
    with pytest.raises(ValueError, match="fit must be called first"):
        ready.delta(part(data, 0))


def test_more_to_forget_than_was_fitted(model, data):
    with pytest.raises(ValueError, match="at most 4 samples, got 12"):
        fitted(model, part(data, 0, 1, 2, 3)).delta(data)


@pytest.mark.parametrize("n", [4, 12])  # dual and primal
def test_samples_that_were_never_fitted(model, data, n):
    ready = fitted(model, part(data, *range(n)))
    strange = oracle.images(2, seed=9)
    with pytest.raises(ValueError, match="samples that fit has seen"):
        ready.delta((5 * strange[0], strange[1]))


def test_cancellation_falls_back_to_the_retained_data(model, data):
    ready = fitted(model, data)
    ready._sums.gram -= 0.5 * torch.eye(28, dtype=torch.float64) * ready._sums.gram.diagonal().max()
    forget, retain = part(data, 0, 1), part(data, *range(2, 12))
    with pytest.raises(ValueError, match="retain_loader"):
        ready.delta(forget)
    wanted = fitted(model, data).delta(forget)
    torch.testing.assert_close(ready.delta(forget, retain), wanted, rtol=1e-9, atol=1e-11)


def test_sums_of_a_model_that_changed(model, data):
    ready = fitted(model, data)
    before = ready.delta(part(data, 0))
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] += 1e-6
    with pytest.raises(ValueError, match="call fit again"):
        ready.delta(part(data, 0))
    after = ready.fit(data).delta(part(data, 0))
    assert after.shape == before.shape and not torch.equal(after, before)


def test_swapped_values_are_a_change(model, data):
    ready = fitted(model, data)
    with torch.no_grad():
        model.head.weight[0] = model.head.weight[0].flip(0)
    with pytest.raises(ValueError, match="call fit again"):
        ready.delta(part(data, 0))


def test_leaking_running_statistics_are_noticed(model, data):
    before = copy.deepcopy(model)
    model.bn1.running_mean += 0.01
    with pytest.warns(UserWarning, match=r"bn1.running_mean.*cannot be removed"):
        fitted(model, data, init_state=before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(model, data, init_state={n: p for n, p in before.named_parameters() if "bn" in n or "head" in n})


def test_float32_sums_are_offered(model, data):
    exact, rough = (fitted(model, data, dtype=d).delta(part(data, 0)) for d in (torch.float64, torch.float32))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), exact, rtol=1e-2, atol=1e-5)


# ------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("n", [4, 12])
@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_round_trip_through_a_file(model, data, n, loss):
    ready = fitted(model, part(data, *range(n)), loss=loss)
    ready.forget(part(data, 3), commit=True)
    file = io.BytesIO()
    torch.save(ready.state_dict(), file)
    file.seek(0)
    other = NTKUnlearner(copy.deepcopy(model), "bn+head", weight_decay=0.1, init_state=model, loss=loss)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.count == n - 1
    assert torch.equal(other.delta(part(data, 0)), ready.delta(part(data, 0)))
    a, b = (u.forget(part(data, 0)).state_dict() for u in (ready, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_loaded_sums_are_a_copy(model, data):
    ready, other = fitted(model, data), fitted(model, data)
    state = ready.state_dict()
    other.load_state_dict(state)
    state["sums"]["gram"].zero_()
    assert other._sums.gram.any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("sums"), "none of sums"),
        (lambda s: s["settings"].update(weight_decay=0.2), "settings"),
        (lambda s: s.update(params=["bn1.weight"]), "params"),
        (lambda s: s.update(init=s["init"] + 1), "this model"),
        (lambda s: s.update(mark=s["mark"] + 1), "this model"),
    ],
)
def test_foreign_states(model, data, change, match):
    ready = fitted(model, data)
    state = copy.deepcopy(ready.state_dict())
    change(state)
    before = ready.delta(part(data, 0))
    with pytest.raises(ValueError, match=match):
        ready.load_state_dict(state)
    assert torch.equal(ready.delta(part(data, 0)), before)


def test_an_empty_state(model):
    fresh = NTKUnlearner(model, "bn", weight_decay=0.1, init_state=model)
    fresh.load_state_dict(fresh.state_dict())
    assert fresh.count == 0


# ------------------------------------------------------------ functional forms


def jacobians(n_r=3, n_f=2, k=2, p=4):
    return [torch.ones(*s) for s in ((n_r, k, p), (n_r, k), (n_f, k, p), (n_f, k))]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda a: [*a[:3], a[3][:1]], ValueError, "r_forget must have one value"),
        (lambda a: [a[0][..., :3], *a[1:]], ValueError, "J_forget must match J_retain"),
        (lambda a: [a[0][0, 0], *a[1:]], ValueError, "J_retain must have shape"),
        (lambda a: [a[0] * float("nan"), *a[1:]], ValueError, "finite"),
        (lambda a: [a[0][:0], a[1][:0], a[2][:0], a[3][:0]], ValueError, "both be empty"),
        (lambda a: [a[0].numpy(), *a[1:]], TypeError, "J_retain"),
    ],
)
def test_bad_jacobians(change, error, match):
    with pytest.raises(error, match=match):
        ntk_delta(*change(jacobians()), 0.1)


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [((-0.1,), {}, "weight_decay"), ((0.1, "schur"), {}, "form must be one of"), ((0.1,), {"ridge": -1.0}, "ridge")],
)
def test_bad_options_of_the_functional_form(args, options, match):
    with pytest.raises(ValueError, match=match):
        ntk_delta(*jacobians(), *args, **options)


@pytest.mark.parametrize("residual", [(5, 2), (10,), (10, 1)])
def test_residuals_may_be_flat(residual):
    full = [torch.ones(5, 2, 4), torch.arange(10.0).view(5, 2), torch.ones(0, 2, 4), torch.ones(0, 2)]
    flat = [full[0], full[1].reshape(residual), *full[2:]]
    assert torch.equal(ntk_delta(*full[2:], *full[:2], 0.1), ntk_delta(*flat[2:], *flat[:2], 0.1))


@pytest.mark.parametrize("args", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_bad_counts(args):
    with pytest.raises(ValueError, match=">= 1"):
        solve_cost(*args)


@pytest.mark.parametrize(
    ("forget", "error"),
    [([-1], ValueError), ([12], ValueError), ([1, 1], ValueError), ([0.5], TypeError), ([True], TypeError)],
)
def test_indices_outside_the_data(data, forget, error):
    with pytest.raises(error, match="forget must hold"):
        retain_forget_split(*data, forget)


def test_split(data):
    (xr, yr), (xf, yf) = retain_forget_split(*data, torch.tensor([5, 2]))
    assert torch.equal(xf, data[0][[5, 2]]) and torch.equal(yf, data[1][[5, 2]])
    assert len(xr) == len(yr) == 10
    (none, _), (_, y) = retain_forget_split(*data, range(12))
    assert len(none) == 0 and len(y) == 12
    assert len(retain_forget_split(*data, [])[1][0]) == 0
    with pytest.raises(ValueError, match="one length"):
        retain_forget_split(data[0], data[1][:3], [0])
