"""Chain of LoRA: the adapted layer against the dense formula, the merge, the guards."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from effnb.finetune import LoRALinear, inject_lora
from effnb.finetune.cola.lora import AdaptedLinear


def adapted(fan_in=7, fan_out=5, r=2, alpha=3.0, dtype=torch.float64, seed=0, **options):
    """A layer with two full factors, as after some training."""
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(fan_in, fan_out, dtype=dtype), r, alpha, **options)
    nn.init.normal_(layer.B, std=0.5)
    return layer


def dense(layer, x):
    """The oracle: form W + s B A in full."""
    weight = layer.base.weight + layer.alpha / layer.r * layer.B @ layer.A
    return x @ weight.T + (0 if layer.base.bias is None else layer.base.bias)


# ---------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (0, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_the_dense_formula(shape, bias):
    layer, x = adapted(), torch.randn(shape, dtype=torch.float64)
    if not bias:
        layer.base.bias = None
    torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight, layer.base.weight + layer.delta_weight(), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_dense_formula():
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))]
    assert torch.autograd.gradcheck(lambda *a: AdaptedLinear.apply(*a, 1.7), args)
    assert torch.autograd.gradgradcheck(lambda *a: AdaptedLinear.apply(*a, 1.7), args)
    without_bias = [*args[:2], *args[3:]]
    assert torch.autograd.gradcheck(lambda x, W, A, B: AdaptedLinear.apply(x, W, None, A, B, 0.3), without_bias)


def test_gradients_at_a_fresh_link():
    """T7: dL/dB = s G A^T and dL/dA = 0, with G the gradient of the effective weight."""
    layer = LoRALinear(nn.Linear(7, 5).double(), 2, alpha=3.0)
    x, target = torch.randn(11, 7).double(), torch.randn(11, 5).double()
    weight = layer.base.weight.detach().clone().requires_grad_()
    (x @ weight.T + layer.base.bias - target).square().sum().backward()
    (layer(x) - target).square().sum().backward()
    torch.testing.assert_close(layer.B.grad, layer.scale * weight.grad @ layer.A.detach().T, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.A.grad, torch.zeros_like(layer.A))


def test_a_gradient_of_constant_entries_is_no_special_case():
    layer, x = adapted(), torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(layer(x).mean(), (x, layer.A, layer.B))
    theirs = torch.autograd.grad(dense(layer, x).mean(), (x, layer.A, layer.B))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merge_identity(dtype, limit):
    """T2: the merged layer and the adapter give the same function, and a second merge adds nothing."""
    layer, x = adapted(64, 48, 8, dtype=dtype), torch.randn(100, 64, dtype=dtype)
    before = layer(x)
    layer.merge_()
    assert (layer.base(x) - before).abs().max() <= limit * before.abs().max()
    assert (layer(x) - before).abs().max() <= limit * before.abs().max()
    once = layer.base.weight.clone()
    assert torch.equal(layer.merge_().base.weight, once)


def test_only_the_factors_are_trained_and_the_base_is_shared():
    base = nn.Linear(6, 4)
    layer = LoRALinear(base, 2)
    assert layer.base is base and {n for n, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2 * (6 + 4)
    layer(torch.randn(3, 6)).sum().backward()
    assert base.weight.grad is None and base.bias.grad is None


def test_alpha_is_the_rank_by_default_and_follows_a_new_rank():
    layer = LoRALinear(nn.Linear(8, 8), 4)
    assert (layer.scale, layer.alpha) == (1.0, 4.0)
    layer = LoRALinear(nn.Linear(8, 8), 4, alpha=8)
    assert layer.reset_(2).scale == 2.0 and layer.alpha == 4.0 and layer.A.shape == (2, 8)


@pytest.mark.parametrize(("init", "std"), [("kaiming", 1 / math.sqrt(3 * 400)), ("gaussian", 1 / 8)])
def test_laws_of_the_start(init, std):
    layer = LoRALinear(nn.Linear(400, 300), 8, init=init, generator=torch.Generator().manual_seed(0))
    assert layer.A.std().item() == pytest.approx(std, rel=0.05)
    assert torch.equal(layer.B, torch.zeros_like(layer.B))
    if init == "kaiming":
        assert layer.A.abs().max() <= 1 / math.sqrt(400)


def test_the_running_generator_gives_new_factors_and_leaves_the_global_one_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    base = nn.Linear(6, 4)
    torch.manual_seed(5)
    layer = LoRALinear(base, 2, generator=torch.Generator().manual_seed(3))
    first = layer.A.detach().clone()
    assert not torch.allclose(layer.reset_().A, first)
    assert torch.equal(torch.rand(1), expected)
    again = LoRALinear(base, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.A, first) and torch.equal(again.reset_().A, layer.A)


# ------------------------------------------------------------------------------------------ modes, transforms


def test_evaluation_merges_and_training_comes_back_without_drift():
    layer, x = adapted(dtype=torch.float32), torch.randn(9, 7)
    start, expected = layer.base.weight.clone(), layer(x)
    for _ in range(50):
        layer.eval()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected)
        layer.train()
    assert torch.equal(layer.base.weight, start)


@torch.no_grad()
def test_the_merged_copy_is_never_stale():
    layer, x = adapted().eval(), torch.randn(9, 7).double()
    layer(x)
    layer.A.add_(1)
    torch.testing.assert_close(layer(x), dense(layer, x))
    layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})
    torch.testing.assert_close(layer(x), dense(layer, x))
    layer.merge_()
    torch.testing.assert_close(layer(x), layer.base(x))
    assert layer.float()(x.float()).dtype == torch.float32
    layer.reset_(1)
    torch.testing.assert_close(layer(x.float()), layer.base(x.float()))


def test_gradients_flow_in_evaluation_mode():
    layer, x = adapted().eval(), torch.randn(9, 7).double()
    layer(x).sum().backward()
    assert layer.B.grad.abs().sum() > 0


def test_keeping_the_factors_apart_in_evaluation():
    layer, x = adapted(merge_on_eval=False).eval(), torch.randn(9, 7).double()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(layer, x))
    assert layer._cache is None


def test_dropout_is_on_the_adapter_alone_and_off_in_evaluation_and_merges():
    layer, x = adapted(dropout=0.5), torch.randn(2000, 7).double()
    exact = dense(layer, x)
    drops = layer(x)
    assert not torch.allclose(drops, exact)
    assert ((drops - layer.base(x)) @ torch.linalg.pinv(layer.delta_weight().T)).shape == x.shape
    torch.testing.assert_close(layer.eval()(x), exact)
    layer.train().merge_()
    torch.testing.assert_close(layer(x), exact)
    fresh = LoRALinear(nn.Linear(7, 5), 2, dropout=0.9)
    torch.testing.assert_close(fresh(x.float()), fresh.base(x.float()))


def test_dropout_has_the_right_mean():
    layer, x = adapted(dropout=0.5), torch.ones(40_000, 7).double()
    torch.testing.assert_close(layer(x).mean(0), dense(layer, x)[0], rtol=0.05, atol=0.02)


def test_function_transforms():
    layer, x = adapted(), torch.randn(6, 7).double()
    factors = {"A": layer.A.detach(), "B": layer.B.detach()}

    def loss(factors, row):
        return functional_call(layer, factors, (row,)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(factors, x)
    one = grad(loss)(factors, x[3])
    torch.testing.assert_close(per_sample["A"][3], one["A"])
    layer(x[3]).square().sum().backward()
    torch.testing.assert_close(one["B"], layer.B.grad)
    jacobian = jacrev(lambda a: functional_call(layer, {"A": a}, (x,)))(factors["A"])
    _, tangent = jvp(lambda a: functional_call(layer, {"A": a}, (x,)), (factors["A"],), (factors["A"],))
    torch.testing.assert_close(torch.einsum("ijkl,kl->ij", jacobian, factors["A"]), tangent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_float32_factors(dtype):
    layer = adapted(dtype=dtype)
    x = torch.randn(4, 7).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and layer.A.dtype == torch.float32
    torch.testing.assert_close(y.float(), dense(layer.float(), x.float()), rtol=0.03, atol=0.03)


def test_autocast():
    layer, x = adapted(dtype=torch.float32), torch.randn(4, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.A.grad.dtype == torch.float32


def test_torch_modules_that_read_the_weight_see_the_update():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 3, 8).double()
    inject_lora(encoder, ["out_proj", "linear1"], 2)
    for name in ("linear1", "self_attn.out_proj"):
        nn.init.normal_(encoder.get_submodule(name).B)
    trained = encoder(x)
    trained.sum().backward()
    assert encoder.self_attn.out_proj.B.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), trained.detach())


def test_a_linear_layer_with_a_forward_of_its_own_keeps_it():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = LoRALinear(Doubled(6, 4), 2), torch.randn(3, 6)
    torch.testing.assert_close(layer(x), layer.base(x))
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), layer.base(x))


def test_state_and_copies():
    layer, x = adapted(), torch.randn(4, 7).double()
    other = adapted(seed=1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and set(layer.state_dict()) == {"A", "B", "base.weight", "base.bias"}
    twin = copy.deepcopy(adapted(generator=torch.Generator()))
    assert twin.reset_().B.abs().sum() == 0


# -------------------------------------------------------------------------------------------------- injection


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return x + self.v(torch.relu(self.q(self.norm(x))))


def blocks(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block(), nn.Linear(8, 3))


def test_injection_names_order_and_function():
    model, x = blocks(), torch.randn(5, 8)
    before = model(x)
    assert inject_lora(model, ["v", "0.q"], 2) == ["0.q", "0.v", "1.v"]
    assert torch.equal(model(x), before)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.{f}" for n in ("0.q", "0.v", "1.v") for f in "AB"}


def test_injection_by_regular_expression_and_with_a_head():
    model = blocks()
    assert inject_lora(model, r"\d\.[qv]", 2, modules_to_save=["2"]) == ["0.q", "0.v", "1.q", "1.v"]
    assert model[2].weight.requires_grad and not model[0].norm.weight.requires_grad


@pytest.mark.parametrize("r", [0, -1, 9, 2.0, True])
def test_bad_ranks(r):
    with pytest.raises(ValueError, match="r must be an integer in"):
        LoRALinear(nn.Linear(8, 12), r)


@pytest.mark.parametrize("options", [{"alpha": 0}, {"alpha": -1}, {"alpha": math.inf}, {"alpha": math.nan}])
def test_bad_alpha(options):
    with pytest.raises(ValueError, match="alpha must be finite and > 0"):
        inject_lora(blocks(), ["q"], 2, **options)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5])
def test_bad_dropout(dropout):
    with pytest.raises(ValueError, match=r"dropout must be finite, >= 0 and < 1"):
        LoRALinear(nn.Linear(3, 3), 1, dropout=dropout)


def test_bad_init_and_master_dtype():
    with pytest.raises(ValueError, match="init must be one of"):
        LoRALinear(nn.Linear(3, 3), 1, init="pissa")
    with pytest.raises(ValueError, match="master_dtype must be"):
        LoRALinear(nn.Linear(3, 3), 1, master_dtype=torch.float16)


@pytest.mark.parametrize("targets", [["query"], ["q", "vv"], "q_proj"])
def test_no_module_matches(targets):
    model = blocks()
    with pytest.raises(ValueError, match=r"target_modules must match a module, got .*near names: \[.*'(q|v|0)'"):
        inject_lora(model, targets, 2)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("targets", [[], "", [""], None, [3]])
def test_empty_targets(targets):
    with pytest.raises(ValueError, match="target_modules must name at least one module"):
        inject_lora(blocks(), targets, 2)


def test_a_target_that_is_no_linear_layer():
    for error in (TypeError, ValueError):
        with pytest.raises(error, match=r"0\.norm must be an nn\.Linear, got LayerNorm"):
            inject_lora(blocks(), ["q", "norm"], 2)
    model = blocks()
    inject_lora(model, ["q"], 2)
    with pytest.raises(TypeError, match="got LoRALinear"):
        inject_lora(model, ["q"], 2)


def test_quantised_and_computed_weights_are_refused():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"plain floating-point tensor, got Parameter of torch.int8"):
        LoRALinear(layer, 2)
    layer.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match="float8"):
        LoRALinear(layer, 2)
    with pytest.raises(ValueError, match="parametrization"):
        LoRALinear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), 2)


def tied(seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"embed": nn.Embedding(9, 8), "q": nn.Linear(8, 8), "head": nn.Linear(8, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def test_tied_weights():
    with pytest.raises(ValueError, match=r"head\.weight is tied to embed\.weight.*allow_tied=True"):
        inject_lora(tied(), ["head"], 2)
    assert inject_lora(tied(), ["q"], 2) == ["q"]
    model = tied()
    inject_lora(model, ["head"], 2, allow_tied=True)
    nn.init.normal_(model["head"].B)
    model["head"].merge_()
    assert model["head"].base.weight is model["embed"].weight


def test_views_of_one_memory_are_tied_and_shared_layers_too():
    q, v = nn.Linear(8, 8), nn.Linear(8, 8)
    v.weight = nn.Parameter(q.weight.data[:8])
    with pytest.raises(ValueError, match="tied"):
        inject_lora(nn.Sequential(q, nn.Linear(8, 8), v), ["0"], 2)
    flat = torch.randn(2, 8, 8)
    q.weight, v.weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])
    inject_lora(nn.Sequential(q, v), ["0", "1"], 2)
    shared = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="tied"):
        inject_lora(nn.Sequential(shared, shared), ["0", "1"], 2)
    model = nn.Sequential(shared, shared)
    inject_lora(model, ["0", "1"], 2, allow_tied=True)
    assert model[0] is model[1]


def test_targets_and_saved_modules_must_not_overlap():
    with pytest.raises(ValueError, match="must not overlap"):
        inject_lora(blocks(), ["q", "2"], 2, modules_to_save=["2"])


# ---------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e25])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_factors_that_are_not_finite_leave_the_weights_alone(value, factor):
    layer = adapted(dtype=torch.float32)
    with torch.no_grad():
        getattr(layer, factor)[0, 1] = value
        getattr(layer, "AB".replace(factor, ""))[1, 0] = 1e20
    before = layer.base.weight.clone()
    with pytest.raises(ValueError, match="finite factors"):
        layer.merge_()
    assert torch.equal(layer.base.weight, before)


def test_an_overflow_of_half_precision_leaves_the_weights_alone():
    layer = adapted(dtype=torch.float16)
    nn.init.constant_(layer.B, 1e6)
    before = layer.base.weight.clone()
    with pytest.raises(ValueError, match=r"overflow torch\.float16"):
        layer.merge_()
    assert torch.equal(layer.base.weight, before)


@pytest.mark.filterwarnings("ignore:.*below half an ulp")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    layer = adapted(64, 48, 8, dtype=dtype)
    exact = layer.base.weight.float() + layer.delta_weight()
    assert torch.equal(layer.merge_().base.weight, exact.to(dtype))


def test_small_updates_vanish_in_half_precision_unless_a_master_copy_collects_them():
    for master_dtype in (None, torch.float32):
        layer = adapted(dtype=torch.bfloat16, master_dtype=master_dtype)
        nn.init.ones_(layer.base.weight)
        nn.init.ones_(layer.A)
        for _ in range(64):
            nn.init.constant_(layer.B, 1e-4 / 3)
            if master_dtype is None:
                with pytest.warns(UserWarning, match="100% of the updates are below half an ulp of torch.bfloat16"):
                    layer.merge_()
            else:
                layer.merge_()
        gained = layer.base.weight.float().mean().item() - 1
        assert gained == (0 if master_dtype is None else pytest.approx(64e-4, abs=2**-8))
    layer.base.weight.data.fill_(3)
    layer.merge_()
    assert layer.base.weight.float().mean() == 3
