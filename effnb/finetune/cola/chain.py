"""Chain of LoRA: train a low-rank update, tie it into the weights, extend by a new one; and the loop over links."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from effnb.common import check_number
from effnb.finetune.cola.lora import LoRALinear, check_sum, factor_dtype, inject_lora, restore_flags
from effnb.finetune.cola.peft_backend import PeftAdapters, check_config, scale_of


class InjectedAdapters:
    """The adapters of :func:`inject_lora`, as a chain sees them."""

    def __init__(self, model: nn.Module, targets: str | Sequence[str], rank: int, scale: float, **options: Any) -> None:
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self.names = inject_lora(model, targets, rank, scale * rank, **options)
        self.model = model
        self.layers: dict[str, LoRALinear] = {name: model.get_submodule(name) for name in self.names}

    def parts(self) -> dict[str, tuple[Tensor, Tensor, Tensor, float]]:
        """The frozen weight ``(out, in)``, ``A``, ``B`` and the scale of every adapted layer."""
        return {name: (layer.base.weight, layer.A, layer.B, layer.scale) for name, layer in self.layers.items()}

    def merge(self) -> None:
        """Add every update to its frozen weight."""
        for layer in self.layers.values():
            layer.merge_()

    def start(self, rank: int) -> None:
        """New factors of the given rank at the same scale."""
        for layer in dict.fromkeys(self.layers.values()):
            layer.reset_(rank)

    def unload(self) -> None:
        """Put the plain layers back, with the ``requires_grad`` flags that the model came with."""
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer.base)
        self.layers = {}
        restore_flags(self.model, self.flags)


class ChainStateError(RuntimeError, ValueError):
    """A step of the chain out of turn."""


class ChainOfLoRA:
    r"""A chain of low-rank updates of a model's linear layers, :math:`W \leftarrow W + s_k B_k A_k` for k = 1, ..., M.

    One link is LoRA. At a knot the update moves into the frozen weights and a new pair is drawn, with ``B = 0``: the
    function is unchanged, the number of trained parameters too, and the sum of the links may have rank
    :math:`\sum_k r_k`. A link needs a new optimizer and a new schedule (:func:`fit_chain` makes them).

    The scale stays that of the first link, so that alpha follows the rank. Where ``peft_config`` is given, the adapters
    are peft's, and ``model`` is a ``PeftModel`` as long as the chain is open.

    Attributes: ``model`` (plain after :meth:`unload`), ``names`` of the adapted layers, ``ranks``, ``link`` (from 1),
    ``scale``.

    Args:
        model: changed in place, until :meth:`unload`.
        target_modules: endings of module names, or a regular expression; ``peft_config`` has its own.
        ranks: one for each link; ``None`` means three links of rank 8, or of the config's rank.
        alpha: of the first link, the scale is ``alpha / ranks[0]``; ``None`` means a scale of 1, or the config's.
        dropout, init, master_dtype: of the adapters, as in :class:`LoRALinear`.
        peft_config: a ``peft.LoraConfig``.
        allow_tied: accept a target whose weight another parameter shares; a knot then changes both.
        modules_to_save: endings of the names of modules that train in full, such as a head; their weights carry on at a
            knot.
        generator: running stream for the factors of all links; ``None`` draws from torch's global one.
        in_place: with peft, ``False`` merges, unloads and wraps the model again at every knot instead of resetting the
            factors; the weights are the same bit for bit.
        keep_head_state: carry the optimizer state of ``modules_to_save`` over the knots (see :func:`fit_chain`).
        keep_links: keep the factors of tied links, which :meth:`accumulated_rank` and :meth:`delta_weight` need; a copy
            of ``A`` and ``B`` for each link.
        train_A: ``False`` leaves ``A`` at its random start and trains ``B`` alone, as RAC-LoRA does.

    Raises:
        ValueError: an option outside its range, no or an unknown target, a quantised or tied weight, a peft option with
            which the update is not ``s B A``.
        TypeError: a target that is no ``nn.Linear`` (the error is a ``ValueError`` as well).
        ImportError: ``peft_config`` without peft.

    Reference: xia2024chain

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> chain = ChainOfLoRA(model, ["0"], ranks=(2, 1), alpha=4)
    >>> chain.trainable_parameters, chain.scale
    (32, 2.0)
    >>> _ = nn.init.ones_(model[0].B)
    >>> chain.tie_knot()
    >>> chain.extend()
    >>> chain.link, chain.trainable_parameters, type(chain.unload()[0]).__name__
    (2, 16, 'Linear')
    """

    def __init__(
        self,
        model: nn.Module,
        target_modules: str | Sequence[str] | None = None,
        ranks: Sequence[int] | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        peft_config: Any = None,
        allow_tied: bool = False,
        *,
        init: str = "kaiming",
        modules_to_save: Sequence[str] = (),
        generator: Generator | None = None,
        master_dtype: torch.dtype | None = None,
        in_place: bool = True,
        keep_head_state: bool = False,
        keep_links: bool = True,
        train_A: bool = True,
    ) -> None:
        if alpha is not None:
            check_number("alpha", alpha, gt=0)
        common = {"generator": generator, "master_dtype": master_dtype, "allow_tied": allow_tied}
        if peft_config is None:
            self.ranks = _checked_ranks((8, 8, 8) if ranks is None else ranks)
            self.scale = 1.0 if alpha is None else alpha / self.ranks[0]
            common |= {"init": init, "modules_to_save": modules_to_save, "dropout": dropout}
            self._adapters = InjectedAdapters(model, target_modules, self.ranks[0], self.scale, **common)
        else:
            check_config(model, peft_config)
            if target_modules is not None or modules_to_save or dropout or init != "kaiming":
                raise ValueError("target_modules, dropout, init and modules_to_save must be set in peft_config")
            self.ranks = _checked_ranks((peft_config.r,) * 3 if ranks is None else ranks)
            self.scale = scale_of(peft_config) if alpha is None else alpha / self.ranks[0]
            self._adapters = PeftAdapters(model, peft_config, self.ranks[0], self.scale, in_place, **common)
        parts = self._adapters.parts().values()
        self._limit = min(min(weight.shape) for weight, *_ in parts)
        try:
            _checked_ranks(self.ranks, self._limit)
        except ValueError:
            self._adapters.unload()
            raise
        self.names, self.link, self.train_A = self._adapters.names, 1, train_A
        self.keep_head_state, self.keep_links = keep_head_state, keep_links
        self._tied = self._unloaded = False
        self._links: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.names}
        for _, A, _, _ in parts:
            A.requires_grad_(train_A)
        if master_dtype is None and any(factor_dtype(weight) != weight.dtype for weight, *_ in parts):
            warnings.warn(
                "base weights of half precision: an update below half an ulp vanishes at a knot, "
                "master_dtype=torch.float32 keeps it",
                stacklevel=2,
            )

    @property
    def model(self) -> nn.Module:
        """The model as it is now: adapted, or plain after :meth:`unload`."""
        return self._adapters.model

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters in training: one link and the saved modules."""
        return sum(p.numel() for p in self.parameters_to_tune())

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The factors ``A`` and ``B`` of the present link."""
        return list(dict.fromkeys(p for _, A, B, _ in self._adapters.parts().values() for p in (A, B)))

    def parameters_to_tune(self) -> list[nn.Parameter]:
        """Everything that requires a gradient. Ask again after every knot: old factors train nothing."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def tie_knot(self) -> None:
        """Add the link's update to the frozen weights, all layers or none, and set ``B`` to zero.

        Raises:
            ValueError: NaN, Inf or an overflow in a layer, which is named; no weight has changed then. Also a second
                knot without :meth:`extend`, or a chain that is unloaded (a ``RuntimeError`` as well).
        """
        self._check_open("tie_knot")
        parts = self._adapters.parts()
        if not self._has_trained():
            warnings.warn(
                f"link {self.link} has not trained: is its optimizer over parameters_to_tune()?", stacklevel=2
            )
        for name, part in parts.items():
            check_sum(*part, name)
        kept = {n: (A.detach().clone(), s * B.detach()) for n, (_, A, B, s) in parts.items()} if self.keep_links else {}
        self._adapters.merge()
        for name, pair in kept.items():
            self._links[name].append(pair)
        self._tied = True

    def extend(self, rank: int | None = None) -> None:
        """Begin the next link: new factors from the running stream, no gradients, the scale as before.

        Args:
            rank: of the new link; ``None`` takes it from ``ranks``, and beyond their end repeats the last one.

        Raises:
            ValueError: the link before is not tied (a ``RuntimeError`` as well), or a rank outside [1, min(in, out)].
        """
        if self._unloaded or not self._tied:
            raise ChainStateError("extend must follow tie_knot: the update of this link would be lost")
        rank = self.ranks[min(self.link, len(self.ranks) - 1)] if rank is None else rank
        _checked_ranks([rank], self._limit)
        self._adapters.start(rank)
        for _, A, _, _ in self._adapters.parts().values():
            A.requires_grad_(self.train_A)
        self.ranks = (*self.ranks[: self.link], rank, *self.ranks[self.link + 1 :])
        self.link, self._tied = self.link + 1, False

    def unload(self) -> nn.Module:
        """Tie the open link, take the adapters out and give back the model: plain layers, its own flags and keys."""
        if not self._unloaded:
            if not self._tied and self._has_trained():
                self.tie_knot()
            self._adapters.unload()
            self._unloaded = True
        return self.model

    def delta_weight(self, name: str) -> Tensor:
        """The accumulated update of one layer, ``sum_k s_k B_k A_k`` of the tied links and the open one, in float64."""
        pairs = self._pairs(name)
        return torch.cat([B for _, B in pairs], 1) @ torch.cat([A for A, _ in pairs])

    def accumulated_rank(self, name: str, tolerance: float = 1e-4) -> int:
        """Number of singular values of the accumulated update above ``tolerance`` times the largest.

        Args:
            name: an adapted layer.
            tolerance: relative, in (0, 1); too tight a one counts rounding errors.

        Raises:
            ValueError: an unknown name, a tolerance outside its range, or a chain without ``keep_links``.
        """
        check_number("tolerance", tolerance, gt=0, lt=1)
        pairs = self._pairs(name)
        if not pairs:
            return 0
        # The triangles of the stacked factors have the singular values of their product.
        rows = torch.linalg.qr(torch.cat([A for A, _ in pairs]).T).R
        columns = torch.linalg.qr(torch.cat([B for _, B in pairs], 1)).R
        values = torch.linalg.svdvals(columns @ rows.T)
        return int((values > tolerance * values[0]).sum())

    def _pairs(self, name: str) -> list[tuple[Tensor, Tensor]]:
        if name not in self._links:
            raise ValueError(f"name must be one of {self.names}, got {name!r}")
        if not self.keep_links:
            raise ChainStateError("the factors of tied links are not kept, make the chain with keep_links=True")
        pairs, parts = list(self._links[name]), self._adapters.parts()
        if name in parts and not self._tied:
            _, A, B, scale = parts[name]
            pairs.append((A.detach(), scale * B.detach()))
        return [(A.double(), B.double()) for A, B in pairs]

    def _has_trained(self) -> bool:
        return any(B.detach().any() for _, _, B, _ in self._adapters.parts().values())

    def _check_open(self, step: str) -> None:
        if self._unloaded:
            raise ChainStateError(f"{step} must come before unload")
        if self._tied:
            raise ChainStateError(f"{step} must follow extend: link {self.link} is tied already")


def _checked_ranks(ranks: Sequence[int], limit: float = math.inf) -> tuple[int, ...]:
    """The ranks, at least one; all are integers from 1 to the shorter side of the smallest layer."""
    if isinstance(ranks, int) or not len(ranks):
        raise ValueError(f"ranks must hold one rank for each link, got {ranks!r}")
    if not all(isinstance(r, int) and not isinstance(r, bool) and 1 <= r <= limit for r in ranks):
        raise ValueError(f"ranks must be integers in [1, {limit}], got {tuple(ranks)}")
    return tuple(ranks)


# --- the loop over the links: a new optimizer and a new schedule for each


def linear_decay(optimizer: Optimizer, steps: int, end: float = 0.0) -> LambdaLR:
    """A schedule from the optimizer's lr down to ``end`` times it, in equal parts over ``steps``.

    Args:
        optimizer: whose lr is scheduled; step the schedule after every step of it.
        steps: number of steps, >= 1; the first is taken at the full lr.
        end: last factor, in [0, 1], reached after ``steps`` steps.

    Raises:
        ValueError: ``steps`` below 1 or ``end`` outside [0, 1].

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> schedule = linear_decay(optimizer, 4)
    >>> [optimizer.step() or schedule.step() or schedule.get_last_lr()[0] for _ in range(4)]
    [0.75, 0.5, 0.25, 0.0]
    """
    if steps < 1 or not 0 <= end <= 1:
        raise ValueError(f"steps must be >= 1 and end in [0, 1], got {steps} and {end}")
    return LambdaLR(optimizer, lambda step: 1 - (1 - end) * min(step, steps) / steps)


def split_steps(steps: int | Sequence[int], links: int) -> list[int]:
    """Steps of each link: a total is split evenly, what remains goes to the last link.

    Args:
        steps: the total, >= ``links``, or one count >= 1 for each link.
        links: number of links.

    Raises:
        ValueError: fewer steps than links, a list of another length, or a link without a step.

    >>> split_steps(11, 3), split_steps([5, 4, 2], 3)
    ([3, 3, 5], [5, 4, 2])
    """
    if isinstance(steps, int):
        if steps < links:
            raise ValueError(f"steps must give each of the {links} links at least one, got {steps}")
        return [steps // links] * (links - 1) + [steps - steps // links * (links - 1)]
    counts = list(steps)
    if len(counts) != links or not all(isinstance(n, int) and n >= 1 for n in counts):
        raise ValueError(f"steps must hold a count >= 1 for each of the {links} links, got {counts}")
    return counts


def fit_chain(
    chain: ChainOfLoRA,
    step_fn: Callable[[nn.Module, int], Tensor],
    steps: int | Sequence[int],
    optimizer_factory: Callable[[list[nn.Parameter]], Optimizer],
    scheduler_factory: Callable[[Optimizer, int], LRScheduler] | None = None,
    callback: Callable[[ChainOfLoRA, int, Tensor], Any] | None = None,
    *,
    keep_head_state: bool | None = None,
    tie: bool = True,
) -> list[list[float]]:
    """Train all links of a chain that are left, from the open one on; the last one is tied too.

    Each link gets an optimizer and a schedule of its own: moments of the old factors point into the old subspace. A
    head goes on with its weights; its moments are new as well unless ``keep_head_state`` is set.

    Args:
        chain: open, that is not tied.
        step_fn: loss of a training step, ``step_fn(model, step)``; steps are counted from 0 over all links, so that the
            order of the data does not depend on the number of links.
        steps: the total (split evenly, the remainder to the last link) or one count for each link.
        optimizer_factory: for instance ``lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0)``; weight decay on
            the factors would pull at the update, not at the weights.
        scheduler_factory: ``scheduler_factory(optimizer, steps_of_the_link)``, stepped after every step, for instance
            :func:`linear_decay`; ``None`` leaves the lr as it is.
        callback: ``callback(chain, step, loss)`` after every step.
        keep_head_state: carry the optimizer state of all parameters but the factors over the knots; ``None`` does as
            the chain was made.
        tie: ``False`` never ties: the same adapter goes on with a new optimizer and schedule, which separates the
            effect of a restart from that of a new subspace.

    Returns:
        The losses, one list for each link.

    Raises:
        ValueError: fewer steps than links or a link without any, a loss that is no scalar with a gradient, a chain that
            is tied or unloaded, ``tie=False`` with ranks that differ.

    Reference: xia2024chain

    >>> model = nn.Linear(4, 4)
    >>> x, y = torch.randn(2, 64, 4)
    >>> chain = ChainOfLoRA(nn.Sequential(model), ["0"], ranks=(1, 1))
    >>> losses = fit_chain(
    ...     chain, lambda model, step: (model(x) - y).square().mean(), 11, lambda p: torch.optim.Adam(p, 0.1)
    ... )
    >>> [len(part) for part in losses], losses[-1][-1] < losses[0][0]
    ([5, 6], True)
    """
    counts = split_steps(steps, len(chain.ranks) - chain.link + 1)
    keep = chain.keep_head_state if keep_head_state is None else keep_head_state
    if not tie and len(set(chain.ranks)) > 1:
        raise ValueError(f"ranks must be equal with tie=False, got {chain.ranks}")
    chain._check_open("fit_chain")
    history, done, head = [], 0, {}
    for count in counts:
        if history and tie:
            chain.extend()
        losses, head = _fit_link(chain, step_fn, done, count, optimizer_factory, scheduler_factory, callback, head)
        head = head if keep else {}
        history.append(losses)
        done += count
        if tie:
            chain.tie_knot()
    return history


def _fit_link(chain, step_fn, done, count, optimizer_factory, scheduler_factory, callback, head):
    # A function of its own, since its end frees the optimizer with its moments before the next one is made.
    optimizer, factors = optimizer_factory(chain.parameters_to_tune()), set(chain.adapter_parameters())
    rest = {n: p for n, p in chain.model.named_parameters() if p.requires_grad and p not in factors}
    optimizer.state.update({rest[name]: state for name, state in head.items() if name in rest})
    scheduler = scheduler_factory(optimizer, count) if scheduler_factory else None
    losses = []
    for step in range(done, done + count):
        loss = step_fn(chain.model, step)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"step_fn must return a scalar loss with a gradient, got {loss!r}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.detach())
        if callback:
            callback(chain, step, losses[-1])
    optimizer.zero_grad()
    return torch.stack(losses).tolist(), {name: optimizer.state[p] for name, p in rest.items() if p in optimizer.state}
