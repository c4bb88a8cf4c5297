"""The staleness key: everything that a chapter's figures depend on, as hashes."""

import ast
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat

from effnb.lab.paths import digest, root


def chapters() -> dict[str, Path]:
    """System name to notebook, in the order of the book.

    >>> all(path.name.endswith(f"_{system}.ipynb") for system, path in chapters().items())
    True
    """
    return {path.stem.split("_", 1)[1]: path for path in sorted((root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))}


def notebook_hash(path: Path) -> str:
    """Digest of the cells' types and sources; outputs and metadata do not count.

    Args:
        path: a notebook.

    Raises:
        FileNotFoundError: no such file.
    """
    cells = nbformat.read(path, as_version=4).cells
    return digest([[cell.cell_type, cell.source] for cell in cells])


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                node.body = body[1:] or [ast.Pass()]
    return tree


def module_hash(name: str) -> str | None:
    """Digest of a module's code without comments and docstrings; ``None`` if there is no such module.

    Args:
        name: dotted name, ``effnb.optim.avagrad``.

    >>> module_hash("effnb.no_such_module") is None
    True
    """
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return None
    tree = _without_docstrings(ast.parse(Path(spec.origin).read_text()))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def loaded_modules() -> list[str]:
    """Names of the ``effnb`` modules that this process has loaded.

    >>> "effnb.lab.key" in loaded_modules()
    True
    """
    return sorted(name for name in sys.modules if name.split(".")[0] == "effnb" and sys.modules[name].__spec__)


def staleness_key(system: str, modules: Iterable[str], parameters: dict | None = None) -> dict:
    """What a result depends on: notebook, parameters, loaded modules, lock file and Python's minor version.

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
        "parameters": parameters,
        "modules": {name: module_hash(name) for name in sorted(modules)},
        "lock": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def stale_parts(system: str, result: dict | None) -> list[str]:
    """Which parts of the key have changed since ``result`` was written, in words; empty if none.

    Args:
        system: the chapter.
        result: its result record, or ``None`` if it was never run.

    >>> stale_parts("avagrad", None)
    ['never run']
    """
    if result is None:
        return ["never run"]
    old = result.get("key") or {}
    if not old:
        return ["result without key"]
    new = staleness_key(system, old["modules"], old["parameters"])
    changed = [part for part in ("notebook", "lock", "python") if old[part] != new[part]]
    return changed + [name for name, value in new["modules"].items() if value != old["modules"][name]]
