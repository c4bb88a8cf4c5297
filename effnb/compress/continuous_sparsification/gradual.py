"""Gradual magnitude pruning (GMP): the cubic schedule and a pruner that follows it during training."""

from .layers import GatedLayers
from .masks import MaskHandle, check_density, top_k_masks


def gmp_sparsity(step: int, end_step: int, final: float, initial: float = 0.0, start_step: int = 0) -> float:
    r"""Sparsity of the cubic schedule, ``final + (initial - final) (1 - (t - t0) / (t1 - t0))^3``, clamped outside.

    Args:
        step: optimiser steps done, >= 0.
        end_step: step from which on the sparsity is ``final``, > ``start_step``.
        final: fraction of weights dropped at the end, in [0, 1).
        initial: fraction dropped at the start, in [0, 1).
        start_step: first step of the schedule.

    Raises:
        ValueError: a fraction or step out of range.

    Reference: zhu2018prune

    >>> [round(gmp_sparsity(t, end_step=10, final=0.8), 9) for t in (0, 5, 10, 99)]
    [0.0, 0.7, 0.8, 0.8]
    """
    if not 0 <= final < 1 or not 0 <= initial < 1:
        raise ValueError(f"final and initial must be in [0, 1), got {final} and {initial}")
    if step < 0 or end_step <= start_step:
        raise ValueError(f"step must be >= 0 and end_step > start_step, got {step}, {end_step}, {start_step}")
    left = 1.0 - min(max((step - start_step) / (end_step - start_step), 0.0), 1.0)
    return final + (initial - final) * left**3


class GradualPruner:
    """Tighten the masks of a training model along the cubic schedule, by global magnitude.

    Args:
        handle: masks on the model, at first all ones.
        density: fraction kept from ``end_step`` on, in (0, 1].
        end_step: optimiser step at which the pruning ends.
        every: steps between two prunings; the last one always happens at ``end_step``.

    Raises:
        ValueError: a number out of range.

    Reference: zhu2018prune

    >>> from effnb.compress import apply_masks
    >>> handle = apply_masks(torch.nn.Linear(10, 10), {"": torch.ones(10, 10, dtype=torch.bool)})
    >>> pruner = GradualPruner(handle, density=0.2, end_step=4)
    >>> [pruner(t) for t in range(5)]
    [1.0, 0.54, 0.3, 0.21, 0.2]
    """

    def __init__(self, handle: MaskHandle, density: float, end_step: int, every: int = 1) -> None:
        check_density(density)
        if end_step < 1 or every < 1:
            raise ValueError(f"end_step and every must be >= 1, got {end_step} and {every}")
        self.handle, self.final, self.end_step, self.every = handle, density, end_step, every

    def __call__(self, step: int) -> float:
        """Prune if it is time at ``step`` (steps done so far); returns the density in use."""
        if step <= self.end_step and (step % self.every == 0 or step == self.end_step):
            self.handle.set_masks(magnitude_masks(self.handle, 1 - gmp_sparsity(step, self.end_step, 1 - self.final)))
        return self.handle.density()


def magnitude_masks(handle: GatedLayers, density: float) -> dict:
    """Masks of exactly ``density``, by the largest raw weights of a masked model; what is masked never comes back.

    Args:
        handle: the masked model.
        density: fraction of all maskable weights to keep, in (0, 1].

    Returns:
        Name to bool mask.

    Raises:
        ValueError: ``density`` out of range.

    Reference: frankle2019lottery

    >>> from effnb.compress import apply_masks
    >>> handle = apply_masks(torch.nn.Linear(10, 10), {"": torch.ones(10, 10, dtype=torch.bool)})
    >>> int(magnitude_masks(handle, 0.25)[""].sum())
    25
    """
    masks = handle.masks()
    # -1 ranks masked weights below any magnitude, also below weights that are exactly zero.
    sizes = {name: w.detach().abs().where(masks[name], -1.0) for name, w in handle.weights().items()}
    return top_k_masks(sizes, density)
