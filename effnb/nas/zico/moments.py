"""Mean of magnitudes and standard deviation of gradients over batches, streamed in buckets that fit a cache."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .bucket import Bucket, Scratch

#: Elements a bucket: half a megabyte of float32, so that all passes over a bucket find it in a cache.
BUCKET = 2**17
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
        size, last, scratch = BUCKET, None, {}
        for name, tensor in like.items():
            # Half precision has too few digits for sums of squares.
            kind = (torch.promote_types(tensor.dtype, torch.float32), tensor.device)
            if size + tensor.numel() > BUCKET or kind != last:
                scratch.setdefault(kind, Scratch(*kind, BUCKET))
                self.buckets.append(Bucket(scratch[kind], self.absolute))
                size, last = 0, kind
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

    def sums(self, variant: str) -> dict[str, float]:
        """Return for each tensor the sum over its elements of the terms of ``variant`` (see `score.VARIANTS`).

        Raises:
            ValueError: fewer than two batches, or ``"paper"`` of more than two without ``absolute``.
        """
        if self.count < 2:
            raise ValueError(f"moments must hold at least 2 batches, got {self.count}")
        if variant == "paper" and self.count > 2 and not self.absolute:
            raise ValueError("variant 'paper' needs GradientMoments(absolute=True) beyond two batches")
        totals = numbers([total for bucket in self.buckets for total in bucket.fast_sums(variant)])
        result: dict[str, float] = {}
        for bucket in self.buckets:
            found = [totals.pop(0) for _ in bucket.shapes]
            if not all(map(math.isfinite, found)):
                found = numbers(bucket.exact_sums(variant))
            result |= zip(bucket.shapes, found, strict=True)
        return result

    def nbytes(self) -> int:
        """Return the bytes kept between two batches."""
        return sum(part.nbytes for bucket in self.buckets for part in bucket.state)

    def _shaped(self, what: str) -> Gradients:
        if not self.count:
            raise ValueError("moments must hold at least one batch, got none")
        named: dict[str, Tensor] = {}
        for bucket in self.buckets:
            flat = getattr(bucket, what)(*bucket.state)
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


def numbers(totals: Sequence[Tensor]) -> list[float]:
    """Return 0-d tensors as numbers, with one copy from the device."""
    return torch.stack([total.double() for total in totals]).tolist()
