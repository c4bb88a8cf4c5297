"""How a notebook hands in what it measured: one recorder a run, one file a chapter, tables and pictures beside it."""

import hashlib
import io
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import effnb
from effnb.common import check_choice, write_atomically
from effnb.lab.judge.claims import Claim, ClaimSet, Sample, Unreachable, load, validated
from effnb.lab.judge.results import NOT_TESTED, PROFILES, Measurement, Result, judge, judge_all, pack_units, result_path
from effnb.lab.measure import timing
from effnb.lab.paths import digest
from effnb.lab.run.process import git
from effnb.lab.run.stale import earlier, loaded_modules, staleness_key

_STARTED = time.perf_counter()
_EMPTY = {"estimate": None, "ci": None, "ci_method": "none", "per_seed": []}
Values = Sample | Sequence[float] | tuple[Sequence[float], Sequence[float]]


def software() -> dict:
    """Return versions and commit of this run; ``dirty`` if tracked files have uncommitted changes, None without git."""
    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "effnb": effnb.__version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


class Recorder:
    """Collects what one chapter run measured, has it judged and writes the result.

    Args:
        system: the chapter's system, with underscores; its claims must be registered.
        profile: ``smoke``, ``book`` or ``study``; in ``smoke`` every verdict is ``smoke``.
        seeds: seeds of the run, unless a claim names its own.
        scale: what the figures hold for, for instance ``{"dataset": ..., "n_train": ..., "model": ...}``.

    Raises:
        ValueError: unknown system or profile, no seeds.
    """

    def __init__(self, system: str, profile: str, seeds: Sequence[int], scale: Mapping | None = None) -> None:
        check_choice("profile", profile, PROFILES)
        if not seeds:
            raise ValueError(f"seeds must hold at least one seed, got {seeds}")
        self.registered: ClaimSet = load(system)
        self.profile, self.seeds = profile, [int(s) for s in seeds]
        self.scale = {"profile": profile} | dict(scale or {})
        self.measured: dict[str, Measurement] = {}
        self.details: dict[str, dict] = {}
        self.metrics: dict[str, list[float]] = {}
        self.tables: list[dict] = []
        self.figures: dict[str, tuple[bytes, dict]] = {}

    def record(
        self,
        claim_id: str,
        per_seed: Values,
        baseline: Sequence[float] | None = None,
        conditions: Mapping[str, Values] | None = None,
        *,
        preconditions: Mapping[str, Values] | None = None,
        as_stated: Values | None = None,
        seeds: Sequence[int] | None = None,
        note: str = "",
        deviations: Sequence[Mapping[str, str]] = (),
        scale: Mapping | None = None,
    ) -> str:
        """Judge one claim, keep the outcome, and return the verdict, before Holm's correction in a family of claims.

        Args:
            claim_id: ``"A1"`` or ``"avagrad/A1"``.
            per_seed: one value a seed (or a pair, for timing ratios), or a :class:`Sample`.
            baseline: the same for ``criterion.against``, where ``per_seed`` is plain values.
            conditions: condition name to values, to ``(values, baseline)`` or to a sample; exactly the registered ones.
            preconditions: the same for the preconditions.
            as_stated: the same for the paper's own comparator, where the claim registers a criterion for it.
            seeds: seeds of these values, where they differ from the run's.
            note: what a reader should know; the reason of a verdict short of ``reproduced`` is put before it.
            deviations: ``{"what", "why", "expected_effect"}`` against the paper.
            scale: fields of the scale that are particular to this claim.

        Raises:
            ValueError: a length that does not fit the seeds, non-finite values, conditions other than registered.
        """
        claim = self.registered[claim_id]
        found = Measurement(
            Sample.of(per_seed if baseline is None else (per_seed, baseline)),
            {name: Sample.of(values) for name, values in (conditions or {}).items()},
            {name: Sample.of(values) for name, values in (preconditions or {}).items()},
            None if as_stated is None else Sample.of(as_stated),
        )
        seeds = self.seeds if seeds is None else [int(s) for s in seeds]
        for name, sample in found.samples().items():
            if (given := len(sample.per_seed)) != len(seeds):
                where = f"per_seed of {claim.id}, {name},"
                raise ValueError(f"{where} must have one value a seed, {len(seeds)}, got {given}")
        outcome = judge(claim, found)
        details = {"scale": self.scale | dict(scale or {}), "seeds": seeds, "note": note}
        self._keep(claim, details | {"deviations": [dict(d) for d in deviations]})
        self.measured[claim.id] = found
        return "smoke" if self.profile == "smoke" else outcome.verdict

    def not_tested(self, claim_id: str, reason: str, kind: str = "data") -> str:
        """Say that a claim could not be tested in this run, and why, in a sentence.

        ``kind`` is ``data`` or ``extra`` (not installed here), ``compute`` (beyond this profile), ``precondition`` or
        ``new-evidence``.

        Raises:
            ValueError: an empty reason, an unknown kind, or the claim is recorded already.
        """
        check_choice("kind", kind, NOT_TESTED)
        if not reason.strip():
            raise ValueError(f"reason must say why {claim_id} was not tested, got {reason!r}")
        self._keep(self.registered[claim_id], {"scale": self.scale, "seeds": [], "note": reason, "not_tested": kind})
        return "not-tested"

    def _keep(self, claim: Claim, details: dict) -> None:
        if claim.id in self.details:
            raise ValueError(f"{claim.id} is recorded already: a claim is measured once a run")
        self.details[claim.id] = details

    def note_metric(self, name: str, per_seed: Sequence[float]) -> None:
        """Store a further per-seed figure, for sweeps; it has no verdict.

        Raises:
            ValueError: not one value a seed.
        """
        if len(per_seed) != len(self.seeds):
            raise ValueError(f"per_seed of {name!r} must have {len(self.seeds)} values, got {len(per_seed)}")
        self.metrics[name] = [float(v) for v in per_seed]

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence], caption: str = "") -> None:
        """Store a table beside the claims; at the study profile the chapter shows it under *At study scale*.

        Args:
            name: lower-case letters, digits and hyphens.
            columns: headings.
            rows: text, numbers or None, one a column.
            caption: a sentence.

        Raises:
            ValueError: a row of another length than ``columns``.
        """
        if wrong := [row for row in rows if len(row) != len(columns)]:
            raise ValueError(f"rows of {name!r} must have {len(columns)} cells, got {wrong[0]!r}")
        cells = [[c.item() if hasattr(c, "item") else c for c in row] for row in rows]
        self.tables.append({"name": name, "caption": caption, "columns": list(columns), "rows": cells})

    def figure(self, figure: Any, name: str, alt: str, caption: str = "") -> None:
        """Store a matplotlib figure as SVG; ``name`` and ``caption`` as in :meth:`table`, as is where it is shown.

        ``alt`` says what the picture shows, for those who can't see it.

        Raises:
            ValueError: no ``alt``.
        """
        if not alt.strip():
            raise ValueError(f"alt must say what figure {name!r} shows, got {alt!r}")
        # No date: the same figures must give the same bytes.
        figure.savefig(buffer := io.BytesIO(), format="svg", metadata={"Date": None})
        svg = buffer.getvalue()
        sha256 = hashlib.sha256(svg).hexdigest()
        self.figures[name] = svg, {"name": name, "alt": alt, "caption": caption, "sha256": sha256}

    def entries(self) -> dict[str, dict]:
        """Return the entries of all claims recorded so far, judged together."""
        outcomes, smoke, found = judge_all(self.registered, self.measured), self.profile == "smoke", {}

        def judged(name: str, of: Any) -> dict:
            told = {"contradicted": of.contradicted and not smoke, "note": of.reason}
            return {"name": name, "measured": of.measured(), "verdict": "smoke" if smoke else of.verdict} | told

        for claim in (claim for claim in self.registered.claims if claim.id in self.details):
            details, outcome = self.details[claim.id], outcomes.get(claim.id)
            common = {"id": claim.id, "registered_hash": claim.registered_hash, "not_tested": None} | details
            if outcome is None:
                nothing = {"conditions": [], "preconditions": [], "as_stated": None}  # pages and comparisons read them
                untested = {"measured": _EMPTY, "verdict": "not-tested", "contradicted": False}
                found[claim.id] = untested | nothing | common
                continue
            stated = None
            if outcome.as_stated:
                stated = judged(claim.as_stated.against or claim.as_stated.metric, outcome.as_stated)
            elif isinstance(claim.as_stated, Unreachable):
                stated = {"name": "as stated", "measured": None, "verdict": "smoke" if smoke else "not-tested"}
                stated["note"] = claim.as_stated.reason
            note = [part[0].upper() + part[1:] for part in (outcome.reason, details["note"]) if part]
            found[claim.id] = common | {
                "measured": outcome.main.measured(),
                "conditions": [judged(name, j) for name, j in outcome.conditions.items()],
                "preconditions": [judged(name, j) for name, j in outcome.preconditions.items()],
                "as_stated": stated,
                "verdict": "smoke" if smoke else outcome.verdict,
                "contradicted": outcome.contradicted and not smoke,
                "note": ". ".join(note),
            }
        return found

    def result(self) -> dict:
        """Return the whole result record, with its digest.

        Raises:
            ValueError: a registered claim was neither recorded nor declared not tested; a value is not finite.
        """
        if missing := [c.short for c in self.registered.claims if c.id not in self.details]:
            raise ValueError(f"every registered claim must be recorded, missing {missing}")
        units = pack_units(self.measured)
        spent = earlier()  # by cut-off runs, whose work this one went on with
        content = {
            "schema": "effnb-result/2",
            "system": self.registered.system,
            "profile": self.profile,
            "seeds": self.seeds,
            "scale": self.scale,
            "runtime_s": round(time.perf_counter() - _STARTED + spent[0], 1),
            "cpu_s": round(time.process_time() + spent[1], 1),
            "hardware": {k: timing.machine_info()[k] for k in ("cpu", "cores", "threads", "ram_gb", "gpu")},
            "software": software(),
            "key": staleness_key(self.registered.system, loaded_modules()),
            "claims": self.entries(),
            "metrics": self.metrics,
            "tables": self.tables,
            "figures": [about for _, about in self.figures.values()],
            "units_sha256": None if units is None else hashlib.sha256(units).hexdigest(),
        }
        content = json.loads(json.dumps(content, allow_nan=False))
        return content | {"digest": digest(content)}

    def save(self, results: Path | None = None) -> None:
        """Validate and write ``<results>/<profile>/<system>.json``, last, after the files that it names."""
        record = self.result()
        validated(Result, record, f"{self.registered.system}.json")
        path = result_path(self.registered.system, self.profile, results)
        for name, (svg, _) in self.figures.items():
            write_atomically(path.with_suffix("") / f"{name}.svg", svg)
        if (units := pack_units(self.measured)) is not None:
            write_atomically(path.with_suffix(".npz"), units)
        write_atomically(path, json.dumps(record, indent=1) + "\n")
