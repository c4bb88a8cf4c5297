"""A new chapter from the skeleton: notebook, module, test, claims and benchmark, all in the house style."""

import re
from importlib import resources
from pathlib import Path
from string import Template

import nbformat

from effnb.common import write_atomically
from effnb.lab.paths import root


def _cells(text: str) -> list:
    """Cells from a text in which each begins with a line ``%% markdown`` or ``%% code tag,tag``."""
    cells = []
    for number, part in enumerate(re.split(r"^%% ", text, flags=re.MULTILINE)[1:], start=1):
        head, _, source = part.partition("\n")
        kind, _, tags = head.partition(" ")
        metadata = {"tags": tags.split(",")} if tags else {}
        make = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        cells.append(make(source.strip(), metadata=metadata, id=f"c{number:02d}"))
    return cells


def _notebook(text: str) -> str:
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.writes(nbformat.v4.new_notebook(cells=_cells(text), metadata=metadata)) + "\n"


def create(name: str, part: str, number: int, title: str | None = None) -> list[Path]:
    """Make the files of a new chapter; nothing that exists is touched.

    Args:
        name: the system, lower case with underscores.
        part: package of its part, ``optim`` for ``effnb.optim``; made if it is new.
        number: the chapter's number, 1 to 99.
        title: short title; default from ``name``.

    Returns:
        The files made.

    Raises:
        ValueError: a name or part that is no identifier in lower case, a number out of range.
        FileExistsError: one of the files is there already; none is then made.

    Reference: agarwal2021precipice.
    """
    for argument, value in (("name", name), ("part", part)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", value):
            raise ValueError(f"{argument} must be lower case letters, digits and underscores, got {value!r}")
    if not 1 <= number <= 99:
        raise ValueError(f"number must be in 1..99, got {number}")
    words = {
        "name": name,
        "part": part,
        "number": f"{number:02d}",
        "title": title or name.replace("_", " ").capitalize(),
        "hyphens": name.replace("_", "-"),
        "verb": f"{name}_value",
    }
    targets = {
        "module.py.txt": f"effnb/{part}/{name}.py",
        "test.py.txt": f"tests/test_{name}.py",
        "claims.yaml.txt": f"book/claims/{name}.yaml",
        "bench.py.txt": f"benchmarks/bench_{name}.py",
        "notebook.txt": f"notebooks/{number:02d}_{name}.ipynb",
    }
    if taken := [path for path in targets.values() if (root() / path).exists()]:
        raise FileExistsError(f"exists already: {', '.join(taken)}")
    made = []
    for template, target in targets.items():
        text = Template((resources.files(__package__) / template).read_text()).substitute(words)
        write_atomically(root() / target, _notebook(text) if target.endswith(".ipynb") else text)
        made.append(root() / target)
    init = root() / "effnb" / part / "__init__.py"
    if not init.exists():
        public = f'"""Part `{part}` of the book."""\n\nfrom effnb.{part}.{name} import {words["verb"]}\n'
        write_atomically(init, public + f'\n__all__ = ["{words["verb"]}"]\n')
        made.append(init)
    profiles = root() / "notebooks" / "profiles.yaml"
    sets = f"\n{name}:\n  smoke: {{seeds: [0]}}\n  paper: {{seeds: [0, 1, 2, 3, 4]}}\n"
    write_atomically(profiles, profiles.read_text() + sets)
    return made
