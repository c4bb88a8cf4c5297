"""The staleness key: everything that a chapter's figures depend on, as hashes; and what changed since a revision."""

import ast
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

import effnb
from effnb.lab.judge.claims import REGISTERED, Claim, Criterion, validated
from effnb.lab.judge.results import joined
from effnb.lab.paths import chapters, digest, root
from effnb.lab.run.parameters import parameters_of
from effnb.lab.run.process import git

#: Modules that show and start, but change no figure.
_NO_FIGURES = ("effnb.lab.publish", "effnb.lab.cli")


def notebook_hash(path: Path) -> str:
    """Return the digest of the code cells; prose, outputs and metadata do not count.

    Args:
        path: a notebook.

    Raises:
        FileNotFoundError: no such file.
    """
    # As JSON: every kernel imports this module, and nbformat takes seconds to import.
    cells = json.loads(Path(path).read_text())["cells"]
    return digest(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                node.body = body[1:] or [ast.Pass()]
    return tree


def _source(name: str) -> Path | None:
    if name.endswith(".py"):
        return path if (path := root() / name).is_file() else None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin else None


def module_hash(name: str) -> str | None:
    """Return the digest of a module's code without comments and docstrings; ``None`` if there is no such module.

    Args:
        name: dotted name, ``effnb.optim.avagrad``, or the path of a script in the checkout, ``data/score_nas.py``.

    >>> module_hash("effnb.no_such_module") is None
    True
    """
    path = _source(name)
    if path is None:
        return None
    return hashlib.sha256(ast.dump(_without_docstrings(ast.parse(path.read_text()))).encode()).hexdigest()


def loaded_modules() -> list[str]:
    """Return the ``effnb`` modules that this process has loaded and that figures may depend on, and ``data/`` scripts.

    >>> "effnb.lab.run.stale" in loaded_modules()
    True
    """
    ours = {name for name, module in sys.modules.items() if name.split(".")[0] == "effnb" and module.__spec__}
    files = (Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None)))
    scripts = {f"data/{file.name}" for file in files if file.parent == root() / "data"}
    return sorted(name for name in ours | scripts if not name.startswith(_NO_FIGURES))


def all_modules() -> list[str]:
    """Return every module of the package that figures may depend on, loaded or not.

    >>> "effnb.optim" in all_modules(), "effnb.lab.cli" in all_modules()
    (True, False)
    """
    home = Path(effnb.__file__).parent
    names = (".".join(("effnb", *path.relative_to(home).with_suffix("").parts)) for path in home.rglob("*.py"))
    return sorted(name for n in names if not (name := n.removesuffix(".__init__")).startswith(_NO_FIGURES))


def staleness_key(system: str, modules: Iterable[str], parameters: Mapping | None = None) -> dict:
    """Return what a result depends on: notebook, parameters, modules, lock file and Python's minor version.

    Args:
        system: the chapter.
        modules: names of the ``effnb`` modules that the run loaded.
        parameters: injected parameters; default those of the running process, ``$EFFNB_PARAMETERS``.

    Returns:
        A JSON-ready dictionary; two equal keys mean that the figures need no new run.
    """
    if parameters is None:
        parameters = json.loads(os.environ.get("EFFNB_PARAMETERS", "{}"))
    path, lock = chapters().get(system), root() / "requirements.lock"
    return {
        "notebook": notebook_hash(path) if path else None,
        "parameters": dict(parameters),
        "modules": {name: module_hash(name) for name in sorted(modules)},
        "lock": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def stale_parts(system: str, result: Mapping | None) -> list[str]:
    """Return which parts of the key have changed since ``result`` was written, in words; empty if none.

    Parameters count as changed where they are not those of the result's profile.

    Args:
        system: the chapter.
        result: its result record, or ``None`` if it was never run.

    >>> stale_parts("avagrad", None)
    ['never run']
    """
    if result is None:
        return ["never run"]
    old = result.get("key") or {}
    if not old.get("modules"):
        return ["result without key"]
    try:
        parameters = parameters_of(system, result["profile"])
    except ValueError:
        parameters = None  # the profile is gone
    new = staleness_key(system, old["modules"], parameters or {}) | {"parameters": parameters}
    changed = [part for part in ("notebook", "parameters", "lock", "python") if old.get(part) != new[part]]
    return changed + [name for name, value in new["modules"].items() if value != old["modules"][name]]


# --- since a revision ----------------------------------------------------------------------------------------------


def diff(revision: str) -> list[str]:
    """Return what changed in claims and committed verdicts since a git revision, one line a change.

    Args:
        revision: anything that git resolves to a commit.

    Raises:
        ValueError: git does not know ``revision``, or is not there.
    """
    if git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}") is None:
        raise ValueError(f"revision must be one that git knows, got {revision!r}")
    rows, studies = joined(), {row["claim"].id: row["entry"] for row in joined(profile="study")}
    lines = []
    for system in sorted({row["system"] for row in rows} | set(_systems_at(revision))):
        now = {row["claim"].id: row for row in rows if row["system"] == system}
        then = _claims_in(git("show", f"{revision}:book/claims/{system}.yaml"))
        today = root() / "book" / "claims" / f"{system}.yaml"
        raw = _claims_in(today.read_text() if today.is_file() else None)
        was = {p: _verdicts_in(git("show", f"{revision}:book/results/{p}/{system}.json")) for p in ("book", "study")}
        for ident in [*now, *(i for i in then if i not in now)]:
            if ident not in now or ident not in then:
                lines.append(f"{ident}: {'new claim' if ident in now else 'claim removed'}")
            else:
                lines += [f"{ident}: {change}" for change in _changes(then[ident], raw[ident])]
            entries = {"book": now[ident]["entry"] if ident in now else None, "study": studies.get(ident)}
            for profile, entry in entries.items():
                old, new = was[profile].get(ident, "none"), entry["verdict"] if entry else "none"
                if old != new:
                    lines.append(f"{ident}: {old} -> {new}{', at study scale' * (profile == 'study')}")
    return lines


def _systems_at(revision: str) -> list[str]:
    listed = git("ls-tree", "--name-only", f"{revision}:book/claims") or ""
    return [Path(name).stem for name in listed.splitlines() if name.endswith(".yaml")]


def _claims_in(text: str | None) -> dict[str, dict]:
    """Return the claims of a file by id, untyped: an older file may break today's rules."""
    try:
        found = (yaml.safe_load(text or "") or {}).get("claims", [])
        return {claim["id"]: claim for claim in found}
    except (yaml.YAMLError, AttributeError, TypeError, KeyError):
        return {}


def _verdicts_in(text: str | None) -> dict[str, str]:
    try:
        return {ident: entry["verdict"] for ident, entry in json.loads(text or "{}").get("claims", {}).items()}
    except (ValueError, AttributeError, TypeError, KeyError):
        return {}


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return what was registered otherwise, typed where both can be read so, else as it stands in the files."""
    added = ["as_stated"] if "as_stated" in new and "as_stated" not in old else []
    # The first edition had no such field; whatever it is set to here is left out below.
    old = {field: new[field] for field in added} | dict(old)
    try:
        before, after = (validated(Claim, claim, "claim").model_dump(mode="json") for claim in (old, new))
    except ValueError:
        before, after = old, new
    fields = [field for field in REGISTERED if before.get(field) != after.get(field)]
    lines = [f"registered {field}" for field in added]
    if "criterion" in fields:
        try:
            told = [validated(Criterion, claim["criterion"], "criterion").text() for claim in (old, new)]
        except (ValueError, KeyError):
            told = ["", ""]
        if told[0] != told[1]:
            fields.remove("criterion")
            lines.append(f"criterion {told[0]!r} -> {told[1]!r}")
    return lines + ([f"changed {', '.join(fields)}"] if fields else [])
