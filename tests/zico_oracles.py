"""The slow and obvious ZiCo: gradients of every batch copied to NumPy and stacked, as the official code does."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def stacked_gradients(model, batches, loss_fn=F.cross_entropy, accumulate=False):
    """Layer name -> (batches, weights); a fresh backward pass a batch, zero where there is no gradient."""
    stacks = {name: [] for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    model.train()
    model.zero_grad()
    for x, y in batches:
        if not accumulate:
            model.zero_grad()
        loss_fn(model(x), y).backward()
        for name, stack in stacks.items():
            weight = model.get_submodule(name).weight
            stack.append(np.zeros(weight.numel()) if weight.grad is None else weight.grad.numpy().flatten().copy())
    return {name: np.array(stack) for name, stack in stacks.items()}


def layer_score(g, variant="code", reduction="sum"):
    """log sum of mean|g| / std over the elements of one layer, with the standard deviation divided by N."""
    std = np.std(np.abs(g) if variant == "paper" else g, axis=0)
    kept = np.nonzero(std)[0]
    terms = np.mean(np.abs(g), axis=0)[kept] / std[kept]
    if not len(terms) or terms.sum() == 0:
        return 0.0
    return float(np.log(terms.mean() if reduction == "mean" else terms.sum()))


def official_zico(model, batches, variant="code", reduction="sum", accumulate=False):
    """Sum of `layer_score` over the layers."""
    stacks = stacked_gradients(model, batches, accumulate=accumulate)
    return sum(layer_score(g, variant, reduction) for g in stacks.values())


def small_net(seed=0, **options):
    """Convolutions with norm, a branch, and a linear head; float64 for exact comparisons."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    return net.to(**options)


def some_batches(count, seed=0, size=6, dtype=torch.float32, classes=5):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, 9, 9, generator=g, dtype=dtype), torch.randint(classes, (size,), generator=g))
        for _ in range(count)
    ]
