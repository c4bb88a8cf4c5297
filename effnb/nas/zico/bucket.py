"""The arithmetic of the moments on one flat piece of memory; every pass works on pieces that fit a cache."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Scratch:
    """Two pieces of memory for intermediate results; allocating them for every pass would cost as much as the pass."""

    def __init__(self, dtype: torch.dtype, device: torch.device, size: int) -> None:
        self.size = size
        self.first, self.second = torch.empty(2, size, dtype=dtype, device=device)


class Bucket:
    """Tensors whose flat moments lie in one piece of memory.

    ``state`` is ``[g1]``, ``[g1, g2]`` or, from three batches on, ``[mean, squares, magnitudes]`` with the sum of
    squared deviations and the sum of ``|g|``.
    """

    def __init__(self, scratch: Scratch, absolute: bool) -> None:
        self.scratch, self.absolute = scratch, absolute
        self.shapes: dict[str, torch.Size] = {}
        self.count = 0
        self.state: list[Tensor] = []

    @torch.no_grad()
    def add(self, grads: Sequence[Tensor], owned: bool = False) -> None:
        """Fold in one gradient of each tensor, in the order of ``shapes``; those ``owned`` need not be copied."""
        if self.count < 2:
            flats = [grad.reshape(-1) for grad in grads]
            flat = (flats[0] if owned and len(flats) == 1 else torch.cat(flats)).to(self.scratch.first.dtype)
            self.state.append(flat.abs_() if self.absolute else flat)
        else:
            if self.count == 2:
                self._open()
            self._fold(grads)
        self.count += 1

    def _fold(self, grads: Sequence[Tensor]) -> None:
        """Welford's update with sample number ``count + 1``."""
        flat = grads[0].reshape(-1).to(self.scratch.first.dtype)
        if len(grads) > 1:
            size = len(self.state[0])
            flat = torch.cat([grad.reshape(-1) for grad in grads], out=self.scratch.first[:size])
        for g, mean, squares, magnitudes in self._pieces(flat, *self.state):
            work = self.scratch.second[: len(g)]
            if self.absolute:
                g = torch.abs(g, out=self.scratch.first[: len(g)])
            torch.sub(g, mean, out=work)
            mean.add_(work, alpha=1 / (self.count + 1))
            squares.addcmul_(work, work, value=self.count / (self.count + 1))
            magnitudes.add_(torch.abs(g, out=work))

    def _open(self) -> None:
        """Turn the two samples into mean, squares and magnitudes; in place but for the third."""
        self.state.append(torch.empty_like(self.state[0]))
        for g1, g2, magnitudes in self._pieces(*self.state):
            work = self.scratch.first[: len(g1)]
            torch.abs(g1, out=magnitudes).add_(torch.abs(g2, out=work))
            torch.sub(g1, g2, out=work)
            g1.add_(g2).mul_(0.5)
            torch.mul(work, work, out=g2).mul_(0.5)

    def _pieces(self, *flat: Tensor) -> list[tuple[Tensor, ...]]:
        return list(zip(*(part.split(self.scratch.size) for part in flat), strict=True))

    def mean_abs(self, *state: Tensor) -> Tensor:
        """Mean magnitude of each element."""
        return state[2] / self.count if self.count > 2 else sum(part.abs() for part in state) / self.count

    def std(self, *state: Tensor) -> Tensor:
        """Standard deviation of each element."""
        return (state[1] / self.count).sqrt_() if self.count > 2 else (state[0] - state[-1]).abs_().mul_(0.5)

    @torch.no_grad()
    def fast_sums(self, variant: str) -> list[Tensor]:
        """Sums over each tensor that are right if finite.

        Finding zero deviations costs more than all the rest. Without looking for them an element is NaN where its
        magnitude is zero too, as in every dead weight, and left out; else it is infinite and shows in the sum.
        """
        if variant in ("floor", "std"):
            return self.exact_sums(variant)
        terms = self._fast_pair if self.count == 2 else self._fast_many
        return self._reduced(terms(variant, *parts) for parts in self._pieces(*self.state))

    def _fast_pair(self, variant: str, g1: Tensor, g2: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.scratch.first[: len(g1)], self.scratch.second[: len(g1)]
        torch.abs(g1, out=first)
        torch.abs(g2, out=second)
        deviation = (first - second).abs_() if variant == "paper" else None
        first.add_(second)
        if variant == "mean":
            return first.mul_(0.5), first.sum()
        deviation = torch.sub(g1, g2, out=second).abs_() if deviation is None else deviation
        check = first.sum()
        return first.mul_(deviation.reciprocal_()), check

    def _fast_many(self, variant: str, mean: Tensor, squares: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.scratch.first[: len(mean)], self.scratch.second[: len(mean)]
        if variant == "mean":
            return torch.div(magnitudes, self.count, out=first), first.sum()
        torch.mul(magnitudes, self.count**-0.5, out=first)
        check = first.sum()
        return first.mul_(torch.rsqrt(squares, out=second)), check

    @torch.no_grad()
    def exact_sums(self, variant: str) -> list[Tensor]:
        """Sums over each tensor, elements without deviation left out; not finite only if a gradient is not."""
        return self._reduced(self._exact(variant, *parts) for parts in self._pieces(*self.state))

    def _exact(self, variant: str, *parts: Tensor) -> tuple[Tensor, Tensor]:
        if variant == "paper" and self.count == 2:
            std = (parts[0].abs() - parts[1].abs()).abs_().mul_(0.5)
        else:
            std = self.std(*parts)
        magnitude, dead = self.mean_abs(*parts), std == 0
        if variant == "mean":
            return magnitude, magnitude.sum()
        if variant == "floor":
            return (~dead).to(std.dtype), magnitude.sum()
        # Division by infinity drops an element; an epsilon in its place would let one dead weight rule the score.
        std.masked_fill_(dead, torch.inf)
        check = magnitude.sum()
        return std.reciprocal_() if variant == "std" else magnitude.div_(std), check

    def _reduced(self, pieces: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Sum over each tensor of terms that come piece by piece; not finite if the check of a piece is not."""
        if len(self.shapes) == 1:
            return [torch.stack([terms.nansum() + 0 * check for terms, check in pieces]).sum(dtype=torch.float64)]
        ((terms, check),) = pieces
        return [part.nansum() + 0 * check for part in terms.split([shape.numel() for shape in self.shapes.values()])]
