"""AvaGrad's step against AdamW (foreach and fused), the official loop restated, and pytorch-optimizer."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from effnb.lab.measure.timing import paired_ratio
from effnb.optim import AvaGrad


class OfficialLoop(Optimizer):
    """The operations of the official code, one tensor after the other, with the calls of today's torch."""

    def __init__(self, params, lr: float = 0.1, betas=(0.9, 0.999), eps: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "gamma": None})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            (b1, b2), eps, total, count = group["betas"], group["eps"], 0.0, 0
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                t, m, v = state["step"], state["m"], state["v"]
                m.mul_(b1).add_(p.grad, alpha=1 - b1)
                root = v.sqrt()
                if t > 1:
                    denominator = root.div(math.sqrt(1 - b2 ** (t - 1))).add_(eps)
                    p.addcdiv_(m, denominator, value=-group["gamma"] * group["lr"] / (1 - b1**t))
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                rates = root.div_(math.sqrt(1 - b2**t)).add_(eps)
                total += rates.norm(-2) ** -2
                count += rates.numel()
            group["gamma"] = 1.0 / (total / count).sqrt().item()


def resnet20() -> list[tuple[int, ...]]:
    """Shapes of a ResNet-20 for CIFAR: 0.27 million weights in many small tensors."""
    shapes, fan_in = [(16, 3, 3, 3), (16,), (16,)], 16
    for width in (16, 32, 64):
        for _ in range(6):
            shapes += [(width, fan_in, 3, 3), (width,), (width,)]
            fan_in = width
    return [*shapes, (10, 64), (10,)]


def resnet18() -> list[tuple[int, ...]]:
    """Shapes of a ResNet-18: 11 million weights."""
    shapes, fan_in = [(64, 3, 3, 3), (64,), (64,)], 64
    for width in (64, 128, 256, 512):
        for _ in range(4):
            shapes += [(width, fan_in, 3, 3), (width,), (width,)]
            fan_in = width
    return [*shapes, (10, 512), (10,)]


def weights(shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    """Parameters with small gradients, so that any number of steps stays finite."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return params


def stepper(make, shapes, **options):
    """The step of a warmed-up optimizer on weights of its own."""
    optimizer = make(weights(shapes), lr=1e-6, **options)
    for _ in range(3):
        optimizer.step()
    return optimizer.step


def compare(name: str, ours: str, peer: str, slow, fast, target: float | None, quick: bool) -> dict:
    """One row: seconds of ours over seconds of AdamW (lower is better), or of another peer over ours."""
    lower = peer.startswith("AdamW")
    ratio = paired_ratio(*((fast, slow) if lower else (slow, fast)), pairs=7, min_block=0.005 if quick else 0.1)
    row = {"name": f"one step, {name}, {ours} and {peer}", "ours": ours, "peer": peer, "ratio": ratio, "target": target}
    return row | {"better": "lower" if lower else "higher", "unit": "x", "detail": "float32, weights already in memory"}


def library_row(name: str, shapes, fast, quick: bool) -> dict:
    """Against pytorch-optimizer, where it is installed."""
    try:
        from pytorch_optimizer import AvaGrad as Library
    except ImportError:
        row = {
            "name": f"one step, {name}, AvaGrad foreach and pytorch-optimizer AvaGrad",
            "ours": "AvaGrad foreach",
            "peer": "pytorch-optimizer AvaGrad",
            "ratio": None,
        }
        return row | {"target": 2.3, "better": "higher", "unit": "x", "detail": "needs the extra bench"}
    return compare(name, "AvaGrad foreach", "pytorch-optimizer AvaGrad", stepper(Library, shapes), fast, 2.3, quick)


def foreach_rows(name: str, shapes, quick: bool) -> list[dict]:
    """The default path against AdamW's, the official loop and pytorch-optimizer."""
    ours = stepper(AvaGrad, shapes, foreach=True)
    adamw = stepper(AdamW, shapes, foreach=True)
    official = stepper(OfficialLoop, shapes)
    return [
        compare(name, "AvaGrad foreach", "AdamW foreach", adamw, ours, 1.15, quick),
        compare(name, "AvaGrad foreach", "official loop", official, ours, 2.3, quick),
        library_row(name, shapes, ours, quick),
    ]


def fused_rows(name: str, shapes, target: float | None, quick: bool) -> list[dict]:
    """The compiled pass against AdamW's fused kernel and its foreach path."""
    ours = stepper(AvaGrad, shapes, fused=True)
    fused, foreach = (stepper(AdamW, shapes, **{path: True}) for path in ("fused", "foreach"))
    return [
        compare(name, "AvaGrad fused", "AdamW fused", fused, ours, target, quick),
        compare(name, "AvaGrad fused", "AdamW foreach", foreach, ours, None, quick),
    ]


def run(quick: bool = False) -> list[dict]:
    """All rows; ``quick`` takes small tensors only."""
    if quick:
        return foreach_rows("ResNet-20", resnet20(), True) + fused_rows("one tensor of 0.01 M", [(10_000,)], None, True)
    rows = foreach_rows("ResNet-20 (0.27 M, 59 tensors)", resnet20(), quick)
    rows += foreach_rows("ResNet-18 (11 M, 53 tensors)", resnet18(), quick)
    rows += fused_rows("one tensor of 0.27 M", [(270_000,)], 1.6, quick)
    rows += fused_rows("one tensor of 11.5 M", [(11_500_000,)], 1.6, quick)
    return rows + fused_rows("ResNet-20 (0.27 M, 59 tensors)", resnet20(), None, quick)
