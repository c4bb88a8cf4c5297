"""What mixed precision must beat, its own bits handed out at random, and the optimum of a quadratic loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from effnb.common import check_choice, check_number
from effnb.compress._gated import select_layers, shuffled
from effnb.compress.smol.gate import SmolGate, initial_scale
from effnb.compress.smol.handle import SmolHandle
from effnb.compress.smol.noise import LN2, NOISE_POWER, check_bits, check_broadcast, codes_per_unit, quantize_weight

__all__ = ["fisher_diagonal", "greedy_layer_bits", "layer_average_bits", "optimal_bits", "optimal_limits"]
__all__ += ["shuffled_bits", "uniform_qat"]


def uniform_qat(
    model: nn.Module,
    bits: int | Mapping[str, int | Tensor],
    include: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
    exclude: Iterable[str | type[nn.Module]] = (),
    *,
    scale: str | float | Mapping[str, Tensor] = "std",
) -> SmolHandle:
    """Quantise every chosen weight to given bits and train straight-through: the baseline, with SMOL's own quantiser.

    The handle is in phase II: train :meth:`SmolHandle.weight_parameters`, then ``finalize()``.

    Args:
        model: changed in place; usually trained already.
        bits: one number, or layer's name to a number or to a tensor that broadcasts to the weight; 1 to 8.
        include, exclude: layers to take, see :func:`select_layers`.
        scale: as in :func:`apply_smol`, from the present weights; or layer's name to another handle's scale.

    Raises:
        ValueError: bits out of range or not whole, a layer without bits or of another shape, no layer matches.

    Reference: zhou2016dorefa

    >>> handle = uniform_qat(nn.Linear(4, 2), bits=2)
    >>> handle.average_bits(), len(handle.model.weight.abs().unique()) <= 2
    (2.0, True)
    """
    layers, gates = select_layers(model, include, exclude), {}
    for argument, given in (("bits", bits), ("scale", scale)):
        for name in layers if isinstance(given, Mapping) else ():
            if name not in given:
                raise ValueError(f"{argument} must name every layer, got none for {name!r}")
    for name, layer in layers.items():
        fixed = bits[name] if isinstance(bits, Mapping) else bits
        check_bits(fixed, 8, "bits")
        fixed = torch.as_tensor(fixed)
        check_broadcast(f"bits of layer {name!r}", fixed.shape, layer.weight.shape)
        # One number for all is kept as such: the quantiser is faster, and the map in a file is one byte.
        sharing = "layer" if fixed.numel() == 1 else "weight"
        gates[name] = SmolGate(layer.weight, 8, sharing, scale=scale[name] if isinstance(scale, Mapping) else scale)
        gates[name].freeze(fixed)
    return SmolHandle(model, gates)


def shuffled_bits(bits: Mapping[str, Tensor], generator: torch.Generator, within: bool = True) -> dict[str, Tensor]:
    """Return the same histogram of bits, handed out at random: does it matter *which* weights get them?

    Args:
        bits: layer's name to whole bits of every weight; the result is of this form.
        generator: stream of the permutation.
        within: permute inside each layer (its average stays), or over all layers.

    Raises:
        ValueError: no layer.

    >>> new = shuffled_bits({"a": torch.tensor([1, 1, 2])}, torch.Generator().manual_seed(0))
    >>> new["a"].sort().values
    tensor([1, 1, 2])
    """
    if not bits:
        raise ValueError("bits must hold at least one layer, got none")
    if within:
        return {name: shuffled(each, generator) for name, each in bits.items()}
    pool = shuffled(torch.cat([each.reshape(-1) for each in bits.values()]), generator)
    parts = pool.split([each.numel() for each in bits.values()])
    return {name: part.view(each.shape) for (name, each), part in zip(bits.items(), parts, strict=True)}


def layer_average_bits(bits: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return every layer as uniform as its own total allows: two neighbouring precisions, at random, same sum of bits.

    The control between uniform precision and a shuffle: it keeps only how many bits each *layer* got.

    Args:
        bits: layer's name to whole bits of every weight; the result is of this form.
        generator: stream that picks which weights get the extra bit.

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
    """Return bits by layer: from the most bits, lower the layer whose loss rises least per bit saved, again and again.

    Args:
        model: trained, plain; unchanged on return.
        loss: computes the loss of ``model`` as it is, on fixed training or validation data; no graph is built.
        budget: mean bits of a weight not to exceed.
        levels: precisions to choose from, 1 to 8.
        include, exclude, scale: as in :func:`apply_smol`.

    Raises:
        ValueError: levels out of range, or a budget below the smallest level.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> greedy_layer_bits(model, lambda: float(model(torch.ones(1, 4)).sum()), budget=1.0)
    {'0': 1, '1': 1}
    """
    levels = sorted(set(levels))
    for level in levels:
        check_bits(level, 8, "levels")
    if not levels or budget < levels[0]:
        raise ValueError(f"budget must be at least the smallest of levels {levels}, got {budget}")
    weights = {name: layer.weight for name, layer in select_layers(model, include, exclude).items()}
    scales = {name: initial_scale(w, scale).to(w.dtype) for name, w in weights.items()}
    sizes = {name: w.numel() for name, w in weights.items()}
    saved = {name: w.detach().clone() for name, w in weights.items()}

    @torch.no_grad()
    def loss_at(bits: Mapping[str, int]) -> float:
        try:
            for name, w in weights.items():
                w.copy_(quantize_weight(saved[name], codes_per_unit(bits[name], w), scales[name]))
            return loss()
        finally:
            for name, w in weights.items():
                w.copy_(saved[name])

    chosen = dict.fromkeys(weights, levels[-1])
    while sum(sizes[name] * bits for name, bits in chosen.items()) > budget * sum(sizes.values()):
        now, tried = loss_at(chosen), {}
        for name, bits in chosen.items():
            if bits > levels[0]:
                lower = levels[levels.index(bits) - 1]
                rise = loss_at(chosen | {name: lower}) - now
                tried[name] = (rise / (sizes[name] * (bits - lower)), lower)
        # A loss may fall with fewer bits: such a layer goes first.
        best = min(tried, key=lambda name: tried[name][0])
        chosen[best] = tried[best][1]
    return chosen


def optimal_limits(curvature: Tensor, lam: float, noise: str = "uniform") -> Tensor:
    r"""Return the best noise limits for ``L = 1/2 sum(H_i u_i^2)``: ``sigma_i = min(1, sqrt(3 lam / (H_i ln 2)))``.

    Reverse water-filling: noise of size ``sigma`` adds ``H sigma^2 / 6`` to the expected loss (``H sigma^2 / 2`` if
    Rademacher, where 3 becomes 1) and saves ``lam log2(1 / sigma)``. Weights of small curvature drown: their limit is
    1, one bit.

    Args:
        curvature: second derivatives ``H`` of the loss in the normalised weights, >= 0, of the shape of the result.
        lam: price of a bit, > 0.
        noise: ``"uniform"`` or ``"rademacher"``.

    Raises:
        ValueError: a negative curvature, ``lam`` not positive (free bits are never enough), unknown noise.

    Reference: cover2006elements

    >>> optimal_limits(torch.tensor([0.0, 3.0, 12.0]), lam=0.25 * 0.6931472)
    tensor([1.0000, 0.5000, 0.2500])
    """
    check_choice("noise", noise, NOISE_POWER)
    check_number("lam", lam, gt=0)
    if curvature.numel() and not bool((curvature >= 0).all()):  # infinite is fine: such a weight tolerates no noise
        raise ValueError(f"curvature must be >= 0 everywhere, got {float(curvature.min())}")
    strength = 3.0 / NOISE_POWER[noise]
    # Without curvature sigma is infinite, and the clamp makes it 1.
    return torch.sqrt(strength * lam / (curvature * LN2)).clamp(max=1.0)


def optimal_bits(curvature: Tensor, lam: float, noise: str = "uniform") -> Tensor:
    r"""Return the bits of :func:`optimal_limits`, ``p_i = max(1, 1 + 1/2 log2(H_i ln 2 / (3 lam)))``.

    Half a bit for every doubling of the curvature.

    Args:
        curvature, lam, noise: as in :func:`optimal_limits`, with its errors.

    Reference: cover2006elements

    >>> optimal_bits(torch.tensor([0.0, 3.0, 6.0]), lam=0.25 * 0.6931472)
    tensor([1.0000, 2.0000, 2.5000])
    """
    return 1 - torch.log2(optimal_limits(curvature, lam, noise))


def fisher_diagonal(losses: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Return mean squared gradients over examples, the empirical stand-in for curvature.

    Args:
        losses: one loss per example, ``(n,)``, with graph.
        weights: tensors to differentiate.

    Raises:
        ValueError: no example, or not one dimension.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> fisher_diagonal(torch.stack([w[0], 3 * w[1]]), [w])
    [tensor([0.5000, 4.5000])]
    """
    if losses.ndim != 1 or len(losses) == 0:
        raise ValueError(f"losses must be one per example, (n,), got {tuple(losses.shape)}")
    total = [torch.zeros_like(w) for w in weights]
    # Example by example: the square of a sum would mix them.
    for i, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, weights, retain_graph=i + 1 < len(losses))
        torch._foreach_add_(total, [g.square() / len(losses) for g in grads])
    return total
