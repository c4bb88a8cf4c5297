"""The proxies by name; many of one network in shared passes, many networks through any fan-out; votes of several."""

import functools
import hashlib
import json
import math
import os
import pickle
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from effnb.common import check_choice
from effnb.nas.proxies.activations import linear_regions, naswot, zen_score
from effnb.nas.proxies.gradient import GradientPass, fisher, grad_norm, grasp, jacob_cov, plain, snip, synflow
from effnb.nas.proxies.kernel import grad_sign, knas, ntk_condition
from effnb.nas.proxies.size import count_macs, count_params, l2_norm, nn_mass
from effnb.nas.zico.passes import Batch, Loss, check_batches
from effnb.nas.zico.score import GradientMoments, per_layer, zico, zico_floor

VOTERS = ("synflow", "jacob_cov", "snip")
PASS = ("grad_norm", "snip", "plain", "fisher")
ZICO = {"zico": "code", "zico_floor": "floor"}
FORMAT = "effnb-scores/1"
Options = Mapping[str, Mapping[str, Any]]
Outcome = dict[str, float] | Exception
Run = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Proxy:
    """One proxy: its function, which direction is better, how many batches it needs, and whether it reads labels.

    >>> available_proxies()["zico"].batches
    2
    """

    function: Callable[..., float]
    higher_is_better: bool = True
    batches: int = 1
    labels: bool = False

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.function.__name__


PROXIES = (
    Proxy(count_params),
    Proxy(count_macs),
    Proxy(l2_norm),
    Proxy(grad_norm, labels=True),
    Proxy(snip, labels=True),
    Proxy(plain, labels=True),
    Proxy(grasp, labels=True),
    Proxy(fisher, labels=True),
    Proxy(synflow),
    Proxy(jacob_cov),
    Proxy(naswot),
    Proxy(zen_score),
    Proxy(ntk_condition, higher_is_better=False),
    Proxy(linear_regions),
    Proxy(grad_sign, labels=True),
    Proxy(knas),
    Proxy(nn_mass),
    Proxy(zico, batches=2, labels=True),
    Proxy(zico_floor, batches=2, labels=True),
)


def available_proxies() -> dict[str, Proxy]:
    """Return all proxies by name; scores are as they are, without absolute values.

    Every function is called as ``function(model, batch, loss_fn=..., seed=...)``, with a list of batches in the place
    of the batch where ``batches`` is 2.

    >>> [name for name, proxy in available_proxies().items() if not proxy.higher_is_better]
    ['ntk_condition']
    """
    return {proxy.name: proxy for proxy in PROXIES}


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

    A list is scored item by item, here or wherever ``run`` takes it: processes of this machine, a cluster. What is sent
    there must be picklable: items, ``build``, ``loss_fn``, batches.

    Args:
        model: a network, or a list of items: networks, or descriptions that ``build`` turns into networks.
        batches: pairs ``(x, y)``, or one pair; all are used by `zico` and `zico_floor`, the first by the others.
        names: proxies, see `available_proxies`.
        loss_fn: mean loss of a batch.
        options: keyword arguments of single proxies, as in ``{"zen_score": {"repeats": 32}}``; such a proxy shares no
            pass, but `fisher`.
        seed: given to every proxy, and to ``build``.
        seeds: for a list, one row for each item and each of these seeds, instead of ``seed``.
        build: for a list, called as ``build(item, generator=generator)``, with a stream of the row's seed.
        run: for a list, called as ``run(function, items, on_done=callback)``. It returns ``function(item)`` of every
            item in order, an exception in the place of one that failed, and calls ``callback(index, outcome)`` in this
            process as each is done. Default: one after the other.
        resume: for a list, a file with a line of JSON for each finished row; rows found there are not computed again.
            The key of a row is a hash of item, seed, names, options, functions and batches. A half-written last line,
            left by a killed run, is dropped.

    Returns:
        Name to score; for a list, one such dictionary for each item (and seed, the seeds of an item together), or the
        exception that this row ended with: a failing item costs only itself.

    Raises:
        ValueError: an unknown name, no batch, an argument for lists with a single network, or a ``resume`` that is no
            file of scores; for a single network also what the proxies raise, as TypeError.

    >>> from effnb.nas.nanobench import build_net
    >>> batches = [(torch.randn(8, 1, 14, 14), torch.arange(8)) for _ in range(2)]
    >>> sorted(score_all(build_net("303030"), batches, ["snip", "zico", "naswot"]))
    ['naswot', 'snip', 'zico']
    >>> rows = score_all(["111111", "000100", "bad"], batches, ["count_params"], build=build_net)
    >>> rows[0], type(rows[2]).__name__
    ({'count_params': 1474.0}, 'ValueError')
    """
    batches, names, known = list(batches), [names] if isinstance(names, str) else list(names), available_proxies()
    if len(batches) == 2 and all(isinstance(part, Tensor) for part in batches):
        batches = [tuple(batches)]
    if not batches:
        raise ValueError("batches must hold at least one pair (inputs, labels), got none")
    if unknown := [name for name in [*names, *(options or {})] if name not in known]:
        raise ValueError(f"names must be among {', '.join(known)}; got {', '.join(map(repr, unknown))}")
    if not names:
        raise ValueError("names must hold at least one proxy, got none")
    scorer = Scorer(batches, names, loss_fn, options or {}, build)
    if isinstance(model, nn.Module):
        if build or run or resume or seeds:
            raise ValueError("build, run, resume and seeds are for a list of networks, got a single one")
        return scorer(Task(model, seed))
    tasks = [Task(item, s) for item in model for s in ((seed,) if seeds is None else seeds)]
    return recorded(scorer, tasks, run or serial, resume)


class Task(NamedTuple):
    """One row: an item and its seed."""

    item: Any
    seed: int | None


@dataclass(frozen=True)
class Scorer:
    """Scores one item with one seed; can be pickled if its parts can."""

    batches: Sequence[Batch]
    names: Sequence[str]
    loss_fn: Loss
    options: Options
    build: Callable[..., nn.Module] | None

    def __call__(self, task: Task) -> dict[str, float]:
        """Return every named score of a network, which is built first if need be."""
        model, seed = task
        if self.build is not None:
            model = self.build(model, generator=None if seed is None else Generator().manual_seed(seed))
        common = {"loss_fn": self.loss_fn, "seed": seed}
        own = {name: self.options.get(name, {}) for name in self.names}
        # Options of its own may be another loss, seed or variant; only `broadcast` of `fisher` is read off afterwards.
        read = [n for n in self.names if n in PASS and not own[n].keys() - {"broadcast"}]
        variants = {n: ZICO[n] for n in self.names if n in ZICO and not own[n]}
        codes = "naswot" in self.names and not own["naswot"]
        found: dict[str, float] = {}
        if read or variants:
            first = GradientPass(model, self.batches[0], **common, fisher="fisher" in read, codes=codes)
            found |= {name: getattr(first, name)(**own[name]) for name in read}
            found |= {"naswot": first.naswot()} if codes else {}
        if variants:
            # Tied layers: the moments are by parameter, as in `gradient_moments`, the pass has the first of the layers.
            moments, names = GradientMoments(), {id(p): name for name, p in model.named_parameters()}
            for i, batch in enumerate(check_batches(self.batches)):
                step = GradientPass(model, batch, **common) if i else first
                if not step.reached:
                    raise ValueError("model must have a counted layer that receives a gradient, got none")
                moments.update({names[id(step.weights[layer])]: grad for layer, grad in step.grads.items()})
            found |= {n: math.fsum(per_layer(moments, model, variant=v).values()) for n, v in variants.items()}
        known = available_proxies()
        for name in self.names:
            if name not in found:
                data = self.batches if known[name].batches > 1 else self.batches[0]
                found[name] = known[name].function(model, data, **common | own[name])
        return {name: found[name] for name in self.names}


def serial(function: Callable[[Task], Any], items: Sequence[Task], on_done: Callable[[int, Any], None]) -> list[Any]:
    """Call ``function`` on one item after the other; an exception stands in the place of its item."""
    outcomes = []
    for index, item in enumerate(items):
        try:
            outcomes.append(function(item))
        except Exception as error:
            outcomes.append(error)
        on_done(index, outcomes[-1])
    return outcomes


def recorded(scorer: Scorer, tasks: list[Task], run: Run, path: str | Path | None) -> list[Outcome]:
    """Return the outcome of every task by ``run``; what the file at ``path`` holds is not run again.

    The file has one line of JSON a finished row. A change of any field of ``scorer`` makes every row a new one.
    """
    if path is None:
        return list(run(scorer, tasks, on_done=lambda index, outcome: None))
    salt, found = fingerprint((FORMAT, sorted(vars(scorer).items()))), {}
    keys = [fingerprint((salt, *task)) for task in tasks]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a+b") as file:
        file.seek(0)
        text = file.read()
        # A run that was killed while it wrote leaves a line without an end.
        whole = text[: text.rfind(b"\n") + 1]
        file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                found[record["key"]] = {name: float(value) for name, value in record["scores"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"resume must be a file of scores, line {number} of {path} is not one") from error
        missing = [i for i, key in enumerate(keys) if key not in found]

        def on_done(index: int, outcome: Any) -> None:
            # An exception is not written down: the next run tries again.
            if isinstance(outcome, BaseException):
                return
            item, seed = tasks[missing[index]]
            item = item if isinstance(item, str | int) else type(item).__name__
            # JSON has no infinity; as text it is read back by `float`.
            values = {name: value if math.isfinite(value) else str(value) for name, value in outcome.items()}
            line = json.dumps({"key": keys[missing[index]], "item": item, "seed": seed, "scores": values})
            file.write(line.encode() + b"\n")
            # On the disk before the next row begins.
            file.flush()
            os.fsync(file.fileno())

        outcomes: list[Outcome] = [found.get(key) for key in keys]
        fresh = run(scorer, [tasks[i] for i in missing], on_done=on_done) if missing else []
    for i, outcome in zip(missing, fresh, strict=True):
        outcomes[i] = outcome
    return outcomes


def fingerprint(value: Any) -> str:
    """Return a hash of a value's content: the same for equal values in another process.

    Networks are hashed by printed form and state, functions by name and code.

    >>> fingerprint(("303030", 0)) == fingerprint(("303030", 0)) != fingerprint(("303030", 1))
    True
    """
    digest = hashlib.sha256()
    for part in parts(value):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def parts(value: Any) -> Iterator[bytes]:
    """Yield bytes that tell a value from others, its own parts in a fixed order."""
    # The type too: 1, 1.0 and True are equal, and so are their hashes.
    yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
    if isinstance(value, str | bytes | int | float | None):
        yield repr(value).encode()
        return
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        yield f"{data.dtype} {tuple(data.shape)}".encode()
        yield data.reshape(-1).view(torch.uint8).numpy().tobytes()
        return
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype} {value.shape}".encode()
        yield value.tobytes()
        return
    if isinstance(value, list | tuple):
        pieces = list(value)
    elif isinstance(value, Mapping):
        pieces = sorted(value.items(), key=lambda pair: repr(pair[0]))
    elif isinstance(value, set | frozenset):
        pieces = sorted(map(fingerprint, value))
    elif isinstance(value, nn.Module):
        # The printed form tells apart what has no state, as a ReLU and a tanh.
        pieces = [repr(value), dict(value.state_dict())]
    elif isinstance(value, functools.partial):
        pieces = [value.func, value.args, value.keywords]
    elif isinstance(value, types.FunctionType):
        pieces = [value.__module__, value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, types.CodeType):
        # Not the whole code: file names and line numbers differ between checkouts.
        pieces = [value.co_code, value.co_names, value.co_consts]
    else:
        yield pickle.dumps(value)
        return
    yield str(len(pieces)).encode()
    for piece in pieces:
        yield from parts(piece)


def vote(
    models: Iterable[nn.Module],
    batch: Any,
    *,
    names: Sequence[str] = VOTERS,
    method: str = "rank",
    loss_fn: Loss = F.cross_entropy,
    seed: int | None = 0,
) -> list[float]:
    """Return one score a network from the ranks that several proxies give it among the others; higher is better.

    Args:
        models: networks; they stay as they were.
        batch, loss_fn, seed: as for `GradientPass`.
        names: proxies that need one batch.
        method: ``"rank"`` or ``"majority"``, see `rank_average`.

    Returns:
        One number a network; it means something within this list only.

    Raises:
        ValueError, TypeError: what `score_all` and `rank_average` raise.

    Reference: abdelfattah2021zerocost.

    >>> from effnb.nas.nanobench import build_net
    >>> vote(map(build_net, ("000100", "333333")), torch.zeros(2, 1, 14, 14), names=["count_params", "count_macs"])
    [1.0, 2.0]
    """
    scores = [score_all(model, [batch], names, loss_fn=loss_fn, seed=seed) for model in models]
    return rank_average({name: [row[name] for row in scores] for name in names}, method=method)


def rank_average(scores: Mapping[str, Sequence[float]], *, method: str = "rank") -> list[float]:
    """Return the `vote` from scores that are known already; higher is better.

    Args:
        scores: name of a proxy to its scores, one a network; those of `ntk_condition` are turned round, unknown names
            count as higher is better. Infinite scores are ranked last or first.
        method: ``"rank"`` averages ranks, 1 for the worst, ties shared; ``"majority"`` counts the networks that most
            proxies place below, a tie half.

    Raises:
        ValueError: an unknown ``method``, no scores, lists of different lengths, or a score that is NaN.

    >>> rank_average({"snip": [1.0, 2.0, 3.0], "ntk_condition": [9.0, 2.0, 4.0]})
    [1.0, 2.5, 2.5]
    """
    check_choice("method", method, ("rank", "majority"))
    if not scores or len({len(column) for column in scores.values()}) != 1 or not all(map(len, scores.values())):
        lengths = {name: len(column) for name, column in scores.items()}
        raise ValueError(f"scores must hold one value a network for at least one proxy, got {lengths}")
    known, rows = available_proxies(), []
    for name, column in scores.items():
        values = np.asarray(column, float)
        if np.isnan(values).any():
            raise ValueError(f"scores must not be NaN, {name} is for network {int(np.isnan(values).argmax())}")
        rows.append(rankdata(-values if name in known and not known[name].higher_is_better else values))
    ranks = np.array(rows)
    if method == "rank":
        return ranks.mean(0).tolist()
    # 1 where most proxies place the row's network above the column's, 0 for a draw, also with itself.
    majority = np.sign(np.sign(ranks[:, :, None] - ranks[:, None, :]).sum(0))
    return ((majority + 1).sum(1) / 2 - 0.5).tolist()
