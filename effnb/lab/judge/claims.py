"""What each chapter promises (``book/claims/<system>.yaml``) and how a promise is judged, once and by code.

The typed models here are the schema: of the registry, and (with :mod:`effnb.lab.judge.results`) of a result.
"""

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass as typed_dataclass

from effnb.lab.judge import stats
from effnb.lab.paths import digest, root

OPS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
UNIT_NAMES = {"points": "pt"}  # one spelling in tables, whatever a claims file registered
#: From the best to the worst; a run whose verdict moves to the right has got worse.
VERDICTS = ("checked-analytically", "reproduced", "partially", "not-reproduced-at-this-scale", "not-tested", "smoke")
EXACT, REPRODUCED, PARTIALLY, NOT_REPRODUCED, UNTESTED, SMOKE = VERDICTS
PASSED = (EXACT, REPRODUCED)
Verdict = Literal[VERDICTS]
Text = Annotated[str, Field(min_length=1)]
# The first edition's words for three intervals; claims files of older revisions are still read.
_OLD_WORDS = {"paired-t": "t", "paired-t-log": "t-log", "order-statistic": "order"}
IntervalName = Annotated[
    Literal["t", "t-log", "t-items", "order", "binomial", "bootstrap-units", "none"],
    BeforeValidator(lambda word: _OLD_WORDS.get(word, word) if isinstance(word, str) else word),
]


@typed_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Criterion:
    """One registered, machine-evaluable condition on measured values.

    Args:
        metric: what is measured, in words.
        op: ``>``, ``>=``, ``<``, ``<=`` or ``within`` (the value lies within ``margin`` of ``threshold``).
        threshold: the bound, in ``unit``.
        unit: unit of metric and threshold.
        margin: half-width of the equivalence region, > 0, for ``within`` only.
        against: name of the rival; then the value is the paired difference (or ratio, see ``interval``).
        interval: ``t`` (seeds), ``t-log`` (geometric mean, ratios), ``t-items`` (seeds and shared test items),
            ``order`` (median of ratios of times), ``binomial`` (counts), ``bootstrap-units`` (architectures, supernets,
            graphs; two-way with seeds), ``none`` (exact statements).
        statistic: over units, for ``bootstrap-units``: ``mean``, ``spearman`` or ``kendall`` (with a target).
        seeds_fraction: share of the seeds that must satisfy the criterion one by one.
        level: level of the two-sided interval; ``within`` uses ``1 - 2 (1 - level)``, two one-sided tests.
        name: short name, for conditions and preconditions of a claim.

    Raises:
        ValueError: an unknown ``op`` or ``interval``, a missing margin, a non-finite threshold, or a fraction or
            level out of range.

    >>> Criterion("gain", ">", 0.0).holds(0.3)
    True
    """

    metric: Text
    op: Literal[">", ">=", "<", "<=", "within"]
    threshold: float
    unit: str = ""
    margin: float | None = None
    against: str | None = None
    interval: IntervalName = "t"
    statistic: Literal[stats.STATISTICS] = "mean"
    seeds_fraction: Annotated[float, Field(ge=0, le=1)] = 0.8
    level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    name: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite, got {self.threshold}")
        if (self.op == "within") != (self.margin is not None and self.margin > 0):
            raise ValueError(f"margin must be > 0 for op 'within' and absent otherwise, got {self.margin}")

    def holds(self, value: float) -> bool:
        """Return whether one value satisfies the criterion."""
        if self.op == "within":
            return abs(value - self.threshold) <= self.margin
        return bool(OPS[self.op](value, self.threshold))

    def bound(self) -> str:
        """Return what is asked of the value, with its unit."""
        sign = f"within {self.margin:g} of" if self.op == "within" else self.op.replace(">=", "≥").replace("<=", "≤")
        return f"{sign} {self.threshold:g} {UNIT_NAMES.get(self.unit, self.unit)}".strip()

    def text(self) -> str:
        """Return the criterion in one line; what it is against is added unless the metric's name has it."""
        against = self.against if self.against and self.against not in self.metric else ""
        word = "over" if self.interval == "t-log" else "minus"
        return f"{self.metric}{f' {word} {against}' if against else ''} {self.bound()}"


@dataclass(frozen=True)
class Sample:
    """What was measured for one criterion; all that judging it again needs.

    Args:
        per_seed: one value a seed.
        baseline: values of the same seeds for the criterion's ``against``.
        rivals: name of the rival that was chosen for each seed (on validation data), where it is not one for all.
        items: ``(d, m)`` for ``t-items``, see :func:`effnb.lab.judge.stats.item_variance`.
        counts: ``(successes, trials)`` of each seed, for ``binomial``; ``per_seed`` holds their ratios.
        units: ``(seeds, units)`` for ``bootstrap-units``; ``per_seed`` holds the statistic of each seed.
        baseline_units: the rival's.
        target: ``(units,)``, what rank correlations are taken with.
    """

    per_seed: Sequence[float]
    baseline: Sequence[float] | None = None
    rivals: Sequence[str] | None = None
    items: tuple[float, int] | None = None
    counts: Sequence[tuple[int, int]] | None = None
    units: Any = None
    baseline_units: Any = None
    target: Any = None

    @classmethod
    def of(cls, values: "Sample | Sequence[float] | tuple[Sequence[float], Sequence[float]]") -> "Sample":
        """Return a sample as it is, values as one, and a pair ``(values, baseline)`` as one with a baseline."""
        if isinstance(values, Sample):
            return values
        return cls(*values) if isinstance(values, tuple) else cls(values)

    @classmethod
    def of_items(cls, ours: Any, theirs: Any = None, rivals: Sequence[str] | None = None) -> "Sample":
        """Return the sample of per-item values ``(seeds, items)``, such as 100 for a hit and 0 for a miss.

        >>> Sample.of_items([[100, 0, 100, 100]]).per_seed
        [75.0]
        """
        per_seed, baseline, d, m = stats.item_variance(ours, theirs)
        return cls(per_seed, baseline, rivals, items=(d, m))

    @classmethod
    def of_counts(cls, counts: Sequence[tuple[int, int]]) -> "Sample":
        """Return the sample of ``(successes, trials)``, one pair a seed.

        >>> Sample.of_counts([(3, 4)]).per_seed
        [0.75]
        """
        return cls([k / n for k, n in counts], counts=[(int(k), int(n)) for k, n in counts])

    @classmethod
    def of_units(
        cls, ours: Any, theirs: Any = None, target: Any = None, statistic: str = "mean", rivals: Any = None
    ) -> "Sample":
        """Return the sample of values ``(seeds, units)``; ``target`` is ``(units,)`` for rank correlations."""
        # Single precision is what is stored, so it is what is judged.
        given = (None if x is None else np.asarray(x, np.float32).astype(np.float64) for x in (ours, theirs, target))
        ours, theirs, target = given
        sides = (None if x is None else stats.unit_statistic(x, target, statistic).tolist() for x in (ours, theirs))
        return cls(*sides, rivals, units=ours, baseline_units=theirs, target=target)


@dataclass(frozen=True)
class Judgement:
    """A sample's summary and what a criterion makes of it."""

    criterion: Criterion
    sample: Sample
    estimate: float
    ci: list[float] | None
    verdict: str
    contradicted: bool
    reason: str

    @property
    def method(self) -> str:
        """How the interval was made; ``none`` where there is none."""
        return self.criterion.interval if self.ci else "none"

    def measured(self) -> dict:
        """Return the block of a result entry; matrices of units stand in a file beside it."""
        sample = self.sample
        found = {"estimate": self.estimate, "ci": self.ci, "ci_method": self.method}
        found["per_seed"] = [float(v) for v in sample.per_seed]
        found["baseline_per_seed"] = None if sample.baseline is None else [float(v) for v in sample.baseline]
        found["unit"] = self.criterion.unit
        further = {"rivals": sample.rivals, "items": sample.items, "counts": sample.counts}
        return found | {key: list(values) for key, values in further.items() if values is not None}


def _values(criterion: Criterion, sample: Sample) -> list[float]:
    """Return the paired differences (ratios for ``t-log``), one a seed; raise unless the sample fits the criterion."""
    ours, theirs = list(sample.per_seed), None if sample.baseline is None else list(sample.baseline)
    if (criterion.against is None) != (theirs is None):
        rule = "baseline must be given exactly when the criterion names `against`"
        raise ValueError(f"{rule}, got against={criterion.against!r}")
    if not ours:
        raise ValueError("per_seed must hold at least one value, got none")
    for name, values in (("baseline", theirs), ("rivals", sample.rivals), ("counts", sample.counts)):
        if values is not None and len(values) != len(ours):
            raise ValueError(f"{name} must have the length of per_seed {len(ours)}, got {len(values)}")
    for name, values in (("per_seed", ours), ("baseline", theirs or ())):
        if not all(math.isfinite(v) for v in values):
            raise ValueError(f"{name} must be finite, got {list(values)}")
    for interval, field in (("t-items", "items"), ("binomial", "counts"), ("bootstrap-units", "units")):
        if (criterion.interval == interval) != (getattr(sample, field) is not None):
            raise ValueError(f"{field} must be given exactly for interval {interval!r}, got {criterion.interval!r}")
    ratio = criterion.interval == "t-log"
    if ratio and min(*ours, *(theirs or [1.0]), 1.0) <= 0:
        raise ValueError(f"per_seed and baseline must be positive for ratios, got {ours}, {theirs}")
    pairs = zip(ours, theirs or [1.0 if ratio else 0.0] * len(ours), strict=True)
    return [a / b if ratio else a - b for a, b in pairs]


def _interval(criterion: Criterion, values: list[float], sample: Sample, level: float) -> tuple[float, list | None]:
    """Return the estimate and its interval; None where a single run gives none."""
    if criterion.interval == "binomial":
        found = stats.binomial_interval(*map(sum, zip(*sample.counts, strict=True)), level)
    elif criterion.interval == "bootstrap-units":
        found = stats.units_interval(sample.units, sample.baseline_units, sample.target, criterion.statistic, level)
    elif criterion.interval == "none" or len(values) < 2:
        return math.fsum(values) / len(values), None
    elif criterion.interval == "order":
        found = stats.order_statistic_interval(values, level)
    elif criterion.interval == "t-items":
        found = stats.items_interval(values, None, *sample.items, level)
    else:
        found = stats.paired_t_interval(values, level=level, log=criterion.interval == "t-log")
    return found.estimate, [found.lo, found.hi]


def evaluate(
    criterion: Criterion,
    sample: Sample | Sequence[float],
    baseline: Sequence[float] | None = None,
    level: float | None = None,
) -> Judgement:
    """Judge measured values by a registered criterion.

    ``reproduced`` needs three things: the point estimate, the whole interval, and ``ceil(seeds_fraction n)`` single
    seeds on the right side. ``partially``: the estimate only. Otherwise ``not-reproduced-at-this-scale``, with
    ``contradicted`` if the whole interval is on the wrong side. ``interval="none"`` (exact statements) gives
    ``checked-analytically`` if every value holds.

    Args:
        criterion: what was registered.
        sample: one value a seed, or a :class:`Sample`.
        baseline: values of the same seeds for ``criterion.against``, where ``sample`` is plain values.
        level: instead of the criterion's, for a family of claims.

    Raises:
        ValueError: the sample does not fit the criterion, is not finite, or ratios are of non-positive values.

    >>> evaluate(Criterion("gain", ">", 0.0), [1.0, 1.2, 0.9]).verdict
    'reproduced'
    """
    sample = Sample.of(sample if baseline is None else (sample, baseline))
    values = _values(criterion, sample)
    level = criterion.level if level is None else level
    level = 1 - 2 * (1 - level) if criterion.op == "within" else level
    estimate, ci = _interval(criterion, values, sample, level)
    held, needed = sum(map(criterion.holds, values)), math.ceil(criterion.seeds_fraction * len(values))
    contradicted, reason = False, ""
    if criterion.interval == "none":
        verdict, contradicted = (EXACT, False) if held == len(values) else (NOT_REPRODUCED, True)
        reason = f"holds in {held} of {len(values)} cases" if contradicted else ""
    elif ci is None:
        verdict, reason = PARTIALLY if criterion.holds(estimate) else NOT_REPRODUCED, "one run gives no interval"
    elif not criterion.holds(estimate):
        verdict, reason = NOT_REPRODUCED, "the estimate lies on the wrong side"
        contradicted = not any(map(criterion.holds, ci)) and not (ci[0] < criterion.threshold < ci[1])
    elif not all(map(criterion.holds, ci)):
        verdict, reason = PARTIALLY, "the interval reaches the wrong side"
    elif criterion.interval != "binomial" and held < needed:  # counts are one sample, whatever seed they come from
        verdict, reason = PARTIALLY, f"holds in {held} of {len(values)} seeds, {needed} needed"
    else:
        verdict = REPRODUCED
    return Judgement(criterion, sample, estimate, ci, verdict, contradicted, reason)


def combine(
    main: Judgement, conditions: Mapping[str, Judgement], preconditions: Mapping[str, Judgement] | None = None
) -> tuple[str, bool, str]:
    """Return a claim's ``(verdict, contradicted, reason)`` from its criterion, conditions and preconditions.

    A precondition that is not met makes the claim ``not-tested``: the experiment could not have told the difference. A
    failed or straddling condition turns ``reproduced`` into ``partially``. Both are named in the reason.

    >>> good = evaluate(Criterion("gain", ">", 0.0), [1.0, 1.2, 0.9])
    >>> combine(good, {"seen": evaluate(Criterion("loss", "<", 0.0), [1.0, 1.2, 0.9])})[0]
    'partially'
    """

    def failures(found: Mapping[str, Judgement]) -> list[str]:
        return [f"{name} ({j.estimate:.2g}): {j.reason}" for name, j in found.items() if j.verdict not in PASSED]

    if unmet := failures(preconditions or {}):
        return UNTESTED, False, f"precondition not met: {'; '.join(unmet)}"
    failed = failures(conditions)
    lowered = failed and main.verdict in PASSED
    reason = "; ".join(filter(None, [main.reason, *failed]))
    return PARTIALLY if lowered else main.verdict, main.contradicted, reason


def holm(family: Mapping[str, Callable[[float], bool]], level: float = 0.95) -> set[str]:
    """Return the members of a family of claims that hold under Holm's correction at the family's ``level``.

    Holm's step-down in terms of intervals: with k members left, those whose interval of level ``1 - (1 - level) / k``
    excludes the threshold hold and leave; again, until none leaves. The family's error stays below ``1 - level``.
    ``family`` maps a name to a function that tells whether the claim holds at a level.

    Reference: holm1979simple.

    >>> sorted(holm({"a": lambda level: level < 0.99, "b": lambda level: level < 0.96, "c": lambda level: False}))
    ['a']
    """
    left, held = dict(family), set()
    while left and (now := {name for name, holds in left.items() if holds(1 - (1 - level) / len(left))}):
        held |= now
        left = {name: holds for name, holds in left.items() if name not in now}
    return held


def is_worse(new: str, old: str) -> bool:
    """Return whether verdict ``new`` stands behind ``old`` in :data:`VERDICTS`.

    >>> is_worse("partially", "reproduced")
    True
    """
    return VERDICTS.index(new) > VERDICTS.index(old)


# --- the registry ------------------------------------------------------------------------------------------------


class Record(BaseModel):
    """Base of all stored records: nothing that is not declared, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(Record):
    """Where a paper states a claim."""

    key: Text
    locator: Text
    arxiv: str | None = None
    code: str | None = None


class PaperValue(Record):
    """A figure as the paper prints it."""

    value: float | str
    unit: str
    metric: str
    dataset: str | None = None
    model: str | None = None
    baseline_value: float | str | None = None
    paper_unit: str | None = None


class Unreachable(Record):
    """Why the paper's own comparator can't be reached here; the claim is then not tested as stated."""

    reason: Text


#: Fields that fix what was promised; a change of any of them needs a new claim.
REGISTERED = [
    "id", "primary", "kind", "statement", "source", "paper_value", "paper", "criterion", "conditions", "preconditions",
    "as_stated", "family",
]  # fmt: skip


class Claim(Record):
    """One registered claim."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9-]+/[A-Z]{1,4}[0-9]+$")]
    primary: bool = False
    kind: Literal["direction", "threshold", "equivalence", "exact", "ranking", "cost"]
    statement: Text
    source: Source
    paper_value: PaperValue | None
    paper_value_reason: Text | None = None
    paper: Text
    criterion: Criterion
    conditions: list[Criterion] = []
    preconditions: list[Criterion] = []
    as_stated: Literal["same"] | Criterion | Unreachable | None = None
    family: Text | None = None
    expected_at_paper_scale: Text
    anchor: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    registered: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]
    supersedes: Text | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Claim":
        if self.paper_value is None and not self.paper_value_reason:
            raise ValueError("paper_value_reason must say why there is no paper_value")
        if (self.kind == "exact") != (self.criterion.interval == "none"):
            raise ValueError("kind exact and interval none belong together")
        comparative = self.kind in ("direction", "threshold", "equivalence", "ranking") and self.criterion.against
        if comparative and self.as_stated is None:
            raise ValueError("as_stated must be given for a comparative claim: same, a criterion, or a reason")
        names = [c.name for c in (*self.conditions, *self.preconditions)]
        if "" in names or len(set(names)) < len(names):
            raise ValueError(f"conditions and preconditions must have names that differ, got {names}")
        return self

    @property
    def registered_hash(self) -> str:
        """Digest of all that fixes the promise, see :data:`REGISTERED`."""
        return digest(self.model_dump(mode="json", include=set(REGISTERED)))

    @property
    def timed(self) -> bool:
        """Whether a ratio of times decides, which other work on the machine can move."""
        return self.kind == "cost" and self.criterion.interval == "order"

    @property
    def short(self) -> str:
        """The id without its system, ``A1``."""
        return self.id.split("/")[1]


class ClaimSet(Record):
    """All claims of one chapter, in the order of the file."""

    schema_: Literal["effnb-claims/1"] = Field(alias="schema")
    system: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    title: Text
    method: Text
    claims: Annotated[list[Claim], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> "ClaimSet":
        ids, prefix = [claim.id for claim in self.claims], self.system.replace("_", "-") + "/"
        if len(set(ids)) < len(ids) or not all(i.startswith(prefix) for i in ids):
            raise ValueError(f"ids must be unique and start with {prefix!r}, got {ids}")
        if (primary := sum(claim.primary for claim in self.claims)) != 1:
            raise ValueError(f"exactly one claim must be primary, got {primary}")
        return self

    def __getitem__(self, claim_id: str) -> Claim:
        for claim in self.claims:
            if claim_id in (claim.id, claim.short):
                return claim
        raise KeyError(f"{self.system} has no claim {claim_id!r}; it has {[c.short for c in self.claims]}")


def validated(model: Any, content: Any, where: str) -> Any:
    """Return ``content`` as a ``model``; a ValueError is one line that names the file, the field and the rule.

    >>> validated(ClaimSet, {}, "demo.yaml")
    Traceback (most recent call last):
    ...
    ValueError: demo.yaml: schema: Field required
    """
    try:
        # By JSON, whose strict mode takes mappings for dataclasses; YAML's dates become text.
        return TypeAdapter(model).validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "(top)"
        raise ValueError(f"{where}: {field}: {first['msg'].removeprefix('Value error, ')}") from None


def parse(text: str, where: str) -> ClaimSet:
    """Return the claims of one file; a ValueError names it as ``where``: no valid YAML, or against the models' rules.

    >>> parse("schema: 1", "demo.yaml")
    Traceback (most recent call last):
    ...
    ValueError: demo.yaml: ...
    """
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {error}") from None
    return validated(ClaimSet, record, where)


def systems() -> list[str]:
    """Return the names of all systems that have a claims file, in alphabetical order.

    >>> systems() == sorted(systems())
    True
    """
    return sorted(path.stem for path in (root() / "book" / "claims").glob("*.yaml"))


def load(system: str) -> ClaimSet:
    """Return the claims of one system, from ``book/claims/<system>.yaml``; errors of :func:`parse`, or no such file.

    >>> load("no_such_system")
    Traceback (most recent call last):
    ...
    ValueError: system must be one of [...], got 'no_such_system'
    """
    path = root() / "book" / "claims" / f"{system}.yaml"
    if not path.is_file():
        raise ValueError(f"system must be one of {systems()}, got {system!r}")
    found = parse(path.read_text(), path.name)
    if found.system != system:
        raise ValueError(f"{path.name}: system must be {system!r}, the file's name, got {found.system!r}")
    return found


def load_all() -> list[ClaimSet]:
    """Return the claims of every system, in alphabetical order.

    >>> [s.system for s in load_all()] == systems()
    True
    """
    return [load(system) for system in systems()]
