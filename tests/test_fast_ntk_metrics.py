"""Training towards w0, baselines, prompts, metrics; and that a class is really forgotten."""

import copy

import fast_ntk_oracles as oracle
import numpy as np
import pytest
import torch
from torch import nn

from effnb.lab.measure.seed import state_hash
from effnb.models import ViT
from effnb.unlearn import (
    NTKUnlearner,
    PromptedViT,
    RelearnTime,
    activation_distance,
    finetune,
    max_loss,
    membership_inference,
    output_distance,
    parameter_distance,
    peft_parameters,
    random_label,
    relearn_time,
    retain_forget_split,
    retrain,
    update_cosine,
    zero_class_row,
)

PARAMS = "bn+head"


@pytest.fixture(scope="module")
def blobs():
    """Four classes that a head can tell apart, a pre-trained net, and the split that forgets class 3."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(4).repeat(15)
    corner = torch.tensor([[0, 0], [0, 3], [3, 0], [3, 3]])
    x = 0.3 * torch.randn(60, 1, 6, 6, generator=g)
    for i, label in enumerate(y.tolist()):
        a, b = corner[label]
        x[i, 0, a : a + 3, b : b + 3] += 1 + 0.5 * label
    init = oracle.randomised(oracle.ConvNet(width=6), 3, torch.float32)
    with torch.no_grad():
        for module in (init.bn1, init.bn2):
            module.weight.fill_(1)
        init.head.weight.zero_()
        init.head.bias.zero_()
    retain, forget = retain_forget_split(x, y, torch.nonzero(y == 3).flatten())
    return init, (x, y), retain, forget


OPTIONS = {"weight_decay": 0.01, "epochs": 30, "lr": 0.05, "batch_size": 20, "seed": 1}


@pytest.fixture(scope="module")
def tuned(blobs):
    init, data, retain, _ = blobs
    original = finetune(init, PARAMS, data, init_state=init, **OPTIONS)
    return original, retrain(original, PARAMS, retain, init_state=init, **OPTIONS)


def accuracy(model, part):
    return float((model(part[0]).argmax(1) == part[1]).double().mean())


# ------------------------------------------------------------ training


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_training_minimises_the_stated_objective(loss):
    model = oracle.Linear(3, 2).eval()
    x, y = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2
    options = {"weight_decay": 0.2, "init_state": model, "loss": loss, "batch_size": 30, "epochs": 1500, "lr": 0.3}
    found = finetune(model, "head", (x, y), **options)
    names = peft_parameters(model, "head")
    w0 = oracle.vector(model, names)
    if loss == "mse":
        wanted = oracle.ridge_solution(model, names, w0, x, y, 0.2, 2)
        torch.testing.assert_close(oracle.vector(found, names), wanted, rtol=1e-6, atol=1e-7)
    objective = nn.functional.cross_entropy(found(x), y)
    if loss == "mse":
        objective = 0.5 * (found(x) - oracle.one_hot(y, 2)).square().sum(1).mean()
    leaves = list(found.parameters())
    total = objective + 0.1 * sum(((p - p0) ** 2).sum() for p, p0 in zip(leaves, model.parameters(), strict=True))
    assert all(grad.abs().max() < 1e-6 for grad in torch.autograd.grad(total, leaves))


def test_only_the_subset_moves_and_statistics_stay_frozen(blobs, tuned):
    init, moved = blobs[0], set(peft_parameters(blobs[0], PARAMS))
    for name, value in tuned[0].state_dict().items():
        assert torch.equal(value, init.state_dict()[name]) == (name not in moved), name
    assert not any(m.training for m in tuned[0].modules())
    assert all(p.requires_grad and p.grad is None for p in tuned[0].parameters())


def test_retraining_starts_from_w0_with_the_same_order(blobs, tuned):
    init, data, _, _ = blobs
    again = retrain(tuned[1], PARAMS, data, init_state=init, **OPTIONS)  # from another model: only w0 counts
    assert state_hash(again) == state_hash(tuned[0])
    assert state_hash(retrain(init, PARAMS, data, init_state=init, **{**OPTIONS, "seed": 2})) != state_hash(again)


BASELINES = {
    "finetune": lambda m, i, r, f: finetune(m, PARAMS, r, init_state=i, **OPTIONS),
    "retrain": lambda m, i, r, f: retrain(m, PARAMS, r, init_state=i, **OPTIONS),
    "max_loss": lambda m, i, r, f: max_loss(m, PARAMS, r, f, init_state=i, alpha=0.05, **OPTIONS),
    "random_label": lambda m, i, r, f: random_label(m, PARAMS, r, f, init_state=i, **OPTIONS),
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_pure_and_seeded(blobs, tuned, name):
    init, _, retain, forget = blobs
    model = tuned[0]
    model.bn1.weight.requires_grad_(False)
    state, rng = state_hash(model), torch.get_rng_state()
    with torch.no_grad():
        a, b = (BASELINES[name](model, init, retain, forget) for _ in range(2))
    assert state_hash(a) == state_hash(b) != state
    assert state_hash(model) == state and torch.equal(rng, torch.get_rng_state())
    assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in model.parameters()]
    model.bn1.weight.requires_grad_(True)
    outside = set(dict(model.named_parameters())) - set(peft_parameters(model, PARAMS))
    assert all(torch.equal(a.state_dict()[n], model.state_dict()[n]) for n in outside)


def test_baselines_forget(blobs, tuned):
    init, _, retain, forget = blobs
    assert accuracy(tuned[0], forget) > 0.8
    for name in ("retrain", "max_loss", "random_label"):
        made = BASELINES[name](tuned[0], init, retain, forget)
        assert accuracy(made, forget) < 0.3, name


def test_random_labels_are_never_the_own_one(blobs, tuned, monkeypatch):
    from effnb.unlearn.fast_ntk import training

    seen = {}
    monkeypatch.setattr(training, "finetune", lambda m, p, data, **options: seen.update(y=data[1], **options))
    _, _, retain, _ = blobs
    forget = torch.zeros(3000, 1, 6, 6), torch.full((3000,), 3)
    random_label(tuned[0], PARAMS, retain, forget, seed=5, weight_decay=0.1)
    labels = seen["y"][-3000:]
    counts = torch.bincount(labels, minlength=4)
    assert counts[3] == 0 and counts[:3].min() > 900 and seen["weight_decay"] == 0.1 and seen["seed"] == 5


def test_max_loss_without_ascent_is_fine_tuning(blobs, tuned):
    """With alpha=0 only the draws of the forget batches differ, so compare with one full batch."""
    init, _, retain, forget = blobs
    options = {**OPTIONS, "batch_size": 1000, "init_state": init}
    a = max_loss(tuned[0], PARAMS, retain, forget, alpha=0.0, **options)
    b = finetune(tuned[0], PARAMS, retain, **options)
    torch.testing.assert_close(
        oracle.vector(a, peft_parameters(a)), oracle.vector(b, peft_parameters(b)), rtol=1e-4, atol=1e-5
    )


def test_zeroed_row(tuned, blobs):
    made = zero_class_row(tuned[0], 3)
    assert not made.head.weight[3].any() and made.head.bias[3] == 0
    assert torch.equal(made.head.weight[:3], tuned[0].head.weight[:3]) and tuned[0].head.weight[3].any()
    without = zero_class_row(nn.Linear(2, 3, bias=False), 0)
    assert not without.weight[0].any()
    for label in (-1, 4):
        with pytest.raises(ValueError, match="label must be from 0 to 3"):
            zero_class_row(tuned[0], label)


@pytest.mark.parametrize(
    "options",
    [{"epochs": -1}, {"lr": -1.0}, {"batch_size": 0}, {"momentum": 1.0}, {"loss": "l1"}, {"weight_decay": -1.0}],
)
def test_bad_schedules(blobs, options):
    init, data, retain, forget = blobs
    options = {"weight_decay": 0.1, "init_state": init, **options}
    for call in (
        lambda: finetune(init, PARAMS, data, **options),
        lambda: max_loss(init, PARAMS, retain, forget, **options),
        lambda: random_label(init, PARAMS, retain, forget, **options),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(set(options) - {'init_state'}))}|must"):
            call()


def test_bad_data_for_training(blobs):
    init, (x, y), retain, forget = blobs
    options = {"weight_decay": 0.1, "init_state": init}
    with pytest.raises(ValueError, match="labels from 0 to 3"):
        finetune(init, PARAMS, (x, y + 1), **options)
    with pytest.raises(ValueError, match="at least one sample"):
        finetune(init, PARAMS, (x[:0], y[:0]), **options)
    with pytest.raises(ValueError, match="alpha"):
        max_loss(init, PARAMS, retain, forget, alpha=-1.0, **options)
    with pytest.raises(ValueError, match="eval mode"):
        finetune(copy.deepcopy(init).train(), PARAMS, (x, y), **options)


def test_weights_that_do_not_stay_finite(blobs):
    init, (x, y), retain, forget = blobs
    options = {**OPTIONS, "init_state": init}
    for call in (finetune, retrain):
        with pytest.raises(ValueError, match=r"weights finite.*lower lr \(1e\+30\)"):
            call(init, PARAMS, (x, y), **{**options, "lr": 1e30})
    with pytest.raises(ValueError, match="weights finite"):
        max_loss(init, PARAMS, retain, forget, **options)  # alpha = 1: the ascent wins
    bad = x.clone()
    bad[7, 0, 0, 0] = float("nan")
    for call in (finetune, retrain):
        with pytest.raises(ValueError, match="data must be finite"):
            call(init, PARAMS, (bad, y), **options)
    for call in (max_loss, random_label):
        with pytest.raises(ValueError, match="retain must be finite"):
            call(init, PARAMS, (bad, y), forget, **options)
        with pytest.raises(ValueError, match="forget must be finite"):
            call(init, PARAMS, retain, (bad, y), **options)


# ------------------------------------------------------------ direction


@pytest.mark.parametrize(("loss", "form"), [("mse", "newton-diff"), ("ce", "newton-diff"), ("ce", "influence")])
def test_a_class_is_forgotten_as_by_retraining(blobs, loss, form):
    init, data, retain, forget = blobs
    original = finetune(init, PARAMS, data, init_state=init, loss=loss, **OPTIONS)
    target = retrain(init, PARAMS, retain, init_state=init, loss=loss, **OPTIONS)
    fitted = NTKUnlearner(original, PARAMS, weight_decay=0.01, init_state=init, loss=loss, form=form).fit(data)
    made = fitted.forget(forget)
    assert accuracy(original, forget) > 0.8 and accuracy(target, forget) == 0
    assert accuracy(made, forget) <= 0.1 and accuracy(made, retain) >= accuracy(target, retain) - 0.1
    if loss == "mse":
        assert output_distance(made, target, original, forget[0]) < 0.8
        assert update_cosine(made, target, original) > 0.5


def test_prompts_of_a_transformer_forget():
    g = torch.Generator().manual_seed(0)
    vit = ViT(image_size=8, patch=4, width=16, depth=1, heads=2, classes=3, generator=g)
    init = PromptedViT(vit, num_prompts=4, generator=g).eval()
    y = torch.arange(3).repeat(10)
    x = 0.2 * torch.randn(30, 1, 8, 8, generator=g)
    x[torch.arange(30), 0, y, :] += 2
    options = {"weight_decay": 0.01, "init_state": init, "epochs": 80, "lr": 0.1}
    original = finetune(init, "prompt+head", (x, y), **options)
    retain, forget = retain_forget_split(x, y, torch.nonzero(y == 2).flatten())
    target = retrain(init, "prompt+head", retain, **options)
    fitted = NTKUnlearner(original, "prompt+head", weight_decay=0.01, init_state=init).fit((x, y))
    made = fitted.forget(forget)
    assert accuracy(original, forget) > 0.9 and accuracy(made, forget) <= 0.3
    assert output_distance(made, target, original, forget[0]) < 0.8
    assert torch.equal(made.vit.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)


def test_prompts_are_tokens_beside_the_image():
    vit = oracle.randomised(ViT(image_size=8, patch=4, width=8, depth=2, heads=2, class_token=True))
    model = PromptedViT(vit, 3).double().eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    seen = []
    vit.blocks.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    out = model(x)
    assert seen[0].shape == (2, 5 + 3, 8) and torch.equal(seen[0][:, :5], vit.embed(x))
    assert torch.equal(seen[0][0, 5:], model.prompt) and out.shape == (2, 10)
    other = copy.deepcopy(model)
    other.prompt.data.normal_()
    assert not torch.allclose(other(x), out)
    a, b = (PromptedViT(vit, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a.prompt, b.prompt)
    with pytest.raises(ValueError, match="num_prompts"):
        PromptedViT(vit, 0)
    with pytest.raises(TypeError, match="ViT"):
        PromptedViT(nn.Linear(2, 2))


# ------------------------------------------------------------ distances


def test_distances(blobs, tuned):
    original, target = tuned
    x = blobs[3][0]
    assert parameter_distance(target, target, original) == 0 == output_distance(target, target, original, x)
    assert parameter_distance(original, target, original) == 1 == output_distance(original, target, original, x)
    half = copy.deepcopy(original)
    with torch.no_grad():
        for p, q in zip(half.parameters(), target.parameters(), strict=True):
            p.copy_((p + q) / 2)
    assert parameter_distance(half, target, original) == pytest.approx(0.5, rel=1e-4)
    assert parameter_distance(half, target, original, PARAMS) == pytest.approx(0.5, rel=1e-4)
    assert update_cosine(half, target, original) == pytest.approx(1, rel=1e-4)
    assert update_cosine(original, target, original) == 0
    for function, more in ((parameter_distance, ()), (output_distance, (x,))):
        with pytest.raises(ValueError, match="differ"):
            function(half, original, original, *more)


def test_activation_distance_is_the_official_one(blobs, tuned):
    x = blobs[1][0]
    a, b = (m(x).softmax(1).detach().numpy() for m in tuned)
    wanted = np.linalg.norm(a - b, ord=1, axis=1).mean()
    assert activation_distance(*tuned, x) == pytest.approx(float(wanted), rel=1e-5)
    with pytest.raises(ValueError, match="at least one"):
        activation_distance(*tuned, x[:0])


def test_metrics_restore_the_mode(blobs, tuned):
    init, data, retain, forget = blobs
    model = copy.deepcopy(tuned[0]).train()
    model.bn1.eval()
    state = state_hash(model)
    activation_distance(model, tuned[1], data[0])
    output_distance(model, tuned[1], init, data[0])
    membership_inference(model, retain, data, forget)
    relearn_time(model, data, forget, 0.0, cap=1)
    assert model.training and model.bn2.training and not model.bn1.training and state_hash(model) == state


def test_metrics_of_models_that_are_not_finite(blobs, tuned):
    x = blobs[1][0]
    broken = copy.deepcopy(tuned[0])
    with torch.no_grad():
        broken.head.weight[0, 0] = float("nan")
    for call in (
        lambda: activation_distance(broken, tuned[1], x),
        lambda: output_distance(broken, tuned[1], tuned[0], x),
        lambda: parameter_distance(broken, tuned[1], tuned[0]),
        lambda: update_cosine(broken, tuned[1], tuned[0]),
    ):
        with pytest.raises(ValueError, match="must be finite, got weights or outputs"):
            call()


# ------------------------------------------------------------ relearning


def test_relearn_time(blobs, tuned):
    _, data, _, forget = blobs
    original, target = tuned
    assert relearn_time(original, data, forget, original) == 0
    slow = relearn_time(target, data, forget, original, lr=0.5, cap=40)
    assert 0 < slow < 40 and not slow.censored and str(slow) == str(int(slow))
    assert relearn_time(target, data, forget, original, lr=0.5, cap=40) == slow
    never = relearn_time(target, data, forget, -1.0, cap=2)
    assert never == 2 and never.censored and str(never) == ">= 2" and isinstance(never, int)
    assert relearn_time(original, data, forget, -1.0, cap=0).censored


def test_relearn_time_by_hand():
    """One weight, full batches: count the steps with a loop."""
    model = nn.Linear(1, 2, bias=False).eval()
    model.weight.data.zero_()
    x, y = torch.ones(8, 1), torch.zeros(8, dtype=torch.int64)
    w, steps = torch.zeros(2), 0
    while -w.log_softmax(0)[0] > 0.5 + 1e-5:
        w -= 0.1 * (w.softmax(0) - torch.tensor([1.0, 0.0]))
        steps += 1
    assert relearn_time(model, (x, y), (x[:2], y[:2]), 0.5, lr=0.1) == steps
    halves = relearn_time(model, (x, y), (x[:2], y[:2]), 0.5, lr=0.1, batch_size=4)
    assert halves == -(-steps // 2)  # two steps an epoch
    fewer = relearn_time(model, (x, y), (x[:2], y[:2]), 0.5, lr=0.1, batch_size=2, draws=6)
    assert fewer == -(-steps // 3)


@pytest.mark.parametrize("options", [{"cap": -1}, {"batch_size": 0}, {"draws": 0}, {"loss": "l1"}, {"lr": -1.0}])
def test_bad_relearning(blobs, tuned, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        relearn_time(tuned[0], blobs[1], blobs[3], 0.0, **options)


def test_relearning_that_is_not_finite(blobs, tuned):
    _, (x, y), _, forget = blobs
    with pytest.raises(ValueError, match="original must be finite, got nan"):
        relearn_time(tuned[0], (x, y), forget, float("nan"))
    with pytest.raises(ValueError, match="tolerance must be finite"):
        relearn_time(tuned[0], (x, y), forget, 0.0, tolerance=float("nan"))
    with pytest.raises(TypeError, match="original must be a number"):
        relearn_time(tuned[0], (x, y), forget, "original")
    for options, data in (({"lr": 1e30}, (x, y)), ({}, (x / 0, y))):
        with pytest.raises(ValueError, match="loss on forget must be finite"):
            relearn_time(tuned[0], data, forget, 0.0, **options)


def test_censored_integers():
    assert RelearnTime(7) == 7 and not RelearnTime(7).censored
    assert np.mean([RelearnTime(4), RelearnTime(100, True)]) == 52


# ------------------------------------------------------------ membership


def test_the_official_attack(blobs, tuned):
    from sklearn.svm import SVC

    _, _, retain, forget = blobs
    g = torch.Generator().manual_seed(9)
    test = retain[0] + 0.5 * torch.randn(retain[0].shape, generator=g), retain[1]

    def entropy(x):
        p = tuned[0](x).double().softmax(1)
        return -(p * p.log()).sum(1, keepdim=True).detach().numpy()

    a, b = entropy(retain[0]), entropy(test[0])
    attack = SVC(C=3, gamma="auto", kernel="rbf")
    attack.fit(np.concatenate([a, b]), [1] * len(a) + [0] * len(b))
    found = membership_inference(tuned[0], retain, test, forget, held_out=forget)
    assert found.member_share == attack.predict(entropy(forget[0])).mean()
    assert found.auc == pytest.approx(0.5, abs=0.01)  # the same samples on both sides


def test_the_balanced_attack():
    model = nn.Identity()
    y = torch.tensor([0, 0, 1, 1])
    sure, unsure = 5 * torch.eye(3)[y], torch.eye(3)[y]
    other = torch.cat([unsure, 9 * torch.eye(3)]), torch.cat([y, torch.tensor([2, 2, 2])])
    found = membership_inference(model, (sure, y), (unsure, y), (sure, y), held_out=other)
    assert found.auc == 1.0  # class 2, where nobody was asked about, does not count
    assert membership_inference(model, (sure, y), (unsure, y), (unsure, y), held_out=(sure, y)).auc == 0.0
    few = membership_inference(model, (sure, y), (unsure, y), (sure, y), held_out=(unsure[:1], y[:1]))
    assert few.auc == 1.0
    none = membership_inference(model, (sure, y), (unsure, y), (sure, y), held_out=(unsure, y * 0 + 2))
    assert np.isnan(none.auc)
    by_mse = membership_inference(model, (sure, y), (unsure, y), (sure, y), held_out=(unsure, y), loss="mse")
    assert by_mse.auc == 0.0  # logits of 5 are far from one-hot


def test_the_attack_leaves_the_global_streams_alone(blobs, tuned):
    _, data, retain, forget = blobs
    before, torch_before = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    membership_inference(tuned[0], retain, data, forget)
    after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_bad_membership(blobs, tuned):
    _, (x, y), retain, forget = blobs
    with pytest.raises(ValueError, match="finite outputs"):
        membership_inference(tuned[0], retain, (x, y), forget, held_out=(x / 0, y))
    with pytest.raises(ValueError, match="loss"):
        membership_inference(tuned[0], retain, (x, y), forget, loss="l1")
    with pytest.raises(ValueError, match="forget must hold at least one sample"):
        membership_inference(tuned[0], retain, (x, y), (x[:0], y[:0]))
    with pytest.raises(ValueError, match="labels"):
        membership_inference(tuned[0], retain, (x, y + 1), forget)
    with pytest.raises(ValueError, match="finite outputs"):
        membership_inference(nn.Identity(), (torch.eye(2) / 0, y[:2]), (torch.eye(2), y[:2] * 0), (torch.eye(2), y[:2]))
