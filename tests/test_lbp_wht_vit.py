"""The small vision transformer that the chapter adapts."""

import pytest
import torch
import torch.nn.functional as F

from effnb.models import ViT


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vit(**options):
    return ViT(width=16, depth=2, heads=2, generator=torch.Generator().manual_seed(0), **options)


def gradient(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# --- the vision transformer ------------------------------------------------------------------------------------------


def test_the_vit_is_drawn_from_its_generator():
    first, second = vit(), vit()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.grid == (7, 7)


@pytest.mark.parametrize("class_token", [False, True])
def test_the_vit_step_by_step(class_token):
    model, x = vit(class_token=class_token), draw(2, 1, 28, 28)
    embedded = model.embed(x)
    assert embedded.shape == (2, 49 + class_token, 16)
    assert torch.equal(model.head(model.pool(model.blocks(embedded))), model(x))
    patch = x[0, :, 8:12, 20:24]  # row 2, column 5 of the grid
    expected = (model.patches.weight * patch).sum((1, 2, 3)) + model.patches.bias
    index = 2 * 7 + 5 + class_token
    torch.testing.assert_close(embedded[0, index], expected + model.positions[0, index], rtol=1e-4, atol=1e-5)


def test_the_vit_attends_as_torch_does():
    attn = vit().blocks[0].attn
    x = draw(2, 49, 16)
    q, k, v = attn.qkv(x).view(2, 49, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 49, 16))
    torch.testing.assert_close(attn(x), expected, rtol=1e-4, atol=1e-5)


def test_the_vit_has_per_sample_gradients():
    model, x = vit().eval(), draw(3, 1, 28, 28)
    weights = dict(model.named_parameters())
    single = torch.func.grad(lambda w, image: torch.func.functional_call(model, w, image[None]).square().sum())
    per_sample = torch.func.vmap(single, (None, 0))(weights, x)
    for name, found in gradient(model, x).items():
        torch.testing.assert_close(per_sample[name].sum(0), found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"patch": 5}, {"width": 30}, {"depth": 0}, {"image_size": 0}])
def test_vits_that_do_not_fit(options):
    with pytest.raises(ValueError, match="must be"):
        ViT(**options)
