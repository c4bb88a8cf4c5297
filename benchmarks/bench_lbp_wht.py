"""The low-rank backward pass against exact back-propagation and against masks broadcast over tiles, and its memory."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnb.finetune import WalshLowRankLinear, apply_walsh_backprop, walsh_bases
from effnb.lab.measure.cost import saved_activation_bytes
from effnb.lab.measure.timing import one_thread, paired_ratio, roofline_probe
from effnb.models import ViT

# (batch, side of the grid, in, out), the k of L1-k, and what the speed over exact back-propagation should be:
# 80 % of L / (P m) from m = 6 on, and 20x, 8x, 4x for L1-1, L1-2, L1-4 on the first shape.
SHAPES = {
    (64, 7, 448, 1792): {1: 20.0, 2: 8.0, 3: 6.5, 4: 4.0, 6: 1.9, 8: None},
    (64, 7, 1792, 448): {2: 8.0, 4: 3.9},
    (32, 14, 224, 896): {2: None, 3: 6.5, 4: 3.9},
    (32, 14, 384, 1536): {2: None, 4: 3.9},
}


class MaskedTiles(torch.autograd.Function):
    """The published operations: each mask times each tile, a tensor of ``m`` times the activation."""

    @staticmethod
    def tiles(x: Tensor, side: int, order: int) -> Tensor:
        missing = math.ceil(side / order) * order - side
        first, last = math.ceil(missing / 2), missing // 2
        image = F.pad(x.view(len(x), side, side, -1).permute(0, 3, 1, 2), (first, last) * 2, mode="reflect")
        tiles = (side + missing) // order
        return image.view(*image.shape[:2], tiles, order, tiles, order).permute(0, 1, 2, 4, 3, 5)

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, bases: Tensor, side: int) -> Tensor:
        masks = bases[:, None, None, None, None]
        ctx.save_for_backward((MaskedTiles.tiles(x, side, masks.shape[-1]) * masks).sum((-1, -2)), weight, masks)
        ctx.side = side
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_hat, weight, masks = ctx.saved_tensors
        m, batch, c_in, tiles = x_hat.shape[:4]
        order, side = masks.shape[-1], ctx.side
        g_hat = (MaskedTiles.tiles(grad, side, order) * masks).mean((-1, -2))
        back = (weight.t() @ g_hat.flatten(3)).view(m, batch, c_in, tiles, tiles, 1, 1) * masks
        whole = back.sum(0).permute(0, 1, 2, 4, 3, 5).reshape(batch, c_in, tiles * order, tiles * order)
        first = math.ceil((tiles * order - side) / 2)
        grad_x = whole[..., first : first + side, first : first + side].flatten(2).permute(0, 2, 1)
        g_rows = g_hat.permute(0, 2, 1, 3, 4).flatten(2)
        x_rows = x_hat.permute(0, 1, 3, 4, 2).flatten(1, 3)
        return grad_x, (g_rows @ x_rows).sum(0), grad.sum((0, 1)), None, None


def inputs(batch: int, side: int, c_in: int, c_out: int) -> tuple[Tensor, nn.Linear, Tensor]:
    """Tokens that need a gradient, a layer, and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, side**2, c_in, generator=generator).requires_grad_()
    layer = nn.Linear(c_in, c_out)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    return x, layer, torch.randn(batch, side**2, c_out, generator=generator)


def backward(y: Tensor, x: Tensor, layer: nn.Linear, grad: Tensor):
    """A call that takes all three gradients anew."""
    return lambda: torch.autograd.grad(y, (x, layer.weight, layer.bias), grad, retain_graph=True)


def row(name: str, peer: str, ratio, target: float | None, detail: str) -> dict:
    """One line of the table, higher is better."""
    ours = {"name": name, "ours": "effnb", "peer": peer, "ratio": ratio, "target": target}
    return ours | {"better": "higher", "unit": "x", "detail": detail}


def roofline(shape: tuple[int, int, int, int], m: int, machine: dict[str, float]) -> float:
    """The largest ratio that operations and traffic allow: both read the output's gradient and write the input's."""
    batch, side, c_in, c_out = shape
    rows, tokens = math.ceil(side / 8) ** 2 * m, side**2
    traffic = 4e-9 * (batch * tokens * (c_in + c_out) + 2 * c_in * c_out) / machine["gb_s"]
    exact = 4e-9 * batch * tokens * c_in * c_out / machine["gflops"]
    ours = 1e-9 * batch * rows * (4 * c_in * c_out + 2 * tokens * (c_in + c_out)) / machine["gflops"]
    return (exact + traffic) / (ours + traffic)


def speed_rows(shape: tuple[int, int, int, int], targets: dict[int, float | None], quick: bool) -> list[dict]:
    """Backward pass with bias: ours against exact and against masked tiles, for each k."""
    batch, side, c_in, c_out = shape
    x, layer, grad = inputs(*shape)
    exact = backward(layer(x), x, layer, grad)
    label = f"{side}x{side} tokens, {c_in} to {c_out}, batch {batch}"
    options = {"pairs": 7, "min_block": 0.01 if quick else 0.1}
    with one_thread():
        machine = roofline_probe(size=256, megabytes=16) if quick else roofline_probe()
    rows = []
    for k, target in targets.items():
        ours = backward(WalshLowRankLinear.from_linear(layer, k=k)(x), x, layer, grad)
        bases = walsh_bases(8, "l1", k)
        limit = side**2 / (math.ceil(side / 8) ** 2 * len(bases))
        name = f"backward, L1-{k}, {label}"
        detail = (
            f"float32; {limit:.1f}x by the products alone, {roofline(shape, len(bases), machine):.1f}x with transforms "
            f"and traffic at {machine['gflops']:.0f} GFLOP/s and {machine['gb_s']:.0f} GB/s"
        )
        ratio = paired_ratio(exact, ours, **options)
        rows.append(row(name + ", exact", "exact back-propagation", ratio, target, detail))
        if len(bases) > 10:
            continue
        masked = backward(MaskedTiles.apply(x, layer.weight, layer.bias, bases, side), x, layer, grad)
        ratio = paired_ratio(masked, ours, **options)
        rows.append(row(name + ", published form", "masks broadcast over tiles", ratio, 8.0, detail))
    return rows


def step_row(shape: tuple[int, int, int, int], k: int, quick: bool) -> dict:
    """Forward and backward together: the exact forward pass bounds the gain by 3."""
    x, layer, grad = inputs(*shape)
    ours = WalshLowRankLinear.from_linear(layer, k=k)
    calls = [lambda m=m: torch.autograd.grad(m(x), (x, m.weight, m.bias), grad) for m in (layer, ours)]
    ratio = paired_ratio(*calls, pairs=7, min_block=0.01 if quick else 0.1)
    name = f"forward and backward, L1-{k}, {shape[1]}x{shape[1]} tokens, {shape[2]} to {shape[3]}, batch {shape[0]}"
    return row(name, "exact back-propagation", ratio, None, "the forward pass is exact in both, so at most 3x")


def memory_rows(shape: tuple[int, int, int, int], ks: tuple[int, ...]) -> list[dict]:
    """Bytes that autograd keeps, by saved-tensor hooks: of the layer, and of a whole transformer."""
    x, layer, _ = inputs(*shape)
    label = f"{shape[1]}x{shape[1]} tokens, {shape[2]} to {shape[3]}, batch {shape[0]}"
    exact = saved_activation_bytes(layer, x)
    rows = []
    for k in ks:
        kept = saved_activation_bytes(WalshLowRankLinear.from_linear(layer, k=k), x)
        detail = f"{100 * kept / exact:.1f} % of the exact layer's"
        rows.append(row(f"stored by a layer, L1-{k}, {label}", "exact", exact / kept, None, detail))
    model, images = ViT(), torch.zeros(16, 1, 28, 28)
    exact = saved_activation_bytes(model, images)
    apply_walsh_backprop(model, k=2)
    kept = saved_activation_bytes(model, images)
    detail = f"{100 * kept / exact:.0f} %: LayerNorm, attention and GELU keep inputs of their own"
    return [*rows, row("stored by a whole ViT, L1-2, width 64, depth 4", "exact", exact / kept, None, detail)]


def run(quick: bool = False) -> list[dict]:
    """All rows; ``quick`` takes one small shape."""
    if quick:
        shape = (8, 7, 64, 256)
        return [*speed_rows(shape, {1: None, 2: None}, True), step_row(shape, 2, True), *memory_rows(shape, (2,))]
    rows = [line for shape, targets in SHAPES.items() for line in speed_rows(shape, targets, quick)]
    first = next(iter(SHAPES))
    return [*rows, step_row(first, 2, quick), *memory_rows(first, (1, 2, 3, 4, 6, 8))]


if __name__ == "__main__":
    import sys

    for line in run("--quick" in sys.argv):
        print(line["name"], "|", line["ratio"], "| target", line["target"], "|", line["detail"])
