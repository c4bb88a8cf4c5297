"""Slow and obvious versions: batch-1 Jacobians by autograd, explicit inverses, exact ridge solutions."""

import copy

import torch
from torch import nn


class ConvNet(nn.Module):
    """Convolution, batch norm, in-place ReLU and a shortcut added in place: what a fast path can stumble over."""

    def __init__(self, width=3, classes=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu, self.dropout = nn.ReLU(inplace=True), nn.Dropout(0.3)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(x))
        out += x
        return self.head(self.dropout(self.relu(out)).mean((2, 3)))


def randomised(model, seed=0, dtype=torch.float64):
    """All parameters and running statistics drawn anew, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator) * 0.5
            value.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
    return model.to(dtype).eval()


def convnet(seed=0, dtype=torch.float64, **options):
    return randomised(ConvNet(**options), seed, dtype)


def images(n, seed=0, dtype=torch.float64, classes=4, side=6):
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(n, 1, side, side, generator=generator).to(dtype)
    return x, torch.randint(classes, (n,), generator=generator)


def jacobian(model, names, x):
    """One sample and one output at a time, on a copy whose every parameter takes gradients: ``(N, K, P)``."""
    model = copy.deepcopy(model).requires_grad_(True)
    known = dict(model.named_parameters())
    leaves = [known[name] for name in names]
    rows = []
    for sample in x:
        out = model(sample[None])[0]
        for value in out:
            grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True)]
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows).view(len(x), -1, len(rows[0])).detach()


def one_hot(y, classes):
    return torch.eye(classes, dtype=torch.float64)[y]


def residual(outputs, y, loss):
    outputs = outputs.detach().double()
    return (outputs if loss == "mse" else outputs.softmax(1)) - one_hot(y, outputs.shape[1])


def hessians(outputs, loss, hessian):
    """``(n, K, K)`` curvature of the loss."""
    n, k = outputs.shape
    if hessian == "identity" or loss == "mse":
        return torch.eye(k, dtype=torch.float64).expand(n, k, k)
    p = outputs.detach().double().softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def official_step(jac, r, lam):
    """``w_lin`` in the dual form with an explicit inverse, as the official notebook has it."""
    rows = jac.double().reshape(-1, jac.shape[-1])
    theta = rows @ rows.T + len(jac) * lam * torch.eye(len(rows), dtype=torch.float64)
    return -(rows.T @ (torch.linalg.inv(theta) @ r.double().reshape(-1)))


def vector(model, names):
    known = dict(model.named_parameters())
    return torch.cat([known[name].detach().reshape(-1).double() for name in names])


class Linear(nn.Module):
    """A model that is linear in its parameters, with an offset that is not trained."""

    def __init__(self, features=3, classes=2, seed=0):
        super().__init__()
        self.head = nn.Linear(features, classes)
        randomised(self, seed)

    def forward(self, x):
        return self.head(x)


def ridge_solution(model, names, w0, x, y, lam, classes):
    """Exact minimiser of ``mean 0.5 |f - t|^2 + lam / 2 |w - w0|^2`` for a model linear in the named parameters."""
    jac = jacobian(model, names, x)
    rows = jac.reshape(-1, jac.shape[-1])
    constant = model(x).detach().reshape(-1).double() - rows @ vector(model, names)  # f = rows w + constant
    matrix = rows.T @ rows + len(x) * lam * torch.eye(rows.shape[1], dtype=torch.float64)
    right = rows.T @ (one_hot(y, classes).reshape(-1) - constant) + len(x) * lam * w0
    return torch.linalg.solve(matrix, right)


def set_vector(model, names, values):
    known = dict(model.named_parameters())
    start = 0
    with torch.no_grad():
        for name in names:
            size = known[name].numel()
            known[name].copy_(values[start : start + size].view_as(known[name]))
            start += size
    return model
