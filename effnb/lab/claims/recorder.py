"""How a notebook hands in what it measured: one recorder a run, one file a chapter."""

import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import effnb
from effnb.lab import timing
from effnb.lab.claims.registry import Claim, ClaimSet, load, validate
from effnb.lab.claims.report import report, shortfalls
from effnb.lab.claims.results import result_path
from effnb.lab.claims.verdict import Criterion, Measured, combine, evaluate
from effnb.lab.key import loaded_modules, staleness_key
from effnb.lab.paths import digest, root, write_atomically

_STARTED = time.perf_counter()

Values = Sequence[float] | tuple[Sequence[float], Sequence[float]]


def software() -> dict:
    """Versions and commit of this run; ``dirty`` if the checkout has uncommitted changes to tracked files."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=root(), capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "effnb": effnb.__version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def _split(values: Values) -> tuple[Sequence[float], Sequence[float] | None]:
    return values if isinstance(values, tuple) else (values, None)


def _plain(measured: Measured) -> dict:
    keep = ("estimate", "ci", "ci_method", "per_seed", "baseline_per_seed", "unit")
    return {key: value for key, value in measured.as_dict().items() if key in keep}


class Recorder:
    """Collects the measured values of one chapter run, judges them and writes the result file.

    Args:
        system: the chapter's system, with underscores; its claims must be registered.
        profile: ``smoke``, ``book`` or ``paper``; in ``smoke`` every verdict is ``smoke``.
        seeds: seeds of the run, unless a claim names its own.
        scale: what the figures hold for, for instance ``{"dataset": ..., "n_train": ..., "model": ...}``.

    Raises:
        ValueError: unknown system or profile, no seeds.

    Reference: agarwal2021precipice.
    """

    def __init__(self, system: str, profile: str, seeds: Sequence[int], scale: Mapping | None = None) -> None:
        if profile not in ("smoke", "book", "paper"):
            raise ValueError(f"profile must be smoke, book or paper, got {profile!r}")
        if not seeds:
            raise ValueError(f"seeds must hold at least one seed, got {seeds}")
        self.registered: ClaimSet = load(system)
        self.profile, self.seeds = profile, [int(s) for s in seeds]
        self.scale = {"profile": profile} | dict(scale or {})
        self.entries: dict[str, dict] = {}
        self.metrics: dict[str, list[float]] = {}

    def _evaluate(self, criterion: Criterion, values: Values, count: int) -> Measured:
        per_seed, baseline = _split(values)
        if len(per_seed) != count:
            raise ValueError(
                f"per_seed of {criterion.metric!r} must have one value a seed, {count}, got {len(per_seed)}"
            )
        return evaluate(criterion, per_seed, baseline)

    def _enter(self, claim: Claim, **fields: object) -> None:
        if claim.id in self.entries:
            raise ValueError(f"{claim.id} is recorded already: a claim is measured once a run")
        raw = claim.raw
        common = {"id": claim.id, "statement": claim.statement, "kind": claim.kind, "criterion": raw["criterion"]}
        self.entries[claim.id] = common | {"registered_hash": claim.registered_hash} | fields

    def record(
        self,
        claim_id: str,
        per_seed: Sequence[float],
        baseline: Sequence[float] | None = None,
        conditions: Mapping[str, Values] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        note: str = "",
        deviations: Sequence[Mapping[str, str]] = (),
        scale: Mapping | None = None,
    ) -> str:
        """Judge one claim and keep the outcome.

        Args:
            claim_id: ``"A1"`` or ``"avagrad/A1"``.
            per_seed: one value a seed (or a pair, for timing ratios).
            baseline: the same for ``criterion.against``.
            conditions: condition name to values, or to ``(values, baseline)``; exactly the registered ones.
            seeds: seeds of these values, where they differ from the run's.
            note: what a reader should know; the reason of a verdict short of ``reproduced`` is put before it.
            deviations: ``{"what", "why", "expected_effect"}`` against the paper.
            scale: fields of the scale that are particular to this claim.

        Returns:
            The verdict.

        Raises:
            ValueError: a length that does not fit the seeds, non-finite values, conditions other than registered.
        """
        claim, conditions = self.registered[claim_id], dict(conditions or {})
        if set(conditions) != {c.name for c in claim.conditions}:
            names = [c.name for c in claim.conditions]
            raise ValueError(f"conditions of {claim.id} must be {names}, got {sorted(conditions)}")
        seeds = self.seeds if seeds is None else [int(s) for s in seeds]
        main = self._evaluate(claim.criterion, per_seed if baseline is None else (per_seed, baseline), len(seeds))
        further = {c.name: self._evaluate(c, conditions[c.name], len(seeds)) for c in claim.conditions}
        verdict, contradicted, reason = combine(main, further)
        if self.profile == "smoke":
            verdict, contradicted = "smoke", False
        self._enter(
            claim,
            scale=self.scale | dict(scale or {}),
            measured=_plain(main),
            conditions=[
                {"name": n, "measured": _plain(m), "verdict": "smoke" if self.profile == "smoke" else m.verdict}
                for n, m in further.items()
            ],
            seeds=list(seeds),
            n_seeds=len(seeds),
            verdict=verdict,
            contradicted=contradicted,
            note=". ".join(part[0].upper() + part[1:] for part in (reason, note) if part),
            deviations=[dict(d) for d in deviations],
        )
        return verdict

    def not_tested(self, claim_id: str, reason: str) -> str:
        """Say that a claim could not be tested in this run, and why.

        Raises:
            ValueError: an empty reason, or the claim is recorded already.
        """
        if not reason.strip():
            raise ValueError(f"reason must say why {claim_id} was not tested, got {reason!r}")
        empty = {"estimate": None, "ci": None, "ci_method": "none", "per_seed": []}
        self._enter(
            self.registered[claim_id],
            scale=self.scale,
            measured=empty,
            conditions=[],
            seeds=[],
            n_seeds=0,
            verdict="not-tested",
            contradicted=False,
            note=reason,
            deviations=[],
        )
        return "not-tested"

    def note_metric(self, name: str, per_seed: Sequence[float]) -> None:
        """Store a further per-seed figure, for sweeps; it has no verdict.

        Raises:
            ValueError: not one value a seed.
        """
        if len(per_seed) != len(self.seeds):
            raise ValueError(f"per_seed of {name!r} must have {len(self.seeds)} values, got {len(per_seed)}")
        self.metrics[name] = [float(v) for v in per_seed]

    def result(self) -> dict:
        """The whole result record, with its digest.

        Raises:
            ValueError: a registered claim was neither recorded nor declared not tested; a value is not finite.
        """
        if missing := [c.short for c in self.registered.claims if c.id not in self.entries]:
            raise ValueError(f"every registered claim must be recorded, missing {missing}")
        content = {
            "schema": "effnb-result/1",
            "system": self.registered.system,
            "profile": self.profile,
            "seeds": self.seeds,
            "scale": self.scale,
            "runtime_s": round(time.perf_counter() - _STARTED, 1),
            "cpu_s": round(time.process_time(), 1),
            "hardware": {k: timing.machine_info()[k] for k in ("cpu", "cores", "threads", "ram_gb", "gpu")},
            "software": software(),
            "key": staleness_key(self.registered.system, loaded_modules()),
            "claims": {c.id: self.entries[c.id] for c in self.registered.claims},
            "metrics": self.metrics,
        }
        content = json.loads(json.dumps(content, allow_nan=False))
        return content | {"digest": digest(content)}

    def save(self, results: Path | None = None) -> None:
        """Validate and write ``<results>/<profile>/<system>.json`` atomically."""
        record = self.result()
        validate(record, "result", f"{self.registered.system}.json")
        path = result_path(self.registered.system, self.profile, results)
        write_atomically(path, json.dumps(record, indent=1) + "\n")

    def report(self) -> object:
        """The verdict table of this run, for display at the chapter's end."""
        return report(self.registered, self.entries)

    def shortfalls(self) -> object:
        """The claims that fell short, each with its reason, for the section "What did not reproduce"."""
        return shortfalls(self.registered, self.entries)
