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
    """Digest of the code cells; prose, outputs and metadata do not count.

    Args:
        path: a notebook.

    Raises:
        FileNotFoundError: no such file.
    """
    return digest([cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"])


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
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


def module_hash(name: str) -> str | None:
    """Digest of a module's code without comments and docstrings; ``None`` if there is no such module.

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
    """Names of the ``effnb`` modules that this process has loaded, and paths of the scripts in ``data/``.

    >>> "effnb.lab.run.stale" in loaded_modules()
    True
    """
    ours = {name for name, module in sys.modules.items() if name.split(".")[0] == "effnb" and module.__spec__}
    files = (Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None)))
    return sorted(ours | {f"data/{file.name}" for file in files if file.parent == root() / "data"})


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
