"""Named streams that do not shift each other, and hashes that tell bit-equal states."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from effnb.lab.measure.seed import seed_everything, state_hash, streams


@pytest.fixture(autouse=True)
def _restore_global_state():
    python, legacy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    benchmark = torch.backends.cudnn.benchmark
    yield
    random.setstate(python)
    np.random.set_state(legacy)  # noqa: NPY002
    torch.set_rng_state(torch_state)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = benchmark


def draw(generator):
    return torch.rand(4, generator=generator).tolist()


def global_draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_seed_everything_fixes_python_numpy_torch_and_the_generator():
    first, a = seed_everything(7), global_draws()
    second, b = seed_everything(7), global_draws()
    assert a == b
    assert draw(first) == draw(second)
    assert global_draws() != (seed_everything(8), global_draws())[1]


def test_seed_everything_asks_for_deterministic_algorithms_with_warnings_only():
    seed_everything(0)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.get_float32_matmul_precision() == "highest"


def test_returned_generator_is_not_the_global_one():
    generator = seed_everything(0)
    before = torch.get_rng_state()
    draw(generator)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("names", [("data",), ("init", "data"), ("data", "init"), ("a", "b", "data", "noise")])
def test_a_stream_depends_on_seed_and_name_alone(names):
    assert draw(streams(3, *names)["data"]) == draw(streams(3, "data")["data"])


def test_streams_differ_by_name_and_seed():
    draws = [tuple(draw(g)) for seed in range(20) for g in streams(seed, "init", "data", "noise").values()]
    assert len(set(draws)) == len(draws)


def test_streams_of_neighbouring_seeds_are_uncorrelated():
    rows = torch.stack([torch.randn(20_000, generator=streams(seed, "noise")["noise"]) for seed in range(8)])
    off_diagonal = torch.corrcoef(rows) - torch.eye(8)
    assert off_diagonal.abs().max() < 5 / 20_000**0.5


def test_streams_leave_the_global_states_alone():
    before = (random.getstate(), torch.get_rng_state().tolist())
    streams(0, "init")
    assert before == (random.getstate(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("seed", [1.0, "1", True, None])
def test_seed_of_a_wrong_type(seed):
    with pytest.raises(TypeError, match="seed must be an integer"):
        seed_everything(seed)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match="seed must be in"):
        streams(seed, "init")


@pytest.mark.parametrize("names", [(), ("",), ("a", "a")])
def test_bad_names(names):
    with pytest.raises(ValueError, match="names must be distinct"):
        streams(0, *names)


def test_names_of_a_wrong_type():
    with pytest.raises(TypeError, match="names must be strings"):
        streams(0, 1)


def test_numpy_integers_are_seeds():
    assert draw(streams(np.int64(4), "a")["a"]) == draw(streams(4, "a")["a"])


def test_state_hash_sees_one_bit():
    layer = nn.Linear(3, 2)
    before = state_hash(layer)
    assert before == state_hash(layer.state_dict())
    with torch.no_grad():
        layer.bias[0] = torch.nextafter(layer.bias[0], torch.tensor(torch.inf))
    assert state_hash(layer) != before


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"x": torch.zeros(2)}, {"y": torch.zeros(2)}),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.tensor(0.0), torch.tensor(-0.0)),
        ({"step": 1}, {"step": 1.0}),
        ({"a": [1, [2]]}, {"a": [[1], 2]}),
    ],
)
def test_state_hash_tells_apart(a, b):
    assert state_hash(a) != state_hash(b)


def test_state_hash_ignores_order_of_keys_strides_and_copies():
    x = torch.arange(6.0).reshape(2, 3)
    assert state_hash({"a": x, "b": 1}) == state_hash({"b": 1, "a": x.clone()})
    assert state_hash(x.t()) == state_hash(x.t().contiguous())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int8, torch.complex64])
def test_state_hash_takes_every_dtype(dtype):
    assert state_hash(torch.ones(3, dtype=dtype)) == state_hash(torch.ones(3, dtype=dtype))
    assert state_hash(torch.ones(0, dtype=dtype)) != state_hash(torch.ones(3, dtype=dtype))


def test_state_hash_takes_an_optimizer_state():
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = state_hash(optimizer.state_dict())
    optimizer.step()
    assert state_hash(optimizer.state_dict()) != before


def test_state_hash_rejects_what_has_no_bytes():
    with pytest.raises(TypeError, match="state must hold tensors"):
        state_hash({"f": print})
