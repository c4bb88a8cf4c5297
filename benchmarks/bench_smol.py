"""SMOL against what a user would otherwise write: autograd noise, plain training, numpy planes, torch.save."""

import bz2
import io
import lzma
import time
import zlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effnb import compress as cp
from effnb.lab.measure import cost, timing
from effnb.models import SmallCNN, mlp

LEVELS, SHARES = [1, 2, 3, 4, 8], [0.33, 0.3, 0.2, 0.12, 0.05]


class Naive(nn.Module):
    """The method's formula as a parametrisation, left to autograd."""

    def __init__(self, shape: torch.Size, scale: float) -> None:
        super().__init__()
        self.s, self.scale = nn.Parameter(torch.full(shape, cp.s_from_bits(8.0))), scale

    def forward(self, u: Tensor) -> Tensor:
        eps = 2 * torch.rand_like(u) - 1
        return self.scale * (u + torch.sigmoid(self.s) * eps)

    def penalty(self) -> Tensor:
        return torch.log2(1 + torch.exp(-self.s)).sum()


def noise_calls() -> dict[str, Callable]:
    """Noise and penalty, forward and backward, on a 784 x 300 weight."""
    g = torch.Generator().manual_seed(0)
    u, up = torch.randn(300, 784, generator=g).clamp_(-1.9, 1.9).requires_grad_(), torch.randn(300, 784, generator=g)
    gate = Naive(u.shape, 0.1)
    s = torch.zeros(300, 784, requires_grad=True)

    def naive() -> None:
        torch.autograd.grad([gate(u), 1e-5 * gate.penalty()], [u, gate.s], [up, torch.ones(())])

    def fused(noise: str) -> Callable:
        return lambda: torch.autograd.grad(cp.perturb(u, s, 0.1, noise, lam=1e-5), [u, s], up)

    return {"naive": naive, "uniform": fused("uniform"), "rademacher": fused("rademacher")}


def step(
    model: nn.Module, x: Tensor, weights, limits=(), after: Callable = bool, penalty: Callable = float
) -> Callable:
    """A function that does one optimiser step on a fixed batch: SGD on weights, Adam on limits, then the clip."""
    optimizers = [torch.optim.SGD(weights, lr=1e-3, momentum=0.9)]
    optimizers += [torch.optim.Adam(limits, lr=1e-3, fused=True)] if limits else []
    y = torch.arange(len(x)) % 10

    def one() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
        after()

    return one


def searching(model: nn.Module, x: Tensor, noise: str) -> Callable:
    """Phase I of ours."""
    handle = cp.apply_smol(model, lam=1e-6, noise=noise)
    return step(model, x, handle.weight_parameters(), handle.precision_parameters(), handle.clip_)


def naive_search(model: nn.Module, x: Tensor) -> Callable:
    """Phase I as a user would write it: autograd noise, penalty in the loss, clip by expression."""
    gates = []
    for layer in cp.select_layers(model).values():
        gates.append(Naive(layer.weight.shape, float(layer.weight.detach().std())))
        parametrize.register_parametrization(layer, "weight", gates[-1])
    limits = [gate.s for gate in gates]
    weights = [p for p in model.parameters() if all(p is not s for s in limits)]
    raw = [layer.parametrizations.weight.original for layer in model.modules() if parametrize.is_parametrized(layer)]

    @torch.no_grad()
    def clip() -> None:
        for u, s in zip(raw, limits, strict=True):
            limit = 2 - torch.sigmoid(s)
            u.copy_(torch.clamp(u, -limit, limit))

    return step(model, x, weights, limits, clip, lambda: 1e-6 * sum(gate.penalty() for gate in gates))


def fine_tuning(model: nn.Module, x: Tensor) -> Callable:
    """Phase II with all sorts of bits."""
    handle = cp.apply_smol(model)
    for s in handle.precision_parameters():
        nn.init.uniform_(s, -5, 3)
    handle.freeze()
    return step(model, x, handle.weight_parameters())


def steps_of(make: Callable[[], nn.Module], x: Tensor) -> dict[str, Callable]:
    """Training steps of one network: plain, both noises, naive noise, phase II."""
    plain = make()
    found = {noise: searching(make(), x, noise) for noise in ("uniform", "rademacher")}
    found |= {"plain": step(plain, x, plain.parameters()), "naive": naive_search(make(), x)}
    return found | {"phase II": fine_tuning(make(), x)}


def plain_planes(codes: np.ndarray, bits: np.ndarray) -> bytes:
    """The straightforward packing: pick the owners of each digit by a boolean index; zlib for the map of bits."""
    planes = [np.packbits((codes[bits > i] >> (7 - i)) & 1).tobytes() for i in range(int(bits.max()))]
    return b"".join([*planes, zlib.compress(bits.tobytes())])


def plain_unpack(data: bytes, bits_size: int, n: int) -> np.ndarray:
    """Its inverse, to float weights."""
    bits = np.frombuffer(zlib.decompress(data[-bits_size:]), np.uint8)
    values, start = np.zeros(n, np.float32), 0
    for i in range(int(bits.max())):
        owners = bits > i
        count = int(owners.sum())
        digits = np.unpackbits(np.frombuffer(data, np.uint8, (count + 7) // 8, start), count=count)
        values[owners] += (2.0 * digits - 1) * 2.0**-i
        start += (count + 7) // 8
    return values


def storage(n: int) -> dict:
    """A tensor of ``n`` weights with five precisions, both packings and all file sizes."""
    rng = np.random.default_rng(0)
    bits = rng.choice(LEVELS, n, p=SHARES).astype(np.uint8)
    u = rng.standard_normal(n).clip(-1.99, 1.99).astype(np.float32)
    matrix = torch.from_numpy(u).view(-1, 1000), torch.from_numpy(bits).view(-1, 1000)
    tensor = cp.QuantizedTensor(*matrix, 0.1)
    packed = cp.pack({"w": tensor})
    data, peer, size = packed.to_bytes(), plain_planes(to_codes(u), bits), len(zlib.compress(bits.tobytes()))
    buffer, whole = io.BytesIO(), tensor.dequantize()
    torch.save({"w": whole}, buffer)
    pairs = {
        "pack": (lambda: plain_planes(to_codes(u), bits), lambda: cp.pack({"w": tensor}).to_bytes()),
        "unpack": (lambda: plain_unpack(peer, size, n), lambda: cp.PackedModel.from_bytes(data).to_state_dict()),
    }
    sizes = {"fp32": buffer.tell(), "zlib": len(zlib.compress(buffer.getvalue(), 6)), "int8": int8_bytes(whole)}
    return {"packed": packed, "bits": bits} | pairs | sizes


def to_codes(u: np.ndarray) -> np.ndarray:
    """Eight-digit codes of normalised weights."""
    return np.floor(u * 64 + 128).astype(np.uint8)


def int8_bytes(weight: Tensor) -> int:
    """What torch.save writes for the weight as int8 with one scale."""
    scale = float(weight.abs().max()) / 127
    return cost.stored_bytes({"w": (weight / scale).round().to(torch.int8)})


def rate(f: Callable, n: int, blocks: int) -> float:
    """Million weights a second, best of ``blocks`` runs on one thread."""
    seconds = []
    for _ in range(blocks + 1):
        start = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - start)
    return n / min(seconds[1:]) / 1e6


def row(
    name: str, ours: str, peer: str, ratio, target: float | None, detail: str, better: str = "higher", unit="x"
) -> dict:
    """One line of the performance page."""
    fields = {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "target": target}
    return fields | {"better": better, "unit": unit, "detail": detail}


def step_rows(ratio: Callable) -> list[dict]:
    """Time of a step over that of plain training; and over naive noise."""
    x = torch.rand(128, 1, 28, 28)
    dense, conv = steps_of(lambda: mlp([784, 300, 100]), x), steps_of(SmallCNN, x)
    time_of = "batch 128: time over plain training"
    nets = {"MLP": (dense, "784-300-100"), "conv net": (conv, "3x3 convolutions 16-32-64 on 28 x 28")}
    targets = [
        ("MLP", "uniform", 2.3), ("MLP", "rademacher", 2.0), ("MLP", "phase II", None),
        ("conv net", "uniform", 1.08), ("conv net", "rademacher", 1.08), ("conv net", "phase II", 1.15),
    ]  # fmt: skip
    rows = []
    for net, kind, target in targets:
        calls, shape = nets[net]
        name = f"step, {net}, {kind}" + ("" if kind == "phase II" else " noise")
        found = ratio(calls[kind], calls["plain"])
        rows.append(row(name, "SMOL", "plain", found, target, f"{shape}, {time_of}", "lower"))
    naive, detail = ratio(dense["naive"], dense["uniform"]), "784-300-100, batch 128, penalty and clip included"
    return [*rows, row("step, MLP, either noise", "fused node", "autograd", naive, None, detail)]


def general_compressors(bits: np.ndarray, entropy_bits: float) -> str:
    """How far from the entropy the standard library stays on the same map."""
    tools = {"zlib": zlib, "bz2": bz2, "lzma": lzma}
    sizes = {name: 8 * len(tool.compress(bits.tobytes())) / entropy_bits for name, tool in tools.items()}
    return ", ".join(f"{name} {size:.2f}" for name, size in sizes.items())


def storage_rows(ratio: Callable, n: int) -> list[dict]:
    """Packing speed and file sizes."""
    found, rows = storage(n), []
    packed = found["packed"]
    average, entropy = packed.payload_bits / n, packed.entropy_bits / n
    what = f"{n:,} weights, {average:.2f} bits each, entropy of the map {entropy:.2f} bits"
    for name in ("pack", "unpack"):
        peer, ours = found[name]
        speed = rate(ours, n, 5), rate(peer, n, 5)
        detail = f"{what}; {speed[0]:.0f} against {speed[1]:.0f} M weights/s"
        rows.append(row(name, "table-driven planes, rANS", "boolean index, zlib", ratio(peer, ours), None, detail))
        absolute = f"{what}; whole file in memory, map and checksum included"
        rows.append(row(f"{name}, absolute", "one thread", "none", speed[0], 20.0, absolute, unit="M weights/s"))
    bound = (packed.payload_bits + packed.entropy_bits) / 8
    note = f"{packed.nbytes:,} bytes; payload and entropy of the map {bound:,.0f}"
    rows.append(row("file over ideal", "file", "payload + entropy", packed.nbytes / bound, 1.05, note, "lower"))
    index, rivals = packed.index_bits / packed.entropy_bits, general_compressors(found["bits"], packed.entropy_bits)
    rows.append(row("index over entropy", "rANS", "entropy", index, 1.05, rivals, "lower"))
    for name, peer in (("fp32", "torch.save"), ("int8", "torch.save of int8"), ("zlib", "zlib of the fp32 file")):
        detail = f"{found[name]:,} bytes against {packed.nbytes:,}"
        rows.append(row(f"file against {name}", "pack", peer, found[name] / packed.nbytes, None, detail))
    return rows


def run(quick: bool = False) -> list[dict]:
    """All rows; ``quick`` takes fewer and shorter blocks and a smaller tensor."""
    torch.set_num_threads(1)
    options = {"pairs": 7, "min_block": 0.01} if quick else {"pairs": 15, "min_block": 0.1}

    def ratio(f: Callable, g: Callable) -> timing.Ratio:
        return timing.paired_ratio(f, g, **options)

    calls = noise_calls()
    shape = "784 x 300, forward and backward, penalty included"
    rows = [
        row("noise, uniform", "fused node", "autograd", ratio(calls["naive"], calls["uniform"]), 1.7, shape),
        row(
            "noise, Rademacher",
            "fused node",
            "autograd, uniform",
            ratio(calls["naive"], calls["rademacher"]),
            None,
            shape,
        ),
    ]
    return rows + step_rows(ratio) + storage_rows(ratio, 200_000 if quick else 1_000_000)
