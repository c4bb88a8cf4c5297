"""What each chapter promises: ``book/claims/<system>.yaml``, read safely and validated."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import yaml

from effnb.lab.claims.verdict import Criterion
from effnb.lab.paths import digest, root


@dataclass(frozen=True)
class Claim:
    """One registered claim; ``raw`` is its record as written in the file.

    Reference: agarwal2021precipice.
    """

    id: str
    kind: str
    primary: bool
    statement: str
    paper: str
    anchor: str
    criterion: Criterion
    conditions: tuple[Criterion, ...]
    raw: dict

    @property
    def registered_hash(self) -> str:
        """Digest of all that fixes the promise: statement, kind, criterion, conditions."""
        return digest({key: self.raw.get(key) for key in ("id", "statement", "kind", "criterion", "conditions")})

    @property
    def timed(self) -> bool:
        """Whether a ratio of times decides, which other work on the machine can move."""
        return self.kind == "cost" and self.criterion.interval == "order-statistic"

    @property
    def short(self) -> str:
        """The id without its system, ``A1``."""
        return self.id.split("/")[1]


@dataclass(frozen=True)
class ClaimSet:
    """All claims of one chapter, in the order of the file.

    Reference: agarwal2021precipice.
    """

    system: str
    title: str
    method: str
    claims: tuple[Claim, ...]

    def __getitem__(self, claim_id: str) -> Claim:
        for claim in self.claims:
            if claim_id in (claim.id, claim.short):
                return claim
        raise KeyError(f"{self.system} has no claim {claim_id!r}; it has {[c.short for c in self.claims]}")


@functools.cache
def _schema() -> dict:
    return json.loads(Path(__file__).with_name("claim.schema.json").read_text())


def validate(record: dict, definition: str, where: str) -> None:
    """Check ``record`` against ``definition`` (``registry`` or ``result``) of the schema.

    Raises:
        ValueError: naming ``where``, the field and the rule.

    >>> validate({}, "registry", "demo.yaml")
    Traceback (most recent call last):
    ...
    ValueError: demo.yaml: (top): 'schema' is a required property
    """
    schema = {"$defs": _schema()["$defs"], "$ref": f"#/$defs/{definition}"}
    errors = jsonschema.Draft202012Validator(schema).iter_errors(record)
    if error := jsonschema.exceptions.best_match(errors):
        field = "/".join(map(str, error.absolute_path)) or "(top)"
        raise ValueError(f"{where}: {field}: {error.message}")


def _claim(raw: dict) -> Claim:
    return Claim(
        id=raw["id"],
        kind=raw["kind"],
        primary=raw.get("primary", False),
        statement=raw["statement"],
        paper=raw["paper"],
        anchor=raw["anchor"],
        criterion=Criterion(**raw["criterion"]),
        conditions=tuple(Criterion(**c) for c in raw.get("conditions", [])),
        raw=raw,
    )


def parse(text: str, where: str) -> ClaimSet:
    """Read one claims file.

    Args:
        text: YAML.
        where: the file's name, for messages.

    Returns:
        The chapter's claims.

    Raises:
        ValueError: not valid YAML or against the schema; ids that repeat or name another system; not exactly one
            primary claim; ``interval: none`` for a kind other than ``exact``, or the reverse.

    >>> parse("schema: 1", "demo.yaml")
    Traceback (most recent call last):
    ...
    ValueError: demo.yaml: ...
    """
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {error}") from None
    validate(record, "registry", where)
    found = ClaimSet(record["system"], record["title"], record["method"], tuple(map(_claim, record["claims"])))
    ids = [claim.id for claim in found.claims]
    prefix = found.system.replace("_", "-") + "/"
    if len(set(ids)) < len(ids) or not all(i.startswith(prefix) for i in ids):
        raise ValueError(f"{where}: ids must be unique and start with {prefix!r}, got {ids}")
    if (primary := sum(claim.primary for claim in found.claims)) != 1:
        raise ValueError(f"{where}: exactly one claim must be primary, got {primary}")
    for claim in found.claims:
        if (claim.kind == "exact") != (claim.criterion.interval == "none"):
            raise ValueError(f"{where}: {claim.id}: kind exact and interval none belong together")
    return found


def systems() -> list[str]:
    """Names of all systems that have a claims file, in alphabetical order.

    >>> systems() == sorted(systems())
    True
    """
    return sorted(path.stem for path in (root() / "book" / "claims").glob("*.yaml"))


def load(system: str) -> ClaimSet:
    """The claims of one system.

    Args:
        system: name with underscores, as in ``book/claims/<system>.yaml``.

    Raises:
        ValueError: no such file, or the file breaks a rule (see :func:`parse`).

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
    """The claims of every system, in alphabetical order.

    >>> [s.system for s in load_all()] == systems()
    True
    """
    return [load(system) for system in systems()]
