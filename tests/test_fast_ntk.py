"""Subsets, per-sample Jacobians by three methods and in chunks, the kernel; and nothing else changes."""

import copy

import fast_ntk_oracles as oracle
import pytest
import torch
from torch import nn

from effnb.lab.measure.seed import state_hash
from effnb.models import SmallCNN, ViT
from effnb.unlearn import (
    NTKUnlearner,
    PromptedViT,
    empirical_ntk,
    iter_jacobian,
    peft_parameters,
    per_sample_jacobian,
)
from effnb.unlearn.fast_ntk.jacobian import choose, pairs, probe, sample_bytes


class Norms(nn.Module):
    """Every kind of norm layer that has an affine part, on images."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.layers = nn.Sequential(
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.InstanceNorm2d(4, affine=True),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.BatchNorm2d(4),
            nn.LayerNorm([4, 4]),
        )
        self.last, self.rms, self.bn = nn.LayerNorm(4), nn.RMSNorm(4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        tokens = self.layers(self.stem(x)).flatten(2).transpose(1, 2)
        return self.head(self.bn(self.rms(self.last(tokens)).mean(1)))


def vit(**options):
    model = ViT(image_size=8, patch=4, width=8, depth=2, heads=2, mlp_ratio=2, classes=4, **options)
    return oracle.randomised(model)


CASES = {
    "conv bn": (oracle.convnet, "bn", 6),
    "conv bn+head": (oracle.convnet, "bn+head", 6),
    "conv head": (oracle.convnet, "head", 6),
    "conv all": (oracle.convnet, "all", 6),
    "every norm": (lambda: oracle.randomised(Norms()), "norm+head", 6),
    "vit norm": (vit, "norm+head", 8),
    "vit token": (lambda: vit(class_token=True), "norm+head", 8),
    "vit prompt": (lambda: oracle.randomised(PromptedViT(vit(), 3)), "prompt+head", 8),
}


@pytest.fixture(params=CASES)
def case(request):
    build, subset, side = CASES[request.param]
    model = build()
    return model, peft_parameters(model, subset), oracle.images(5, side=side)[0]


# ------------------------------------------------------------ subsets


def test_subsets_of_a_convolutional_net():
    model = SmallCNN(widths=(2, 3))
    bn = ["features.1.weight", "features.1.bias", "features.5.weight", "features.5.bias"]
    assert peft_parameters(model, "bn") == peft_parameters(model, "norm") == bn
    assert peft_parameters(model, "head") == ["head.weight", "head.bias"]
    assert peft_parameters(model, "bn+head") == [*bn, "head.weight", "head.bias"] == peft_parameters(model)
    assert peft_parameters(model, "head+bn") == peft_parameters(model, "bn+head")
    assert peft_parameters(model, "all") == [name for name, _ in model.named_parameters()]


def test_subsets_by_predicate():
    model = SmallCNN(widths=(2, 3))
    assert peft_parameters(model, lambda name, p: p.ndim == 4) == ["features.0.weight", "features.4.weight"]
    assert peft_parameters(model, lambda name: name.startswith("head")) == ["head.weight", "head.bias"]


def test_subsets_of_a_transformer():
    model = PromptedViT(vit(), 3)
    norm = peft_parameters(model, "norm")
    assert len(norm) == 2 * (2 * 2 + 1) and all("norm" in name for name in norm)
    assert peft_parameters(model, "prompt") == ["prompt"]
    assert peft_parameters(model, "prompt+head") == ["prompt", "vit.head.weight", "vit.head.bias"]
    with pytest.raises(ValueError, match="none for 'bn'"):
        peft_parameters(model, "bn")


def test_the_book_nets_have_the_sizes_of_the_chapter():
    model = SmallCNN(1, 10, (8, 16, 32, 32))
    sizes = {
        subset: sum(dict(model.named_parameters())[name].numel() for name in peft_parameters(model, subset))
        for subset in ("bn", "bn+head", "all")
    }
    assert sizes == {"bn": 176, "bn+head": 506, "all": 15_554}


@pytest.mark.parametrize(
    ("which", "error"), [("bm", ValueError), ("", ValueError), (lambda n, p: False, ValueError), (3, TypeError)]
)
def test_bad_subsets(which, error):
    with pytest.raises(error, match="which"):
        peft_parameters(SmallCNN(widths=(2,)), which)


def test_a_head_needs_a_linear_layer():
    with pytest.raises(ValueError, match="linear"):
        peft_parameters(nn.BatchNorm1d(3), "head")


# ------------------------------------------------------------ Jacobians


@pytest.mark.parametrize("method", ["loop", "vmap", "auto"])
def test_methods_agree_with_the_oracle(case, method):
    model, names, x = case
    torch.testing.assert_close(
        per_sample_jacobian(model, names, x, method=method), oracle.jacobian(model, names, x), rtol=1e-10, atol=1e-12
    )


def test_the_fast_path_agrees_where_it_applies(case):
    model, names, x = case
    if choose(model, names, "auto") == "vmap":
        with pytest.raises(ValueError, match="norm_affine"):
            per_sample_jacobian(model, names, x, method="norm_affine")
        return
    fast = per_sample_jacobian(model, names, x, method="norm_affine")
    torch.testing.assert_close(fast, oracle.jacobian(model, names, x), rtol=1e-10, atol=1e-12)


def test_three_methods_agree_in_float32():
    model, x = oracle.convnet(dtype=torch.float32), oracle.images(6, dtype=torch.float32)[0]
    found = [per_sample_jacobian(model, "bn+head", x, method=m) for m in ("loop", "vmap", "norm_affine")]
    assert found[0].dtype == torch.float32
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def test_which_method_auto_takes():
    model = oracle.convnet()
    assert choose(model, peft_parameters(model, "bn+head"), "auto") == "norm_affine"
    assert choose(model, peft_parameters(model, "all"), "auto") == "vmap"


@pytest.mark.parametrize("method", ["vmap", "norm_affine"])
def test_chunks_are_one_shot(method):
    model, x = oracle.convnet(), oracle.images(7)[0]
    whole = per_sample_jacobian(model, "bn+head", x, method=method)
    for size in (1, 3, 100):
        parts = list(iter_jacobian(model, "bn+head", x, method=method, chunk_size=size))
        assert [len(part) for part in parts] == [len(part) for part in x.split(size)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-14)


def test_the_columns_follow_the_names():
    model, x = oracle.convnet(), oracle.images(2)[0]
    names = peft_parameters(model, "bn+head")
    turned = per_sample_jacobian(model, names[::-1], x)
    assert torch.equal(turned[..., :4], per_sample_jacobian(model, names, x)[..., -4:])  # head.bias comes first


def test_unused_parameters_have_zero_columns():
    model = oracle.convnet()
    model.spare = nn.BatchNorm2d(2).double().eval()
    names, x = peft_parameters(model, "bn"), oracle.images(2)[0]
    for method in ("loop", "vmap", "norm_affine"):
        jac = per_sample_jacobian(model, names, x, method=method)
        assert jac.shape[-1] == 16 and not jac[..., -4:].any()


def test_a_norm_layer_used_twice_is_summed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.norm(self.norm(x).tanh()))

    model, x = oracle.randomised(Twice()), torch.randn(3, 4, dtype=torch.float64)
    names = peft_parameters(model, "all")
    torch.testing.assert_close(
        per_sample_jacobian(model, names, x, method="norm_affine"), oracle.jacobian(model, names, x)
    )


def test_a_head_whose_output_is_scaled():
    model = oracle.convnet()
    scaled = nn.Sequential(model, nn.Softplus()).eval()
    names, x = peft_parameters(scaled, "bn+head"), oracle.images(3)[0]
    found = per_sample_jacobian(scaled, names, x, method="norm_affine")
    torch.testing.assert_close(found, oracle.jacobian(scaled, names, x))


def test_shared_parameters_leave_the_fast_path():
    model = oracle.convnet()
    model.bn2.weight = model.bn1.weight
    names, x = peft_parameters(model, "bn"), oracle.images(3)[0]
    with pytest.raises(ValueError, match="shares"):
        per_sample_jacobian(model, names, x, method="norm_affine")
    torch.testing.assert_close(per_sample_jacobian(model, names, x), oracle.jacobian(model, names, x))


class NormAct(nn.BatchNorm2d):
    """As in timm: batch norm and activation in one module."""

    def forward(self, x):
        return torch.relu(super().forward(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def test_a_subclass_with_a_forward_of_its_own_leaves_the_fast_path():
    for first, last, which in ((NormAct, nn.Linear, "bn"), (nn.BatchNorm2d, Doubled, "head")):
        layers = nn.Conv2d(1, 4, 3), first(4), nn.Flatten(), last(64, 3)
        model, x = oracle.randomised(nn.Sequential(*layers)), oracle.images(3)[0]
        names = peft_parameters(model, which)
        torch.testing.assert_close(per_sample_jacobian(model, names, x), oracle.jacobian(model, names, x))
        with pytest.raises(ValueError, match="torch's norm layers"):
            per_sample_jacobian(model, names, x, method="norm_affine")


def test_a_forward_put_on_the_instance_leaves_the_fast_path():
    model, x = oracle.convnet(), oracle.images(3)[0]
    plain = model.bn1.forward
    model.bn1.forward = lambda x: plain(x).sinh()
    loop = per_sample_jacobian(model, "bn", x, method="loop")  # a deep copy would call the first model's forward
    torch.testing.assert_close(per_sample_jacobian(model, "bn", x), loop)


def test_the_fast_path_stands_in_front_of_hooks():
    model, x = oracle.convnet(), oracle.images(3)[0]
    model.bn1.register_forward_hook(lambda m, args, out: out.sinh())
    names = peft_parameters(model, "bn+head")
    loop = per_sample_jacobian(model, names, x, method="loop")
    torch.testing.assert_close(per_sample_jacobian(model, names, x, method="norm_affine"), loop)


def test_a_parameter_without_axes():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor, self.head = nn.Parameter(torch.tensor(2.0)), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.factor * x)

    model, x = oracle.randomised(Scaled()), torch.randn(3, 4, dtype=torch.float64)
    for method in ("loop", "vmap"):
        found = per_sample_jacobian(model, "all", x, method=method)
        torch.testing.assert_close(found, oracle.jacobian(model, peft_parameters(model, "all"), x))


def test_auto_falls_back_where_rows_are_not_samples():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.norm(x.flatten(0, 1)).tanh().reshape(len(x), 6))

    model, x = oracle.randomised(Folded()), torch.randn(4, 2, 3, dtype=torch.float64)
    names = peft_parameters(model, "all")
    with pytest.raises(ValueError, match="one row a sample"):
        per_sample_jacobian(model, names, x, method="norm_affine")
    torch.testing.assert_close(per_sample_jacobian(model, names, x), oracle.jacobian(model, names, x))


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_jacobian_times_residual_is_the_batch_gradient(loss):
    model, (x, y) = oracle.convnet(), oracle.images(9)
    names = peft_parameters(model, "bn+head")
    found = torch.einsum("nkp,nk->p", per_sample_jacobian(model, names, x), oracle.residual(model(x), y, loss))
    out = model(x)
    objective = nn.functional.cross_entropy(out, y, reduction="sum")
    if loss == "mse":
        objective = 0.5 * (out - oracle.one_hot(y, 4)).square().sum()
    known = dict(model.named_parameters())
    grads = torch.autograd.grad(objective, [known[name] for name in names])
    torch.testing.assert_close(found, torch.cat([g.reshape(-1) for g in grads]), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------ memory


def chunk_sizes(budget, method="vmap"):
    model, x = oracle.convnet(), oracle.images(64)[0]
    return [len(jac) for _, jac in pairs(model, "bn+head", x, method=method, memory_budget=budget)]


def test_the_budget_sets_the_chunk():
    assert chunk_sizes(2**30) == [64]
    assert chunk_sizes(1) == [1] * 64
    some = chunk_sizes(400_000)
    assert 1 < some[0] < 64 and sum(some) == 64
    assert chunk_sizes(800_000)[0] in (2 * some[0], 2 * some[0] + 1)
    assert chunk_sizes(400_000, "norm_affine")[0] > some[0]


@pytest.mark.parametrize("method", ["vmap", "norm_affine"])
def test_the_estimate_bounds_the_memory_really_used(method):
    """Live bytes, counted for every tensor that an operation returns; views and what was there before left out."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    class Peak(TorchDispatchMode):
        live, peak = 0, 0
        seen: dict

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.note(tensor.untyped_storage())
            return out

        def note(self, storage):
            key = storage._cdata
            if key not in self.seen:
                self.seen[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.drop, key)

        def drop(self, key):
            self.live -= self.seen.pop(key, 0)

    model = oracle.randomised(SmallCNN(1, 10, (8, 16, 32, 32)), dtype=torch.float32)
    x = torch.randn(32, 1, 14, 14)
    names = peft_parameters(model, "bn+head")
    mode = Peak()
    mode.seen = {}
    with mode:
        per_sample_jacobian(model, names, x, method=method, chunk_size=32)
    cost = probe(model, {n: p.detach() for n, p in model.named_parameters()}, x)
    assert mode.peak / 32 <= 1.25 * sample_bytes(method, cost, 506, 4)
    assert mode.peak / 32 >= 4 * 10 * 506  # the count sees at least the Jacobian itself


# ------------------------------------------------------------ kernel


def test_the_kernel_is_the_gram_of_the_jacobian():
    model, x = oracle.convnet(), oracle.images(6)[0]
    names = peft_parameters(model, "bn+head")
    jac = oracle.jacobian(model, names, x)
    theta = empirical_ntk(model, names, x[:4], x[2:])
    assert theta.shape == (4, 4, 4, 4)
    torch.testing.assert_close(theta[1, 3], jac[1] @ jac[5].T)
    torch.testing.assert_close(theta, torch.einsum("ikp,jlp->ijkl", jac[:4], jac[2:]))
    torch.testing.assert_close(
        empirical_ntk(model, names, x[:4], x[2:], trace=True), theta.diagonal(dim1=2, dim2=3).sum(-1)
    )
    torch.testing.assert_close(empirical_ntk(model, names, x, chunk_size=2), empirical_ntk(model, names, x, x))


@pytest.mark.parametrize("subset", ["bn", "all"])
def test_the_gram_is_symmetric_semidefinite_of_bounded_rank(subset):
    model, x = oracle.convnet(), oracle.images(6)[0]
    names = peft_parameters(model, subset)
    size = len(oracle.vector(model, names))
    gram = empirical_ntk(model, names, x).transpose(1, 2).reshape(24, 24)
    torch.testing.assert_close(gram, gram.T)
    values = torch.linalg.eigvalsh(gram)
    assert values[0] >= -1e-10 * values[-1]
    assert int((values > 1e-10 * values[-1]).sum()) <= min(24, size)


def test_the_kernel_is_float64_for_float32_models():
    model, x = oracle.convnet(dtype=torch.float32), oracle.images(3, dtype=torch.float32)[0]
    assert empirical_ntk(model, "bn", x).dtype == torch.float64
    assert empirical_ntk(model, "bn", x, trace=True, dtype=torch.float32).dtype == torch.float32


# ------------------------------------------------------------ purity


@pytest.mark.parametrize("method", ["loop", "vmap", "norm_affine"])
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_but_the_result_changes(method, grad):
    model, (x, y) = oracle.convnet(), oracle.images(6)
    model.conv1.weight.requires_grad_(False)
    model.bn1.weight.grad = torch.ones_like(model.bn1.weight)
    before = copy.deepcopy(model)
    state, flags = state_hash(model), [p.requires_grad for p in model.parameters()]
    rng, inputs = torch.get_rng_state(), x.clone()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True)
    with torch.set_grad_enabled(grad):
        jac = per_sample_jacobian(model, "bn+head", x, method=method)
        options = {"weight_decay": 0.1, "init_state": before, "method": method}
        new = NTKUnlearner(model, "bn+head", **options).fit(loader).forget((x[:2], y[:2]))
    assert not jac.requires_grad and torch.equal(inputs, x)
    assert torch.equal(rng, torch.get_rng_state())
    assert state_hash(model) == state and [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model.bn1.weight.grad, torch.ones_like(model.bn1.weight)) and model.conv2.weight.grad is None
    assert not any(m.training or m._forward_hooks for m in model.modules())
    assert [p.requires_grad for p in new.parameters()] == flags
    outside = set(dict(model.named_parameters())) - set(peft_parameters(model, "bn+head"))
    assert all(torch.equal(dict(new.named_parameters())[n], dict(model.named_parameters())[n]) for n in outside)
    assert all(torch.equal(a, b) for a, b in zip(new.buffers(), model.buffers(), strict=True))


def test_nothing_changes_after_an_error():
    model, (x, y) = oracle.convnet(), oracle.images(4)
    state, rng = state_hash(model), torch.get_rng_state()
    bad = x.clone()
    bad[2] = float("nan")
    for method in ("loop", "vmap", "norm_affine"):
        with pytest.raises(ValueError, match="NaN"):
            per_sample_jacobian(model, "bn", bad, method=method)
        with pytest.raises(RuntimeError):
            per_sample_jacobian(model, "bn", torch.zeros(2, 5, 6, 6, dtype=torch.float64), method=method)
    with pytest.raises(ValueError, match="labels"):
        NTKUnlearner(model, "bn", weight_decay=0.1, init_state=model).fit((x, y + 9))
    assert state_hash(model) == state and torch.equal(rng, torch.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())
