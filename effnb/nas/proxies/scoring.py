"""Many proxies of one network in shared passes, and of many networks through any fan-out."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..zico import GradientMoments
from ..zico.passes import check_batches
from ..zico.score import per_layer
from .common import Loss
from .gradient import GradientPass
from .journal import Journal, fingerprint
from .registry import available_proxies

PASS = ("grad_norm", "snip", "plain", "fisher")
ZICO = {"zico": "code", "zico_floor": "floor"}
Options = Mapping[str, Mapping[str, Any]]


def score_all(
    model: nn.Module | Iterable[Any],
    batches: Sequence[tuple[Tensor, Tensor]],
    names: Sequence[str],
    *,
    loss_fn: Loss = F.cross_entropy,
    options: Options | None = None,
    seed: int | None = 0,
    seeds: Sequence[int] | None = None,
    build: Callable[..., nn.Module] | None = None,
    run: Callable[..., list[Any]] | None = None,
    resume: str | Path | None = None,
) -> Any:
    names, batches = checked_names(names, options or {}), as_batches(batches)
    scorer = Scorer(batches, names, loss_fn, options or {}, build)
    if isinstance(model, nn.Module):
        if build or run or resume or seeds:
            raise ValueError("build, run, resume and seeds are for a list of networks; got one network")
        return scorer.score(model, seed)
    tasks = [(item, s) for item in model for s in ((seed,) if seeds is None else seeds)]
    return scored(scorer, tasks, run or serial, resume)


@dataclass(frozen=True)
class Scorer:
    """Scores one ``(item, seed)``; can be pickled if its parts can."""

    batches: Sequence[tuple[Tensor, Tensor]]
    names: Sequence[str]
    loss_fn: Loss
    options: Options
    build: Callable[..., nn.Module] | None

    def __call__(self, task: tuple[Any, int | None]) -> dict[str, float]:
        item, seed = task
        if self.build is None:
            return self.score(item, seed)
        generator = Generator().manual_seed(seed) if seed is not None else None
        return self.score(self.build(item, generator=generator), seed)

    def score(self, model: nn.Module, seed: int | None) -> dict[str, float]:
        """Return every named score of one network."""
        shared = self.shared(model, seed)
        proxies = available_proxies()
        return {name: shared[name] if name in shared else self.alone(proxies[name], model, seed) for name in self.names}

    def alone(self, proxy: Any, model: nn.Module, seed: int | None) -> float:
        """Return the score of a proxy that has passes of its own."""
        data = self.batches if proxy.batches > 1 else self.batches[0]
        own = dict(self.options.get(proxy.name, {}))
        return proxy.function(model, data, **({"loss_fn": self.loss_fn, "seed": seed} | own))

    def shared(self, model: nn.Module, seed: int | None) -> dict[str, float]:
        """Return the scores that are read off one backward pass a batch."""
        wanted = [n for n in self.names if n in (*PASS, *ZICO) and not (n in ZICO and self.options.get(n))]
        if not wanted:
            return {}
        codes = "naswot" in self.names and "naswot" not in self.options
        first = GradientPass(
            model, self.batches[0], loss_fn=self.loss_fn, seed=seed, fisher="fisher" in wanted, codes=codes
        )
        found = {n: getattr(first, n)(**self.options.get(n, {})) for n in wanted if n in PASS}
        found |= {"naswot": first.naswot()} if codes else {}
        variants = {n: ZICO[n] for n in wanted if n in ZICO}
        return found | (self.zico_family(first, variants, seed) if variants else {})

    def zico_family(self, first: GradientPass, variants: Mapping[str, str], seed: int | None) -> dict[str, float]:
        """Return ZiCo and its floor from the first pass and one more for each further batch."""
        model, moments = first.model, GradientMoments()
        check_batches(self.batches)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for i, batch in enumerate(self.batches):
            step = first if i == 0 else GradientPass(model, batch, loss_fn=self.loss_fn, seed=seed)
            moments.update({names[id(step.weights[layer])]: grad for layer, grad in step.grads.items()})
        found = {n: per_layer(moments, model, variant=v) for n, v in variants.items()}
        return {name: math.fsum(terms.values()) for name, terms in found.items()}


def checked_names(names: Sequence[str], options: Options) -> list[str]:
    """Return the names as a list; raise for one that is no proxy."""
    names = [names] if isinstance(names, str) else list(names)
    known = available_proxies()
    if unknown := [name for name in [*names, *options] if name not in known]:
        raise ValueError(f"names must be among {', '.join(known)}; got {', '.join(map(repr, unknown))}")
    if not names:
        raise ValueError("names must hold at least one proxy, got none")
    return names


def as_batches(batches: Any) -> list[tuple[Tensor, Tensor]]:
    """Return a list of batches; one pair of tensors is a list of one."""
    found = list(batches)
    if len(found) == 2 and isinstance(found[0], Tensor):
        found = [tuple(found)]
    if not found:
        raise ValueError("batches must hold at least one pair (inputs, labels), got none")
    return found


def serial(function: Callable[[Any], Any], items: Sequence[Any], on_done: Callable[[int, Any], None]) -> list[Any]:
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


def scored(scorer: Scorer, tasks: list[Any], run: Callable[..., list[Any]], resume: str | Path | None) -> list[Any]:
    """Return the outcome of every task; those in the journal are not run again."""
    if resume is None:
        return run(scorer, tasks, on_done=lambda index, outcome: None)
    salt = fingerprint((scorer.batches, sorted(scorer.names), scorer.loss_fn, scorer.options, scorer.build))
    keys = [fingerprint((salt, task)) for task in tasks]
    with Journal(resume) as journal:
        missing = [i for i, key in enumerate(keys) if key not in journal.found]

        def done(index: int, outcome: Any) -> None:
            if not isinstance(outcome, BaseException):
                journal.add(keys[missing[index]], tasks[missing[index]], outcome)

        outcomes = dict(zip(missing, run(scorer, [tasks[i] for i in missing], on_done=done), strict=True))
        stored = {i: {name: journal.found[key][name] for name in scorer.names} for i, key in enumerate(keys) if i not in outcomes}
    return [outcomes[i] if i in outcomes else stored[i] for i in range(len(tasks))]
