"""What mixed precision must beat: one precision for all, precisions by layer, and its own bits handed out at random."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from effnb.compress._gated import select_layers

from .digits import check_bits, quantize_weight, steps_per_unit
from .gate import SmolGate, initial_scale
from .handle import SmolHandle

Bits = int | Mapping[str, int | Tensor]


def uniform_qat(
    model: nn.Module,
    bits: Bits,
    include: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
    exclude: Iterable[str | type[nn.Module]] = (),
    *,
    scale: str | float | Mapping[str, Tensor] = "std",
) -> SmolHandle:
    """Quantise every chosen weight to given bits and train straight-through: the baseline, with SMOL's own quantiser.

    Args:
        model: changed in place; usually trained already.
        bits: one number, or layer's name to a number or to a tensor that broadcasts to the weight; 1 to 8.
        include: types of layers to take.
        exclude: names, patterns or types to leave out.
        scale: as in :func:`apply_smol`, from the present weights; or layer's name to a scale, to take over another
            handle's.

    Returns:
        A handle in phase II: train :meth:`SmolHandle.weight_parameters`, then ``finalize()``.

    Raises:
        ValueError: bits out of range or not whole, a layer without bits or of another shape, no layer matches.

    Reference: zhou2016dorefa

    >>> handle = uniform_qat(nn.Linear(4, 2), bits=2)
    >>> handle.average_bits(), len(handle.model.weight.abs().unique()) <= 2
    (2.0, True)
    """
    layers = select_layers(model, include, exclude)
    gates, fixed = {}, {}
    for name, layer in layers.items():
        if isinstance(bits, Mapping) and name not in bits:
            raise ValueError(f"bits must name every layer, got none for {name!r}")
        fixed[name] = bits[name] if isinstance(bits, Mapping) else bits
        check_bits(fixed[name], 8, "bits")
        sharing = "weight" if isinstance(fixed[name], Tensor) and fixed[name].numel() > 1 else "layer"
        own = scale[name] if isinstance(scale, Mapping) else scale
        gates[name] = SmolGate(layer.weight, 8, sharing, scale=own)
    for name, gate in gates.items():
        wanted = torch.as_tensor(fixed[name], device=gate.bits.device)
        shape = gate.bits.shape if wanted.numel() > 1 else ()
        gate.freeze(wanted.broadcast_to(shape) if shape else wanted.reshape(()))
    return SmolHandle(model, gates)


def shuffled_bits(bits: Mapping[str, Tensor], generator: torch.Generator, within: bool = True) -> dict[str, Tensor]:
    """The same histogram of bits, handed out at random: does it matter *which* weights get them?

    Args:
        bits: layer's name to whole bits of every weight.
        generator: stream of the permutation.
        within: permute inside each layer (its average stays), or over all layers.

    Returns:
        Layer's name to bits, same shapes.

    Raises:
        ValueError: no layer.

    Reference: savarese2022bits

    >>> new = shuffled_bits({"a": torch.tensor([1, 1, 2])}, torch.Generator().manual_seed(0))
    >>> new["a"].sort().values
    tensor([1, 1, 2])
    """
    if not bits:
        raise ValueError("bits must hold at least one layer, got none")

    def permuted(flat: Tensor) -> Tensor:
        order = torch.randperm(flat.numel(), generator=generator, device=generator.device)
        return flat[order.to(flat.device)]

    if within:
        return {name: permuted(each.reshape(-1)).view(each.shape) for name, each in bits.items()}
    pool = permuted(torch.cat([each.reshape(-1) for each in bits.values()]))
    parts = pool.split([each.numel() for each in bits.values()])
    return {name: part.view(each.shape) for (name, each), part in zip(bits.items(), parts, strict=True)}


def layer_average_bits(bits: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Every layer as uniform as its own total allows: two neighbouring precisions, at random, same sum of bits.

    The control between uniform precision and a shuffle: it keeps only how many bits each *layer* got.

    Args:
        bits: layer's name to whole bits of every weight.
        generator: stream that picks which weights get the extra bit.

    Returns:
        Layer's name to bits, same shapes, same sum for each layer.

    Reference: savarese2022bits

    >>> layer_average_bits({"a": torch.tensor([1, 1, 1, 5])}, torch.Generator().manual_seed(0))
    {'a': tensor([2, 2, 2, 2])}
    """
    found = {}
    for name, each in bits.items():
        low, extra = divmod(int(each.sum(dtype=torch.int64)), max(1, each.numel()))
        order = torch.randperm(each.numel(), generator=generator, device=generator.device).to(each.device)
        flat = torch.full_like(each.reshape(-1), low)
        flat[order[:extra]] = low + 1
        found[name] = flat.view(each.shape)
    return found


@contextmanager
def _rounded(layers: Mapping[str, nn.Module], bits: Mapping[str, int], scales: Mapping[str, Tensor]):
    saved = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                density = steps_per_unit(bits[name], layer.weight)
                layer.weight.copy_(quantize_weight(saved[name], density, scales[name].to(saved[name].dtype)))
            yield
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(saved[name])


def greedy_layer_bits(
    model: nn.Module,
    loss: Callable[[], float],
    budget: float,
    levels: Sequence[int] = (1, 2, 3, 4, 5, 6, 8),
    *,
    include: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
    exclude: Iterable[str | type[nn.Module]] = (),
    scale: str | float = "std",
) -> dict[str, int]:
    """Mixed precision by layer: from the most bits, lower the layer whose loss rises least per bit saved, again.

    Args:
        model: trained, plain; unchanged on return.
        loss: computes the loss of ``model`` as it is, on fixed training or validation data.
        budget: mean bits of a weight not to exceed.
        levels: precisions to choose from, 1 to 8.
        include: types of layers to take.
        exclude: names, patterns or types to leave out.
        scale: as in :func:`apply_smol`.

    Returns:
        Layer's name to bits, for :func:`uniform_qat`.

    Raises:
        ValueError: levels out of range, or a budget below the smallest level.

    Reference: dong2019hawq

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> greedy_layer_bits(model, lambda: float(model(torch.ones(1, 4)).sum()), budget=1.0)
    {'0': 1, '1': 1}
    """
    levels = sorted(set(levels))
    for level in levels:
        check_bits(level, 8, "levels")
    if not levels or budget < levels[0]:
        raise ValueError(f"budget must be at least the smallest of levels {levels}, got {budget}")
    layers = select_layers(model, include, exclude)
    scales = {name: initial_scale(layer.weight, scale) for name, layer in layers.items()}
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    chosen = dict.fromkeys(layers, levels[-1])

    def at(bits: Mapping[str, int]) -> float:
        with _rounded(layers, bits, scales):
            return loss()

    while sum(sizes[name] * bits for name, bits in chosen.items()) > budget * sum(sizes.values()):
        now, tried = at(chosen), {}
        for name, bits in chosen.items():
            if bits > levels[0]:
                lower = levels[levels.index(bits) - 1]
                rise = at(chosen | {name: lower}) - now
                tried[name] = (rise / (sizes[name] * (bits - lower)), lower)
        best = min(tried, key=lambda name: tried[name][0])
        chosen[best] = tried[best][1]
    return chosen
