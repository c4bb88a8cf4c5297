"""Where things stand in a checkout, and the digest that names a content."""

import hashlib
import json
import os
from pathlib import Path


def root() -> Path:
    """Return the checkout: ``$EFFNB_ROOT``, else the nearest folder around here or the package that holds ``_toc.yml``.

    Raises:
        FileNotFoundError: ``$EFFNB_ROOT`` is no checkout of the book, or neither of the others is inside one.

    >>> (root() / "pyproject.toml").is_file()
    True
    """
    if configured := os.environ.get("EFFNB_ROOT"):
        folder = Path(configured).resolve()  # workers run elsewhere: a relative path would change its meaning
        if not (folder / "_toc.yml").is_file():
            raise FileNotFoundError(f"EFFNB_ROOT must be a checkout of the book, with a _toc.yml, got {configured!r}")
        return folder
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "_toc.yml").is_file() and (folder / "notebooks").is_dir():
                return folder
    raise FileNotFoundError("no checkout of the book around the working folder: set EFFNB_ROOT to one")


def chapters() -> dict[str, Path]:
    """Return system name to notebook, in the order of the book.

    >>> all(path.name.endswith(f"_{system}.ipynb") for system, path in chapters().items())
    True
    """
    return {path.stem.split("_", 1)[1]: path for path in sorted((root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))}


def chapter_path(system: str) -> Path:
    """Return the notebook of a chapter.

    >>> chapter_path("no_such_system")
    Traceback (most recent call last):
    ...
    ValueError: system must be one of [...], got 'no_such_system'
    """
    known = chapters()
    if system not in known:
        raise ValueError(f"system must be one of {list(known)}, got {system!r}")
    return known[system]


def results_root() -> Path:
    """Return where chapters write what they measure: ``$EFFNB_RESULTS``, else ``_build/results`` of the checkout.

    >>> results_root().name
    'results'
    """
    return Path(os.environ.get("EFFNB_RESULTS") or root() / "_build" / "results")


def committed_results() -> Path:
    """Return the folder of the results that the book publishes, ``book/results`` of the checkout.

    >>> committed_results().parts[-2:]
    ('book', 'results')
    """
    return root() / "book" / "results"


def digest(content: object) -> str:
    """Return the SHA-256 of a JSON value in canonical form (sorted keys, no spaces); ValueError for NaN and infinity.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
