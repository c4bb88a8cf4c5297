"""Where things stand in a checkout, and how a file is written so that a kill leaves no half of it."""

import hashlib
import json
import os
import tempfile
from pathlib import Path


def root() -> Path:
    """The checkout: ``$EFFNB_ROOT``, else the nearest folder above here or the working folder that holds ``_toc.yml``.

    Raises:
        FileNotFoundError: neither is inside a checkout of the book.

    >>> (root() / "pyproject.toml").is_file()
    True
    """
    if configured := os.environ.get("EFFNB_ROOT"):
        return Path(configured)
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "_toc.yml").is_file() and (folder / "notebooks").is_dir():
                return folder
    raise FileNotFoundError("no checkout of the book around the working folder: set EFFNB_ROOT to one")


def results_root() -> Path:
    """Where chapters write what they measure: ``$EFFNB_RESULTS``, else ``_build/results`` of the checkout.

    >>> results_root().name
    'results'
    """
    return Path(os.environ.get("EFFNB_RESULTS") or root() / "_build" / "results")


def committed_results() -> Path:
    """The results that the book publishes, ``book/results`` of the checkout.

    >>> committed_results().parts[-2:]
    ('book', 'results')
    """
    return root() / "book" / "results"


def write_atomically(path: Path, text: str | bytes) -> None:
    """Write ``text`` to a temporary neighbour of ``path``, then rename it into place.

    Args:
        path: the file; its folder is made if need be.
        text: the whole content; strings as UTF-8.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> write_atomically(folder / "a.txt", "done"); (folder / "a.txt").read_text()
    'done'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def digest(content: object) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces).

    Raises:
        ValueError: the value holds NaN or infinity, which JSON has not.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
