"""Continuous sparsification of a whole model: gates, temperature, rounds, tickets."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from effnb.common import check_choice, check_count, check_number
from effnb.compress._gated import select_layers, watch_decay
from effnb.compress.continuous_sparsification.gates import ContinuousGate, soft_gates
from effnb.compress.continuous_sparsification.masks import MaskedLayers, Ticket, TrainRound, top_k_masks, warn_dead

__all__ = ["Annealer", "BetaSchedule", "CSHandle", "FitResult", "apply_cs", "fit_s0", "ticket_search"]


class CSHandle(MaskedLayers):
    """Everything a training loop needs; made by :func:`apply_cs`, which explains ``min_keep`` and ``foreach``.

    Reference: savarese2020winning

    >>> handle = apply_cs(nn.Linear(4, 2), s0=0.1)
    >>> handle.set_beta(200.0)
    >>> handle.density(), round(handle.undecided(), 2)
    (1.0, 0.0)
    """

    decay_harm = "on gate scores drives them to 0, the decision boundary"

    def __init__(
        self, model: nn.Module, gates: Mapping[str, ContinuousGate], min_keep: int = 0, foreach: bool = False
    ) -> None:
        super().__init__(model, gates)
        self.min_keep, self._folded, self._hooks = min_keep, False, []
        if foreach:
            # Bound methods, not lambdas: a deep copy of the model then gets a handle of its own.
            self._hooks.append(model.register_forward_pre_hook(self._gate_all))
            self._hooks.append(model.register_forward_hook(self._release, always_call=True))
        watch_decay(self)

    def _gate_all(self, *_) -> None:
        """Compute all soft weights in one node, for the forward pass that starts."""
        gates = list(self.gates.values())
        if not self.is_hard:
            # From the raw parameters: to read `layer.weight` would run the gates one by one.
            weights, scores = list(self.weights().values()), self.gate_parameters()
            ready = soft_gates(weights, scores, self.beta, gates[0].scale_s0, gates[0].lam)
            for gate, weight in zip(gates, ready, strict=True):
                gate._ready = weight

    def _release(self, *_) -> None:
        """Forget the weights of the forward pass that ended."""
        for gate in self.gates.values():
            gate._ready = None

    @property
    def beta(self) -> float:
        """The inverse temperature in use."""
        return next(iter(self.gates.values())).beta

    def set_beta(self, beta: float) -> None:
        """Set the inverse temperature of all gates, > 0."""
        check_number("beta", beta, gt=0)
        for gate in self.gates.values():
            gate.beta = float(beta)

    @property
    def is_hard(self) -> bool:
        """Whether the model computes with the ticket instead of the soft gates."""
        return next(iter(self.gates.values())).is_hard

    is_fixed = is_hard  # the base's name for it: the scores have stopped learning

    def penalty(self) -> float:
        """``lam * sum(c * sigmoid(beta * s))`` for the log; its gradient is already in that of the scores."""
        return sum(gate.lam * gate.scale * float(gate.openness().sum()) for gate in self.gates.values())

    def density(self, hard: bool = True) -> float:
        """Fraction of gates with ``s > 0`` over all layers, or (``hard=False``) the mean of ``sigmoid(beta * s)``."""
        if hard:
            return super().density()
        opened = [gate.openness() for gate in self.gates.values()]
        return sum(float(each.sum()) for each in opened) / sum(each.numel() for each in opened)

    def openness(self) -> Tensor:
        """``sigmoid(beta * s)`` of all gates as one vector, without gradient."""
        return torch.cat([gate.openness().flatten() for gate in self.gates.values()])

    def undecided(self, low: float = 0.01, high: float = 0.99) -> float:
        """Fraction of gates with ``low < sigmoid(beta * s) < high``."""
        openness = self.openness()
        return float(((openness > low) & (openness < high)).float().mean())

    @torch.no_grad()
    def end_round(self, reset: str = "paper") -> None:
        """Reset the scores for the next round, ``s <- min(beta * s, s0)``, and the temperature to 1.

        Suppressed gates end far below zero and stay closed; open ones get a fresh chance. ``reset="official"`` does
        what the published code does: it sets the temperature to 1 first, so that ``s <- min(s, s0)``.
        """
        check_choice("reset", reset, ("paper", "official"))
        if self.is_hard:
            raise RuntimeError("end_round() needs soft gates; call hard(False) before")
        warn_dead(self.masks())
        for gate in self.gates.values():
            # Before the temperature goes back: with beta = 1 already, a suppressed gate could come back.
            gate.scores.mul_(gate.beta if reset == "paper" else 1.0).clamp_(max=gate.s0)
        self.set_beta(1.0)
        watch_decay(self)  # the next round has an optimiser of its own

    @torch.no_grad()
    def hard(self, flag: bool = True, density: float | None = None) -> None:
        """Compute with the ticket ``c * H(s) * w`` from now on (``flag=False``: with the soft gates again).

        With ``density`` exactly that fraction stays, chosen by the largest ``s`` over all layers; ``min_keep`` and
        ``density`` work by flipping the sign of the scores concerned, so the scores always hold the whole ticket.
        """
        scores = {name: gate.scores for name, gate in self.gates.items()}
        if not flag and self._folded:
            raise RuntimeError("hard(False) is not possible after fold(): the mask is in the weights")
        if flag:
            if any(s.isnan().any() for s in scores.values()):
                raise ValueError("scores must not hold NaN: the search has diverged")
            # On `s`, never on the soft gate: a density of "mask != 0" would depend on where the sigmoid underflows.
            if density is not None:
                wanted = top_k_masks(scores, density, self.min_keep)
            else:
                wanted = self.masks()
                for name, s in scores.items() if self.min_keep else ():
                    wanted[name] |= top_k_masks({name: s}, 1 / s.numel(), self.min_keep)[name]
            for name, s in scores.items():
                # A score of 0 is a closed gate: opened, it becomes the least positive number.
                size = s.abs().clamp_min(torch.finfo(s.dtype).tiny)
                flipped = torch.where(wanted[name], size, -size)
                s.copy_(torch.where(wanted[name] == (s > 0), s, flipped))
            warn_dead(self.masks())
        for gate in self.gates.values():
            gate.hard(flag)
            gate.scores.grad = None  # a stale gradient would let an optimiser move the ticket

    @torch.no_grad()
    def fold(self, density: float | None = None) -> None:
        """Harden, and move ``c * H(s)`` into the weights: ``w <- c * H(s) * w``; the mask stays on for fine-tuning."""
        self.hard(density=density)
        for name, weight in self.weights().items():
            # By the gate itself, so that the folded model computes the ticket's bits. Without c a net that has no
            # normalisation breaks.
            weight.copy_(self.gates[name](weight))
            self.gates[name].scale_s0 = None
        self._folded = True

    def rewind(self) -> None:
        """As in the base; RuntimeError after :meth:`fold`."""
        if self._folded:
            raise RuntimeError("rewind() after fold() would lose the scale 1 / sigmoid(s0); use hard() instead")
        super().rewind()

    def finalize(self, sparse: bool = False, density: float | None = None) -> nn.Module:
        """Harden (see :meth:`hard` for ``density``), fold, take the gates off; the handle is finished.

        With ``sparse`` every gated ``nn.Linear`` becomes a CSR layer for inference. Returns the plain model.
        """
        self.hard(density=density)
        for hook in self._hooks:
            hook.remove()
        return super().finalize(sparse)


def apply_cs(
    model: nn.Module,
    s0: float = 0.0,
    include: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
    exclude: Iterable[str | type[nn.Module]] = (),
    *,
    lam: float = 0.0,
    scale_init: bool = True,
    min_keep: int = 0,
    foreach: bool | None = None,
) -> CSHandle:
    r"""Put a :class:`ContinuousGate` on every chosen weight, in place, and return the handle.

    The published experiments gate the 3x3 convolutions only; leave out the rest with ``exclude``.

    Args:
        model: any module.
        s0: initial score; the smaller, the sparser (about -0.3 .. 0.3 is useful).
        include, exclude: layers to gate, see :func:`select_layers`.
        lam: strength of the penalty ``lam * sum(gates)``, >= 0. The push on a gate is about steps x gate lr x lam:
            a value for 85 epochs does nothing in 5.
        scale_init: divide by ``sigmoid(s0)``, so that the model starts unchanged.
        min_keep: weights that every layer keeps in the ticket, >= 0.
        foreach: compute all gates in one go at the model's forward pass; ``None``: when the model is on a GPU.

    Raises:
        ValueError: a number out of range, no layer matches, or gates are on already.

    Reference: savarese2020winning

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> apply_cs(model, s0=-0.05, exclude=["2"]).per_layer()
    {'0': 0.0}
    """
    check_count("min_keep", min_keep, ge=0)
    weights = {name: layer.weight for name, layer in select_layers(model, include, exclude).items()}
    gates = {n: ContinuousGate(w.shape, s0, scale_init, lam, w.device, w.dtype) for n, w in weights.items()}
    if foreach is None:
        foreach = all(w.is_cuda for w in weights.values())
    return CSHandle(model, gates, min_keep, foreach)


@dataclass(frozen=True)
class BetaSchedule:
    r"""Exponential annealing of the gates' inverse temperature from 1 to ``final``.

    ``granularity="epoch"``: ``beta_k = final ** (k / (total - 1))`` for the epochs ``k = 0 .. total - 1`` of a round,
    constant inside an epoch. ``granularity="step"``: ``beta_t = final ** (t / total)`` before the optimiser's step
    ``t``; ``t = total`` is the state after the last one. Below about 20 epochs annealing by step is the better choice.

    Args:
        total: epochs or optimiser steps of one round, >= 2.
        final: inverse temperature at the end of a round, >= 1; 1 switches annealing off.
        granularity: ``"epoch"`` or ``"step"``.

    Raises:
        ValueError: a field out of range, or an index outside the round when called.

    Reference: savarese2020winning

    >>> schedule = BetaSchedule(total=3, final=100.0)
    >>> [round(schedule(k), 6) for k in range(3)]
    [1.0, 10.0, 100.0]
    """

    total: int
    final: float = 200.0
    granularity: str = "epoch"

    def __post_init__(self) -> None:
        check_count("total", self.total, ge=2)
        check_number("final", self.final, ge=1)
        check_choice("granularity", self.granularity, ("epoch", "step"))

    def __call__(self, index: int) -> float:
        """Return the inverse temperature of epoch or step ``index`` (counted from 0)."""
        # Epochs are counted to total - 1; by step there is a state after the last one.
        last = self.total - (self.granularity == "epoch")
        check_number("index", index, ge=0, le=last)
        return self.final ** (index / last)


class Annealer:
    """A training loop's callback after every optimiser step: drives one round of continuous sparsification.

    It sets the temperature for the next step, calls ``handle.checkpoint()`` at the end of ``checkpoint_epoch``, and at
    the end of every epoch adds a record to ``trace``: ``beta``, ``density`` and ``histogram``, the counts of
    ``sigmoid(beta * s)`` in 20 equal bins over [0, 1].

    Args:
        handle: of the gated model.
        epochs: epochs of the round, >= 1 (>= 2 by epoch).
        steps_per_epoch: optimiser steps in an epoch, >= 1.
        final, granularity: as in :class:`BetaSchedule`; ``"epoch"`` as published, ``"step"`` for short rounds.
        checkpoint_epoch: epochs after which to save the weights; ``None`` for never.

    Raises:
        ValueError: a number out of range.

    >>> handle = apply_cs(nn.Linear(2, 1))
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
        check_count("epochs", epochs)
        check_count("steps_per_epoch", steps_per_epoch)
        if checkpoint_epoch is not None:
            check_count("checkpoint_epoch", checkpoint_epoch, le=epochs)
        self.by_step = granularity == "step"
        self.schedule = BetaSchedule(epochs * (steps_per_epoch if self.by_step else 1), final, granularity)
        self.handle, self.epochs, self.steps_per_epoch = handle, epochs, steps_per_epoch
        self.checkpoint_epoch, self.trace = checkpoint_epoch, []
        handle.set_beta(1.0)

    def __call__(self, step: int, loss: float | None = None) -> None:
        """Take note that optimiser step ``step`` (from 0) is done; ``loss`` is not used."""
        handle = self.handle
        epoch, rest = divmod(step + 1, self.steps_per_epoch)
        # By epoch the last temperature is reached one epoch before the end: there is none after it.
        handle.set_beta(self.schedule(step + 1 if self.by_step else min(epoch, self.epochs - 1)))
        if not rest:
            counts = handle.openness().float().histc(20, 0, 1).long().tolist()
            self.trace.append({"beta": handle.beta, "density": handle.density(), "histogram": counts})
            if epoch == self.checkpoint_epoch:
                handle.checkpoint()


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit_s0` found: ``s0``, the ``density`` it gave, and every ``(s0, density)`` that was tried."""

    s0: float
    density: float
    tried: list[tuple[float, float]] = field(default_factory=list)


def fit_s0(
    density_at: Callable[[float], float],
    target: float,
    low: float = -0.3,
    high: float = 0.3,
    rtol: float = 0.1,
    max_runs: int = 10,
) -> FitResult:
    r"""Bisect the initial gate score until a run ends at the wanted density; return the best run.

    A larger ``s0`` leaves more weights, so the density is taken to grow with it. Each evaluation is a whole run; ask
    for the exact density by ``finalize(density=...)`` afterwards.

    Args:
        density_at: runs the method at one ``s0`` and returns the density in [0, 1] that it reached.
        target: wanted density in (0, 1).
        low, high: the bracket, ``low < high``.
        rtol: stop when ``|density - target| <= rtol * target``.
        max_runs: most evaluations, >= 2 (the two ends of the bracket count).

    Raises:
        ValueError: an argument out of range, or the bracket's densities do not enclose ``target``.

    >>> fit_s0(lambda s0: 0.5 + s0, target=0.4, rtol=0.01).s0
    -0.1...
    """
    check_number("target", target, gt=0, lt=1)
    check_number("low", low)
    check_number("high", high, gt=low)
    check_number("rtol", rtol, gt=0)
    check_count("max_runs", max_runs, ge=2)
    tried = [(s0, float(density_at(s0))) for s0 in (low, high)]
    if not tried[0][1] <= target <= tried[1][1]:
        found = f"[{tried[0][1]:.4g}, {tried[1][1]:.4g}]; change low, high or lam"
        raise ValueError(f"target must lie between the densities at low and high, got {target} outside {found}")

    def miss(run: tuple[float, float]) -> float:
        return abs(run[1] - target)

    # Plain bisection: a density is a noisy, stepped function of s0, where secants jump.
    while miss(min(tried, key=miss)) > rtol * target and len(tried) < max_runs:
        middle = (low + high) / 2
        tried.append((middle, float(density_at(middle))))
        low, high = (middle, high) if tried[-1][1] < target else (low, middle)
    return FitResult(*min(tried, key=miss), tried)


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
    """Run rounds of continuous sparsification without rewinding in between; return the mask and the early weights.

    Runs with different ``s0`` are independent, so that a whole range of densities costs the time of one run.

    Args:
        model_fn: makes the plain model.
        train_fn: ``train_fn(model, handle, round)`` trains one round (0, 1, ...), raises the temperature by
            ``handle.set_beta`` as it goes, and in round 0 calls ``handle.checkpoint()`` at the rewind epoch.
        rounds: number of rounds, >= 1.
        reset: between rounds, ``"paper"`` or ``"official"`` (see :meth:`CSHandle.end_round`).
        s0, lam, options: arguments of :func:`apply_cs`.

    Raises:
        ValueError: ``rounds`` below 1, or an argument of :func:`apply_cs` out of range.
        RuntimeError: no checkpoint was taken.

    Reference: savarese2020winning

    >>> ticket = ticket_search(lambda: nn.Linear(3, 2), lambda model, handle, r: handle.checkpoint(), 1, s0=0.1)
    >>> ticket.density
    1.0
    """
    check_count("rounds", rounds)
    model = model_fn()
    handle = apply_cs(model, s0, lam=lam, **options)
    scale = next(iter(handle.gates.values())).scale
    history = []
    for index in range(rounds):
        train_fn(model, handle, index)
        saved = handle.saved_state  # raises after the first round, not at the end of a long search
        history.append({"round": index, "density": handle.density(), "per_layer": handle.per_layer()})
        if index < rounds - 1:  # the last round's scores are the ticket
            handle.end_round(reset)
    handle.hard()  # settles min_keep
    return Ticket(handle.masks(), saved, scale, history)
