"""The staleness key: all that a chapter's figures depend on, as hashes; work kept under it; changes since a revision.

Finished work of a study lies in a folder named by the key, so a change of anything in it starts afresh; joblib writes a
result beside its place and renames it, so one whose writing was killed is never read.
"""

import ast
import functools
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from joblib import Memory

import effnb
from effnb.common import write_atomically
from effnb.lab.judge.claims import REGISTERED, Claim, Criterion, validated
from effnb.lab.judge.results import joined
from effnb.lab.paths import chapters, digest, root
from effnb.lab.run.parameters import parameters_of
from effnb.lab.run.process import git

#: Modules that show and start, but change no figure.
_NO_FIGURES = ("effnb.lab.publish", "effnb.lab.cli")
#: Variables by which the runner names a study's folder of finished work, and the file that tells how far a run is.
RESUME, PROGRESS = "EFFNB_RESUME", "EFFNB_PROGRESS"
F = TypeVar("F", bound=Callable)
_SPENT = "spent.json"
_now = {"done": 0, "calls": 0, "seconds": 0.0, "cpu": 0.0, "inside": False}


def notebook_hash(path: Path) -> str:
    """Return the digest of a notebook's code cells; prose, outputs and metadata do not count.

    Raises:
        FileNotFoundError: no such file.
    """
    # As JSON: every kernel imports this module, and nbformat takes seconds to import.
    cells = json.loads(Path(path).read_text())["cells"]
    return digest(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])


def module_hash(name: str) -> str | None:
    """Return the digest of a module's code without comments and docstrings; ``None`` if there is no such module.

    ``name`` is dotted, ``effnb.optim.avagrad``, or the path of a script in the checkout, ``data/score_nas.py``.

    >>> module_hash("effnb.no_such_module") is None
    True
    """
    path = root() / name
    if not name.endswith(".py"):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        path = Path(spec.origin) if spec and spec.origin else None
    if path is None or not path.is_file():
        return None
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(value=ast.Constant(value=str())), *rest]:
                node.body = rest or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


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

    Two equal keys mean that the figures need no new run. ``modules`` are those that the run loaded; ``parameters`` what
    was injected, by default into the running process, ``$EFFNB_PARAMETERS``.
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


# --- work that a cut-off study need not do again -------------------------------------------------------------------


def folder_of(system: str, parameters: Mapping[str, Any]) -> Path:
    """Return where finished work of a chapter with these parameters and today's code is kept.

    >>> folder_of("avagrad", {"epochs": 1}) == folder_of("avagrad", {"epochs": 2})
    False
    """
    key = digest(staleness_key(system, all_modules(), parameters))
    return root() / "_build" / "resume" / system / key[:16]


def resumable(function: F | None = None, *, calls: int | None = None) -> F:
    """Make a function keep its results through a study that is cut off; elsewhere return the function as it is.

    What it returns must follow from its arguments and the chapter's parameters alone, and be picklable as they are:
    one seed, or one arm of one seed, is a good piece. Works for functions of notebook cells, and as a decorator.

    Args:
        function: what to keep the results of.
        calls: how often the run will call it, for the time that remains.

    >>> resumable(abs)(-2)
    2
    """
    if function is None:
        return functools.partial(resumable, calls=calls)
    if not (folder := os.environ.get(RESUME)):
        return function
    kept = Memory(folder, verbose=0).cache(function)
    _now["calls"] += calls or 0

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        known, begun = kept.check_call_in_cache(*args, **kwargs), (time.perf_counter(), time.process_time())
        outer, _now["inside"] = not _now["inside"], True
        try:
            found = kept(*args, **kwargs)
        finally:
            _now["inside"] = not outer
        if outer and not known:
            before = earlier()
            _now["seconds"] += time.perf_counter() - begun[0]
            _now["cpu"] += time.process_time() - begun[1]
            spent = {"seconds": before[0] + _now["seconds"], "cpu": before[1] + _now["cpu"]}
            write_atomically(Path(folder) / _SPENT, json.dumps(spent))
        if calls:
            _now["done"] += 1
            _tell()
        return found

    _tell()
    return call


def _tell() -> None:
    if path := os.environ.get(PROGRESS):
        write_atomically(path, json.dumps({"done": _now["done"], "calls": _now["calls"]}))


@functools.cache
def earlier() -> tuple[float, float]:
    """Return the seconds and CPU seconds that cut-off runs before this process spent on what is now read from disk."""
    folder = os.environ.get(RESUME)
    try:
        spent = json.loads((Path(folder) / _SPENT).read_text()) if folder else {}
        return float(spent.get("seconds", 0)), float(spent.get("cpu", 0))
    except (OSError, ValueError):
        return 0.0, 0.0


# --- since a revision ----------------------------------------------------------------------------------------------


def diff(revision: str) -> list[str]:
    """Return what changed in claims and committed verdicts since a git revision, one line a change.

    Raises:
        ValueError: git can't resolve ``revision`` to a commit, or is not there.
    """
    if git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}") is None:
        raise ValueError(f"revision must be one that git knows, got {revision!r}")
    rows, studies = joined(), {row["claim"].id: row["entry"] for row in joined(profile="study")}
    listed = (git("ls-tree", "--name-only", f"{revision}:book/claims") or "").splitlines()
    lines = []
    for system in sorted({row["system"] for row in rows} | {n.removesuffix(".yaml") for n in listed if ".yaml" in n}):
        now = {row["claim"].id: row for row in rows if row["system"] == system}
        then = _by_id(git("show", f"{revision}:book/claims/{system}.yaml"), yaml.safe_load)
        today = root() / "book" / "claims" / f"{system}.yaml"
        raw = _by_id(today.read_text() if today.is_file() else None, yaml.safe_load)
        was = {p: _by_id(git("show", f"{revision}:book/results/{p}/{system}.json")) for p in ("book", "study")}
        for ident in dict.fromkeys([*now, *then]):
            if ident not in now or ident not in then:
                lines.append(f"{ident}: {'new claim' if ident in now else 'claim removed'}")
            else:
                lines += [f"{ident}: {change}" for change in _changes(then[ident], raw[ident])]
            entries = {"book": now[ident]["entry"] if ident in now else None, "study": studies.get(ident)}
            for profile, entry in entries.items():
                old, new = ((e or {}).get("verdict", "none") for e in (was[profile].get(ident), entry))
                if old != new:
                    lines.append(f"{ident}: {old} -> {new}{', at study scale' * (profile == 'study')}")
    return lines


def _by_id(text: str | None, parse: Callable = json.loads) -> dict[str, dict]:
    """Return the claims or entries of a file by id, untyped: an older file may break today's rules."""
    try:
        found = parse(text or "{}")["claims"]
        return dict(found) if isinstance(found, dict) else {claim["id"]: claim for claim in found}
    except (yaml.YAMLError, ValueError, TypeError, KeyError):
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
