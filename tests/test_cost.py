"""Counted cost against hand formulas and the published figures of ResNet-20."""

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effnb.lab.measure.cost import count_flops, count_params, saved_activation_bytes, stored_bytes
from effnb.lab.measure.seed import state_hash


class Block(nn.Module):
    """Basic block with a parameter-free (option A) shortcut."""

    def __init__(self, fan_in, width):
        super().__init__()
        self.stride, self.extra = width // fan_in, width - fan_in
        self.conv1 = nn.Conv2d(fan_in, width, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(y + shortcut)


def resnet20():
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture(autouse=True)
def _no_warning():
    """A warning that a test does not expect is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def resnet20_macs():
    stem, first = 27 * 16 * 32**2, 9 * 16 * 16 * 32**2 * 6
    second = 9 * 16 * 32 * 16**2 + 9 * 32 * 32 * 16**2 * 5
    third = 9 * 32 * 64 * 8**2 + 9 * 64 * 64 * 8**2 * 5
    return stem + first + second + third + 640


# --- FLOPs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_resnet20_has_269722_parameters_and_81_million_flops(training):
    model = resnet20().train(training)
    flops = count_flops(model, torch.zeros(1, 3, 32, 32).expand(2, -1, -1, -1))
    assert count_params(model).total == 269_722
    assert flops.total == 2 * 2 * resnet20_macs()
    assert flops.total / 2 == pytest.approx(81.1e6, rel=1e-3)
    assert flops.unknown == ()


def test_backward_is_twice_the_forward_but_once_for_the_first_layer():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 7))
    x = torch.zeros(2, 3)
    first, second = 2 * 2 * 3 * 5, 2 * 2 * 5 * 7
    assert count_flops(model, x).total == first + second
    assert count_flops(model, x, backward=True).total == 2 * first + 3 * second
    assert count_flops(model, x.requires_grad_(), backward=True).total == 3 * (first + second)


def test_frozen_layers_cost_less():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    model[0].requires_grad_(False)
    assert count_flops(model, torch.zeros(2, 3), backward=True).total == 60 + 2 * 140


def test_grouped_convolutions_and_attention():
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert count_flops(conv, torch.zeros(1, 8, 6, 6)).total == 2 * 9 * 8 * 36
    q = torch.zeros(1, 2, 5, 4)
    assert count_flops(F.scaled_dot_product_attention, q, q, q).total == 2 * (2 * 2 * 5 * 5 * 4)


@pytest.mark.parametrize(
    ("fn", "shapes", "name"),
    [
        (torch.mv, [(5, 4), (4,)], "mv"),
        (torch.dot, [(9,), (9,)], "dot"),
        (torch.fft.rfft, [(64,)], "_fft_r2c"),
        (torch.sort, [(64,)], "sort"),
        (torch.linalg.qr, [(4, 4)], "linalg_qr"),
    ],
)
def test_what_torch_cannot_count_is_named(fn, shapes, name):
    args = [torch.zeros(shape) for shape in shapes]
    with pytest.warns(UserWarning, match=f"no FLOPs counted for {name}"):
        flops = count_flops(fn, *args)
    assert (flops.total, flops.unknown) == (0, (name,))
    silent = count_flops(fn, *args, extra={name: 40})
    assert (silent.matmul_conv, silent.extra, silent.total, silent.unknown) == (0, 40, 40, ())


def test_hand_formulas_are_added_and_kept_apart():
    n = 64
    extra = {"_fft_r2c": 2.5 * n * math.log2(n), "_fft_c2r": 2.5 * n * math.log2(n)}

    def circulant(x, layer):
        return layer(torch.fft.irfft(torch.fft.rfft(x) * 2.0))

    flops = count_flops(circulant, torch.zeros(1, n), nn.Linear(n, 3), extra=extra)
    assert (flops.matmul_conv, flops.extra) == (2 * n * 3, 5 * n * 6)
    assert flops.total == flops.matmul_conv + flops.extra


def test_a_custom_kernel_is_unknown():
    @torch.library.custom_op("effnb_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with pytest.warns(UserWarning, match="effnb_test::double"):
        assert count_flops(double, torch.zeros(5)).unknown == ("effnb_test::double",)


@pytest.mark.parametrize(("size", "unknown"), [(1, ()), (2, ("dot",))])
def test_ops_are_let_pass_up_to_one_percent_of_the_elements(size, unknown):
    """300 elements of the product beside 3 (0.99 %) or 5 (1.6 %) of the dot product."""

    def both(a, v):
        return a @ a, torch.dot(v, v)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert count_flops(both, torch.zeros(10, 10), torch.zeros(size)).unknown == unknown
    assert len(caught) == len(unknown)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten()),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.AvgPool2d(2), nn.Upsample(scale_factor=2)),
        nn.Sequential(nn.Flatten(), nn.LayerNorm(192), nn.Linear(192, 4), nn.Softmax(-1)),
        nn.TransformerEncoderLayer(8, 2, batch_first=True),
    ],
)
def test_usual_layers_are_not_called_unknown(model):
    x = torch.zeros(2, 8, 8) if isinstance(model, nn.TransformerEncoderLayer) else torch.zeros(2, 3, 8, 8)
    assert count_flops(model, x, backward=True).unknown == ()


def test_counting_leaves_gradients_buffers_and_the_global_stream_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, stream = state_hash(model), torch.get_rng_state()
    for fn, args in ((model, ()), (lambda x, m: m(x).sum(), (model,))):
        count_flops(fn, torch.rand(2, 3, 6, 6, generator=torch.Generator()), *args, backward=True)
        saved_activation_bytes(fn, torch.zeros(2, 3, 6, 6), *args)
    assert state_hash(model) == before
    assert torch.equal(torch.get_rng_state(), stream)
    assert model[0].weight.grad.eq(1).all() and model[0].bias.grad is None


def test_refusals():
    with pytest.raises(ValueError, match="extra must hold FLOPs >= 0"):
        count_flops(torch.sin, torch.zeros(2), extra={"sin": -1})
    with pytest.raises(ValueError, match="extra must hold FLOPs >= 0"):
        count_flops(torch.sin, torch.zeros(2), extra={"sin": math.nan})
    with pytest.raises(ValueError, match="backward=True needs an output"):
        count_flops(torch.sin, torch.zeros(2), backward=True)


# --- parameters --------------------------------------------------------------------------------------------------


def test_parameters_are_split_and_tied_ones_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[3].weight = nn.Parameter(model[0].weight.detach().t())  # same memory, another object
    model[1].requires_grad_(False)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1)
        model[2].bias.fill_(1)
        model[3].bias.fill_(1)
    params = count_params(model)
    assert (params.trainable, params.frozen, params.buffers) == (16 + 12, 8, 9)
    assert params.nonzeros == 12 + 4
    assert params.total == 36


def test_parameters_without_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False))
    assert count_params(model).total == 12
    assert count_params(model).nonzeros is None


# --- bytes -------------------------------------------------------------------------------------------------------


def test_stored_bytes_are_those_of_real_files(tmp_path):
    model = nn.Linear(100, 100)
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    assert stored_bytes(path) == stored_bytes(str(path)) == path.stat().st_size
    assert abs(stored_bytes(model) - path.stat().st_size) < 128
    assert stored_bytes(model) == stored_bytes(model.state_dict())
    assert stored_bytes(model) > 4 * 10_100
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "scales.bin").write_bytes(b"12345")
    assert stored_bytes(tmp_path) == path.stat().st_size + 5


def test_packing_pays_on_disk():
    half = {"w": torch.zeros(50_000, dtype=torch.uint8)}
    assert stored_bytes(half) < 0.26 * stored_bytes({"w": torch.zeros(50_000)})


def test_stored_bytes_refuses(tmp_path):
    with pytest.raises(ValueError, match="source must be an existing path"):
        stored_bytes(tmp_path / "absent")
    with pytest.raises(TypeError, match="source must be a path, a module or a state_dict, got int"):
        stored_bytes(3)


# --- activations -------------------------------------------------------------------------------------------------


def test_activations_of_a_perceptron_by_hand():
    """Linear keeps its input (ReLU's output is kept once for both), never its weight."""
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    assert saved_activation_bytes(model, torch.zeros(8, 10)) == 4 * (8 * 10 + 8 * 20)


def test_activations_of_functions_frozen_weights_and_views():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)).requires_grad_(False)
    x = torch.zeros(8, 10, requires_grad=True)
    assert saved_activation_bytes(model, x) == 0
    assert saved_activation_bytes(lambda m, x: m(x).sum(), model, x) == 0
    assert saved_activation_bytes(lambda w, x: (x @ w).sum(), nn.Parameter(torch.zeros(10, 3)), x) == 4 * 80
    assert saved_activation_bytes(lambda x: x[:4] * x[4:], x) == 4 * 80


def test_activations_outlive_what_is_freed_on_the_way():
    """Sixteen equal-sized intermediates must not be mistaken for one reused address."""

    def chain(x):
        for _ in range(16):
            x = x.exp()
        return x

    assert saved_activation_bytes(chain, torch.zeros(100, requires_grad=True)) == 16 * 400


def test_no_gradient_no_activations():
    assert saved_activation_bytes(torch.exp, torch.zeros(10)) == 0
    with torch.no_grad():
        assert saved_activation_bytes(torch.exp, torch.zeros(10, requires_grad=True)) == 40
