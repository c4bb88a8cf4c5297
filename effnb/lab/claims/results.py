"""What was measured: read, re-judge and compare ``<results>/<profile>/<system>.json``."""

import json
import math
import subprocess
from collections.abc import Mapping
from pathlib import Path

from effnb.lab.claims.registry import Claim, load, load_all, parse, validate
from effnb.lab.claims.verdict import Criterion, Measured, combine, evaluate, is_worse
from effnb.lab.paths import committed_results, digest, results_root, root


def result_path(system: str, profile: str, results: Path | None = None) -> Path:
    """The result file of one chapter, in ``results`` (default: where this process writes).

    >>> result_path("avagrad", "book").parts[-2:]
    ('book', 'avagrad.json')
    """
    return Path(results or results_root()) / profile / f"{system}.json"


def parse_result(text: str, where: str) -> dict:
    """Read and check one result file.

    Raises:
        ValueError: not JSON, against the schema, or the stored digest does not fit (the file was edited by hand).

    >>> parse_result("{}", "demo.json")
    Traceback (most recent call last):
    ...
    ValueError: demo.json: ...
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    validate(record, "result", where)
    if digest({k: v for k, v in record.items() if k != "digest"}) != record["digest"]:
        raise ValueError(f"{where}: digest does not fit the content: the file was edited after it was written")
    return record


def load_result(system: str, profile: str = "book", results: Path | None = None) -> dict | None:
    """The result of one chapter, or ``None`` where it has not been measured.

    Args:
        system: name with underscores.
        profile: ``smoke``, ``book`` or ``paper``.
        results: folder with one folder a profile; default the committed ``book/results``.

    Raises:
        ValueError: the file breaks a rule (see :func:`parse_result`).

    >>> load_result("no_such_system") is None
    True
    """
    path = result_path(system, profile, results or committed_results())
    return parse_result(path.read_text(), path.name) if path.is_file() else None


def _measure(criterion: Criterion, measured: dict) -> Measured:
    return evaluate(criterion, measured["per_seed"], measured.get("baseline_per_seed"))


def judge(claim: Claim, entry: dict) -> tuple[str, bool]:
    """Re-derive ``(verdict, contradicted)`` of a stored entry from its per-seed values and the registered criteria.

    Raises:
        ValueError: stored estimate or interval does not follow from the per-seed values.
    """
    if entry["verdict"] == "not-tested":
        return "not-tested", False
    main = _measure(claim.criterion, entry["measured"])
    for key in ("estimate", "ci"):
        stored, found = entry["measured"][key], getattr(main, key)
        same = stored == found or (
            stored is not None
            and found is not None
            and all(
                math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
                for a, b in zip(*([v] if isinstance(v, float | int) else v for v in (stored, found)), strict=True)
            )
        )
        if not same:
            raise ValueError(f"{claim.id}: stored {key} {stored} does not follow from per_seed, which gives {found}")
    stored = {c["name"]: c["measured"] for c in entry.get("conditions", [])}
    if set(stored) != {c.name for c in claim.conditions}:
        raise ValueError(f"{claim.id}: conditions must be {[c.name for c in claim.conditions]}, got {sorted(stored)}")
    verdict, contradicted, _ = combine(main, {c.name: _measure(c, stored[c.name]) for c in claim.conditions})
    return ("smoke", False) if entry["verdict"] == "smoke" else (verdict, contradicted)


def _problems_of(claim: Claim, entry: dict | None, profile: str) -> list[str]:
    if entry is None:
        return [f"{claim.id}: registered, but the result does not hold it"]
    if entry["registered_hash"] != claim.registered_hash:
        return [f"{claim.id}: the claim was changed after it was measured: run the chapter again"]
    if len(entry["measured"]["per_seed"]) != len(entry["seeds"]):
        return [f"{claim.id}: per_seed must have the length of seeds"]
    if (profile == "smoke") != (entry["verdict"] == "smoke") and entry["verdict"] != "not-tested":
        return [f"{claim.id}: verdict {entry['verdict']!r} in profile {profile!r}"]
    try:
        verdict, contradicted = judge(claim, entry)
    except ValueError as error:
        return [str(error)]
    if (verdict, contradicted) != (entry["verdict"], entry["contradicted"]):
        return [f"{claim.id}: stored verdict {entry['verdict']!r}, but the values give {verdict!r}"]
    return []


def check(systems: list[str] | None = None, profile: str = "book", results: Path | None = None) -> list[str]:
    """Everything that is wrong between claims and results; empty if all is well.

    Finds: a result that is missing, breaks the schema or was edited by hand; a claim without result or a result
    without claim; a claim changed after it was measured; a stored verdict that its values do not give.

    Args:
        systems: which chapters; default all that have claims.
        profile: which results.
        results: folder with one folder a profile; default the committed ``book/results``.

    Returns:
        One line a problem.
    """
    problems = []
    for claims in [load(s) for s in systems] if systems is not None else load_all():
        try:
            result = load_result(claims.system, profile, results)
        except ValueError as error:
            problems.append(str(error))
            continue
        if result is None:
            problems.append(f"{claims.system}: no result for profile {profile!r}: run the chapter")
            continue
        problems += [
            f"{i}: measured, but not registered" for i in set(result["claims"]) - {c.id for c in claims.claims}
        ]
        for claim in claims.claims:
            problems += _problems_of(claim, result["claims"].get(claim.id), profile)
    return problems


def joined(results: Path | None = None, profile: str = "book") -> list[dict]:
    """Claims and results side by side, one row a claim: ``{system, title, method, claim, entry, result}``.

    ``entry`` and ``result`` are ``None`` where nothing was measured.
    """
    rows = []
    for claims in load_all():
        result = load_result(claims.system, profile, results)
        for claim in claims.claims:
            entry = result["claims"].get(claim.id) if result else None
            rows.append(
                {"system": claims.system, "title": claims.title, "method": claims.method}
                | {"claim": claim, "entry": entry, "result": result}
            )
    return rows


def _within(new: Mapping, old: Mapping) -> bool:
    """Whether all figures of a claim still lie within the intervals of its older result."""
    pairs = [(new["measured"], old["measured"])]
    pairs += [(a["measured"], b["measured"]) for a, b in zip(new["conditions"], old["conditions"], strict=True)]
    return all(a and b and b["ci"] and b["ci"][0] <= a["estimate"] <= b["ci"][1] for a, b in pairs)


def compare(new: Path, old: Path | None = None, profile: str = "book", excused: bool = False) -> list[str]:
    """Claims whose verdict in ``new`` is worse than in ``old`` (default: the committed results), one line each.

    ``excused`` chooses those that are told but are no failure: a ratio of times decides them, which a busy machine can
    turn, or all their figures still lie within the old intervals, so that next to a threshold rounding decided.
    """
    before = {row["claim"].id: row["entry"] for row in joined(old, profile) if row["entry"]}
    lines = []
    for row in joined(new, profile):
        claim, now, was = row["claim"], row["entry"], before.get(row["claim"].id)
        worse = now and was and is_worse(now["verdict"], was["verdict"])
        if worse and (claim.timed or _within(now, was)) == excused:
            lines.append(f"{claim.id}: {now['verdict']}, was {was['verdict']}")
    return lines


def _show(revision: str, path: str) -> str | None:
    done = subprocess.run(["git", "show", f"{revision}:{path}"], cwd=root(), capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def diff(revision: str, profile: str = "book") -> list[str]:
    """What changed in claims and committed verdicts since a git revision, one line a change.

    Raises:
        ValueError: git does not know ``revision``.
    """
    known = subprocess.run(["git", "rev-parse", "--verify", f"{revision}^{{commit}}"], cwd=root(), capture_output=True)
    if known.returncode:
        raise ValueError(f"revision must be one that git knows, got {revision!r}")
    lines = []
    for row in joined(profile=profile):
        claim, system = row["claim"], row["system"]
        claims_then = _show(revision, f"book/claims/{system}.yaml")
        result_then = _show(revision, f"book/results/{profile}/{system}.json")
        old = {c.id: c for c in parse(claims_then, system).claims} if claims_then else {}
        if claim.id not in old:
            lines.append(f"{claim.id}: new claim")
        elif old[claim.id].registered_hash != claim.registered_hash:
            lines.append(f"{claim.id}: criterion {old[claim.id].criterion.text()!r} -> {claim.criterion.text()!r}")
        was = json.loads(result_then)["claims"].get(claim.id, {}).get("verdict", "none") if result_then else "none"
        now = row["entry"]["verdict"] if row["entry"] else "none"
        if was != now:
            lines.append(f"{claim.id}: {was} -> {now}")
    return lines
