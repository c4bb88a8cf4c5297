"""The proxies against the procedures of the official codes; rows for the benchmark of a chapter, no benchmark itself.

Benchmarks are run by path, so a neighbour is loaded by path as well::

    from runpy import run_path
    from pathlib import Path

    zoo = run_path(str(Path(__file__).with_name("nas_zoo.py")))
    rows = zoo["rows"](quick)
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnb.lab.measure.timing import paired_ratio
from effnb.models.small import SmallCNN
from effnb.nas import nanobench, nb201, score_all
from effnb.nas.proxies import grasp, knas
from effnb.nas.proxies.activations import CodeKernel
from effnb.nas.proxies.kernel import tangent_kernel

LAYERS = (nn.Conv2d, nn.Linear)
ZOO = ("grad_norm", "snip", "plain", "fisher", "naswot", "zico")
Batch = tuple[Tensor, Tensor]


# ---- the procedures of the official codes, each on a copy of the network ---------------------------------------------
def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LAYERS)]


def stepped(model: nn.Module, batch: Batch) -> nn.Module:
    model = copy.deepcopy(model).train()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    return model


def official_sums(model: nn.Module, batch: Batch) -> list[float]:
    """Gradient norm, SNIP and plain, a pass each."""
    formulas = (lambda w: w.grad.norm(), lambda w: (w * w.grad).abs().sum(), lambda w: (w * w.grad).sum())
    return [sum(f(m.weight).item() for m in layers(stepped(model, batch))) for f in formulas]


def official_fisher(model: nn.Module, batch: Batch) -> float:
    """An identity behind each layer, whose backward hook multiplies output and gradient; then one number a weight."""
    model = copy.deepcopy(model).train()
    found: dict[nn.Module, Tensor] = {}

    def tap(layer: nn.Module, args: tuple, z: Tensor) -> Tensor:
        def arrived(grad: Tensor) -> None:
            product = z.detach() * grad
            sums = product.sum(tuple(range(2, z.ndim))) if z.ndim > 2 else product
            found[layer] = sums.pow(2).mean(0).mul(0.5)

        out = z.view_as(z)
        out.register_hook(arrived)
        return out

    for layer in layers(model):
        layer.register_forward_hook(tap)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    dense = [torch.stack([torch.full(m.weight.shape[1:], float(f)) for f in found[m]]) for m in found]
    return sum(part.sum().item() for part in dense)


def official_kernel(inputs: list[Tensor]) -> np.ndarray:
    """Two products a ReLU, added up in NumPy."""
    kernel = np.zeros((len(inputs[0]), len(inputs[0])))
    for x in inputs:
        code = (x.flatten(1) > 0).float()
        kernel = kernel + (code @ code.t()).numpy() + ((1.0 - code) @ (1.0 - code.t())).numpy()
    return kernel


def official_naswot(model: nn.Module, batch: Batch) -> float:
    """A backward pass to mark the ReLUs that it visits, then a forward pass to read them."""
    model, seen = copy.deepcopy(model).train(), []
    x = batch[0].clone().requires_grad_()
    y = model(x)
    y.backward(torch.ones_like(y))
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    model(batch[0])
    return float(np.linalg.slogdet(official_kernel(seen))[1])


def official_zico(model: nn.Module, batches: list[Batch]) -> float:
    """Gradients of every batch copied to NumPy and stacked."""
    model, stacks = copy.deepcopy(model).train(), []
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        stacks.append([m.weight.grad.flatten().numpy().copy() for m in layers(model)])
    score = 0.0
    for grads in zip(*stacks, strict=True):
        grads = np.array(grads)
        std = grads.std(0)
        kept = std.nonzero()[0]
        total = (np.abs(grads).mean(0)[kept] / std[kept]).sum()
        score += float(np.log(total)) if total else 0.0
    return score


def official_zoo(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """All six, one after the other."""
    first = batches[0]
    sums = dict(zip(ZOO, official_sums(model, first), strict=False))
    rest = {"fisher": official_fisher(model, first), "naswot": official_naswot(model, first)}
    return sums | rest | {"zico": official_zico(model, batches)}


def official_gradients(model: nn.Module, x: Tensor) -> Tensor:
    """One backward pass a sample; gradients of all parameters named weight."""
    model, rows = copy.deepcopy(model).train(), []
    y = model(x)
    for i in range(len(x)):
        y[i : i + 1].backward(torch.ones_like(y[i : i + 1]), retain_graph=True)
        named = [p.grad.view(-1) for n, p in model.named_parameters() if "weight" in n and p.grad is not None]
        rows.append(torch.cat(named))
        model.zero_grad()
    return torch.stack(rows)


def official_ntk(model: nn.Module, x: Tensor) -> Tensor:
    g = official_gradients(model, x)
    return torch.einsum("nc,mc->nm", g, g)


def official_grasp(model: nn.Module, batch: Batch) -> float:
    """Two forward passes: one for the constant gradient, one for the product."""
    model = copy.deepcopy(model).train()
    theta = [m.weight for m in layers(model)]
    fixed = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), theta)
    grads = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), theta, create_graph=True)
    sum((a * b).sum() for a, b in zip(fixed, grads, strict=True)).backward()
    return sum((-w.detach() * w.grad).sum().item() for w in theta)


# ---- rows ------------------------------------------------------------------------------------------------------------
def row(
    name: str, ours: str, peer: str, slow: Callable, fast: Callable, target: float | None, detail: str, quick: bool
):
    ratio = paired_ratio(slow, fast, pairs=7, min_block=0.005 if quick else 0.1)
    row = {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "target": target, "better": "higher"}
    return row | {"unit": "x", "detail": detail}


def images(count: int, shape: tuple[int, ...], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator), torch.arange(count) % 10


def networks(quick: bool) -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """Name, network and shape of an image."""
    stream = torch.Generator().manual_seed(0)
    nano = ("nano-bench cell", nanobench.build_net("332113", generator=stream), (1, 14, 14))
    if quick:
        return [nano]
    return [
        nano,
        ("NAS-Bench-201 cell, one a stage", nb201.build_cell_net("332113", cells=1, generator=stream), (3, 32, 32)),
    ]


def zoo_rows(quick: bool) -> list[dict]:
    found = []
    for name, model, shape in networks(quick):
        size = 16 if quick else 64
        batches = [images(size, shape, seed) for seed in (0, 1)]
        detail = f"{', '.join(ZOO)}; 2 batches of {size}; limit: the 2 forward and backward passes that ZiCo needs"
        slow, fast = (lambda m=model, b=batches: official_zoo(m, b)), (lambda m=model, b=batches: score_all(m, b, ZOO))
        title = f"six proxies of one network, {name}"
        found.append(row(title, "score_all, shared passes", "one procedure each", slow, fast, 2.5, detail, quick))
    return found


def kernel_rows(quick: bool) -> list[dict]:
    found = []
    for name, model, shape in networks(quick):
        inputs = []
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0].detach()))
        model(images(16 if quick else 64, shape)[0])
        apart = [x.clone() for x in inputs]

        def ours(values: list[Tensor] = apart) -> Tensor:
            kernel = CodeKernel()
            for value in values:
                kernel.add(value)
            return kernel.matrix()

        detail = f"{len(inputs)} ReLUs, every input taken as different"
        slow, title = (lambda values=apart: official_kernel(values)), f"code kernel of naswot, {name}"
        found.append(row(title, "one product of signs", "two products", slow, ours, 1.5, detail, quick))
    return found


def tangent_rows(quick: bool) -> list[dict]:
    nano = nanobench.build_net("332113", generator=torch.Generator().manual_seed(0))
    cases = [("nano-bench cell, 8 x 8", nano, (1, 8, 8), 16), ("nano-bench cell, 14 x 14", nano, (1, 14, 14), 16)]
    if not quick:
        cell = nb201.build_cell_net("332113", cells=1)
        cases += [
            ("nano-bench cell, 8 x 8", nano, (1, 8, 8), 32),
            ("nano-bench cell, 14 x 14", nano, (1, 14, 14), 32),
            ("small CNN, 8 x 8", SmallCNN(), (1, 8, 8), 16),
            ("NAS-Bench-201 cell, 8 x 8", cell, (3, 8, 8), 16),
            ("NAS-Bench-201 cell, 32 x 32", cell, (3, 32, 32), 16),
        ]
    found = []
    for name, model, shape, size in cases:
        x = images(size, shape)[0]
        slow, fast = (lambda m=model, x=x: official_ntk(m, x)), (lambda m=model, x=x: tangent_kernel(m, x))
        detail = "both do the same arithmetic; what is gained is the overhead of a call"
        title = f"tangent kernel of {size} samples, {name}"
        ours, peer = "batched backward pass", "one backward pass a sample"
        found.append(row(title, ours, peer, slow, fast, 3.0, detail, quick))
    return found


def other_rows(quick: bool) -> list[dict]:
    found = []
    for name, model, shape in networks(quick):
        batch = images(16 if quick else 64, shape)
        slow, fast = (lambda m=model, b=batch: official_grasp(m, b)), (lambda m=model, b=batch: grasp(m, b))
        found.append(row(f"GraSP, {name}", "one graph", "two forward passes", slow, fast, None, "", quick))
    _, model, shape = networks(True)[0]
    x = images(16, shape)[0]
    slow, fast = (lambda: official_ntk(model, x).mean().item()), (lambda: knas(model, x))
    detail = "the mean of the Gram matrix is the squared norm of the mean gradient"
    found.append(
        row("KNAS of 16 samples, nano-bench cell", "one backward pass", "one a sample", slow, fast, None, detail, quick)
    )
    return found


def rows(quick: bool = False) -> list[dict]:
    """All rows; ``quick`` takes the smallest network, batches of 16 and short blocks."""
    return zoo_rows(quick) + kernel_rows(quick) + tangent_rows(quick) + other_rows(quick)
