"""A training loop's callback: raises the temperature, saves the rewind point, keeps a trace of the gates."""

import torch

from .handle import CSHandle
from .schedule import BetaSchedule


class Annealer:
    """Call it after every optimiser step; it drives one round of continuous sparsification.

    After each step it sets the temperature for the next one, at the end of ``checkpoint_epoch`` it calls
    ``handle.checkpoint()``, and at the end of every epoch it adds a record to ``trace``: ``beta``, ``density`` and
    ``histogram``, the counts of ``sigmoid(beta * s)`` in 20 equal bins over [0, 1].

    Args:
        handle: of the gated model.
        epochs: epochs of the round, >= 1 (>= 2 by epoch).
        steps_per_epoch: optimiser steps in an epoch, >= 1.
        final: inverse temperature at the end of the round, >= 1.
        granularity: ``"step"`` (for short rounds) or ``"epoch"`` (as published).
        checkpoint_epoch: epochs after which to save the weights; ``None`` for never.

    Raises:
        ValueError: a number out of range.

    Reference: savarese2020winning

    >>> from effnb.compress import apply_cs
    >>> handle = apply_cs(torch.nn.Linear(2, 1))
    >>> annealer = Annealer(handle, epochs=2, steps_per_epoch=5, final=100.0)
    >>> for step in range(5):
    ...     annealer(step)
    >>> round(handle.beta, 6), len(annealer.trace)
    (10.0, 1)
    """

    def __init__(
        self,
        handle: CSHandle,
        epochs: int,
        steps_per_epoch: int,
        final: float = 200.0,
        granularity: str = "step",
        checkpoint_epoch: int | None = None,
    ) -> None:
        if epochs < 1 or steps_per_epoch < 1:
            raise ValueError(f"epochs and steps_per_epoch must be >= 1, got {epochs} and {steps_per_epoch}")
        if checkpoint_epoch is not None and not 1 <= checkpoint_epoch <= epochs:
            raise ValueError(f"checkpoint_epoch must be in 1 .. {epochs}, got {checkpoint_epoch}")
        self.by_step = granularity == "step"
        self.schedule = BetaSchedule(epochs * (steps_per_epoch if self.by_step else 1), final, granularity)
        self.handle, self.epochs, self.steps_per_epoch = handle, epochs, steps_per_epoch
        self.checkpoint_epoch, self.trace = checkpoint_epoch, []
        handle.set_beta(1.0)

    def __call__(self, step: int, loss: float | None = None) -> None:
        """Take note that optimiser step ``step`` (from 0) is done; ``loss`` is not used."""
        epoch, rest = divmod(step + 1, self.steps_per_epoch)
        self.handle.set_beta(self.schedule(step + 1 if self.by_step else min(epoch, self.epochs - 1)))
        if rest:
            return
        self.trace.append({"beta": self.handle.beta, "density": self.handle.density(), "histogram": self._histogram()})
        if epoch == self.checkpoint_epoch:
            self.handle.checkpoint()

    def _histogram(self) -> list[int]:
        openness = torch.cat([gate.openness().flatten() for gate in self.handle.gates.values()])
        return openness.float().histc(20, 0, 1).long().tolist()
