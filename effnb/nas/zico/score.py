"""The scores that are read off the moments."""

import math
from collections import deque
from collections.abc import Iterable, Sequence

from torch import Generator, nn
from torch.nn import functional as F

from .moments import GradientMoments
from .passes import LAYERS, Batch, Loss, counted_weights, gradient_moments

#: What is summed over the elements of a layer before the logarithm: mean |g| / std g; mean |g| / std |g|; mean |g|;
#: 1 / std g; 1. All but ``"mean"`` leave out elements without any deviation.
VARIANTS = ("code", "paper", "mean", "std", "floor")


def zico(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: Loss = F.cross_entropy,
    *,
    variant: str = "code",
    layers: tuple[type[nn.Module], ...] = LAYERS,
    init: str | None = None,
    generator: Generator | None = None,
    seed: int | None = None,
    reduction: str = "sum",
    accumulate: bool = False,
) -> float:
    r"""Return ZiCo, :math:`\sum_l \log \sum_{w \in l} \operatorname{mean}_i |g_{iw}| / \operatorname{std}_i g_{iw}`.

    Higher is better. ``i`` runs over the batches, ``w`` over the weights of layer ``l`` with a deviation that is not
    zero; a layer without any contributes 0. The deviation divides by N and is that of the signed gradient, as in the
    official code; ``variant="paper"`` takes that of ``|g|``, as equation 15.

    Args:
        model: network; it stays as it was.
        batches: pairs ``(x, y)``, two or more (the paper: 2 of 128 images).
        loss_fn: mean loss of a batch.
        variant: ``"code"``, ``"paper"``, or the ablations ``"mean"`` and ``"std"`` (see `VARIANTS`).
        layers: classes whose ``weight`` counts.
        init: ``"kaiming"`` draws weights anew from ``generator`` or ``seed``; ``None`` scores the network as it is.
        generator: stream for ``init``, on the CPU.
        seed: instead of ``generator``; also seeds what the network draws itself, such as dropout.
        reduction: ``"sum"`` or ``"mean"`` over the elements of a layer, before the logarithm.
        accumulate: let gradients add up over the batches, as the official code does, which never clears them.

    Returns:
        The score.

    Raises:
        ValueError: see `gradient_moments`; an unknown ``variant`` or ``reduction``; a gradient that is not finite.
        TypeError: a batch that is not a pair of tensors.

    Reference: li2023zico.

    >>> model, y = nn.Linear(3, 2), torch.tensor([0, 1])
    >>> batch = torch.randn(2, 3), y
    >>> zico(model, [batch, batch])
    0.0
    """
    terms = zico_per_layer(
        model, batches, loss_fn, variant=variant, layers=layers, init=init, generator=generator, seed=seed,
        reduction=reduction, accumulate=accumulate,
    )  # fmt: skip
    return math.fsum(terms.values())


def zico_per_layer(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: Loss = F.cross_entropy,
    *,
    variant: str = "code",
    reduction: str = "sum",
    layers: tuple[type[nn.Module], ...] = LAYERS,
    **options: object,
) -> dict[str, float]:
    """Return the terms of `zico` by name of the layer; 0 for a layer without any deviation.

    Args:
        model: network; it stays as it was.
        batches: pairs ``(x, y)``, two or more.
        loss_fn: mean loss of a batch.
        variant: one of `VARIANTS`.
        reduction: ``"sum"`` or ``"mean"``.
        layers: classes whose ``weight`` counts.
        options: ``init``, ``generator``, ``seed`` and ``accumulate`` of `zico`.

    Returns:
        Layer name to its logarithm, in the order of ``model.named_modules()``.

    Raises:
        ValueError: as `zico`.
        TypeError: a batch that is not a pair of tensors, or an unknown option.

    Reference: li2023zico.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> batches = [(torch.randn(8, 3), torch.arange(8) % 2) for _ in range(2)]
    >>> list(zico_per_layer(model, batches))
    ['0', '2']
    """
    check_choice("variant", variant, VARIANTS)
    check_choice("reduction", reduction, ("sum", "mean"))
    stream = gradient_moments(model, batches, loss_fn, layers=layers, absolute=variant == "paper", **options)
    return per_layer(deque(stream, maxlen=1).pop(), model, layers, variant, reduction)


def zico_terms(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: Loss = F.cross_entropy,
    *,
    variants: Sequence[str] = VARIANTS,
    layers: tuple[type[nn.Module], ...] = LAYERS,
    **options: object,
) -> dict[str, float]:
    """Return several variants of the score from the same passes (``"paper"`` takes its own beyond two batches).

    Args:
        model: network; it stays as it was.
        batches: pairs ``(x, y)``, two or more.
        loss_fn: mean loss of a batch.
        variants: some of `VARIANTS`; ``"floor"`` is `zico_floor`.
        layers: classes whose ``weight`` counts.
        options: ``init``, ``generator``, ``seed`` and ``accumulate`` of `zico`.

    Returns:
        Variant to score.

    Raises:
        ValueError: as `zico`.
        TypeError: a batch that is not a pair of tensors, or an unknown option.

    Reference: li2023zico.

    >>> batches = [(torch.randn(8, 3), torch.arange(8) % 2) for _ in range(2)]
    >>> terms = zico_terms(nn.Linear(3, 2), batches)
    >>> terms["code"] >= terms["floor"], round(terms["floor"], 4)
    (True, 1.7918)
    """
    for variant in variants:
        check_choice("variants", variant, VARIANTS)
    batches = list(batches)
    generator = options.get("generator")
    start = generator.get_state() if generator is not None else None
    alone = {"paper"} if len(batches) > 2 else set()
    found: dict[str, float] = {}
    for absolute, wanted in enumerate(([v for v in variants if v not in alone], [v for v in variants if v in alone])):
        if not wanted:
            continue
        if start is not None:
            generator.set_state(start)
        stream = gradient_moments(model, batches, loss_fn, layers=layers, absolute=bool(absolute), **options)
        moments = deque(stream, maxlen=1).pop()
        found |= {v: math.fsum(per_layer(moments, model, layers, v).values()) for v in wanted}
    return {variant: found[variant] for variant in variants}


def zico_floor(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    loss_fn: Loss = F.cross_entropy,
    *,
    layers: tuple[type[nn.Module], ...] = LAYERS,
    **options: object,
) -> float:
    r"""Return :math:`\sum_l \log n_l`, with :math:`n_l` the weights whose gradient differs between the batches.

    With two batches every term of `zico` is at least 1, and is 1 exactly where the two gradients differ in sign; so
    this is a lower bound of it. It is none for three batches or more.

    Args:
        model: network; it stays as it was.
        batches: pairs ``(x, y)``, two or more; ``None`` counts every weight as live and needs no data.
        loss_fn: mean loss of a batch.
        layers: classes whose ``weight`` counts.
        options: ``init``, ``generator``, ``seed`` and ``accumulate`` of `zico`.

    Returns:
        The floor.

    Raises:
        ValueError: as `zico`.
        TypeError: a batch that is not a pair of tensors, or an unknown option.

    Reference: li2023zico.

    >>> round(zico_floor(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))), 4)
    4.5643
    """
    if batches is None:
        return math.fsum(math.log(weight.numel()) for weight in counted_weights(model, layers).values())
    return math.fsum(zico_per_layer(model, batches, loss_fn, variant="floor", layers=layers, **options).values())


def per_layer(
    moments: GradientMoments,
    model: nn.Module,
    layers: tuple[type[nn.Module], ...] = LAYERS,
    variant: str = "code",
    reduction: str = "sum",
) -> dict[str, float]:
    """Return the logarithm for each layer; a layer that shares its weight has the term of that weight.

    Raises:
        ValueError: if a gradient was not finite, naming the layer.
    """
    totals = moments.sums(variant)
    counts = moments.sums("floor") if reduction == "mean" else dict.fromkeys(totals, 1.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    result = {}
    for layer, weight in counted_weights(model, layers).items():
        total, count = totals[names[id(weight)]], counts[names[id(weight)]]
        if not math.isfinite(total):
            raise ValueError(f"gradient must be finite, got inf or nan in layer {layer!r}")
        result[layer] = math.log(total / max(count, 1)) if total > 0 else 0.0
    return result


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError if ``value`` is not one of ``known``."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
