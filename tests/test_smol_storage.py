"""SMOL on disk: digit planes, the entropy coder, maps of bits, the file and what it refuses; baselines and controls."""

import contextlib
import inspect
import io
import json
import lzma
import math
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.compress import (
    PackedModel,
    QuantizedTensor,
    apply_smol,
    decode_levels,
    encode_levels,
    greedy_layer_bits,
    layer_average_bits,
    map_entropy,
    pack,
    s_from_bits,
    shuffled_bits,
    uniform_qat,
)
from effnb.compress.smol import codec, packed
from effnb.compress.smol.codec import (
    decode_map,
    encode_map,
    group_map,
    pack_planes,
    plane_bytes,
    ungroup_map,
    unpack_planes,
)
from effnb.models import SmallCNN, mlp


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def net(seed=0):
    return mlp([30, 16, 4], generator=rng(seed))


def mixed(seed=0, granularity="weight", model=None):
    """A frozen model with all sorts of bits."""
    handle = apply_smol(model or net(seed), granularity=granularity)
    with torch.no_grad():
        for s in handle.precision_parameters():
            s.copy_(s_from_bits(1.2 + 7 * torch.rand(s.shape, generator=rng(seed)) ** 2))
    handle.freeze()
    return handle


def levels_like(shares, n, seed=0):
    return np.random.default_rng(seed).choice(len(shares), n, p=shares).astype(np.uint8) + np.uint8(1)


# --- digit planes ----------------------------------------------------------------------------------------------------


def slow_planes(codes, bits):
    """One weight after the other, plane by plane."""
    planes = [[c >> (7 - i) & 1 for c, p in zip(codes, bits, strict=True) if p > i] for i in range(8)]
    return b"".join(np.packbits(np.array(plane, np.uint8)).tobytes() for plane in planes if plane)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(1, 8)), max_size=70))
def test_planes_equal_the_obvious_loop_and_come_back(pairs):
    codes, bits = (np.array([pair[i] for pair in pairs], np.uint8) for i in range(2))
    data = pack_planes(codes, bits)
    assert data == slow_planes(codes.tolist(), bits.tolist()) and len(data) == plane_bytes(bits)
    kept = codes & ~np.uint8(0) << (8 - bits)
    assert (unpack_planes(data, bits) == kept).all()


def test_planes_of_a_large_tensor_have_no_slack():
    bits = levels_like([0.5, 0.2, 0.2, 0.0, 0.0, 0.0, 0.0, 0.1], 100_003)
    codes = np.random.default_rng(1).integers(0, 256, len(bits)).astype(np.uint8)
    data = pack_planes(codes, bits)
    assert 0 <= 8 * len(data) - int(bits.sum(dtype=np.int64)) < 8 * 8  # less than a byte a plane
    assert (unpack_planes(data, bits) == codes & (0xFF << (8 - bits.astype(np.uint16))).astype(np.uint8)).all()
    with pytest.raises(ValueError, match="must hold"):
        unpack_planes(data[:-1], bits)


# --- the entropy coder -----------------------------------------------------------------------------------------------

HISTOGRAMS = {
    "five levels": [0.33, 0.3, 0.2, 0.12, 0, 0, 0, 0.05],
    "two levels": [0.6, 0.4],
    "mostly one": [0.95, 0.03, 0.02],
    "eight levels": [0.125] * 8,
    "skewed eight": [0.9, 0.04, 0.03, 0.01, 0.01, 0.005, 0.004, 0.001],
}


@pytest.mark.parametrize("name", HISTOGRAMS)
@pytest.mark.parametrize("n", [100_000, 1_000_001])
def test_the_coder_stays_within_five_per_cent_of_the_entropy(name, n):
    levels = levels_like(HISTOGRAMS[name], n)
    data, entropy = encode_levels(levels), map_entropy(torch.from_numpy(levels)) * n
    assert 8 * len(data) <= 1.05 * entropy
    assert (decode_levels(data, n) == levels).all()


def test_general_compressors_do_not_reach_that():
    """Why there is a coder of our own."""
    levels = levels_like(HISTOGRAMS["five levels"], 200_000)
    entropy = map_entropy(torch.from_numpy(levels)) * len(levels) / 8
    assert len(zlib.compress(levels.tobytes(), 9)) > 1.15 * entropy
    assert len(lzma.compress(levels.tobytes())) > 1.05 * entropy


@given(st.lists(st.integers(0, 255), min_size=2, max_size=60), st.integers(0, 10**6))
def test_any_short_array_comes_back(values, payload):
    levels = np.array(values, np.uint8)
    data = encode_levels(levels, payload)
    if data is None:
        assert len(set(values)) == 1
    else:
        assert decode_levels(data, len(values)).tolist() == values


@given(st.integers(0, 3), st.integers(0, 10**9), st.integers(0, 255))
@settings(max_examples=200)
def test_damaged_codes_are_refused_or_at_least_harmless(seed, at, value):
    levels = levels_like(HISTOGRAMS["skewed eight"], 500, seed)
    data = bytearray(encode_levels(levels))
    data[at % len(data)] = value
    with contextlib.suppress(ValueError):
        assert len(decode_levels(bytes(data), 500)) == 500
    for cut in (0, 3, len(data) - 1):
        with pytest.raises(ValueError, match="index must"):
            decode_levels(bytes(data[:cut]), 500)


# --- maps of bits ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 8), max_size=40))
def test_maps_come_back(values):
    levels = np.array(values, np.uint8)
    form, data = encode_map(levels)
    assert decode_map(form, data, (len(values),)).tolist() == values


def test_the_smallest_form_is_taken():
    forms = {
        "constant": np.full(1000, 3, np.uint8),
        "fixed": levels_like([0.25] * 4, 1000),
        "coded": levels_like([0.9, 0.1], 10_000),
    }
    for form, levels in forms.items():
        assert encode_map(levels)[0] == form
    for form, data, count in (
        ("constant", b"", 2),
        ("fixed", b"\x02\x01\x02", 9),
        ("huffman", b"", 1),
        ("constant", b"\x09", 2),
    ):
        with pytest.raises(ValueError, match="map"):
            decode_map(form, data, (count,))


def with_border(rows, columns, seed=0):
    """A map whose outer columns, and whose first rows, have one bit, and whose inner ones have more."""
    g = np.random.default_rng(seed)
    busy = np.outer(np.linspace(-0.5, 1.5, rows).clip(0), np.exp(-(np.linspace(-3, 3, columns) ** 2)))
    return (1 + g.poisson(2 * busy).clip(0, 7)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(16, 784), (300, 784), (12, 900)])
def test_lines_of_few_bits_are_cheap(shape):
    levels = with_border(*shape)
    form, data = encode_map(levels)
    assert form == "lines" and (decode_map(form, data, shape) == levels).all()
    entropy = map_entropy(torch.from_numpy(levels)) * levels.size
    assert 8 * len(data) < 0.97 * entropy and len(data) < len(lzma.compress(levels.tobytes()))
    with pytest.raises(ValueError, match="damaged"):
        decode_map(form, data, (levels.size,))
    for cut in (1, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=r"damaged|must"):
            decode_map(form, data[:cut], shape)


def test_a_map_without_structure_is_not_cut_into_lines():
    levels = levels_like(HISTOGRAMS["five levels"], 90_000)
    assert encode_map(levels.reshape(300, 300))[0] == "coded"


@pytest.mark.parametrize(("granularity", "entries"), [("filter", 8), ("input", 10), ("layer", 1), (("block", 7), 103)])
def test_shared_bits_are_stored_once(granularity, entries):
    model = nn.Sequential(nn.Conv2d(10, 8, 3, bias=False))
    handle = mixed(model=model, granularity=granularity)
    bits = handle.bits()["0"].numpy()
    levels, block = group_map(bits, 7)
    assert levels.size == entries
    assert (ungroup_map(levels, block, bits.shape) == bits.reshape(-1)).all()
    packed = pack(model)
    assert packed.index_bits <= 8 * (9 + entries)
    assert torch.equal(PackedModel.from_bytes(packed.to_bytes()).to_state_dict()["0.weight"], model[0].weight)


# --- models and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["weight", "filter", "input", "layer", ("block", 16), ("block", 7)])
@pytest.mark.parametrize("make", [net, lambda: SmallCNN(widths=(4, 8), generator=rng())])
def test_a_file_gives_the_model_back_bit_for_bit(make, granularity, tmp_path):
    handle = mixed(model=make(), granularity=granularity)
    packed = pack(handle.model)
    assert packed.payload_bits == sum(int(bits.sum()) for bits in handle.bits().values())
    assert packed.payload_bits / packed.weights == pytest.approx(handle.average_bits())
    assert (
        packed.entropy_bits == pytest.approx(handle.cost().index * packed.weights, abs=1e-6) or granularity == "layer"
    )
    size = packed.save(tmp_path / "net.smol")
    assert size == packed.nbytes == (tmp_path / "net.smol").stat().st_size
    state, plain = PackedModel.load(tmp_path / "net.smol").to_state_dict(), make()
    plain.load_state_dict(state)
    for key, value in handle.finalize().state_dict().items():
        assert torch.equal(state[key], value) and state[key].dtype == value.dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_types_and_shapes_come_back(dtype, tmp_path):
    tensors = {
        "scalar": QuantizedTensor(torch.tensor(0.3, dtype=dtype), 3, 0.1),
        "empty": QuantizedTensor(torch.zeros(0, 4, dtype=dtype), 2),
        "rows": QuantizedTensor(
            torch.linspace(-2, 2, 12, dtype=dtype).view(3, 4), 5, torch.tensor([[1.0], [0.1], [3.0]])
        ),
        "raw": torch.arange(5, dtype=dtype),
        "flag": torch.tensor([True, False]),
        "count": torch.tensor(7),
        "none": torch.zeros(0),
    }
    pack(tensors).save(tmp_path / "t")
    state = PackedModel.load(tmp_path / "t").to_state_dict()
    for name, item in tensors.items():
        expected = item.dequantize() if isinstance(item, QuantizedTensor) else item
        assert torch.equal(state[name], expected) and state[name].dtype == expected.dtype
        assert state[name].shape == expected.shape


@given(st.integers(1, 300), st.integers(0, 100))
@settings(max_examples=30)
def test_unpack_of_pack_is_the_identity(n, seed):
    g = rng(seed)
    u, bits = 4 * torch.rand(n, generator=g) - 2, torch.randint(1, 9, (n,), generator=g)
    packed = pack({"w": QuantizedTensor(u, bits, 0.37)})
    assert packed.payload_bits == int(bits.sum())
    assert torch.equal(packed.to_state_dict()["w"], QuantizedTensor(u, bits, 0.37).dequantize())


def test_a_large_file_is_within_five_per_cent_of_payload_and_entropy():
    levels = torch.from_numpy(levels_like(HISTOGRAMS["five levels"], 300_000))
    packed = pack({"w": QuantizedTensor(4 * torch.rand(300_000, generator=rng()) - 2, levels)})
    assert packed.index_bits <= 1.05 * packed.entropy_bits
    assert packed.nbytes <= 1.05 * (packed.payload_bits + packed.entropy_bits) / 8 + 1000
    buffer = io.BytesIO()
    torch.save({"w": packed.to_state_dict()["w"]}, buffer)
    assert packed.nbytes * 6 < buffer.tell()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits must hold whole numbers"),
        ({"bits": 9}, "bits must hold whole numbers"),
        ({"bits": torch.tensor([1.5, 2.0])}, "bits must hold whole numbers"),
        ({"bits": torch.tensor([1, 2, 3])}, "bits must broadcast"),
        ({"u": torch.tensor([0.0, 2.1])}, r"u must be in \[-2, 2\]"),
        ({"u": torch.tensor([0.0, math.nan])}, r"u must be in \[-2, 2\]"),
        ({"u": torch.tensor([0, 1])}, "u must be floating"),
        ({"scale": 0.0}, "scale must be finite and > 0"),
        ({"scale": -1.0}, "scale must be finite and > 0"),
        ({"scale": math.nan}, "scale must be finite and > 0"),
        ({"scale": torch.tensor([1.0, math.inf])}, "scale must be finite and > 0"),
    ],
)
def test_bad_tensors_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizedTensor(**({"u": torch.tensor([0.5, -0.5]), "bits": 2} | options))


def test_bad_models_are_refused():
    with pytest.raises(ValueError, match="call freeze"):
        pack(apply_smol(net()).model)
    with pytest.raises(ValueError, match="at least one quantised weight"):
        pack(net())
    with pytest.raises(ValueError, match="at least one quantised weight"):
        pack({})
    good = QuantizedTensor(torch.zeros(2), 1)
    assert torch.equal(pack({"a": (torch.zeros(2), 1, 0.5)}).to_state_dict()["a"], torch.full((2,), 0.5))
    with pytest.raises(TypeError, match="must be a tensor or a QuantizedTensor"):
        pack({"a": good, "b": [1, 2]})
    with pytest.raises(TypeError, match="must be a dense tensor"):
        pack({"a": good, "b": torch.zeros(2, dtype=torch.complex64)})


@pytest.fixture(scope="module")
def file():
    return pack(mixed().model).to_bytes()


def resealed(body):
    """A checksum that fits, as someone who means harm would add."""
    return bytes(body) + struct.pack("<I", zlib.crc32(body))


def test_wrong_magic_version_and_length_are_named(file, tmp_path):
    start = len(packed.MAGIC)
    with pytest.raises(ValueError, match="must start with"):
        PackedModel.from_bytes(b"PK" + file[2:])
    newer = bytearray(file)
    newer[start : start + 2] = struct.pack("<H", 2)
    with pytest.raises(ValueError, match="version 1, got 2"):
        PackedModel.from_bytes(bytes(newer))
    for size in (start, start + 9, 40, len(file) // 2, len(file) - 1):
        (tmp_path / "cut").write_bytes(file[:size])
        with pytest.raises(ValueError, match="cut is truncated"):
            PackedModel.load(tmp_path / "cut")
    with pytest.raises(ValueError, match="damaged"):
        PackedModel.from_bytes(file + b"\0")


@given(st.integers(0, 10**9), st.integers(1, 255))
@settings(max_examples=150)
def test_any_flipped_byte_is_noticed(at, flip):
    data = bytearray(FLIPPED)
    data[at % len(data)] ^= flip
    with pytest.raises(ValueError):
        PackedModel.from_bytes(bytes(data))


FLIPPED = pack({"w": QuantizedTensor(torch.linspace(-2, 2, 50), torch.arange(50) % 8 + 1)}).to_bytes()


def with_index(file, change):
    """The file with another index of entries and sizes and checksum that fit."""
    start = len(packed.MAGIC) + packed._HEAD.size
    _, _, size = packed._HEAD.unpack_from(file, len(packed.MAGIC))
    index = zlib.compress(json.dumps(change(json.loads(zlib.decompress(file[start : start + size])))).encode())
    rest = file[start + size : -4]
    length = start + len(index) + len(rest) + 4
    return resealed(packed.MAGIC + packed._HEAD.pack(1, length, len(index)) + index + rest)


LIES = [("shape", [10**9, 10**9]), ("shape", [-1]), ("shape", [5, 5]), ("shape", "ab"), ("map", [7]), ("block", 0)]
LIES += [("kind", "pickle"), ("dtype", "object"), ("form", "eval"), ("bits", None), ("scale", [2, 2])]
LIES += [("parts", [4, 10**12, 1]), ("parts", [4])]


@pytest.mark.parametrize(("key", "value"), LIES)
def test_an_index_that_lies_is_refused(file, key, value):
    def change(records):
        next(r for r in records if r["kind"] == "pm1")[key] = value
        return records

    with pytest.raises(ValueError):
        PackedModel.from_bytes(with_index(file, change)).to_state_dict()
    assert PackedModel.from_bytes(with_index(file, lambda records: records)).payload_bits > 0


def test_a_zipped_bomb_is_not_inflated(file, monkeypatch):
    monkeypatch.setattr(packed, "_LARGEST_INDEX", 100)
    with pytest.raises(ValueError, match="too large"):
        PackedModel.from_bytes(file)


def test_nothing_is_pickled():
    for module in (packed, codec):
        source = inspect.getsource(module).replace("unpickled", "")
        assert "pickle" not in source and "torch.load" not in source


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        pack(mixed().model).save(tmp_path / "net")
    assert not list(tmp_path.iterdir())


# --- baselines and controls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_uniform_baseline_uses_the_same_quantiser(bits):
    handle = uniform_qat(net(), bits)
    assert handle.histogram() == {bits: 30 * 16 + 16 * 4} and handle.is_frozen
    smol = apply_smol(net(), init_bits=8)
    with torch.no_grad():
        for s in smol.precision_parameters():
            s.fill_(s_from_bits(bits + 1e-3))
    smol.freeze()
    x = torch.randn(5, 30, generator=rng())
    assert torch.equal(handle.model(x), smol.model(x))
    assert pack(handle.model).index_bits == 2 * 8  # a byte a layer


def test_uniform_baseline_takes_given_bits_and_scales():
    other = mixed(3)
    scales = {name: gate.scale for name, gate in other.gates.items()}
    handle = uniform_qat(net(1), other.bits(), scale=scales)
    assert handle.histogram() == other.histogram()
    assert all(torch.equal(handle.gates[name].scale, scale) for name, scale in scales.items())
    with pytest.raises(ValueError, match="name every layer"):
        uniform_qat(net(), {"1": 2})
    with pytest.raises(ValueError, match="scale must name every layer"):
        uniform_qat(net(), 2, scale={"1": scales["1"]})
    with pytest.raises(ValueError, match="bits of layer '3' must broadcast"):
        uniform_qat(net(), {"1": 2, "3": torch.ones(5)})
    for bad in (0, 9, 2.5, {"1": 2, "3": torch.full((4, 16), 9)}):
        with pytest.raises(ValueError, match="bits must hold"):
            uniform_qat(net(), bad)


@pytest.mark.parametrize("within", [True, False])
def test_shuffles_keep_the_histogram(within):
    bits = mixed().bits()
    new = shuffled_bits(bits, rng(), within)
    flat = [torch.cat([each.reshape(-1) for each in maps.values()]).sort().values for maps in (bits, new)]
    assert torch.equal(*flat) and any(not torch.equal(bits[k], new[k]) for k in bits)
    same = all(torch.equal(bits[k].reshape(-1).sort().values, new[k].reshape(-1).sort().values) for k in bits)
    assert same == within
    assert all(torch.equal(new[k], shuffled_bits(bits, rng(), within)[k]) for k in bits)
    with pytest.raises(ValueError, match="at least one layer"):
        shuffled_bits({}, rng())


def test_layer_averages_keep_the_sum_of_every_layer():
    bits = mixed().bits()
    flat = layer_average_bits(bits, rng())
    for name, each in bits.items():
        assert int(flat[name].sum()) == int(each.sum()) and int(flat[name].max()) - int(flat[name].min()) <= 1


def test_greedy_allocation_spends_where_the_loss_is_and_changes_nothing():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = model[1].weight, model[3].weight

    def loss():  # the second layer matters, the first does not
        return float((second.detach() - before["3.weight"]).square().sum() + 1e-6 * first.detach().square().sum())

    found = greedy_layer_bits(model, loss, budget=2.0)
    assert found["3"] > found["1"] and (480 * found["1"] + 64 * found["3"]) / 544 <= 2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="budget must be"):
        greedy_layer_bits(model, loss, budget=0.5)
    with pytest.raises(ValueError, match="levels must hold"):
        greedy_layer_bits(model, loss, budget=2, levels=(1, 9))

    def broken():
        raise KeyError("loss")

    with pytest.raises(KeyError):
        greedy_layer_bits(model, broken, budget=2.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
