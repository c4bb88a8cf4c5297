"""One template of contracts run over all three optimizers: bad input, checkpoints, schedulers, closures, purity."""

import copy
import io
import pickle
import socket

import avagrad_ranks
import pytest
import torch
from torch import nn

from effnb.optim import AvaGrad, AvaGradW, DelayedAdam, functional

OPTIMIZERS = [AvaGrad, AvaGradW, DelayedAdam]
PATHS = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.fixture(params=OPTIMIZERS, ids=lambda cls: cls.__name__)
def cls(request):
    return request.param


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_of(model, step):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return (model(x) - x[:, :2].sin()).square().mean()


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def one():
    return [nn.Parameter(torch.ones(3))]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be finite and >= 0, got nan"),
        ({"lr": torch.ones(2)}, "lr must be a number or a tensor with one element"),
        ({"eps": 0.0}, "eps must be finite and > 0, got 0.0"),
        ({"eps": -1e-8}, "eps must be finite and > 0, got -1e-08"),
        ({"eps": float("inf")}, "eps must be finite and > 0, got inf"),
        ({"betas": (1.0, 0.999)}, r"betas must be two numbers in \[0, 1\), got \(1.0, 0.999\)"),
        ({"betas": (0.9, -0.1)}, "betas must be two numbers"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0, got -0.1"),
        ({"first_step": "jump"}, "first_step must be one of 'skip', 'sgd', got 'jump'"),
        ({"foreach": True, "fused": True}, "foreach and fused exclude each other"),
        ({"foreach": True, "differentiable": True}, "differentiable=True needs the single-tensor path"),
    ],
    ids=str,
)
def test_bad_hyper_parameters_name_argument_rule_and_value(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(one(), **options)
    optimizer = cls(one())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": one(), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("norm", ["rms", None])
def test_unknown_norm(norm):
    with pytest.raises(ValueError, match=f"norm must be one of 'current', 'lagged', got {norm!r}"):
        AvaGrad(one(), norm=norm)
    with pytest.raises(TypeError):
        DelayedAdam(one(), norm="lagged")


def test_sparse_gradients_are_refused_before_any_change(cls):
    table, dense = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.ones(2))
    before = table.weight.detach().clone()
    optimizer = cls([{"params": [dense]}, {"params": table.parameters()}])
    (table(torch.tensor([1])).sum() + dense.sum()).backward()
    with pytest.raises(NotImplementedError, match=f"{cls.__name__} does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(table.weight, before) and not optimizer.state


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_raise_on_request_only(cls, bad):
    params = one()
    optimizer = cls(params, error_if_nonfinite=True)
    params[0].grad = torch.tensor([0.0, bad, 0.0])
    with pytest.raises(ValueError, match=r"gradients must be finite .*parameter 0"):
        optimizer.step()
    assert torch.equal(params[0], torch.ones(3)) and not optimizer.state
    silent = cls(params)
    silent.step()
    assert silent.state[params[0]]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_refuses_half_precision(cls, dtype):
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    p.grad = torch.ones_like(p)
    other = one()
    other[0].grad = torch.ones(3)
    optimizer = cls([{"params": other}, {"params": [p]}], fused=True)
    with pytest.raises(ValueError, match=f"fused=True needs float32 or float64 parameters, got {dtype}"):
        optimizer.step()
    assert not optimizer.state and torch.equal(p, torch.ones_like(p))


def test_fused_refuses_mixed_dtypes(cls):
    params = [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="fused=True needs one dtype and device per group"):
        cls(params, fused=True).step()


def test_state_of_another_optimizer_is_refused(cls):
    params = one()
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    params[0].grad = torch.ones(3)
    sgd.step()
    with pytest.raises(
        ValueError, match=f"must come from {cls.__name__}: parameter 0 has no step, exp_avg, exp_avg_sq"
    ):
        cls(params).load_state_dict(sgd.state_dict())


# ---------------------------------------------------------------- behaviour


def test_it_learns(cls, path):
    model = network()
    first = loss_of(model, 0).item()
    train(model, cls(model.parameters(), lr=0.3 if cls is not DelayedAdam else 0.01, **path), range(150))
    assert loss_of(model, 0).item() < 0.1 * first


def test_gradients_are_never_written(cls, path):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    optimizer = cls(params, weight_decay=0.1, maximize=True, **path)
    grads = [torch.arange(3.0), torch.full((2, 2), 2.0)]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    copies = [g.clone() for g in grads]
    for _ in range(3):
        optimizer.step()
    assert all(p.grad is g and torch.equal(g, c) for p, g, c in zip(params, grads, copies, strict=True))


def test_checkpoint_resumes_bit_identically(cls, path):
    model = network()
    optimizer = cls(model.parameters(), lr=0.1, weight_decay=1e-2, **path)
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(4, 8))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = network(seed=1)
    resumed = cls(twin.parameters())
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["gamma"] == saved["optimizer"]["param_groups"][0]["gamma"]
    train(twin, resumed, range(4, 8))
    assert torch.equal(flat(twin), flat(model))
    assert resumed.param_groups[0]["gamma"] == optimizer.param_groups[0]["gamma"]


def test_state_is_flat(cls, path):
    """Tools that shard or flatten checkpoints take tensors and numbers, and no dictionaries in a state."""
    model = network()
    optimizer = cls(model.parameters(), **path)
    train(model, optimizer, range(2))
    for state in optimizer.state.values():
        assert set(state) >= {"step", "exp_avg", "exp_avg_sq"}
        assert all(isinstance(value, torch.Tensor | float) for value in state.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_steps_are_counted_in_float32_whatever_the_default_is(cls, dtype):
    """A counter in bfloat16 would stop at 256."""
    before, params = torch.get_default_dtype(), one()
    torch.set_default_dtype(dtype)
    try:
        optimizer = cls(params)
        params[0].grad = torch.full((3,), 0.1, dtype=torch.float32)
        optimizer.step()
        old = copy.deepcopy(optimizer.state_dict())
        old["state"][0]["step"] = 300  # a plain number, as the official code stores it
        optimizer.load_state_dict(old)
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    step = optimizer.state[params[0]]["step"]
    assert step.dtype == torch.float32 and step == 301


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_continue_alike(cls, copier):
    model = network()
    optimizer = cls(model.parameters())
    train(model, optimizer, range(3))
    twin, twin_optimizer = copier((model, optimizer))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        train(m, o, range(3, 6))
    assert torch.equal(flat(model), flat(twin))


def test_runs_are_deterministic(cls, path):
    results = []
    for _ in range(2):
        model = network()
        train(model, cls(model.parameters(), **path), range(5))
        results.append(flat(model))
    assert torch.equal(*results)


def test_learning_rate_schedulers_drive_it(cls, path):
    model = network()
    optimizer = cls(model.parameters(), lr=0.1, **path)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for step in range(4):
        train(model, optimizer, [step])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    before = flat(model)
    train(model, optimizer, [4])
    torch.testing.assert_close(flat(model), before, rtol=0, atol=1e-12)


def test_closure_runs_with_gradients_and_its_loss_is_returned(cls):
    model = network()
    optimizer = cls(model.parameters())

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == pytest.approx(loss_of(network(), 0).item())
        assert not torch.is_grad_enabled()


def test_nothing_happens_without_gradients(cls, path):
    params = one()
    optimizer = cls(params, weight_decay=0.1, **path)
    assert optimizer.step() is None
    assert torch.equal(params[0], torch.ones(3)) and not optimizer.state
    assert optimizer.param_groups[0]["gamma"] is None


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_empty_parameters_are_harmless(cls, shape):
    params = [nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(2))]
    for subset in (params[:1], params):
        optimizer = cls(subset)
        for _ in range(3):
            for p in subset:
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert torch.isfinite(params[1]).all() and (params[1] < 1).all()


def test_maximize_is_minimising_the_negative(cls, path):
    results = []
    for sign in (1.0, -1.0):
        params = one()
        optimizer = cls(params, maximize=sign < 0, weight_decay=0.1, **path)
        for step in range(4):
            params[0].grad = sign * (torch.arange(3.0) + step)
            optimizer.step()
        results.append(params[0].detach())
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_groups_have_their_own_hyper_parameters(cls):
    slow, fast = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = cls([{"params": [slow], "lr": 0.0}], lr=0.1)
    optimizer.add_param_group({"params": [fast], "eps": 1.0})
    for _ in range(3):
        slow.grad, fast.grad = torch.ones(2), torch.ones(2)
        optimizer.step()
    assert torch.equal(slow, torch.ones(2)) and (fast < 1).all()


def test_decoupled_decay_shrinks_by_lr_times_decay(cls):
    moved = []
    for decay in (0.0, 0.5):
        p = nn.Parameter(torch.full((2,), 4.0))
        optimizer = cls(
            [p], lr=0.1, weight_decay=decay, **({} if cls is AvaGradW else {"decoupled_weight_decay": True})
        )
        for _ in range(2):
            p.grad = torch.ones(2)
            optimizer.step()
        moved.append(p.detach())
    torch.testing.assert_close(moved[1], moved[0] - 0.1 * 0.5 * 4.0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first_step", ["skip", "sgd"])
def test_first_step_skips_or_follows_the_plain_gradient(cls, path, first_step):
    params = one()
    optimizer = cls(params, lr=0.1, weight_decay=0.0, first_step=first_step, **path)
    params[0].grad = torch.tensor([1.0, -2.0, 0.0])
    optimizer.step()
    expected = torch.ones(3) - (0.1 * params[0].grad if first_step == "sgd" else 0)
    torch.testing.assert_close(params[0].detach(), expected)
    assert optimizer.state[params[0]]["exp_avg_sq"][1] > 0


def test_skipped_first_step_survives_an_infinite_gradient(cls):
    params = one()
    optimizer = cls(params)
    params[0].grad = torch.tensor([float("inf"), 1.0, 1.0])
    optimizer.step()
    assert torch.equal(params[0], torch.ones(3))


def test_large_parameters_are_updated_in_place(cls, path):
    p = nn.Parameter(torch.ones(4))
    optimizer, address = cls([p], **path), p.data_ptr()
    for _ in range(2):
        p.grad = torch.ones(4)
        optimizer.step()
    assert p.data_ptr() == address and p.is_leaf and p.requires_grad


def test_tensor_subclasses_take_the_single_path():
    class Marked(torch.Tensor):
        pass

    p = torch.ones(3).as_subclass(Marked).requires_grad_()
    p.grad = torch.ones(3).as_subclass(Marked)
    AvaGrad([p]).step()
    assert type(p) is Marked


@pytest.mark.parametrize("name", ["avagrad", "delayed_adam"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_differentiable_steps_have_the_right_gradients(name, decoupled):
    """gradcheck through three steps, with respect to start, gradients (one entry is zero) and learning rate."""
    step_once = getattr(functional, name)

    def after(w, g, lr):
        p, m, v, t = w.clone(), torch.zeros_like(w), torch.zeros_like(w), torch.zeros((), dtype=torch.float64)
        for scale in (1.0, -0.5, 2.0):
            gradient = torch.cat([g * scale, g.new_zeros(1)])
            options = {"weight_decay": 0.1, "decoupled_weight_decay": decoupled, "differentiable": True}
            step_once([p], [gradient], [m], [v], [t], lr=lr, eps=0.1, **options)
        return p

    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(after, (w, g, lr))


def test_differentiable_class_lets_the_step_be_seen(cls):
    start = torch.ones(3, requires_grad=True)
    p = start.clone()
    p.retain_grad()
    optimizer = cls([p], differentiable=True, lr=0.1)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    p.sum().backward()
    torch.testing.assert_close(start.grad, torch.ones(3))


def test_global_state_is_left_alone(cls, path):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    model = network()
    torch.set_rng_state(state)
    train(model, cls(model.parameters(), **path), range(2))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


# ---------------------------------------------------------------- sharded parameters


@pytest.fixture(scope="module")
def sharded():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        found = manager.dict()
        torch.multiprocessing.spawn(avagrad_ranks.work, (port, found), nprocs=2)
        yield dict(found)


@pytest.mark.parametrize("name", avagrad_ranks.OPTIONS)
def test_two_ranks_with_sharded_parameters_are_one_process(sharded, name):
    weights, gammas = sharded[name]
    model = avagrad_ranks.net()
    assert gammas == pytest.approx(avagrad_ranks.train(model, slice(None), **avagrad_ranks.OPTIONS[name]), rel=1e-5)
    for ours, theirs in zip(weights, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_a_compiled_step_with_a_scheduler_is_the_plain_one():
    found = []
    for wrap in (lambda step: step, torch.compile):
        model = network()
        optimizer = AvaGrad(model.parameters(), lr=torch.tensor(0.1))
        scheduler, step = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), wrap(optimizer.step)
        for t in range(4):
            optimizer.zero_grad()
            model(torch.full((2, 4), t + 1.0)).square().mean().backward()
            step()
            scheduler.step()
        found.append([p.detach() for p in model.parameters()])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
