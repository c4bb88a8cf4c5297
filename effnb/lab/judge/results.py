"""What was measured (``<results>/<profile>/<system>.json``): stored, judged again from its values, compared."""

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, JsonValue

from effnb.lab.judge.claims import (
    PARTIALLY,
    PASSED,
    UNIT_NAMES,
    Claim,
    ClaimSet,
    Criterion,
    IntervalName,
    Judgement,
    Record,
    Sample,
    Text,
    Unreachable,
    Verdict,
    combine,
    evaluate,
    holm,
    is_worse,
    load,
    load_all,
    validated,
)
from effnb.lab.paths import committed_results, digest, results_root

PROFILES = ("smoke", "book", "study")
#: Why a claim may stand untested.
NOT_TESTED = ("data", "extra", "compute", "precondition", "new-evidence")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Measured(Record):
    """Values, estimate and interval; what an interval over items, counts or units needs stands with it."""

    estimate: float | None
    ci: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    ci_method: IntervalName
    per_seed: list[float]
    baseline_per_seed: list[float] | None = None
    unit: str = ""
    rivals: list[str] | None = None
    items: list[float | int] | None = None
    counts: list[list[int]] | None = None


class Judged(Record):
    """A condition, a precondition or the claim as stated: measured and judged."""

    name: str
    measured: Measured | None
    verdict: Verdict
    contradicted: bool = False
    note: str = ""


class Deviation(Record):
    """Where the experiment differs from the paper's."""

    what: Text
    why: Text
    expected_effect: str = ""


class Entry(Record):
    """One claim's outcome."""

    id: str
    registered_hash: Sha256
    scale: dict[str, JsonValue]
    measured: Measured
    conditions: list[Judged] = []
    preconditions: list[Judged] = []
    as_stated: Judged | None = None
    seeds: list[int]
    verdict: Verdict
    contradicted: bool
    note: str
    not_tested: Literal[NOT_TESTED] | None = None
    deviations: list[Deviation] = []


class Figure(Record):
    """A stored picture, ``<results>/<profile>/<system>/<name>.svg``."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    alt: Text
    caption: str = ""
    sha256: Sha256


class StoredTable(Record):
    """A stored table, as text and numbers."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    caption: str = ""
    columns: list[str]
    rows: list[list[str | float | int | None]]


class Hardware(Record):
    """The machine."""

    cpu: str
    cores: int | None
    threads: int
    ram_gb: float | None
    gpu: str | None


class Software(Record):
    """Versions and commit; ``dirty`` if tracked files had changes, None without git."""

    python: str
    torch: str
    effnb: str
    commit: str | None
    dirty: bool | None


class Result(Record):
    """One run of one chapter."""

    schema_: Literal["effnb-result/2"] = Field(alias="schema")
    system: str
    profile: Literal[PROFILES]
    seeds: list[int]
    scale: dict[str, JsonValue]
    runtime_s: float
    cpu_s: float
    hardware: Hardware
    software: Software
    key: dict[str, JsonValue]
    claims: dict[str, Entry]
    metrics: dict[str, list[float]]
    tables: list[StoredTable] = []
    figures: list[Figure] = []
    units_sha256: Sha256 | None = None
    #: Of the outputs of the committed notebook that belong to this result, of the book profile.
    outputs_sha256: Sha256 | None = None
    digest: Sha256


# --- judging a run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured for one claim."""

    main: Sample
    conditions: Mapping[str, Sample] = field(default_factory=dict)
    preconditions: Mapping[str, Sample] = field(default_factory=dict)
    as_stated: Sample | None = None

    def samples(self) -> dict[str, Sample]:
        """Return every sample under the name that its arrays have in the file of units."""
        found = {"main": self.main} | ({"as-stated": self.as_stated} if self.as_stated else {})
        found |= {f"condition {name}": s for name, s in self.conditions.items()}
        return found | {f"precondition {name}": s for name, s in self.preconditions.items()}


@dataclass(frozen=True)
class Outcome:
    """A claim's judgement: against the strongest rival (the verdict), and as stated."""

    main: Judgement
    conditions: dict[str, Judgement]
    preconditions: dict[str, Judgement]
    as_stated: Judgement | None
    verdict: str
    contradicted: bool
    reason: str


def judge(claim: Claim, found: Measurement) -> Outcome:
    """Judge one claim by itself.

    Raises:
        ValueError: other conditions, preconditions or comparators than registered; a sample that does not fit.
    """
    own = isinstance(claim.as_stated, Criterion)
    if own != (found.as_stated is not None):
        raise ValueError(f"as_stated of {claim.id} must be given exactly where a criterion of its own is registered")
    main, further = evaluate(claim.criterion, found.main), []
    for what in ("conditions", "preconditions"):
        registered, samples = {c.name: c for c in getattr(claim, what)}, getattr(found, what)
        if samples.keys() != registered.keys():
            raise ValueError(f"{what} of {claim.id} must be {list(registered)}, got {sorted(samples)}")
        further.append({name: evaluate(c, samples[name]) for name, c in registered.items()})
    stated = evaluate(claim.as_stated, found.as_stated) if own else None
    return Outcome(main, *further, stated, *combine(main, *further))


def judge_all(claims: ClaimSet, found: Mapping[str, Measurement]) -> dict[str, Outcome]:
    """Judge those claims of a chapter that were measured (``found``, by id), with Holm's correction in each family."""
    measured = [claim for claim in claims.claims if claim.id in found]
    outcomes = {claim.id: judge(claim, found[claim.id]) for claim in measured}

    def holds(claim: Claim, level: float) -> bool:
        return evaluate(claim.criterion, found[claim.id].main, level=level).verdict in PASSED

    for name in {claim.family for claim in measured if claim.family}:
        family = {claim.id: partial(holds, claim) for claim in measured if claim.family == name}
        reason = f"does not hold after Holm's correction in the family {name!r}"
        for ident in family.keys() - holm(family):
            if outcomes[ident].verdict in PASSED:
                outcomes[ident] = replace(outcomes[ident], verdict=PARTIALLY, contradicted=False, reason=reason)
    return outcomes


# --- files -------------------------------------------------------------------------------------------------------


def result_path(system: str, profile: str, results: Path | None = None) -> Path:
    """Return the result file of one chapter, in ``results`` (default: where this process writes).

    >>> result_path("avagrad", "book").parts[-2:]
    ('book', 'avagrad.json')
    """
    return Path(results or results_root()) / profile / f"{system}.json"


def pack_units(found: Mapping[str, Measurement]) -> bytes | None:
    """Return the matrices of all samples as one compressed file, or None where there are none."""
    arrays = {}
    for ident, measurement in found.items():
        for name, sample in measurement.samples().items():
            for side, array in (("a", sample.units), ("b", sample.baseline_units), ("target", sample.target)):
                if array is not None:
                    arrays[f"{ident}|{name}|{side}"] = np.asarray(array, np.float32)
    if not arrays:
        return None
    np.savez_compressed(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


def parse_result(text: str, where: str) -> dict:
    """Read and check one result file.

    Raises:
        ValueError: not JSON, against the model, or the stored digest does not fit (the file was edited by hand).

    >>> parse_result("{}", "demo.json")
    Traceback (most recent call last):
    ...
    ValueError: demo.json: ...
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    validated(Result, record, where)
    if digest({k: v for k, v in record.items() if k != "digest"}) != record["digest"]:
        raise ValueError(f"{where}: digest does not fit the content: the file was edited after it was written")
    return record


def load_result(system: str, profile: str = "book", results: Path | None = None) -> dict | None:
    """Return the result of one chapter, or ``None`` where it has not been measured; errors of :func:`parse_result`.

    ``results`` is a folder with one folder a profile; default the committed ``book/results``.

    >>> load_result("no_such_system") is None
    True
    """
    path = result_path(system, profile, results or committed_results())
    return parse_result(path.read_text(), path.name) if path.is_file() else None


def _load_units(result: Mapping, folder: Path) -> dict[str, Any]:
    if result.get("units_sha256") is None:
        return {}
    path = folder / f"{result['system']}.npz"
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != result["units_sha256"]:
        raise ValueError(f"{path.name}: missing, or not the file that the result was written with")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {key: arrays[key].astype(np.float64) for key in arrays.files}


def measurement(entry: Mapping, units: Mapping[str, Any]) -> Measurement:
    """Return a stored entry's samples, so that it can be judged again; ``units`` are the arrays beside the result."""

    def sample(measured: Mapping, name: str) -> Sample:
        values = (measured.get(key) for key in ("per_seed", "baseline_per_seed", "rivals", "items", "counts"))
        return Sample(*values, *(units.get(f"{entry['id']}|{name}|{side}") for side in ("a", "b", "target")))

    stated = entry.get("as_stated") or {"measured": None}
    return Measurement(
        sample(entry["measured"], "main"),
        {e["name"]: sample(e["measured"], f"condition {e['name']}") for e in entry.get("conditions", [])},
        {e["name"]: sample(e["measured"], f"precondition {e['name']}") for e in entry.get("preconditions", [])},
        sample(stated["measured"], "as-stated") if stated["measured"] else None,
    )


# --- re-judging --------------------------------------------------------------------------------------------------


def stated_verdict(claim: Claim, entry: Mapping | None) -> str | None:
    """Return a claim's verdict as stated: of its own comparator where one is registered, else the claim's verdict."""
    if entry is None:
        return None
    if isinstance(claim.as_stated, Unreachable):
        return "not-tested"
    return entry["as_stated"]["verdict"] if entry.get("as_stated") else entry["verdict"]


def _close(stored: Any, found: Any) -> bool:
    if stored is None or found is None:
        return stored is found
    return np.allclose(stored, found, rtol=1e-9, atol=1e-12)


def _problems_of(claim: Claim, entry: Mapping, profile: str, outcome: Outcome | None) -> list[str]:
    if entry["registered_hash"] != claim.registered_hash:
        return [f"{claim.id}: the claim was changed after it was measured: run the chapter again"]
    if len(entry["measured"]["per_seed"]) != len(entry["seeds"]):
        return [f"{claim.id}: per_seed must have the length of seeds"]
    if outcome is None:
        told = entry["not_tested"] and entry["note"]
        return [] if told else [f"{claim.id}: not tested must have a reason and its kind"]
    smoke, wrong, blocks = profile == "smoke", [], [(claim.id, entry, outcome.main)]
    for what in ("conditions", "preconditions"):
        blocks += [(f"{claim.id}, {b['name']}", b, getattr(outcome, what)[b["name"]]) for b in entry[what]]
    if outcome.as_stated:
        blocks.append((f"{claim.id}, as stated", entry["as_stated"], outcome.as_stated))
    for name, stored, found in blocks:
        for key, value in (("estimate", found.estimate), ("ci", found.ci)):
            if not _close(shown := stored["measured"][key], value):
                wrong.append(f"{name}: stored {key} {shown} does not follow from per_seed, which gives {value}")
        if stored is not entry and not smoke and stored["verdict"] != found.verdict:
            wrong.append(f"{name}: stored verdict {stored['verdict']!r}, but the values give {found.verdict!r}")
    expected = ("smoke", False) if smoke else (outcome.verdict, outcome.contradicted)
    if expected != (entry["verdict"], entry["contradicted"]):
        wrong.append(f"{claim.id}: stored verdict {entry['verdict']!r}, but the values give {expected[0]!r}")
    return wrong


def problems(claims: ClaimSet, profile: str, results: Path | None = None) -> list[str]:
    """Return everything that is wrong between one chapter's claims and its result, one line each."""
    folder = Path(results or committed_results()) / profile
    try:
        result = load_result(claims.system, profile, results)
        if result is None:
            # Nobody has to have run a study; the book has to be whole.
            missing = f"{claims.system}: no result for profile {profile!r}: run the chapter"
            return [] if profile == "study" else [missing]
        if (result["system"], result["profile"]) != (claims.system, profile):
            raise ValueError(f"{claims.system}: the result is of {result['system']} at {result['profile']!r}")
        units, entries = _load_units(result, folder), result["claims"]
        known = {claim.id for claim in claims.claims}
        lines = [f"{ident}: measured, but not registered" for ident in entries if ident not in known]
        lines += [f"{ident}: registered, but the result does not hold it" for ident in known - entries.keys()]
        tested = {i: measurement(e, units) for i, e in entries.items() if i in known and e["not_tested"] is None}
        outcomes = judge_all(claims, tested)
    except ValueError as error:
        return [str(error)]
    for figure in result["figures"]:
        path = folder / claims.system / f"{figure['name']}.svg"
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != figure["sha256"]:
            lines.append(f"{claims.system}: figure {figure['name']} is missing or not the one of this run")
    for claim in claims.claims:
        if claim.id in entries:
            lines += _problems_of(claim, entries[claim.id], profile, outcomes.get(claim.id))
    return lines


def check(systems: list[str] | None = None, profile: str = "book", results: Path | None = None) -> list[str]:
    """Return everything that is wrong between claims and results, one line each; empty if all is well.

    Finds: a result that is missing, breaks the model or was edited by hand; a claim without result or a result
    without claim; a claim changed after it was measured; a stored estimate, interval or verdict (of the claim, its
    conditions, preconditions or the comparison as stated) that its values do not give; another figure or file of units.

    Args:
        systems: which chapters; default all that have claims.
        profile: which results; of ``study``, those that there are.
        results: as in :func:`load_result`.
    """
    chosen = [load(s) for s in systems] if systems is not None else load_all()
    return [line for claims in chosen for line in problems(claims, profile, results)]


def joined(results: Path | None = None, profile: str = "book") -> list[dict]:
    """Return claims and results side by side, one row a claim: ``{system, title, method, claim, entry, result}``.

    ``entry`` and ``result`` are ``None`` where nothing was measured.
    """
    rows = []
    for claims in load_all():
        result = load_result(claims.system, profile, results)
        about = {"system": claims.system, "title": claims.title, "method": claims.method, "result": result}
        entries = result["claims"] if result else {}
        rows += [about | {"claim": claim, "entry": entries.get(claim.id)} for claim in claims.claims]
    return rows


def _within(new: Mapping, old: Mapping) -> bool:
    """Whether all figures of a claim still lie within the intervals of its older result."""
    if len(new["conditions"]) != len(old["conditions"]):  # one of them was not tested
        return False
    pairs = zip([new, *new["conditions"]], [old, *old["conditions"]], strict=True)
    figures = [(a["measured"]["estimate"], b["measured"]["ci"]) for a, b in pairs]
    return all(value is not None and ci and ci[0] <= value <= ci[1] for value, ci in figures)


def compare(new: Path, old: Path | None = None, profile: str = "book", excused: bool = False) -> list[str]:
    """Return the claims whose verdict in ``new`` is worse than in ``old`` (default: the committed results).

    ``excused`` chooses those that are told but are no failure: data or a package that the claim needs is not here, a
    ratio of times decides it, which a busy machine can turn, or all its figures still lie within the old intervals, so
    that next to a threshold rounding decided.
    """
    before = {row["claim"].id: row["entry"] for row in joined(old, profile) if row["entry"]}
    lines = []
    for row in joined(new, profile):
        claim, now, was = row["claim"], row["entry"], before.get(row["claim"].id)
        worse = now and was and is_worse(now["verdict"], was["verdict"])
        if worse and (now["not_tested"] in ("data", "extra") or claim.timed or _within(now, was)) == excused:
            lines.append(f"{claim.id}: {now['verdict']}, was {was['verdict']}")
    return lines


def format_measured(measured: Mapping | None) -> str:
    """Return ``estimate [lo, hi] unit (n)``, rounded to two significant digits of the interval's half-width.

    ``measured`` is the block of a result entry; the text is ``"-"`` where nothing was measured.

    >>> format_measured({"estimate": 1.2345, "ci": [1.1, 1.4], "per_seed": [1, 1], "unit": "pt"})
    '1.23 [1.10, 1.40] pt (n = 2)'
    """
    if not measured or measured["estimate"] is None:
        return "-"
    value, ci = measured["estimate"], measured["ci"]
    reference = (ci[1] - ci[0]) / 2 if ci and ci[1] > ci[0] else abs(value) / 10
    digits = 2 if reference <= 0 else max(0, min(6, 1 - math.floor(math.log10(reference))))

    def show(x: float) -> str:
        text = f"{x:.{digits}f}" if abs(x) < 1e6 and (x == 0 or abs(x) >= 1e-5) else f"{x:.2e}"
        return text[1:] if text.lstrip("-0.") == "" and text.startswith("-") else text

    interval = f" [{show(ci[0])}, {show(ci[1])}]" if ci else ""
    unit = UNIT_NAMES.get(measured.get("unit"), measured.get("unit"))
    return f"{show(value)}{interval}{f' {unit}' if unit else ''} (n = {len(measured['per_seed'])})"
