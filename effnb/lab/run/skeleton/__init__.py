"""A new chapter from the skeleton, in the house style: all its files, and its entries in those that exist.

What must be filled in says PLACEHOLDER; a test fails as long as one is left.
"""

import ast
import datetime
import itertools
import keyword
import re
from pathlib import Path

import nbformat
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from effnb.common import write_atomically
from effnb.lab.paths import chapters, root

#: Package of a part to the part's caption in the table of contents.
PARTS = {
    "solvers": "I · Solvers",
    "compress": "II · Compression",
    "sparse": "III · Sparse networks",
    "nas": "IV · Architecture",
    "anytime": "IV · Architecture",
    "models": "IV · Architecture",
    "optim": "V · Optimisers",
    "finetune": "VI · Fine-tuning",
    "unlearn": "VII · Unlearning",
    "dynamic": "VIII · Dynamic inference",
    "edge": "IX · Graphs and the edge",
}
_PROFILES = "\n{name}:\n  smoke: {{seeds: [0]}}\n  study: {{seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}}\n"
_SOURCE = """
@misc{{{key},
  author = {{PLACEHOLDER, Author}},
  title = {{PLACEHOLDER for the paper of {name}}},
  year = {{{year}}}
}}
"""
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
)


def create(name: str, part: str, number: int, title: str | None = None, folder: bool = False) -> list[Path]:
    """Make the files of a new chapter and its entries; return them. Nothing that exists is replaced.

    Args:
        name: the system, lower case with underscores.
        part: package of its part, ``optim`` for ``effnb.optim``; made if it is new.
        number: the chapter's number, 1 to 99.
        title: short title, one line; default from ``name``.
        folder: whether the module is a folder, for a system of several files.

    Raises:
        ValueError: a name or part that Python can't import, a number out of range or taken, a title of several lines.
        FileExistsError: one of the files is there already; none is then made.
    """
    _check(name, part, number, title)
    title, today = title or name.replace("_", " ").capitalize(), datetime.date.today()
    words = {"name": name, "part": part, "number": f"{number:02d}", "title": title, "today": today.isoformat()}
    words |= {"hyphens": name.replace("_", "-"), "verb": f"{name}_value", "key": f"{name}{today.year}placeholder"}
    imports = ["from effnb.lab.measure.timing import paired_ratio", f"from effnb.{part} import {words['verb']}"]
    words["bench_imports"] = "\n".join(sorted(imports))
    # A title may hold anything: YAML quotes it, and no Python file shows it.
    words |= {"yaml_title": _quoted(title), "yaml_method": _quoted(f"{title}: PLACEHOLDER for the table of methods")}
    module = f"effnb/{part}/{name}/{name}.py" if folder else f"effnb/{part}/{name}.py"
    targets = {
        "module.py.j2": module,
        "test.py.j2": f"tests/test_{name}.py",
        "claims.yaml.j2": f"book/claims/{name}.yaml",
        "bench.py.j2": f"benchmarks/bench_{name}.py",
        "notebook.md.j2": f"notebooks/{number:02d}_{name}.ipynb",
    }
    texts = {target: _TEMPLATES.get_template(template).render(words) for template, target in targets.items()}
    texts[targets["notebook.md.j2"]] = _notebook(texts[targets["notebook.md.j2"]])
    if folder:
        inside = f"effnb.{part}.{name}.{name}"
        start = f'"""PLACEHOLDER: what {name} is."""\n\nfrom {inside} import {words["verb"]}\n'
        texts[f"effnb/{part}/{name}/__init__.py"] = f'{start}\n__all__ = ["{words["verb"]}"]\n'
    places = (*texts, f"effnb/{part}/{name}", f"effnb/{part}/{name}.py")
    if taken := [path for path in places if (root() / path).exists()]:
        raise FileExistsError(f"exists already: {', '.join(taken)}")
    # Every entry before any file: a page that can't be extended must stop the whole.
    api, index = f"book/api/{part}.md", "book/api/index.md"
    head, section = f"# effnb.{part}\n\nPLACEHOLDER: what the part holds.\n", _TEMPLATES.get_template("api.md.j2")
    texts |= {
        "notebooks/profiles.yaml": _old("notebooks/profiles.yaml") + _PROFILES.format(**words),
        "book/references.bib": _old("book/references.bib") + _SOURCE.format(**words, year=today.year),
        "_toc.yml": _contents(_old("_toc.yml"), part, number, f"notebooks/{number:02d}_{name}", title),
        f"effnb/{part}/__init__.py": _part_init(_old(f"effnb/{part}/__init__.py"), part, name),
        api: f"{_old(api) or head}\n{section.render(words)}",
    }
    if not _old(api):
        rows, row = _old(index).splitlines(), f"| [`effnb.{part}`]({part}.md) | PLACEHOLDER |"
        at = next((k for k, line in enumerate(rows) if line.startswith("| [`effnb.lab`]")), len(rows))
        texts[index] = "\n".join([*rows[:at], row, *rows[at:]]) + "\n"
    for target, text in texts.items():
        write_atomically(root() / target, text)
    return [root() / target for target in texts]


def _check(name: str, part: str, number: int, title: str | None) -> None:
    for argument, value in (("name", name), ("part", part)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", value) or keyword.iskeyword(value) or keyword.issoftkeyword(value):
            rule = "lower case letters, digits and underscores, no word of Python"
            raise ValueError(f"{argument} must be {rule}, got {value!r}")
    if part == "lab":
        raise ValueError("part must be a package of methods, got 'lab'")
    if not 1 <= number <= 99:
        raise ValueError(f"number must be in 1..99, got {number}")
    if same := [path.name for path in chapters().values() if path.name.startswith(f"{number:02d}_")]:
        raise ValueError(f"number must be new, got {number}, which {same[0]} has")
    if name in chapters():
        raise FileExistsError(f"exists already: chapter {name}")
    if title is not None and (not title.strip() or not title.isprintable()):
        raise ValueError(f"title must be one line of text, got {title!r}")


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, width=10_000, allow_unicode=True, default_style='"').strip()


def _old(path: str) -> str:
    return (root() / path).read_text() if (root() / path).is_file() else ""


def _notebook(text: str) -> str:
    """Return a notebook from a text in which each cell begins with a line ``%% markdown`` or ``%% code tag,tag``."""
    cells = []
    for count, part in enumerate(re.split(r"^%% ", text, flags=re.MULTILINE)[1:], start=1):
        head, _, source = part.partition("\n")
        kind, _, tags = head.partition(" ")
        make = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        cells.append(make(source.strip(), metadata={"tags": tags.split(",")} if tags else {}, id=f"c{count:02d}"))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata=metadata)) + "\n"


def _part_init(old: str, part: str, name: str) -> str:
    """Return the part's ``__init__`` with the new system's names, imports in order, all else as it was."""
    if not old:
        old = f'"""Part {PARTS.get(part, part)} of the book."""\n\n__all__ = []\n'
    lines, nodes = old.splitlines(), [n for n in ast.parse(old).body if isinstance(n, ast.ImportFrom)]
    imports = {n.module: "\n".join(lines[n.lineno - 1 : n.end_lineno]) for n in nodes}
    modules = [alias.name for n in nodes if n.module == f"effnb.{part}" for alias in n.names]
    imports[f"effnb.{part}"] = f"from effnb.{part} import {', '.join(sorted([*modules, name]))}"
    imports[f"effnb.{part}.{name}"] = f"from effnb.{part}.{name} import *"
    block = "\n".join(imports[module] for module in sorted(imports))
    start, end = (nodes[0].lineno - 1, nodes[-1].end_lineno) if nodes else (2, 2)
    text = "\n".join([*lines[:start], block, *([] if nodes else [""]), *lines[end:]]) + "\n"
    before, listed, after = text.partition("__all__ = [")
    if not listed:
        return f"{text}\n__all__ = [*{name}.__all__]\n"
    inner, _, rest = after.partition("]")
    if inner.endswith("\n"):
        return f"{before}{listed}{inner}    *{name}.__all__,\n]{rest}"
    return f"{before}{listed}{f'{inner}, ' if inner else ''}*{name}.__all__]{rest}"


def _contents(old: str, part: str, number: int, file: str, title: str) -> str:
    """Return the table of contents with the chapter in its part, in order; lines that are there stay as they are."""
    lines, caption = old.splitlines(), PARTS.get(part, part)
    if "parts:" not in lines:
        raise ValueError("_toc.yml must have parts")
    entry = [f"      - file: {file}", f"        title: {_quoted(f'{number:02d} {title}')}"]
    head, place = [f"  - caption: {_quoted(caption)}", "    chapters:"], len(lines)
    starts = [k for k, line in enumerate(lines) if line.startswith("  - caption:")]
    for start, end in itertools.pairwise([*starts, len(lines)]):
        numbers = {k: int(m[1]) for k in range(start, end) if (m := re.search(r"notebooks/(\d\d)_", lines[k]))}
        later = [k for k, n in numbers.items() if n > number]
        if yaml.safe_load(lines[start].strip()[2:])["caption"] == caption:
            head, place = [], later[0] if later else end
            break
        # A part that is not there yet: before the first part with a later chapter, else after the last with any.
        if later:
            place = start
            break
        if numbers:
            place = end
    lines[place:place] = head + entry
    page = f"          - file: book/api/{part}"
    listed = [k for k, line in enumerate(lines) if "file: book/api/" in line]
    if listed and page not in lines:
        lines.insert(max(k for k in listed if "api/lab" not in lines[k]) + 1, page)
    return "\n".join(lines) + "\n"
