"""Many proxies of one network in shared passes, and of many networks through any fan-out."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..zico import GradientMoments
from ..zico.passes import check_batches
from ..zico.score import per_layer
from .common import Loss, check_model
from .gradient import GradientPass
from .journal import Outcome, Run, Task, recorded
from .registry import Proxy, available_proxies

PASS = ("grad_norm", "snip", "plain", "fisher")
ZICO = {"zico": "code", "zico_floor": "floor"}
Batch = tuple[Tensor, Tensor]
Options = Mapping[str, Mapping[str, Any]]


def score_all(
    model: nn.Module | Iterable[Any],
    batches: Sequence[Batch] | Batch,
    names: Sequence[str],
    *,
    loss_fn: Loss = F.cross_entropy,
    options: Options | None = None,
    seed: int | None = 0,
    seeds: Sequence[int] | None = None,
    build: Callable[..., nn.Module] | None = None,
    run: Run | None = None,
    resume: str | Path | None = None,
) -> dict[str, float] | list[Outcome]:
    """Return several proxies of a network, or of each network of a list, from as few passes as they need.

    One backward pass on the first batch serves `grad_norm`, `snip`, `plain`, `fisher` and the first batch of `zico` and
    `zico_floor`, and `naswot` rides on its forward pass; the scores are those of the functions alone.

    A list is scored item by item, here or wherever ``run`` takes it: ``functools.partial(fan_out, jobs=8)`` on
    processes of this machine, ``partial(fan_out, ray_address="auto")`` on a Ray cluster (`effnb.lab.fanout`). What is
    sent there must be picklable: items, ``build``, ``loss_fn``, batches.

    Args:
        model: a network, or a list of items: networks, or descriptions that ``build`` turns into networks.
        batches: pairs ``(x, y)``, or one pair; all are used by `zico` and `zico_floor`, the first by the others.
        names: proxies, see `available_proxies`.
        loss_fn: mean loss of a batch.
        options: keyword arguments of single proxies, as in ``{"zen_score": {"repeats": 32}}``.
        seed: given to every proxy, and to ``build``.
        seeds: for a list, one row for each item and each of these seeds, instead of ``seed``.
        build: for a list, called as ``build(item, generator=generator)``, with a stream of the row's seed.
        run: for a list, called as ``run(function, items, on_done=callback)``, with the signature and the conventions of
            `effnb.lab.fanout.fan_out`; default one after the other in this process.
        resume: for a list, a file with a line of JSON for each finished row; rows found there are not computed again.
            The key of a row is a hash of item, seed, names, options, functions and batches. A half-written last line,
            left by a killed run, is dropped.

    Returns:
        Name to score; for a list, one such dictionary for each item (and seed, the seeds of an item together), or the
        exception that this row ended with: a failing item costs only itself.

    Raises:
        ValueError: an unknown name, no batch, an argument for lists with a single network, or a ``resume`` that is no
            file of scores; for a single network also what the proxies raise.
        TypeError: for a single network, what the proxies raise.

    Reference: abdelfattah2021zerocost, li2023zico.

    >>> from effnb.nas.nanobench import build_net
    >>> batches = [(torch.randn(8, 1, 14, 14), torch.arange(8)) for _ in range(2)]
    >>> sorted(score_all(build_net("303030"), batches, ["snip", "zico", "naswot"]))
    ['naswot', 'snip', 'zico']
    >>> rows = score_all(["111111", "000100", "bad"], batches, ["count_params"], build=build_net)
    >>> rows[0], type(rows[2]).__name__
    ({'count_params': 1474.0}, 'ValueError')
    """
    scorer = Scorer(as_batches(batches), checked_names(names, options), loss_fn, options or {}, build)
    if isinstance(model, nn.Module):
        if build or run or resume or seeds:
            raise ValueError("build, run, resume and seeds are for a list of networks, got a single one")
        return scorer.score(model, seed)
    tasks = [Task(item, s) for item in model for s in ((seed,) if seeds is None else seeds)]
    return recorded(scorer, tasks, run or serial, resume)


@dataclass(frozen=True)
class Scorer:
    """Scores one item with one seed; can be pickled if its parts can."""

    batches: Sequence[Batch]
    names: Sequence[str]
    loss_fn: Loss = F.cross_entropy
    options: Options = field(default_factory=dict)
    build: Callable[..., nn.Module] | None = None

    def __call__(self, task: Task) -> dict[str, float]:
        """Build the network if need be, and score it."""
        if self.build is None:
            return self.score(task.item, task.seed)
        generator = None if task.seed is None else Generator().manual_seed(task.seed)
        return self.score(self.build(task.item, generator=generator), task.seed)

    def score(self, model: nn.Module, seed: int | None) -> dict[str, float]:
        """Return every named score of one network."""
        check_model(model)
        found, known = self.shared(model, seed), available_proxies()
        return {name: found[name] if name in found else self.alone(known[name], model, seed) for name in self.names}

    def alone(self, proxy: Proxy, model: nn.Module, seed: int | None) -> float:
        """Return the score of a proxy that has passes of its own."""
        data = self.batches if proxy.batches > 1 else self.batches[0]
        return proxy.function(
            model, data, **{"loss_fn": self.loss_fn, "seed": seed, **self.options.get(proxy.name, {})}
        )

    def shared(self, model: nn.Module, seed: int | None) -> dict[str, float]:
        """Return the scores that are read off one backward pass a batch."""
        wanted = [n for n in self.names if n in PASS or (n in ZICO and not self.options.get(n))]
        if not wanted:
            return {}
        codes = "naswot" in self.names
        first = self.step(model, 0, seed, fisher="fisher" in wanted, codes=codes)
        found = {n: getattr(first, n)(**self.options.get(n, {})) for n in wanted if n in PASS}
        found |= {"naswot": first.naswot()} if codes else {}
        variants = {n: ZICO[n] for n in wanted if n in ZICO}
        return found | (self.zico_family(first, variants, seed) if variants else {})

    def step(self, model: nn.Module, index: int, seed: int | None, **collect: bool) -> GradientPass:
        """Run one backward pass."""
        return GradientPass(model, self.batches[index], loss_fn=self.loss_fn, seed=seed, **collect)

    def zico_family(self, first: GradientPass, variants: Mapping[str, str], seed: int | None) -> dict[str, float]:
        """Return ZiCo and its floor from the first pass and one more for each further batch."""
        check_batches(self.batches)
        model, moments = first.model, GradientMoments()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for i in range(len(self.batches)):
            step = self.step(model, i, seed) if i else first
            if not step.reached:
                raise ValueError("model must have a counted layer that receives a gradient, got none")
            moments.update({names[id(step.weights[layer])]: grad for layer, grad in step.grads.items()})
        return {n: math.fsum(per_layer(moments, model, variant=v).values()) for n, v in variants.items()}


def checked_names(names: Sequence[str], options: Options | None) -> list[str]:
    """Return the names as a list; raise for one that is no proxy."""
    names = [names] if isinstance(names, str) else list(names)
    known = available_proxies()
    if unknown := [name for name in [*names, *(options or {})] if name not in known]:
        raise ValueError(f"names must be among {', '.join(known)}; got {', '.join(map(repr, unknown))}")
    if not names:
        raise ValueError("names must hold at least one proxy, got none")
    return names


def as_batches(batches: Any) -> list[Batch]:
    """Return a list of batches; one pair of tensors is a list of one."""
    found = list(batches)
    if len(found) == 2 and all(isinstance(part, Tensor) for part in found):
        found = [tuple(found)]
    if not found:
        raise ValueError("batches must hold at least one pair (inputs, labels), got none")
    return found


def serial(function: Callable[[Task], Any], items: Sequence[Task], on_done: Callable[[int, Any], None]) -> list[Any]:
    """Call ``function`` on one item after the other; an exception stands in the place of its item."""
    outcomes = []
    for index, item in enumerate(items):
        try:
            outcome = function(item)
        except Exception as error:
            outcome = error
        on_done(index, outcome)
        outcomes.append(outcome)
    return outcomes
