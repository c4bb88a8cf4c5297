"""The chain on top of peft: the same weights as peft, as our own layers, and in both variants bit for bit."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from effnb.finetune import ChainOfLoRA, fit_chain, linear_decay

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ADAM = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.0)
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.v(torch.tanh(self.q(x)))))


def problem(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = Net().to(dtype)
    x, y = torch.randn(64, 12, dtype=dtype), torch.randint(3, (64,))
    return model, x, lambda model, step: nn.functional.cross_entropy(model(x), y)


def config(**options):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], **options})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trained_by_peft(seed=0, steps=30, **options):
    model, _, loss = problem()
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, config(**options))
    optimizer = ADAM([p for p in wrapped.parameters() if p.requires_grad])
    schedule = linear_decay(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        optimizer.step()
        schedule.step()
    return wrapped.merge_and_unload()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["head"]}, {"use_rslora": True}, {"lora_dropout": 0.3}])
def test_one_link_is_peft(in_place, options):
    """T1: M = 1 with the same seed gives peft's weights."""
    expected = weights(trained_by_peft(**options))
    model, _, loss = problem()
    torch.manual_seed(0)
    chain = ChainOfLoRA(model, peft_config=config(**options), ranks=(2,), in_place=in_place)
    fit_chain(chain, loss, 30, ADAM, linear_decay)
    assert same(weights(chain.unload()), expected)


def test_one_link_of_ours_is_peft():
    """T1: our own layers, given peft's start, end at peft's weights."""
    model, _, loss = problem()
    torch.manual_seed(0)
    start = peft.get_peft_model(copy.deepcopy(model), config())
    chain = ChainOfLoRA(model, ["q", "v"], (2,), alpha=4)
    with torch.no_grad():
        for name in ("q", "v"):
            getattr(model, name).A.copy_(getattr(start.base_model.model, name).lora_A["default"].weight)
    fit_chain(chain, loss, 30, ADAM, linear_decay)
    for name, weight in weights(trained_by_peft()).items():
        torch.testing.assert_close(weights(chain.unload())[name], weight, rtol=1e-6, atol=1e-6)


def run(in_place, dtype=torch.float32, ranks=(2, 2, 2), seeded=False, master=None, steps=15, **options):
    model, x, loss = problem(dtype=dtype)
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(2) if seeded else None
    common = {"peft_config": config(**options), "in_place": in_place, "generator": generator, "master_dtype": master}
    chain = ChainOfLoRA(model, ranks=ranks, **common)
    history = fit_chain(chain, loss, steps, ADAM, linear_decay)
    return chain, history, torch.rand(3), x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seeded": True},
        {"ranks": (4, 2, 1)},
        {"dtype": torch.float64},
        {"modules_to_save": ["head"]},
        {"lora_dropout": 0.2},
        {"use_rslora": True, "ranks": (4, 1)},
        {"init_lora_weights": "gaussian"},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_both_variants_agree_bit_for_bit(options):
    (a, losses_a, draw_a, _), (b, losses_b, draw_b, _) = run(True, **options), run(False, **options)
    assert losses_a == losses_b and torch.equal(draw_a, draw_b)
    assert a.names == b.names == ["q", "v"] and a.accumulated_rank("q") == b.accumulated_rank("q") == sum(a.ranks)
    assert same(weights(a.unload()), weights(b.unload()))


@pytest.mark.parametrize("master", [None, torch.float32])
def test_both_variants_agree_in_half_precision(master):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*half an ulp" if master is None else "nothing")
        a, b = (run(i, dtype=torch.bfloat16, master=master)[0] for i in (True, False))
    assert same(weights(a.unload()), weights(b.unload()))


def test_half_precision_warns():
    with pytest.warns(UserWarning, match="half an ulp"):
        run(True, dtype=torch.bfloat16)


@pytest.mark.parametrize("in_place", [True, False])
def test_the_model_comes_back_as_it_was(in_place):
    model, _, _ = problem()
    keys, types, flags = (
        list(model.state_dict()),
        [type(m) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    chain, _, _, _ = run(in_place, modules_to_save=["head"])
    back = chain.unload()
    assert list(back.state_dict()) == keys and [type(m) for m in back.modules()] == types
    assert [p.requires_grad for p in back.parameters()] == flags and not hasattr(back, "peft_config")


@pytest.mark.parametrize("in_place", [True, False])
def test_knots_keep_the_function_and_the_head(in_place):
    model, x, loss = problem()
    chain = ChainOfLoRA(model, peft_config=config(modules_to_save=["head"]), ranks=(2, 2), in_place=in_place)
    fit_chain(chain, loss, [20, 1], ADAM)
    before = chain.model(x)
    chain.extend()
    torch.testing.assert_close(chain.model(x), before)
    wrappers = [m for m in chain.model.modules() if type(m).__name__ == "ModulesToSaveWrapper"]
    assert len(wrappers) == 1
    torch.testing.assert_close(chain.unload()(x), before)


@pytest.mark.parametrize("in_place", [True, False])
def test_ranks_in_peft_and_what_is_saved(in_place):
    model, _, loss = problem()
    chain = ChainOfLoRA(model, peft_config=config(lora_alpha=4), ranks=(4, 2), alpha=8, in_place=in_place)
    fit_chain(chain, loss, [2, 2], ADAM)
    chain.extend(1)
    layer = chain.model.base_model.model.q
    assert (layer.r["default"], layer.scaling["default"], layer.lora_alpha["default"]) == (1, 2.0, 2)
    assert chain.model.peft_config["default"].r == 1 and chain.trainable_parameters == 2 * 24
    state = peft.get_peft_model_state_dict(chain.model)
    assert {tuple(v.shape) for v in state.values()} == {(1, 12), (12, 1)}


def test_ranks_come_from_the_config_and_the_config_stays():
    own = config()
    chain = ChainOfLoRA(problem()[0], peft_config=own)
    assert chain.ranks == (2, 2, 2) and chain.scale == 2.0 and own.r == 2
    assert chain.model.peft_config["default"] is not own


def test_the_head_state_is_kept_over_both_kinds_of_knots():
    results = []
    for in_place in (True, False):
        model, _, loss = problem()
        torch.manual_seed(0)
        steps = []

        def factory(parameters):
            factory.last = ADAM(parameters)
            return factory.last

        def watch(chain, step, _, steps=steps):
            head = next(p for n, p in chain.model.named_parameters() if "head" in n and p.requires_grad)
            steps.append(int(factory.last.state[head]["step"]))

        options = config(modules_to_save=["head"])
        chain = ChainOfLoRA(model, peft_config=options, ranks=(2, 2), in_place=in_place, keep_head_state=True)
        fit_chain(chain, loss, 4, factory, callback=watch)
        assert steps == [1, 2, 3, 4]
        results.append(weights(chain.unload()))
    assert same(*results)


def test_conv1d_of_transformers_has_the_right_orientation():
    """The layer of GPT-2 stores its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    finals = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Conv1D(5, 7))
        x = torch.randn(11, 7)
        options = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], fan_in_fan_out=True)
        chain = ChainOfLoRA(model, peft_config=options, ranks=(2, 2), in_place=in_place)
        fit_chain(chain, lambda m, _, x=x: (m(x) - 1).square().mean(), 6, ADAM, tie=True)
        chain.extend()
        before = chain.model(x)
        assert chain.delta_weight("0").shape == (5, 7)
        torch.testing.assert_close(chain.unload()(x), before)
        finals.append(model[0].weight.detach())
    assert torch.equal(*finals)


def test_our_layers_and_peft_s_give_the_same_chain():
    model, x, loss = problem()
    ours = ChainOfLoRA(model, ["q", "v"], (2, 2), alpha=4, generator=torch.Generator().manual_seed(2))
    history = fit_chain(ours, loss, 16, ADAM, linear_decay)
    theirs, other, _, _ = run(True, seeded=True, ranks=(2, 2), steps=16)
    assert history[1] == pytest.approx(other[1], rel=1e-4)
    torch.testing.assert_close(ours.unload()(x), theirs.unload()(x), rtol=1e-4, atol=1e-5)


def test_a_seeded_chain_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    for in_place in (True, False):
        assert torch.equal(run(in_place, seeded=True)[2], expected)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "plain LoRA, got use_dora"),
        ({"lora_bias": True}, "plain LoRA, got lora_bias"),
        ({"rank_pattern": {"q": 3}}, "plain LoRA, got rank_pattern"),
        ({"alpha_pattern": {"q": 3}}, "plain LoRA, got alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True or 'gaussian'"),
        ({"init_lora_weights": False}, "init_lora_weights must be True or 'gaussian'"),
    ],
    ids=str,
)
def test_other_adapters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ChainOfLoRA(problem()[0], peft_config=config(**options))


def test_wrong_configs_and_models():
    with pytest.raises(TypeError, match=r"must be a peft\.LoraConfig, got dict"):
        ChainOfLoRA(problem()[0], peft_config={"r": 2})
    wrapped = peft.get_peft_model(problem()[0], config())
    with pytest.raises(ValueError, match="model must carry no peft adapter"):
        ChainOfLoRA(wrapped, peft_config=config())
    with pytest.raises(ValueError, match="must be set in peft_config"):
        ChainOfLoRA(problem()[0], ["q"], peft_config=config())


@pytest.mark.parametrize("ranks", [(), (2, 0), (13,), (2, 13)])
def test_bad_ranks_leave_the_model_alone(ranks):
    model, _, _ = problem()
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"rank|`r`"):
        ChainOfLoRA(model, peft_config=config(), ranks=ranks)
    assert [type(m) for m in model.modules()] == types and all(p.requires_grad for p in model.parameters())


def test_tied_and_foreign_layers_leave_the_model_alone():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 8), "head": nn.Linear(8, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="tied"):
            ChainOfLoRA(model, peft_config=config(target_modules=["head"]))
        with pytest.raises(TypeError, match=r"embed must be an nn\.Linear, got Embedding"):
            ChainOfLoRA(model, peft_config=config(target_modules=["embed"]), allow_tied=True)
        ChainOfLoRA(model, peft_config=config(target_modules=["head"]), allow_tied=True).unload()
    assert type(model["head"]) is nn.Linear and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("in_place", [True, False])
def test_bad_factors_leave_all_weights_alone(in_place):
    model, _, loss = problem()
    chain = ChainOfLoRA(model, peft_config=config(), ranks=(2,), in_place=in_place)
    fit_chain(chain, loss, 3, ADAM, tie=False)
    layer = chain.model.base_model.model.v
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    before = weights(chain.model.base_model.model.q.base_layer)
    with pytest.raises(ValueError, match="v must have finite factors"):
        chain.tie_knot()
    assert same(weights(chain.model.base_model.model.q.base_layer), before)


def test_without_peft_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"effnb\[llm\]"):
        ChainOfLoRA(problem()[0], peft_config=object())


# ------------------------------------------------------------------------------------------------------ the recipe


def test_the_recipe_runs_on_a_tiny_language_model(tmp_path, capsys):
    import json

    from effnb.finetune.cola import recipe

    words = ["<pad>", "<unk>", "good", "bad", "film", "was", "yes", "no"]
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 16}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(words), "dropout": 0.0}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, **layers, **ids)).save_pretrained(tmp_path)
    lines = [
        {"prompt": f"film was {word}", "choices": [" yes", " no"], "label": label}
        for word, label in (("good", 0), ("bad", 1))
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = ["--train", str(tmp_path / "d.jsonl"), "--test", str(tmp_path / "d.jsonl"), "--model", str(tmp_path)]
    options = ["--rank", "4", "--alpha", "8", "--steps", "60", "--lr", "0.03", "--seeds", "0", "--device", "cpu"]
    results = recipe.main([*data, *options, "--links", "1", "2"])
    assert list(results) == ["links=1", "links=2"] and results["links=2"] == [100.0]
    assert "links=2" in capsys.readouterr().out
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "choices": ["a"], "label": 1}')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1"):
        recipe.read_examples(tmp_path / "bad.jsonl")
