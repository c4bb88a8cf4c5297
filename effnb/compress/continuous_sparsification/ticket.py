"""Search for lottery tickets, by continuous sparsification and by iterative magnitude pruning, with rewinding."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .gradual import magnitude_masks
from .handle import CSHandle, apply_cs
from .layers import select_layers
from .masks import MaskHandle, apply_masks, check_density

TrainRound = Callable[[nn.Module, CSHandle | MaskHandle, int], None]


@dataclass(frozen=True)
class Ticket:
    """A mask and the early weights that it is trained from.

    Args:
        masks: layer's name to bool mask.
        rewind_state: plain ``state_dict`` of the whole model at the rewind epoch of round 1.
        scale: factor on the masked weights, ``1 / sigmoid(s0)`` for continuous sparsification, 1 for magnitudes.
        history: one record per round: ``round``, ``density``, ``per_layer``.

    Reference: savarese2020winning

    >>> Ticket({"": torch.tensor([[True, False]])}, {}).density
    0.5
    """

    masks: dict[str, Tensor]
    rewind_state: dict[str, Tensor]
    scale: float = 1.0
    history: list[dict] = field(default_factory=list)

    @property
    def density(self) -> float:
        """Fraction of the maskable weights that the ticket keeps."""
        masks = self.masks.values()
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    @torch.no_grad()
    def install(self, model: nn.Module) -> MaskHandle:
        """Load the early weights (times ``scale``) into a plain ``model``, put the masks on; train it from there."""
        model.load_state_dict(self.rewind_state)
        handle = apply_masks(model, self.masks)
        for weight in handle.weights().values():
            weight.mul_(self.scale)
        return handle


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")


def _record(handle: CSHandle | MaskHandle, index: int) -> dict:
    return {"round": index, "density": handle.density(), "per_layer": handle.per_layer()}


def _saved(handle: CSHandle | MaskHandle) -> dict[str, Tensor]:
    if not handle.has_checkpoint:
        raise RuntimeError("train_fn must call handle.checkpoint() at the rewind epoch of round 0")
    return handle._saved


def ticket_search(
    model_fn: Callable[[], nn.Module],
    train_fn: TrainRound,
    rounds: int,
    s0: float = 0.0,
    lam: float = 0.0,
    *,
    reset: str = "paper",
    **options,
) -> Ticket:
    """Rounds of continuous sparsification without rewinding in between; returns the mask and the early weights.

    Runs with different ``s0`` are independent, so that a whole range of densities costs the time of one run.

    Args:
        model_fn: makes the plain model.
        train_fn: ``train_fn(model, handle, round)`` trains one round (0, 1, ...), raises the temperature by
            ``handle.set_beta`` as it goes, and in round 0 calls ``handle.checkpoint()`` at the rewind epoch.
        rounds: number of rounds, >= 1.
        s0: initial score of the gates.
        lam: strength of the penalty.
        reset: between rounds, ``"paper"`` or ``"official"`` (see :meth:`CSHandle.end_round`).
        **options: further arguments of :func:`apply_cs`.

    Returns:
        The ticket; its history has one record per round.

    Raises:
        ValueError: ``rounds`` below 1, or an argument of :func:`apply_cs` out of range.
        RuntimeError: no checkpoint was taken.

    Reference: savarese2020winning

    >>> ticket = ticket_search(lambda: nn.Linear(3, 2), lambda model, handle, r: handle.checkpoint(), 1, s0=0.1)
    >>> ticket.density
    1.0
    """
    _check_rounds(rounds)
    model = model_fn()
    handle = apply_cs(model, s0, lam=lam, **options)
    scale = next(iter(handle.gates.values())).scale
    history = []
    for index in range(rounds):
        train_fn(model, handle, index)
        saved = _saved(handle)
        history.append(_record(handle, index))
        if index < rounds - 1:
            handle.end_round(reset)
    handle.hard()  # settles min_keep
    return Ticket({name: mask.clone() for name, mask in handle.masks().items()}, saved, scale, history)


def magnitude_ticket_search(
    model_fn: Callable[[], nn.Module],
    train_fn: TrainRound,
    rounds: int,
    keep_ratio: float = 0.8,
    masks: dict[str, Tensor] | None = None,
) -> Ticket:
    """Iterative magnitude pruning with rewinding (IMP): train, keep the largest weights, rewind, again.

    Args:
        model_fn: makes the plain model.
        train_fn: as in :func:`ticket_search`; the handle is a :class:`MaskHandle`.
        rounds: number of rounds, >= 1.
        keep_ratio: fraction of the *remaining* weights kept per round, in (0, 1]: density ``keep_ratio ** rounds``.
        masks: all-ones masks of the layers to prune; ``None`` for every convolution and linear layer.

    Returns:
        The ticket; its history has one record per round, after pruning.

    Raises:
        ValueError: ``rounds`` or ``keep_ratio`` out of range.
        RuntimeError: no checkpoint was taken.

    Reference: frankle2020linear

    >>> ticket = magnitude_ticket_search(lambda: nn.Linear(5, 5), lambda model, handle, r: handle.checkpoint(), 2)
    >>> ticket.density
    0.64
    """
    _check_rounds(rounds)
    check_density(keep_ratio, "keep_ratio")
    model = model_fn()
    handle = apply_masks(model, masks or full_masks(model))
    history = []
    for index in range(rounds):
        train_fn(model, handle, index)
        saved = _saved(handle)
        handle.set_masks(magnitude_masks(handle, keep_ratio ** (index + 1)))
        history.append(_record(handle, index))
        handle.rewind()
    return Ticket({name: mask.clone() for name, mask in handle.masks().items()}, saved, 1.0, history)


def full_masks(model: nn.Module, **layers) -> dict[str, Tensor]:
    """All-ones masks for :func:`apply_masks`.

    Args:
        model: plain model.
        **layers: ``include`` and ``exclude`` of :func:`select_layers`.

    Returns:
        Layer's name to bool mask.

    Raises:
        ValueError: no layer matches.

    Reference: frankle2019lottery

    >>> full_masks(nn.Linear(2, 1))
    {'': tensor([[True, True]])}
    """
    chosen = select_layers(model, **layers)
    return {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in chosen.items()}
