"""The shared training loop: what it computes, what it restores, what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effnb.lab.measure.seed import state_hash
from effnb.lab.measure.train import accuracy, fit


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n=90, seed=0):
    centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0]])
    y = torch.arange(n) % 3
    return centres[y] + torch.randn(n, 2, generator=generator(seed)), y


def net(seed=0, dropout=0.0):
    layers = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(seed)) * 0.3)
    return layers


def run(model, seed=0, **kwargs):
    x, y = blobs()
    options = {"epochs": 3, "batch_size": 16, "generator": generator(seed)} | kwargs
    return fit(model, x, y, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), **options)


def test_fit_is_plain_sgd_on_the_generators_permutations():
    x, y = blobs(20)
    model, oracle = nn.Linear(2, 3).double(), nn.Linear(2, 3).double()
    oracle.load_state_dict(model.state_dict())
    x = x.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = fit(model, x, y, optimizer=optimizer, epochs=2, batch_size=8, generator=generator(5))
    stream, expected = generator(5), []
    torch.randint(2**31, (), generator=stream)
    for _ in range(2):
        order, total = torch.randperm(20, generator=stream).tolist(), 0.0
        for start in range(0, 20, 8):
            batch = order[start : start + 8]
            loss = F.cross_entropy(oracle(x[batch]), y[batch])
            gradients = torch.autograd.grad(loss, list(oracle.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(oracle.parameters(), gradients, strict=True):
                    parameter -= 0.1 * gradient
            total += loss.item() * len(batch)
        expected.append(total / 20)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)
    for a, b in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_fit_learns():
    x, y = blobs()
    model = net()
    losses = run(model, epochs=20)
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2
    assert accuracy(model, x, y) > 90


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_two_runs_are_bit_equal_whatever_the_global_stream(dropout):
    hashes = set()
    for noise in range(2):
        torch.rand(noise)
        model = net(dropout=dropout)
        run(model)
        hashes.add(state_hash(model))
    assert len(hashes) == 1


def test_the_seed_matters():
    a, b = net(), net()
    run(a, seed=0)
    run(b, seed=1)
    assert state_hash(a) != state_hash(b)


def test_the_global_stream_is_left_alone():
    model, before = net(dropout=0.5), torch.get_rng_state()
    run(model)
    assert torch.equal(before, torch.get_rng_state())


class Boom(Exception):
    pass


def explode(*_):
    raise Boom


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_global_stream_are_restored_even_after_an_exception(fails):
    model = net(dropout=0.5)
    model.eval()
    model[1].train()
    modes, before = [m.training for m in model.modules()], torch.get_rng_state()
    if fails:
        with pytest.raises(Boom):
            run(model, on_step=explode)
        with pytest.raises(Boom):
            accuracy(nn.Sequential(model, type("Bad", (nn.Module,), {"forward": explode})()), *blobs())
    else:
        run(model)
        accuracy(model, *blobs())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(before, torch.get_rng_state())


def test_training_happens_in_train_mode_and_accuracy_in_eval_mode():
    model = net()
    run(model.eval(), epochs=1)
    assert int(model[1].num_batches_tracked) == 6
    buffers = state_hash(model)
    accuracy(model.train(), *blobs())
    assert state_hash(model) == buffers


def test_on_step_and_scheduler_are_called_once_a_batch():
    seen, rates, model = [], [], net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    x, y = blobs(40)

    def on_step(step, loss):
        seen.append((step, loss))
        rates.append(scheduler.get_last_lr()[0])

    kwargs = {"optimizer": optimizer, "scheduler": scheduler, "on_step": on_step, "generator": generator()}
    losses = fit(model, x, y, epochs=2, batch_size=16, **kwargs)
    assert [step for step, _ in seen] == list(range(6))
    assert rates == pytest.approx([0.9**k for k in range(1, 7)])
    assert losses[0] == pytest.approx(sum(w * v for w, (_, v) in zip((16, 16, 8), seen, strict=False)) / 40)


def test_other_losses_and_no_epochs():
    model, x = nn.Linear(2, 1), torch.randn(10, 2, generator=generator())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    assert fit(model, x, x[:, :1], optimizer=optimizer, epochs=0, generator=generator()) == []
    losses = fit(model, x, x[:, :1], optimizer=optimizer, epochs=30, loss=F.mse_loss, generator=generator())
    assert losses[-1] < losses[0]


def test_divergence_is_reported_not_hidden():
    model, x = nn.Linear(2, 1), torch.ones(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    losses = fit(model, x, x[:, :1] * 9, optimizer=optimizer, epochs=4, loss=F.mse_loss, generator=generator())
    assert not torch.tensor(losses).isfinite().all()


def test_accuracy_is_a_percentage_over_all_batches():
    x = torch.eye(5)
    assert accuracy(nn.Identity(), x, torch.tensor([0, 1, 2, 0, 0]), batch_size=2) == pytest.approx(60.0)


def test_accuracy_counts_positions_of_sequences():
    logits = F.one_hot(torch.tensor([[0, 1], [1, 1]]), 2).float().transpose(1, 2)
    assert accuracy(nn.Identity(), logits, torch.tensor([[0, 1], [0, 1]])) == 75.0


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"y": torch.zeros(3).long()}, ValueError, "x and y must be of one length"),
        ({"x": torch.zeros(0, 2), "y": torch.zeros(0).long()}, ValueError, "x and y must be of one length"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"epochs": -1}, ValueError, "epochs must be >= 0, got -1"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator, got int"),
        ({"optimizer": None}, TypeError, "optimizer must be a torch.optim.Optimizer, got NoneType"),
    ],
)
def test_fit_refuses(kwargs, error, text):
    model = net()
    x, y = blobs(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state_hash(model)
    options = {"x": x, "y": y, "optimizer": optimizer, "epochs": 1, "generator": generator()} | kwargs
    with pytest.raises(error, match=text):
        fit(model, **options)
    assert state_hash(model) == before


def test_accuracy_refuses():
    with pytest.raises(ValueError, match="x and y must be of one length"):
        accuracy(nn.Identity(), torch.eye(3), torch.zeros(2).long())
