"""The slow and obvious versions of the proxies, on a copy of the network that they may spoil, and networks to try."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from effnb.models.small import SmallCNN, initialize, mlp
from effnb.nas import nanobench, nb201

LAYERS = (nn.Conv2d, nn.Linear)


# ---- networks --------------------------------------------------------------------------------------------------------
class Twisted(nn.Module):
    """In-place ReLU after a convolution, a ReLU used thrice, functional ReLUs, a convolution used twice, ``+=``."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm, self.relu, self.last = nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Linear(6, 10)

    def forward(self, x):
        x = self.relu(self.first(x))
        y = self.relu(self.norm(self.again(x)))
        z = self.again(y)
        z += x
        z = torch.relu(z).relu() + F.relu(z, inplace=True)
        return self.last(self.relu(z).mean((2, 3)))


class Grouped(nn.Module):
    """Biases, a group norm, dropout, a strided grouped convolution, and a tuple as output."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(0.2),
            nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        features = self.body(x).mean((2, 3))
        return features, self.head(features)


def seeded(number):
    return torch.Generator().manual_seed(number)


NETS = {
    "nano": lambda: nanobench.build_net("312403", generator=seeded(0)),
    "nano disconnected": lambda: nanobench.build_net("301000", generator=seeded(0)),
    "cell": lambda: nb201.build_cell_net("320314", channels=4, cells=1, in_channels=1, generator=seeded(1)),
    "cnn": lambda: SmallCNN(widths=(4, 8), generator=seeded(2)),
    "twisted": lambda: initialize(Twisted(), seeded(3)),
    "grouped": lambda: initialize(Grouped(), seeded(4)),
    "mlp": lambda: mlp([144, 12, 10], generator=seeded(5)),
}
ALIVE = [name for name in NETS if name != "nano disconnected"]


def batch(size=6, pixels=12, seed=0):
    stream = seeded(seed)
    return torch.randn(size, 1, pixels, pixels, generator=stream), torch.arange(size) % 10


# ---- the oracles -----------------------------------------------------------------------------------------------------
def trained(model, seed=0):
    """A copy in train mode whose dropout draws from ``seed``."""
    model = copy.deepcopy(model).train()
    torch.manual_seed(seed)
    return model


def logits(output):
    return output[-1] if isinstance(output, tuple) else output


def layers(model):
    return [m for m in model.modules() if isinstance(m, LAYERS)]


def backward(model, pair):
    model = trained(model)
    F.cross_entropy(logits(model(pair[0])), pair[1]).backward()
    return [m for m in layers(model) if m.weight.grad is not None]


def grad_norm(model, pair):
    return sum(m.weight.grad.norm().item() for m in backward(model, pair))


def snip(model, pair):
    return sum((m.weight * m.weight.grad).abs().sum().item() for m in backward(model, pair))


def plain(model, pair):
    return sum((m.weight * m.weight.grad).sum().item() for m in backward(model, pair))


def fisher(model, pair, broadcast=True):
    """Outputs pass through a copy, of which gradient and value are kept; F_c is written to every weight and added."""
    model, seen = trained(model), []

    def tap(layer, args, z):
        kept = z.clone()
        kept.retain_grad()
        seen.append((layer, kept, kept.detach().clone()))
        return kept.clone()

    for layer in layers(model):
        layer.register_forward_hook(tap)
    F.cross_entropy(logits(model(pair[0])), pair[1]).backward()
    score = 0.0
    for layer, z, value in seen:
        if z.grad is not None:
            g = value * z.grad
            per_channel = (g.sum(tuple(range(2, g.ndim))) if g.ndim > 2 else g).pow(2).mean(0) / 2
            dense = torch.stack(
                [torch.full(layer.weight.shape[1:] if broadcast else (), f.item()) for f in per_channel]
            )
            score += dense.sum(dtype=torch.float64).item()
    return score


def grasp(model, pair, step=1e-4):
    """The Hessian times g as a central difference of gradients, in double precision."""
    double = (pair[0].double(), pair[1])

    def gradients(shift):
        moved = trained(model).double()
        with torch.no_grad():
            for layer, delta in zip(layers(moved), shift, strict=True):
                layer.weight += delta
        F.cross_entropy(logits(moved(double[0])), double[1]).backward()
        return [torch.zeros_like(m.weight) if m.weight.grad is None else m.weight.grad for m in layers(moved)]

    g = gradients([0.0] * len(layers(model)))
    ahead, behind = gradients([step * d for d in g]), gradients([-step * d for d in g])
    curved = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
    return -sum((m.weight.double() * h).sum().item() for m, h in zip(layers(model), curved, strict=True))


def synflow(model, pair, norms=False):
    model = trained(model).double()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.abs_()
    if not norms:
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d | nn.GroupNorm):
                    setattr(parent, name, nn.Identity())
    torch.manual_seed(0)
    logits(model(torch.ones(1, *pair[0].shape[1:], dtype=torch.float64))).sum().backward()
    return sum((m.weight * m.weight.grad).abs().sum().item() for m in layers(model) if m.weight.grad is not None)


def jacob_cov(model, pair):
    model, x = trained(model), pair[0].clone().requires_grad_()
    y = logits(model(x))
    y.backward(torch.ones_like(y))
    values = np.linalg.eigvalsh(np.corrcoef(x.grad.flatten(1).double().numpy())).clip(0)
    return -float(np.sum(np.log(values + 1e-5) + 1 / (values + 1e-5)))


def relu_inputs(model, x):
    """Inputs of all ReLUs, by replacing the functions that compute them."""
    model, seen = trained(model), []
    names = [(torch, "relu"), (torch.Tensor, "relu"), (F, "relu")]
    kept = {pair: getattr(*pair) for pair in names}
    clip = torch.clamp_min

    def watched(value, inplace=False):
        seen.append(value.detach().clone())
        return value.clamp_min_(0) if inplace else clip(value, 0)

    try:
        for owner, name in names:
            setattr(owner, name, watched)
        model(x)
    finally:
        for (owner, name), value in kept.items():
            setattr(owner, name, value)
    return seen


def naswot_kernel(model, x):
    kernel = np.zeros((len(x), len(x)))
    for value in relu_inputs(model, x):
        code = (value.flatten(1) > 0).double().numpy()
        kernel += code @ code.T + (1 - code) @ (1 - code).T
    return kernel


def naswot(model, pair):
    return np.linalg.slogdet(naswot_kernel(model, pair[0])).logabsdet


def linear_regions(model, pair):
    codes = torch.cat([value.flatten(1) > 0 for value in relu_inputs(model, pair[0])], 1)
    return float(len({tuple(row.tolist()) for row in codes}))


def zen(model, x, seed=0, variance="running"):
    """One repeat, with the global generator; the network's last map is what its global average pooling sees."""
    model, maps, variances = copy.deepcopy(model).train(), [], []
    for m in model.modules():
        if isinstance(m, nn.AdaptiveAvgPool2d):
            m.register_forward_pre_hook(lambda m, args: maps.append(args[0]))
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.register_forward_pre_hook(lambda m, args: variances.append(args[0].var((0, 2, 3))))
    torch.manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, LAYERS):
                nn.init.normal_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
        first, second = torch.randn(x.shape), torch.randn(x.shape)
        model(first)
        batch_variances = list(variances)
        model(first + 0.01 * second)
        score = torch.log((maps[0] - maps[1]).abs().sum((1, 2, 3)).mean())
        running = [m.running_var for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for value in running if variance == "running" else batch_variances:
            score += torch.log(torch.sqrt(value.mean()))
    return score.item()


def per_sample(model, pair, rows, names):
    """Gradients of each entry of ``rows(logits)``, one backward pass each."""
    model = trained(model)
    values, found = rows(logits(model(pair[0]))), []
    for value in values:
        model.zero_grad()
        value.backward(retain_graph=True)
        chosen = [p for name, p in model.named_parameters() if names(model, name, p)]
        found.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in chosen]))
    return torch.stack(found).double()


def named_weight(model, name, parameter):
    return "weight" in name


def layer_weight(model, name, parameter):
    return any(parameter is m.weight for m in layers(model))


def tangent_kernel(model, pair):
    g = per_sample(model, pair, lambda out: out.sum(1), named_weight)
    return g @ g.T


def grad_sign(model, pair):
    g = per_sample(model, pair, lambda out: F.cross_entropy(out, pair[1], reduction="none"), layer_weight)
    return g.sign().sum(0).abs().sum().item()


def grad_sign_alone(model, pair):
    model, rows = trained(model), []
    for x, y in zip(*pair, strict=True):
        model.zero_grad()
        F.cross_entropy(logits(model(x[None])), y[None]).backward()
        rows.append(torch.cat([m.weight.grad.flatten() for m in layers(model)]))
    return torch.stack(rows).sign().sum(0).abs().sum().item()
