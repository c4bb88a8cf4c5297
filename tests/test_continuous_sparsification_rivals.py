"""The rivals at equal density, tickets, CSR inference and the file format of continuous sparsification's chapter."""

import itertools
import math
import struct
import zlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.compress import (
    BetaSchedule,
    GradualPruner,
    HardConcreteGate,
    SparseLinear,
    Ticket,
    apply_cs,
    apply_l0,
    apply_masks,
    full_masks,
    global_magnitude_mask,
    gmp_sparsity,
    load_sparse,
    magnitude_ticket_search,
    random_masks,
    save_sparse,
    shuffled_masks,
    sparsify_linears,
    ticket_search,
    top_k_masks,
)
from effnb.compress.continuous_sparsification.storage import encodings
from effnb.lab.measure import data, train
from effnb.models import SmallCNN, mlp

densities = st.floats(0.01, 1.0)


def net(seed=0):
    return mlp([6, 8, 4], generator=torch.Generator().manual_seed(seed))


def count(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def size(masks):
    return sum(mask.numel() for mask in masks.values())


def sgd_steps(model, parameters, steps=4, lr=0.1, **options):
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, **options)
    x = torch.rand(8, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(8) % 4).backward()
        optimizer.step()


# --- masks of an exact size ------------------------------------------------------------------------------------------


@given(densities, st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_all_masks_have_exactly_the_density_asked_for(density, seed):
    model, generator = net(seed), torch.Generator().manual_seed(seed)
    wanted = max(1, round(density * 80))
    for masks in (
        top_k_masks({n: p for n, p in model.named_parameters() if p.ndim == 2}, density),
        global_magnitude_mask(model, 1 - density) if density < 1 else full_masks(model),
        random_masks(full_masks(model), density, generator),
    ):
        assert abs(count(masks) - wanted) <= (density < 1 and round((1 - (1 - density)) * 80) != round(density * 80))
    masks = random_masks(full_masks(model), density, generator)
    shuffled = shuffled_masks(masks, generator)
    assert {n: int(m.sum()) for n, m in shuffled.items()} == {n: int(m.sum()) for n, m in masks.items()}


def test_magnitude_mask_against_the_obvious_loop():
    model = net(3)
    masks = global_magnitude_mask(model, 0.7)
    every = sorted((abs(v) for layer in (model[1], model[3]) for v in layer.weight.flatten().tolist()), reverse=True)
    threshold = every[23]
    for name, mask in masks.items():
        assert torch.equal(mask, model.get_submodule(name).weight.abs() >= threshold)


@given(densities, st.integers(0, 3), st.integers(0, 3), st.sampled_from([1.0, 3.0, 1e6]))
@settings(max_examples=60, deadline=None)
def test_top_k_equals_a_full_stable_sort(density, seed, min_keep, levels):
    generator = torch.Generator().manual_seed(seed)
    scores = {name: (torch.randn(7, 5, generator=generator) * levels).round() for name in "abc"}
    masks = top_k_masks(scores, density, min_keep)
    flat = torch.stack(list(scores.values())).flatten(1)
    for row in flat:
        row[row.argsort(descending=True, stable=True)[:min_keep]] = torch.inf
    expected = torch.zeros(105, dtype=torch.bool)
    expected[flat.flatten().argsort(descending=True, stable=True)[: max(1, round(density * 105), 3 * min_keep)]] = True
    assert torch.equal(torch.stack(list(masks.values())).flatten(), expected)


def test_ties_are_broken_by_position_and_min_keep_is_kept():
    masks = top_k_masks({"a": torch.zeros(4), "b": torch.zeros(4)}, 0.5)
    assert masks["a"].all() and not masks["b"].any()
    masks = top_k_masks({"a": torch.ones(4), "b": torch.zeros(4)}, 0.5, min_keep=1)
    assert count({"b": masks["b"]}) == 1 and count(masks) == 4


def test_random_masks_depend_on_the_generator_only():
    like = full_masks(net())
    first, again = (random_masks(like, 0.3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_masked_weights_are_not_revived_by_momentum_or_decay():
    model = net()
    handle = apply_masks(model, global_magnitude_mask(model, 0.6))
    masks = {n: m.clone() for n, m in handle.masks().items()}
    sgd_steps(model, model.parameters(), weight_decay=1e-2)
    model = handle.finalize()
    assert all(torch.equal(model.get_submodule(n).weight != 0, mask) for n, mask in masks.items())


@given(st.integers(0, 30), st.integers(1, 20), st.floats(0, 0.99), st.floats(0, 0.99))
@settings(max_examples=60, deadline=None)
def test_gmp_schedule(step, end, final, initial):
    value = gmp_sparsity(step, end, final, initial)
    assert min(final, initial) - 1e-12 <= value <= max(final, initial) + 1e-12
    assert gmp_sparsity(0, end, final, initial) == pytest.approx(initial)
    assert gmp_sparsity(end, end, final, initial) == final


def test_gradual_pruner_ends_at_the_exact_density_with_nested_masks():
    model = net()
    handle, seen = apply_masks(model, full_masks(model)), []
    pruner = GradualPruner(handle, 0.1, end_step=10, every=4)
    for step in range(12):
        sgd_steps(model, model.parameters(), steps=1)
        pruner(step)
        seen.append({n: m.clone() for n, m in handle.masks().items()})
    assert count(seen[-1]) == 8
    for before, after in itertools.pairwise(seen):
        assert all((after[n] <= before[n]).all() for n in before)


def test_pruning_by_magnitude_never_brings_back_what_is_masked():
    model = nn.Linear(3, 1)
    model.weight.data = torch.tensor([[5.0, 0.0, 1.0]])
    handle = apply_masks(model, {"": torch.tensor([[False, True, True]])})
    handle.prune(2 / 3)
    assert handle.masks()[""].tolist() == [[False, True, True]]
    with pytest.raises(ValueError, match="density must be"):
        handle.prune(2.0)


# --- tickets ---------------------------------------------------------------------------------------------------------


def train_round(model, handle, index):
    if index == 0:
        handle.checkpoint()
    groups = handle.param_groups(0.1, 5.0) if hasattr(handle, "param_groups") else model.parameters()
    sgd_steps(model, groups, steps=6)
    if hasattr(handle, "set_beta"):
        handle.set_beta(200.0)


@pytest.mark.parametrize("reset", ["paper", "official"])
def test_cs_ticket_search_returns_mask_early_weights_and_history(reset):
    start = net().state_dict()
    ticket = ticket_search(net, train_round, rounds=3, s0=0.02, lam=2e-3, reset=reset)
    assert [record["round"] for record in ticket.history] == [0, 1, 2]
    assert 0 < ticket.density < 1 and ticket.scale == pytest.approx(1 + math.exp(-0.02))
    assert all(torch.equal(value, start[key]) for key, value in ticket.rewind_state.items())
    model = net(9)
    handle = ticket.install(model)
    assert handle.density() == ticket.density
    weight = model.get_submodule("1").weight
    torch.testing.assert_close(weight, start["1.weight"] * ticket.masks["1"] * ticket.scale)


@pytest.mark.parametrize("rounds", [1, 3])
def test_imp_keeps_a_power_of_its_ratio_and_rewinds(rounds):
    ticket = magnitude_ticket_search(net, train_round, rounds, keep_ratio=0.8)
    assert count(ticket.masks) == round(0.8**rounds * 80)
    for before, after in itertools.pairwise(ticket.history):
        assert after["density"] < before["density"]
    assert torch.equal(ticket.rewind_state["1.weight"], net().state_dict()["1.weight"])


def test_search_without_a_checkpoint_says_so():
    for search in (ticket_search, magnitude_ticket_search):
        with pytest.raises(RuntimeError, match=r"handle\.checkpoint"):
            search(net, lambda *_: None, 1)


# --- hard concrete ---------------------------------------------------------------------------------------------------


@given(st.floats(-4, 4))
@settings(max_examples=15, deadline=None)
def test_hard_concrete_opens_with_the_probability_it_claims(score):
    gate = HardConcreteGate((20_000,), init=score, generator=torch.Generator().manual_seed(0))
    rate = float((gate(torch.ones(20_000)) > 0).float().mean())
    assert rate == pytest.approx(float(gate.expected_open()[0]), abs=5 * 0.5 / math.sqrt(20_000))


def test_hard_concrete_is_noisy_only_in_training_and_gated_by_its_generator():
    gate = HardConcreteGate((100,), init=0.0, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    assert not torch.equal(gate(torch.ones(100)), gate(torch.ones(100)))
    assert torch.equal(torch.get_rng_state(), state)
    gate.eval()
    assert torch.equal(gate(torch.ones(100)), gate(torch.ones(100)))


def test_l0_folds_to_the_noiseless_gates_at_the_exact_density():
    model = net()
    handle = apply_l0(model, lam=1e-3, generator=torch.Generator().manual_seed(0))
    sgd_steps(model, handle.param_groups(0.1, 50.0))
    model.eval()
    x, before = torch.rand(3, 6), None
    handle.fold()
    before = model(x)
    handle.fold(density=0.1)
    assert count(handle.masks()) == 8
    assert before.shape == model(x).shape
    masks, model = handle.masks(), handle.finalize()
    assert all((model.get_submodule(n).weight[~m] == 0).all() for n, m in masks.items())


def test_folded_l0_model_equals_its_noiseless_forward():
    model = net()
    handle = apply_l0(model, init=0.5, generator=torch.Generator().manual_seed(0))
    x = torch.rand(3, 6)
    noiseless = model.eval()(x)
    handle.fold()
    torch.testing.assert_close(model(x), noiseless)


# --- inference and file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 6), (5, 6), (2, 3, 6), (6,)])
@pytest.mark.parametrize("bias", [True, False])
def test_sparse_linear_equals_the_dense_layer(shape, bias):
    layer = nn.Linear(6, 4, bias=bias)
    layer.weight.data *= torch.rand(4, 6) < 0.3
    x = torch.rand(shape)
    torch.testing.assert_close(SparseLinear(layer.weight, layer.bias)(x), layer(x), rtol=1e-5, atol=1e-6)


def test_sparse_finalize_keeps_the_function_and_only_replaces_gated_linears():
    model = SmallCNN(widths=(3, 4)).eval()
    handle = apply_cs(model, s0=0.1, exclude=["features.0"])
    with torch.no_grad():
        for scores in handle.gate_parameters():
            scores[::2] = -1.0
    handle.hard()
    x = torch.rand(2, 1, 8, 8)
    before = model(x)
    assert isinstance(handle.finalize(sparse=True).head, SparseLinear)
    assert type(model.features[4]) is nn.Conv2d
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    root = sparsify_linears(nn.Linear(3, 2))
    assert isinstance(root, SparseLinear) and root.density == 1.0


def test_sparse_linear_state_round_trip():
    first, second = (SparseLinear(torch.eye(3) * k, torch.ones(3)) for k in (2.0, 5.0))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(torch.ones(1, 3)), second(torch.ones(1, 3)))


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_file_round_trip_is_exact_and_as_small_as_promised(tmp_path_factory, rows, columns, density, dtype):
    generator = torch.Generator().manual_seed(rows * 41 + columns)
    tensor = torch.randn(rows, columns, generator=generator, dtype=dtype)
    tensor *= torch.rand(rows, columns, generator=generator) < density
    path = tmp_path_factory.mktemp("file") / "net.cs"
    written = save_sparse({"w": tensor, "n": torch.tensor(3)}, path)
    assert written == path.stat().st_size <= min(encodings(tensor).values()) + 8 + 260
    loaded = load_sparse(path)
    assert torch.equal(loaded["w"], tensor) and loaded["w"].dtype == dtype and loaded["n"] == 3


def test_the_form_changes_at_one_sixteenth():
    for kept, best in ((0.03, "csr"), (0.2, "bitmap"), (1.0, "dense")):
        tensor = torch.zeros(500, 500)
        tensor.view(-1)[: int(kept * 250_000)] = 1.0
        sizes = encodings(tensor)
        assert min(sizes, key=sizes.get) == best
    assert "csr" not in encodings(torch.zeros(1, 70_000))


def test_a_whole_network_comes_back(tmp_path):
    model, other = SmallCNN(widths=(3, 4)).eval(), SmallCNN(widths=(3, 4)).eval()
    apply_cs(model, s0=0.1).finalize(density=0.1)
    save_sparse(model, tmp_path / "net.cs")
    other.load_state_dict(load_sparse(tmp_path / "net.cs"))
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(x), other(x))


@given(cut=st.integers(0, 400))
@settings(max_examples=30, deadline=None)
def test_truncated_files_are_refused(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "net.cs"
    save_sparse({"w": torch.eye(30)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: cut % len(data)])
    with pytest.raises(ValueError, match=r"truncated or damaged|not a file"):
        load_sparse(path)


def test_flipped_bits_other_versions_and_other_files_are_refused(tmp_path):
    path = tmp_path / "net.cs"
    save_sparse({"w": torch.eye(30)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    with pytest.raises(ValueError, match="damaged"):
        load_sparse(path)
    body = data[:6] + struct.pack("<H", 9) + data[8:-4]
    path.write_bytes(body + struct.pack("<I", zlib.crc32(body)))
    with pytest.raises(ValueError, match="version 1, got 9"):
        load_sparse(path)
    path.write_bytes(b"PK" + data)
    with pytest.raises(ValueError, match="not a file of save_sparse"):
        load_sparse(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.cs"
    save_sparse({"w": torch.eye(3)}, path)
    with pytest.raises(TypeError, match="dense tensor"):
        save_sparse({"w": torch.eye(3), "z": torch.zeros(2, dtype=torch.complex64)}, path)
    assert torch.equal(load_sparse(path)["w"], torch.eye(3)) and len(list(tmp_path.iterdir())) == 1


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: global_magnitude_mask(net(), 1.0), "sparsity must be finite, >= 0 and < 1"),
        (lambda: top_k_masks({}, 0.5), "scores must name"),
        (lambda: top_k_masks({"a": torch.ones(2)}, 0.0), "density must be finite, > 0 and <= 1"),
        (lambda: top_k_masks({"a": torch.tensor([float("nan")])}, 0.5), "NaN"),
        (lambda: top_k_masks({"a": torch.ones(2)}, 0.5, -1), "min_keep must be >= 0"),
        (lambda: gmp_sparsity(-1, 5, 0.5), "step must be finite and >= 0"),
        (lambda: gmp_sparsity(1, 5, 1.0), "final must be finite, >= 0 and < 1"),
        (lambda: GradualPruner(apply_masks(net(), full_masks(net())), 0.5, 0), "end_step must be >= 1"),
        (lambda: gmp_sparsity(math.nan, 5, 0.5), "step must be finite"),
        (lambda: gmp_sparsity(1, 5, 0.5, -0.1), "initial must be finite, >= 0 and < 1"),
        (lambda: gmp_sparsity(1, 3, 0.5, start_step=3), "end_step must be finite and > 3"),
        (lambda: GradualPruner(apply_masks(net(), full_masks(net())), 0.5, 1, 0), "every must be >= 1"),
        (lambda: sparsify_linears(net(), ["nope"]), "names must be modules of the model, got 'nope'"),
        (lambda: apply_masks(net(), {}), "masks must name layers"),
        (lambda: apply_masks(net(), {"7": torch.ones(2, dtype=torch.bool)}), "masks must name layers"),
        (lambda: apply_masks(net(), {"1": torch.ones(2, dtype=torch.bool)}), "must have shape"),
        (lambda: apply_masks(net(), {"0": torch.ones(2, dtype=torch.bool)}), "parameter named weight"),
        (lambda: ticket_search(net, train_round, 0), "rounds must be >= 1"),
        (
            lambda: magnitude_ticket_search(net, train_round, 1, keep_ratio=0.0),
            "keep_ratio must be finite, > 0 and <= 1",
        ),
        (lambda: apply_l0(net(), lam=-1.0), "lam must be finite and >= 0"),
        (lambda: SparseLinear(torch.ones(3), None), "weight must be a matrix"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_masks_must_be_bool():
    with pytest.raises(TypeError, match="bool"):
        apply_masks(net(), {"1": torch.ones(8, 6)})


def test_dead_masks_warn():
    with pytest.warns(UserWarning, match="dead"):
        apply_masks(nn.Linear(2, 1), {"": torch.zeros(1, 2, dtype=torch.bool)})


def test_a_ticket_is_read_only():
    with pytest.raises(AttributeError):
        Ticket({}, {}).scale = 2.0


@pytest.mark.slow
def test_cs_prunes_digits_to_a_few_percent_and_stays_accurate():
    """Direction: a few per cent of the weights of a digits network, well above a random mask of that size."""
    digits = data.load("digits")

    def accuracy(model, groups, on_step=None):
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
        x, y, generator = digits.x_train, digits.y_train, torch.Generator().manual_seed(0)
        train.fit(model, x, y, optimizer=optimizer, epochs=20, generator=generator, on_step=on_step)
        return train.accuracy(model, digits.x_test, digits.y_test)

    def fresh():
        return mlp([64, 100, 10], generator=torch.Generator().manual_seed(0))

    model, schedule = fresh(), BetaSchedule(240, granularity="step")
    handle = apply_cs(model, s0=-0.05, lam=3e-4)
    ours = accuracy(model, handle.param_groups(0.05, 20.0), lambda step, _: handle.set_beta(schedule(step + 1)))
    model, density = fresh(), handle.density()
    apply_masks(model, random_masks(full_masks(model), density, torch.Generator().manual_seed(0)))
    random = accuracy(model, model.parameters())
    assert density < 0.1 and ours > 80 and ours > random + 5
