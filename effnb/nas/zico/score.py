"""Moments of gradients over batches, and the scores that are read off them."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from effnb.common import check_choice
from effnb.nas.zico.passes import LAYERS, Batch, Loss, check_batches, free_weights, mean_loss, pure

#: What is summed over the elements of a layer before the logarithm: mean |g| / std g; mean |g| / std |g|; mean |g|;
#: 1 / std g; 1. All but ``"mean"`` leave out elements without any deviation.
VARIANTS = ("code", "paper", "mean", "std", "floor")
#: Elements a chunk: half a megabyte of float32, so that all operations on a chunk find it in a cache.
CHUNK = 2**17
Gradients = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class Bucket:
    """The arithmetic of the moments on one flat piece of memory, of one large tensor or of several small ones.

    ``state`` is ``[g1]``, ``[g1, g2]`` or, from three batches on, ``[mean, squares, magnitudes]`` with the sum of
    squared deviations and the sum of ``|g|``; `mean_abs` and `std` take it whole or by chunks.
    """

    def __init__(self, absolute: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.absolute, self.options = absolute, {"dtype": dtype, "device": device}
        self.shapes: dict[str, torch.Size] = {}
        self.count = 0
        self.state: list[Tensor] = []

    @torch.no_grad()
    def fold(self, grads: dict[str, Tensor], owned: bool = False) -> None:
        """Take one sample out of ``grads``, zeros for what is missing; gradients that are ``owned`` are not copied."""
        flats = [
            grads.pop(name).reshape(-1) if name in grads else torch.zeros(shape.numel(), **self.options)
            for name, shape in self.shapes.items()
        ]
        self.count += 1
        flat = flats[0] if len(flats) == 1 and (owned or self.count > 2) else torch.cat(flats)
        flat = flat.to(**self.options)
        if self.count <= 2:
            self.state.append(flat.abs_() if self.absolute else flat)
            return
        if self.count == 3:
            self.state.append(torch.empty_like(self.state[0]))
            for g1, g2, magnitudes in chunks(*self.state):
                torch.add(g1.abs(), g2.abs(), out=magnitudes)
                difference = g1 - g2
                # From here on the memory of g1 holds the mean, that of g2 the squares: no third and fourth copy.
                g1.add_(g2).mul_(0.5)
                torch.mul(difference, difference, out=g2).mul_(0.5)
        for g, mean, squares, magnitudes in chunks(flat, *self.state):
            g = g.abs() if self.absolute else g
            shift = g - mean
            mean.add_(shift, alpha=1 / self.count)
            squares.addcmul_(shift, shift, value=(self.count - 1) / self.count)
            magnitudes.add_(g.abs())

    def mean_abs(self, *state: Tensor) -> Tensor:
        if self.count > 2:
            return state[2] / self.count
        return functools.reduce(Tensor.add_, map(torch.abs, state)).div_(self.count)

    def std(self, *state: Tensor) -> Tensor:
        return (state[1] / self.count).sqrt_() if self.count > 2 else (state[0] - state[-1]).abs_().mul_(0.5)

    @torch.no_grad()
    def sums(self, variant: str, exact: bool = False) -> Tensor:
        """Return the sum of each tensor's terms; not finite if a gradient is not, or where it has to be ``exact``.

        Finding zero deviations costs more than all the rest. Without looking for them, a quotient is NaN where the
        magnitude is zero too, as in every dead weight, and left out; else it is infinite and shows in the sum.
        """
        totals = []
        for part in chunks(*self.state):
            if variant in ("code", "paper") and self.count > 2 and not exact:
                magnitude = part[2] * self.count**-0.5
                check, terms = magnitude.sum(), magnitude.mul_(part[1].rsqrt())
            else:
                magnitude = self.mean_abs(*part)
                check = magnitude.sum()
                std = self.std(*(g.abs() for g in part) if variant == "paper" and self.count == 2 else part)
                if variant == "mean":
                    terms = magnitude
                elif variant == "floor":
                    terms = (std != 0).to(std.dtype)
                elif variant == "std" or exact:
                    # Division by infinity drops an element; an epsilon in its place would let one dead weight rule.
                    std.masked_fill_(std == 0, torch.inf)
                    terms = std.reciprocal_() if variant == "std" else magnitude.div_(std)
                else:
                    terms = magnitude.mul_(std.reciprocal_())
            pieces = self.split(terms) if len(self.shapes) > 1 else [terms]
            # `nansum` also leaves out what a gradient that is not finite has made: zero times the check brings it back.
            totals.append(torch.stack([piece.nansum() for piece in pieces]) + 0 * check)
        return torch.stack(totals).sum(0, dtype=torch.float64)

    def split(self, flat: Tensor) -> Sequence[Tensor]:
        """Return the part of each tensor."""
        return flat.split([shape.numel() for shape in self.shapes.values()])


def chunks(*flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of flat tensors of one length, `CHUNK` elements at a time."""
    return zip(*(part.split(CHUNK) for part in flat), strict=True)


class GradientMoments:
    r"""Streaming moments of gradients over batches: :math:`\operatorname{mean}|g|` and the standard deviation of g.

    The deviation divides by the number of batches N, not N - 1. The first two samples are kept as they are, because
    two have closed forms, :math:`a = (|g_1| + |g_2|) / 2` and :math:`s = |g_1 - g_2| / 2`; from the third on, mean,
    sum of squared deviations and sum of magnitudes are updated in place (Welford). So the memory is 2 times the
    parameters for N = 2 and 3 times for any N, where stacking takes N times.

    Args:
        absolute: take the deviation of ``|g|`` (the paper's equation 15) instead of that of ``g`` (its code).

    Reference: welford1962note.

    >>> moments = GradientMoments()
    >>> for value in (1.0, -1.0, 0.0):
    ...     moments.update([torch.tensor([value, 2.0])])
    >>> moments.count, moments.mean_abs()[0].tolist(), moments.std()[0].tolist()
    (3, [0.6666666865348816, 2.0], [0.8164966106414795, 0.0])
    """

    def __init__(self, absolute: bool = False) -> None:
        self.absolute = absolute
        self.buckets: list[Bucket] = []
        self._kind: type = dict

    def update(self, grads: Gradients) -> None:
        """Add the gradients of one batch; they are copied.

        Args:
            grads: a tensor, a sequence of tensors or name -> tensor; floating, of the same names and shapes each time.

        Raises:
            TypeError: a gradient that is no floating tensor.
            ValueError: names or shapes that differ from those of the first batch, or none.
        """
        tensors = [grads] if isinstance(grads, Tensor) else grads
        named = dict(tensors) if isinstance(tensors, Mapping) else {str(i): grad for i, grad in enumerate(tensors)}
        if not named:
            raise ValueError("grads must hold at least one tensor, got none")
        for name, grad in named.items():
            if not isinstance(grad, Tensor) or not grad.is_floating_point():
                raise TypeError(f"grads must be floating tensors, got {type(grad).__name__} for {name}")
        if not self.buckets:
            self._kind = next((kind for kind in (Tensor, list, tuple) if isinstance(grads, kind)), dict)
            self.lay_out(named)
        shapes = {name: shape for bucket in self.buckets for name, shape in bucket.shapes.items()}
        if {name: grad.shape for name, grad in named.items()} != shapes:
            raise ValueError(f"grads must have the names and shapes of the first batch, got {list(named)}")
        for bucket in self.buckets:
            bucket.fold(named)

    def lay_out(self, like: Mapping[str, Tensor]) -> None:
        """Distribute tensors over buckets in their order: small ones share a bucket, a large one has its own."""
        size, last = CHUNK, None
        for name, tensor in like.items():
            # Half precision has too few digits for sums of squares.
            place = torch.promote_types(tensor.dtype, torch.float32), tensor.device
            if size + tensor.numel() > CHUNK or place != last:
                self.buckets.append(Bucket(self.absolute, *place))
                size, last = 0, place
            self.buckets[-1].shapes[name] = tensor.shape
            size += tensor.numel()

    @property
    def count(self) -> int:
        """Batches so far."""
        return self.buckets[0].count if self.buckets else 0

    def mean_abs(self) -> Gradients:
        """Return the mean magnitude of every element, in the form that ``update`` was given."""
        return self._shaped(Bucket.mean_abs)

    def std(self) -> Gradients:
        """Return the standard deviation of every element (divided by N), in the form that ``update`` was given."""
        return self._shaped(Bucket.std)

    def sums(self, variant: str) -> dict[str, float]:
        """Return for each tensor the sum over its elements of the terms of ``variant``, one of `VARIANTS`.

        Raises:
            ValueError: fewer than two batches, or ``"paper"`` of more than two without ``absolute``.
        """
        if self.count < 2:
            raise ValueError(f"moments must hold at least 2 batches, got {self.count}")
        if variant == "paper" and self.count > 2 and not self.absolute:
            raise ValueError("variant 'paper' needs GradientMoments(absolute=True) beyond two batches")
        # One copy from the device for all tensors.
        totals = torch.cat([bucket.sums(variant) for bucket in self.buckets]).cpu()
        result: dict[str, float] = {}
        for bucket, found in zip(self.buckets, totals.split([len(b.shapes) for b in self.buckets]), strict=True):
            found = found if found.isfinite().all() else bucket.sums(variant, exact=True)
            result |= zip(bucket.shapes, found.tolist(), strict=True)
        return result

    def nbytes(self) -> int:
        """Return the bytes kept between two batches."""
        return sum(part.nbytes for bucket in self.buckets for part in bucket.state)

    def _shaped(self, moment: Callable[..., Tensor]) -> Gradients:
        if not self.count:
            raise ValueError("moments must hold at least one batch, got none")
        named: dict[str, Tensor] = {}
        for bucket in self.buckets:
            parts = bucket.split(moment(bucket, *bucket.state))
            named |= {n: part.view(shape) for (n, shape), part in zip(bucket.shapes.items(), parts, strict=True)}
        if self._kind in (list, tuple):
            return self._kind(named.values())
        return named["0"] if self._kind is Tensor else named


def gradient_moments(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: Loss = F.cross_entropy,
    *,
    layers: tuple[type[nn.Module], ...] = LAYERS,
    init: str | None = None,
    generator: Generator | None = None,
    seed: int | None = None,
    absolute: bool = False,
    accumulate: bool = False,
) -> Iterator[GradientMoments]:
    """Yield the moments of the weights' gradients after each batch: the same object, fuller each time.

    The network runs in training mode (normalisation by the batch), without an update between batches. Parameters,
    buffers, gradients, modes and the global random state are untouched, also after an exception.

    Args:
        model, batches, loss_fn, layers, init, generator, seed, accumulate: as for `zico`.
        absolute: see `GradientMoments`.

    Yields:
        The moments of the batches so far, by name of the parameter.

    Raises:
        ValueError: fewer than 2 batches, an empty batch, labels out of range, a loss that is not finite, no counted
            layer that is trained, or none that receives a gradient; ``init`` without ``generator`` or ``seed``.
        TypeError: a batch that is not a pair of tensors, or a model of complex numbers.

    >>> model, y = nn.Linear(3, 2), torch.tensor([0, 1])
    >>> [moments.count for moments in gradient_moments(model, [(torch.randn(2, 3), y) for _ in range(3)])]
    [1, 2, 3]
    """
    batches = check_batches(batches)
    check_choice("init", init, (None, "kaiming"))
    if generator is not None and seed is not None:
        raise ValueError("generator and seed exclude each other, got both")
    if init and generator is None and seed is None:
        raise ValueError("init='kaiming' needs a seed or a generator, got neither")
    counted = {id(weight) for weight in free_weights(model, layers).values()}
    fresh: dict[int, Tensor] = {}  # by parameter; drawn as `effnb.models.small.initialize` draws
    if init:
        generator = torch.Generator().manual_seed(seed) if generator is None else generator
        for layer in (module for module in model.modules() if isinstance(module, LAYERS)):
            weight = torch.empty(layer.weight.shape, dtype=layer.weight.dtype)
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
            fresh[id(layer.weight)] = weight.to(layer.weight.device)
            if layer.bias is not None:
                fresh[id(layer.bias)] = torch.zeros_like(layer.bias)

    # Leaves of our own that share the memory of the weights, so that no `grad` of the model is touched; all others are
    # constants, for which no backward pass is run.
    state = {name: fresh.get(id(p), p).detach() for name, p in model.named_parameters()}
    leaves = {name: state[name].requires_grad_() for name, p in model.named_parameters() if id(p) in counted}
    state |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    moments, arrived = GradientMoments(absolute), {}
    moments.lay_out(leaves)

    def receive(bucket: Bucket, name: str, leaf: Tensor) -> None:
        # A bucket is folded in, and freed, as soon as the backward pass has filled it: never are all gradients there.
        arrived[name] = leaf.grad
        if not accumulate:
            leaf.grad = None
        if bucket.shapes.keys() <= arrived.keys():
            bucket.fold(arrived, owned=not accumulate)

    for bucket in moments.buckets:
        for name in bucket.shapes:
            leaves[name].register_post_accumulate_grad_hook(functools.partial(receive, bucket, name))
    for count, (x, y) in enumerate(batches):
        with pure(model, seed, state, strict=False) as call:
            loss = mean_loss(loss_fn, call(x), y)
            if loss.requires_grad:
                loss.backward(inputs=list(leaves.values()))
        if not arrived and all(bucket.count == count for bucket in moments.buckets):
            raise ValueError("model must have a counted layer that receives a gradient, got none")
        for bucket in moments.buckets:
            if bucket.count == count:
                # A weight outside the graph has gradient zero; the official code stops there.
                bucket.fold(arrived, owned=not accumulate)
        yield moments


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
        model: network from ``x`` to the input of ``loss_fn``, or to a tuple that ends in it; it stays as it was.
        batches: pairs ``(x, y)``, two or more (the paper: 2 of 128 images); ``y`` class numbers for the default loss.
        loss_fn: mean loss of a batch.
        variant: ``"code"``, ``"paper"``, or the ablations ``"mean"`` and ``"std"`` (see `VARIANTS`).
        layers: classes whose ``weight`` counts, where it is a parameter with ``requires_grad``.
        init: ``"kaiming"`` draws convolution and linear weights anew (biases zero); ``None`` takes them as they are.
        generator: stream for ``init``, on the CPU.
        seed: instead of ``generator``; also seeds what the network draws itself, such as dropout.
        reduction: ``"sum"`` or ``"mean"`` over the elements of a layer, before the logarithm.
        accumulate: do not clear gradients between batches, as the official code: sample i is the sum of the first i.

    Returns:
        The score.

    Raises:
        ValueError: see `gradient_moments`; an unknown ``variant`` or ``reduction``; a gradient that is not finite.
        TypeError: see `gradient_moments`.

    Reference: li2023zico.

    >>> model, y = nn.Linear(3, 2), torch.tensor([0, 1])
    >>> batch = torch.randn(2, 3), y
    >>> zico(model, [batch, batch])
    0.0
    """
    options = {"init": init, "generator": generator, "seed": seed, "accumulate": accumulate}
    terms = zico_per_layer(model, batches, loss_fn, variant=variant, layers=layers, reduction=reduction, **options)
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
    """Return the terms of `zico` by name of the layer, in the model's order; 0 for a layer without any deviation.

    Args:
        model, batches, loss_fn, reduction, layers: as for `zico`, which also says what raises.
        variant: one of `VARIANTS`, ``"floor"`` included.
        options: ``init``, ``generator``, ``seed`` and ``accumulate`` of `zico`.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> batches = [(torch.randn(8, 3), torch.arange(8) % 2) for _ in range(2)]
    >>> list(zico_per_layer(model, batches))
    ['0', '2']
    """
    check_choice("variant", variant, VARIANTS)
    check_choice("reduction", reduction, ("sum", "mean"))
    *_, moments = gradient_moments(model, batches, loss_fn, layers=layers, absolute=variant == "paper", **options)
    return per_layer(moments, model, layers, variant, reduction)


def zico_terms(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: Loss = F.cross_entropy,
    *,
    variants: Sequence[str] = VARIANTS,
    layers: tuple[type[nn.Module], ...] = LAYERS,
    **options: object,
) -> dict[str, float]:
    """Return variant -> score for several variants from the same passes (beyond two batches ``"paper"`` has its own).

    Args:
        model, batches, loss_fn, layers: as for `zico`, which also says what raises.
        variants: some of `VARIANTS`; ``"floor"`` is `zico_floor`.
        options: ``init``, ``generator``, ``seed`` and ``accumulate`` of `zico`.

    >>> batches = [(torch.randn(8, 3), torch.arange(8) % 2) for _ in range(2)]
    >>> terms = zico_terms(nn.Linear(3, 2), batches)
    >>> terms["code"] >= terms["floor"], round(terms["floor"], 4)
    (True, 1.7918)
    """
    for variant in variants:
        check_choice("variants", variant, VARIANTS)
    batches, generator, found = list(batches), options.get("generator"), {}
    start = generator.get_state() if generator is not None else None
    for absolute in (False, True):
        wanted = [variant for variant in variants if absolute == (variant == "paper" and len(batches) > 2)]
        if not wanted:
            continue
        if start is not None:
            # Both streams draw the same weights.
            generator.set_state(start)
        *_, moments = gradient_moments(model, batches, loss_fn, layers=layers, absolute=absolute, **options)
        found |= {variant: math.fsum(per_layer(moments, model, layers, variant).values()) for variant in wanted}
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
        model, loss_fn, layers: as for `zico`, which also says what raises.
        batches: pairs ``(x, y)``, two or more; ``None`` counts every weight as live and needs no data.
        options: ``init``, ``generator``, ``seed`` and ``accumulate`` of `zico`.

    >>> round(zico_floor(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))), 4)
    4.5643
    """
    if batches is None:
        return math.fsum(math.log(weight.numel()) for weight in free_weights(model, layers).values())
    return math.fsum(zico_per_layer(model, batches, loss_fn, variant="floor", layers=layers, **options).values())


def per_layer(
    moments: GradientMoments,
    model: nn.Module,
    layers: tuple[type[nn.Module], ...] = LAYERS,
    variant: str = "code",
    reduction: str = "sum",
) -> dict[str, float]:
    """Return the logarithm for each layer; a layer that shares its weight has the term of that weight."""
    totals = moments.sums(variant)
    counts = moments.sums("floor") if reduction == "mean" else dict.fromkeys(totals, 1.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    result = {}
    for layer, weight in free_weights(model, layers).items():
        total, count = totals[names[id(weight)]], counts[names[id(weight)]]
        if not math.isfinite(total):
            raise ValueError(f"gradient must be finite, got inf or nan in layer {layer!r}")
        result[layer] = math.log(total / max(count, 1)) if total > 0 else 0.0
    return result
