"""Networks with a generator of their own: their weights come from it alone, and nothing else is drawn."""

import pytest
import torch

from effnb.models import CharTransformer, SmallCNN, ViT, mlp

NETWORKS = {
    "mlp": lambda g: mlp((6, 5, 3), g),
    "cnn": lambda g: SmallCNN(widths=(4, 8), generator=g),
    "transformer": lambda g: CharTransformer(width=8, depth=1, heads=2, generator=g),
    "vit": lambda g: ViT(width=8, depth=1, heads=2, class_token=True, generator=g),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_generator_leaves_the_global_stream_alone(make):
    weights = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        weights.append(make(torch.Generator().manual_seed(3)).state_dict())
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_without_a_generator_the_global_stream_gives_the_weights(make):
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(torch.cat([p.flatten() for p in make(None).parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
