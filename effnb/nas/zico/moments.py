"""Mean of magnitudes and standard deviation of gradients over batches, streamed in buckets that fit a cache."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: Elements a bucket: 1 MB of float32, so that the passes over a bucket read a cache and not the memory.
BUCKET = 2**18
Gradients = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class GradientMoments:
    r"""Streaming moments of gradients over batches: :math:`\operatorname{mean}|g|` and the standard deviation of g.

    The deviation divides by the number of batches N, not N - 1. The first two sets are kept as they are, because two
    samples have closed forms, :math:`a = (|g_1| + |g_2|) / 2` and :math:`s = |g_1 - g_2| / 2`; from the third on,
    mean, sum of squared deviations and sum of magnitudes are updated in place (Welford). So the memory is 2 times the
    parameters for N = 2 and 3 times for any N, where stacking takes N times.

    Args:
        absolute: take the deviation of ``|g|`` (the paper's equation 15) instead of that of ``g`` (its code).

    Reference: li2023zico, welford1962note.

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
            TypeError: if a gradient is not a floating tensor.
            ValueError: if names or shapes differ from those of the first batch, or there are none.
        """
        named = as_mapping(grads)
        if not self.buckets:
            self._kind = type(grads) if isinstance(grads, Tensor | list | tuple) else dict
            self.lay_out(named)
        expected = {name: shape for bucket in self.buckets for name, shape in bucket.shapes.items()}
        if {name: grad.shape for name, grad in named.items()} != expected:
            raise ValueError(f"grads must have the names and shapes of the first batch, got {list(named)}")
        for bucket in self.buckets:
            bucket.add([named[name] for name in bucket.shapes])

    def lay_out(self, like: Mapping[str, Tensor]) -> None:
        """Distribute tensors over buckets in their order: small ones share a bucket, a large one has its own."""
        size = BUCKET
        for name, tensor in like.items():
            if size + tensor.numel() > BUCKET or self.buckets[-1].dtype != tensor.dtype:
                self.buckets.append(Bucket(tensor.dtype, self.absolute))
                size = 0
            self.buckets[-1].shapes[name] = tensor.shape
            size += tensor.numel()

    @property
    def count(self) -> int:
        """Batches so far."""
        return self.buckets[0].count if self.buckets else 0

    def mean_abs(self) -> Gradients:
        """Return the mean magnitude of every element, in the form that ``update`` was given."""
        return self._shaped("mean_abs")

    def std(self) -> Gradients:
        """Return the standard deviation of every element (divided by N), in the form that ``update`` was given."""
        return self._shaped("std")

    def sums(self, variant: str) -> dict[str, Tensor]:
        """Return for each tensor the float64 sum over its elements of the terms of ``variant`` (see `zico_terms`)."""
        if self.count < 2:
            raise ValueError(f"moments must hold at least 2 batches, got {self.count}")
        return {name: total for bucket in self.buckets for name, total in bucket.sums(variant).items()}

    def nbytes(self) -> int:
        """Return the bytes kept between two batches."""
        return sum(part.nbytes for bucket in self.buckets for part in bucket.state)

    def _shaped(self, what: str) -> Gradients:
        if not self.count:
            raise ValueError("moments must hold at least one batch, got none")
        named: dict[str, Tensor] = {}
        for bucket in self.buckets:
            flat = torch.cat([getattr(bucket, what)(*parts) for parts in bucket.chunks()])
            pieces = flat.split([shape.numel() for shape in bucket.shapes.values()])
            named |= {n: p.view(shape) for (n, shape), p in zip(bucket.shapes.items(), pieces, strict=True)}
        if self._kind is dict:
            return named
        return self._kind(named.values()) if self._kind in (list, tuple) else named["0"]


def as_mapping(grads: Gradients) -> dict[str, Tensor]:
    """Return gradients by name; those of a sequence are named by their place."""
    if isinstance(grads, Tensor):
        grads = [grads]
    named = dict(grads) if isinstance(grads, Mapping) else {str(i): grad for i, grad in enumerate(grads)}
    if not named:
        raise ValueError("grads must hold at least one tensor, got none")
    for name, grad in named.items():
        if not isinstance(grad, Tensor) or not grad.is_floating_point():
            raise TypeError(f"grads must be floating tensors, got {type(grad).__name__} for {name}")
    return named


class Bucket:
    """Tensors whose flat moments lie in one piece of memory.

    ``state`` is ``[g1]``, ``[g1, g2]`` or, from three batches on, ``[mean, squares, magnitudes]`` with the sum of
    squared deviations and the sum of ``|g|``.
    """

    def __init__(self, dtype: torch.dtype, absolute: bool) -> None:
        self.dtype, self.absolute = dtype, absolute
        self.shapes: dict[str, torch.Size] = {}
        self.count = 0
        self.state: list[Tensor] = []

    @torch.no_grad()
    def add(self, grads: Sequence[Tensor]) -> None:
        """Fold in one gradient of each tensor, in the order of ``shapes``."""
        if self.count < 2:
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            self.state.append(flat.abs_() if self.absolute else flat)
        else:
            if self.count == 2:
                self._open()
            flat = grads[0].reshape(-1) if len(grads) == 1 else torch.cat([grad.reshape(-1) for grad in grads])
            for g, mean, squares, magnitudes in zip(*(part.split(BUCKET) for part in (flat, *self.state)), strict=True):
                welford(g.abs() if self.absolute else g, self.count, mean, squares, magnitudes)
        self.count += 1

    def _open(self) -> None:
        """Turn the two samples into mean, squares and magnitudes; in place but for the third."""
        first, second = self.state
        magnitudes = first.abs()
        for g1, g2, total in zip(*(part.split(BUCKET) for part in (first, second, magnitudes)), strict=True):
            total.add_(g2.abs())
            difference = g1 - g2
            g1.add_(g2).mul_(0.5)
            torch.mul(difference, difference, out=g2).mul_(0.5)
        self.state = [first, second, magnitudes]

    def chunks(self) -> list[tuple[Tensor, ...]]:
        """The state in pieces that fit a cache."""
        return list(zip(*(part.split(BUCKET) for part in self.state), strict=True))

    def mean_abs(self, *parts: Tensor) -> Tensor:
        """Mean magnitude of one chunk."""
        if self.count > 2:
            return parts[2] / self.count
        return sum(part.abs() for part in parts) / self.count

    def std(self, *parts: Tensor) -> Tensor:
        """Standard deviation of one chunk."""
        if self.count > 2:
            return (parts[1] / self.count).sqrt_()
        return (parts[0] - parts[-1]).abs_().mul_(0.5)

    @torch.no_grad()
    def sums(self, variant: str) -> dict[str, Tensor]:
        """Float64 sum over each tensor of the terms of ``variant``."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        chunks = [terms(self, variant, *parts) for parts in self.chunks()]
        if len(sizes) == 1:
            totals = [torch.stack([chunk.sum(dtype=torch.float64) for chunk in chunks]).sum()]
        else:
            totals = [piece.sum(dtype=torch.float64) for piece in chunks[0].split(sizes)]
        return dict(zip(self.shapes, totals, strict=True))


def welford(g: Tensor, count: int, mean: Tensor, squares: Tensor, magnitudes: Tensor) -> None:
    """Fold sample number ``count + 1`` into the moments, in place."""
    delta = g - mean
    mean.add_(delta, alpha=1 / (count + 1))
    squares.addcmul_(delta, delta, value=count / (count + 1))
    magnitudes.add_(delta.copy_(g).abs_())


def terms(bucket: Bucket, variant: str, *parts: Tensor) -> Tensor:
    """Elementwise terms of one chunk, zero where the deviation is zero (but for ``"mean"``)."""
    if variant == "mean":
        return bucket.mean_abs(*parts)
    if variant == "floor":
        return (parts[0] != parts[1]) if bucket.count == 2 else (parts[1] != 0)
    if variant == "paper" and not bucket.absolute:
        if bucket.count > 2:
            raise ValueError("variant 'paper' needs GradientMoments(absolute=True) beyond two batches")
        std = (parts[0].abs() - parts[1].abs()).abs_().mul_(0.5)
    else:
        std = bucket.std(*parts)
    # Division by infinity drops an element; an epsilon in its place would let one dead weight rule the score.
    std.masked_fill_(std == 0, torch.inf)
    if variant == "std":
        return std.reciprocal_()
    return torch.div(bucket.mean_abs(*parts), std, out=std)
