"""Criteria and the verdicts that follow from them: no human judgement enters after registration."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from effnb.lab import stats

UNIT_NAMES = {"points": "pt"}  # one spelling in tables, whatever a claims file registered
OPS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
INTERVALS = ("paired-t", "paired-t-log", "order-statistic", "none")
#: From the best to the worst; a run whose verdict moves to the right has got worse.
VERDICTS = (
    "checked-analytically",
    "reproduced",
    "partially",
    "not-reproduced-at-this-scale",
    "not-tested",
    "smoke",
)


@dataclass(frozen=True)
class Criterion:
    """One registered, machine-evaluable condition on per-seed values.

    Args:
        metric: what is measured, in words.
        op: ``>``, ``>=``, ``<``, ``<=`` or ``within`` (the value lies within ``margin`` of ``threshold``).
        threshold: the bound, in ``unit``.
        unit: unit of metric and threshold.
        margin: half-width of the equivalence region, > 0, for ``within`` only.
        against: name of the baseline; then the value is the paired difference (or ratio, see ``interval``).
        interval: ``paired-t``, ``paired-t-log`` (geometric mean, ratios), ``order-statistic`` (median), ``none``.
        seeds_fraction: share of the seeds that must satisfy the criterion one by one.
        level: level of the two-sided interval; ``within`` uses ``1 - 2 (1 - level)``, two one-sided tests.
        name: short name, for further conditions of a claim.

    Raises:
        ValueError: an unknown ``op`` or ``interval``, a missing margin, a non-finite threshold, or a fraction or
            level out of range.

    Reference: agarwal2021precipice.

    >>> Criterion("gain", ">", 0.0).holds(0.3)
    True
    """

    metric: str
    op: str
    threshold: float
    unit: str = ""
    margin: float | None = None
    against: str | None = None
    interval: str = "paired-t"
    seeds_fraction: float = 0.8
    level: float = 0.95
    name: str = ""

    def __post_init__(self) -> None:
        if self.op not in (*OPS, "within"):
            raise ValueError(f"op must be one of {[*OPS, 'within']}, got {self.op!r}")
        if self.interval not in INTERVALS:
            raise ValueError(f"interval must be one of {list(INTERVALS)}, got {self.interval!r}")
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite, got {self.threshold}")
        if (self.op == "within") != (self.margin is not None and self.margin > 0):
            raise ValueError(f"margin must be > 0 for op 'within' and absent otherwise, got {self.margin}")
        if not 0 <= self.seeds_fraction <= 1:
            raise ValueError(f"seeds_fraction must be in [0, 1], got {self.seeds_fraction}")
        if not 0.5 < self.level < 1:
            raise ValueError(f"level must be in (0.5, 1), got {self.level}")

    def holds(self, value: float) -> bool:
        """Whether one value satisfies the criterion."""
        if self.op == "within":
            return abs(value - self.threshold) <= self.margin
        return bool(OPS[self.op](value, self.threshold))

    def bound(self) -> str:
        """What is asked of the value, with its unit."""
        sign = {">=": "≥", "<=": "≤"}.get(self.op, self.op)
        bound = f"within {self.margin:g} of {self.threshold:g}" if self.op == "within" else f"{sign} {self.threshold:g}"
        return f"{bound} {UNIT_NAMES.get(self.unit, self.unit)}".strip()

    def text(self) -> str:
        """The criterion in one line, for tables; what it is against is added unless the metric's name has it."""
        against = self.against if self.against and self.against not in self.metric else ""
        word = "over" if self.interval == "paired-t-log" else "minus"
        return f"{self.metric}{f' {word} {against}' if against else ''} {self.bound()}"


@dataclass(frozen=True)
class Measured:
    """Per-seed values, their summary and what the criterion makes of them."""

    estimate: float | None
    ci: list[float] | None
    ci_method: str
    per_seed: list[float]
    baseline_per_seed: list[float] | None
    unit: str
    verdict: str
    contradicted: bool
    reason: str

    def as_dict(self) -> dict:
        """A plain dictionary, ready for JSON."""
        return asdict(self)


def _paired(criterion: Criterion, per_seed: Sequence[float], baseline: Sequence[float] | None) -> list[float]:
    if (criterion.against is None) != (baseline is None):
        raise ValueError(
            f"baseline must be given exactly when the criterion names `against`, got against={criterion.against!r}"
        )
    if not per_seed:
        raise ValueError("per_seed must hold at least one value, got none")
    if baseline is not None and len(baseline) != len(per_seed):
        raise ValueError(f"baseline must have the length of per_seed {len(per_seed)}, got {len(baseline)}")
    for name, values in (("per_seed", per_seed), ("baseline", baseline or ())):
        if not all(math.isfinite(v) for v in values):
            raise ValueError(f"{name} must be finite, got {list(values)}")
    if criterion.interval == "paired-t-log":
        if min(*per_seed, *(baseline or [1.0]), 1.0) <= 0:
            raise ValueError(f"per_seed and baseline must be positive for ratios, got {list(per_seed)}, {baseline}")
        return [a / b for a, b in zip(per_seed, baseline or [1.0] * len(per_seed), strict=True)]
    return [a - b for a, b in zip(per_seed, baseline or [0.0] * len(per_seed), strict=True)]


def _interval(criterion: Criterion, values: list[float]) -> tuple[float, list[float] | None]:
    mean = math.fsum(values) / len(values)
    if criterion.interval == "none" or len(values) < 2:
        return mean, None
    level = 1 - 2 * (1 - criterion.level) if criterion.op == "within" else criterion.level
    if criterion.interval == "order-statistic":
        found = stats.order_statistic_interval(values, level=level)
    else:
        found = stats.paired_t_interval(values, level=level, log=criterion.interval == "paired-t-log")
    return found.estimate, [found.lo, found.hi]


def _judge(criterion: Criterion, values: list[float], estimate: float, ci: list[float] | None) -> tuple[str, bool, str]:
    needed = math.ceil(criterion.seeds_fraction * len(values))
    held = sum(map(criterion.holds, values))
    if criterion.interval == "none":
        return (
            ("checked-analytically", False, "")
            if held == len(values)
            else ("not-reproduced-at-this-scale", True, f"holds in {held} of {len(values)} cases")
        )
    if ci is None:
        verdict = "partially" if criterion.holds(estimate) else "not-reproduced-at-this-scale"
        return verdict, False, "one run gives no interval"
    if not criterion.holds(estimate):
        wrong = not any(map(criterion.holds, ci)) and not (ci[0] < criterion.threshold < ci[1])
        return "not-reproduced-at-this-scale", wrong, "the estimate lies on the wrong side"
    if not all(map(criterion.holds, ci)):
        return "partially", False, "the interval reaches the wrong side"
    if held < needed:
        return "partially", False, f"holds in {held} of {len(values)} seeds, {needed} needed"
    return "reproduced", False, ""


def evaluate(criterion: Criterion, per_seed: Sequence[float], baseline: Sequence[float] | None = None) -> Measured:
    """Judge per-seed values by a registered criterion.

    ``reproduced`` needs three things: the point estimate, the whole interval, and ``ceil(seeds_fraction n)`` single
    seeds on the right side. ``partially``: the estimate only. Otherwise ``not-reproduced-at-this-scale``, with
    ``contradicted`` if the whole interval is on the wrong side. ``interval="none"`` (exact statements) gives
    ``checked-analytically`` if every value holds.

    Args:
        criterion: what was registered.
        per_seed: one value a seed.
        baseline: values of the same seeds for ``criterion.against``.

    Returns:
        The estimate, interval, verdict and reason.

    Raises:
        ValueError: lengths differ, non-finite values, a baseline missing or superfluous, ratios of non-positive values.

    Reference: agarwal2021precipice.

    >>> evaluate(Criterion("gain", ">", 0.0), [1.0, 1.2, 0.9]).verdict
    'reproduced'
    """
    per_seed = [float(v) for v in per_seed]
    baseline = None if baseline is None else [float(v) for v in baseline]
    values = _paired(criterion, per_seed, baseline)
    estimate, ci = _interval(criterion, values)
    verdict, contradicted, reason = _judge(criterion, values, estimate, ci)
    method = criterion.interval if ci else "none"
    return Measured(estimate, ci, method, per_seed, baseline, criterion.unit, verdict, contradicted, reason)


def combine(main: Measured, conditions: Mapping[str, Measured]) -> tuple[str, bool, str]:
    """The claim's verdict from its main criterion and its named conditions.

    A failed or straddling condition turns ``reproduced`` into ``partially`` and is named in the reason.

    Args:
        main: the main criterion's judgement.
        conditions: name to judgement, for the further criteria.

    Returns:
        ``(verdict, contradicted, reason)``.

    Reference: agarwal2021precipice.

    >>> good = evaluate(Criterion("gain", ">", 0.0), [1.0, 1.2, 0.9])
    >>> combine(good, {"seen": evaluate(Criterion("loss", "<", 0.0), [1.0, 1.2, 0.9])})[0]
    'partially'
    """
    passed = ("reproduced", "checked-analytically")
    failed = [f"{name} ({m.estimate:.2g}): {m.reason}" for name, m in conditions.items() if m.verdict not in passed]
    reason = "; ".join(filter(None, [main.reason, *failed]))
    if main.verdict in passed and failed:
        return "partially", False, reason
    return main.verdict, main.contradicted, reason


def is_worse(new: str, old: str) -> bool:
    """Whether verdict ``new`` stands behind ``old`` in :data:`VERDICTS`.

    Reference: agarwal2021precipice.

    >>> is_worse("partially", "reproduced")
    True
    """
    return VERDICTS.index(new) > VERDICTS.index(old)
