"""Parameters of chapters: their cells, the sets in ``notebooks/profiles.yaml``, values typed on a command line.

One parser and one check serve ``run -p``, ``sweep --grid`` and ``bench -p``: an unknown name, or a value of another
type than the chapter's, is refused before anything runs.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import JsonValue

from effnb.common import near
from effnb.lab.judge.claims import validated
from effnb.lab.judge.results import PROFILES
from effnb.lab.paths import chapter_path, root

_WORDS = {"true": True, "false": False, "null": None, "none": None}
_KINDS = {"bool": bool, "int": int, "float": (int, float), "str": str, "list": list, "dict": dict}
_MOST_SEEDS, _SEED_LIMIT = 10_000, 2**32


class Known(NamedTuple):
    """What a chapter says of one parameter: its type (``float``, ``list[int]``; empty if not said) and its default."""

    kind: str
    default: Any


def known(system: str) -> dict[str, Known]:
    """Return the parameters of a chapter, as its parameters cell declares them.

    Raises:
        ValueError: unknown system, or a notebook without a cell tagged ``parameters`` that declares some: a profile
            would change nothing.

    >>> known("avagrad")["epochs"].kind
    'int'
    """
    import papermill  # here: every kernel imports this module for its staleness key, and papermill takes long

    notebook = chapter_path(system)
    if not (found := papermill.inspect_notebook(str(notebook))):
        raise ValueError(f"{notebook.name} must have a cell with the tag 'parameters' that declares some")
    return {name: _known(about["inferred_type_name"], about["default"]) for name, about in found.items()}


def arguments(path: Path) -> dict[str, Known]:
    """Return the arguments of the function ``run`` in a file that is not imported, in the form of :func:`known`.

    Raises:
        ValueError: the file has no such function, or is no Python.
    """
    try:
        body = ast.parse(path.read_text()).body
    except SyntaxError as error:
        raise ValueError(f"{path.name}, line {error.lineno}: {error.msg}") from None
    found = [node.args for node in body if isinstance(node, ast.FunctionDef) and node.name == "run"]
    if not found:
        raise ValueError(f"{path.name} must have a function run()")
    (*_, its) = found
    required = [None] * (len(its.args) - len(its.defaults))
    pairs = zip([*its.args, *its.kwonlyargs], [*required, *its.defaults, *its.kw_defaults], strict=True)
    return {a.arg: _known(*(ast.unparse(node) if node else "" for node in (a.annotation, d))) for a, d in pairs}


def _known(kind: str, default: str) -> Known:
    kind = "" if kind == "None" else kind.replace(" ", "")
    try:
        value = ast.literal_eval(default)
    except (ValueError, SyntaxError):
        return Known(kind, None)
    return Known(kind or ("" if value is None else type(value).__name__), value)


def checked(values: Mapping[str, Any], declared: Mapping[str, Known], where: str) -> dict[str, Any]:
    """Return name to value as ``declared`` (see :func:`known`), whole numbers for ``float`` parameters as floats.

    ``where`` says whose parameters they are, for messages.

    Raises:
        ValueError: a name that is not declared, or a value of another type than the declared one.

    >>> checked({"lr": 1}, {"lr": Known("float", 0.1)}, "demo")
    {'lr': 1.0}
    >>> checked({"lr": "big"}, {"lr": Known("float", 0.1)}, "demo")
    Traceback (most recent call last):
    ...
    ValueError: lr of demo must be of type float, got 'big'
    """
    found = {}
    for name, value in values.items():
        if name not in declared:
            hint = near(name, list(declared))
            raise ValueError(f"parameters of {where} must be among {sorted(declared)}, got {name!r}; {hint}")
        kind, default = declared[name]
        if not _fits(value, kind, default):
            raise ValueError(f"{name} of {where} must be of type {kind}, got {value!r}")
        if name == "seeds" and (not value or any(not 0 <= seed < _SEED_LIMIT for seed in value)):
            raise ValueError(f"seeds of {where} must be whole numbers from 0, at least one, got {value!r}")
        found[name] = float(value) if kind == "float" and isinstance(value, int) else value
    return found


def _fits(value: Any, kind: str, default: Any) -> bool:
    base, _, inner = kind.partition("[")
    if value is None:
        return default is None
    if base not in _KINDS:
        return True  # a type that the command line can't spell: the notebook has the word
    if not isinstance(value, _KINDS[base]) or (isinstance(value, bool) and base != "bool"):
        return False
    if base != "list":
        return True
    if inner:
        return all(_fits(element, inner.removesuffix("]"), None) for element in value)
    # Whatever kinds of elements the default has, numbers of all kinds being one.
    kinds = {"float" if type(e) in (int, float) else type(e).__name__ for e in default or ()}
    return not kinds or all(any(_fits(element, k, None) for k in kinds) for element in value)


def profiles(system: str) -> dict[str, dict[str, Any]]:
    """Return the parameter sets of one chapter in ``notebooks/profiles.yaml``.

    Raises:
        ValueError: the file is no YAML, or the chapter's entry is not a mapping of profiles to parameters.
    """
    path = root() / "notebooks" / "profiles.yaml"
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: must map chapters to profiles, got {type(content).__name__}")
    # One entry only: a mistake in another chapter's must not stop this one.
    return validated(dict[str, dict[str, JsonValue]], content.get(system, {}), f"{path.name}: {system}")


def parameters_of(system: str, profile: str) -> dict[str, Any]:
    """Return the parameters that a profile injects; the ``book`` profile is the notebook's own defaults.

    Raises:
        ValueError: the chapter has no such profile, or the file breaks a rule (see :func:`profiles`).

    >>> parameters_of("avagrad", "book")
    {}
    """
    if profile == "book":
        return {}
    sets = {name: values for name, values in profiles(system).items() if name in PROFILES}
    if profile not in sets:
        raise ValueError(f"profile of {system} must be one of {['book', *sets]}, got {profile!r}")
    return {"profile": profile} | sets[profile]


def injected(system: str, profile: str, further: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return everything that is injected into a chapter: the profile's parameters, and ``further`` over them, checked.

    Raises:
        ValueError: as in what it calls; a ``profile`` in ``further``: one's figures would be published as another's.
    """
    declared, values = known(system), parameters_of(system, profile)
    if "profile" in (further or {}):
        raise ValueError("profile is chosen by --profile, not as a parameter")
    values = checked(values, declared, f"{system} at {profile} (profiles.yaml)")
    if values.get("profile", profile) != profile:
        raise ValueError(f"profiles.yaml: profile of {system} at {profile} must be {profile!r}, its own name")
    return values | checked(further or {}, declared, system)


def parse_value(text: str) -> Any:
    """Return the value of a Python literal, of ``true``, ``false``, ``null``, or of a bare word, which is text.

    Raises:
        ValueError: an unfinished literal, or a kind of value that a parameters cell can't hold (sets, bytes, complex).

    >>> parse_value("1e-2"), parse_value("(8, 16)"), parse_value("fashion-mnist"), parse_value("true")
    (0.01, [8, 16], 'fashion-mnist', True)
    """
    word = text.strip()
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    try:
        return json.loads(json.dumps(ast.literal_eval(word)))  # papermill has no tuples, and JSON makes lists of them
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        if isinstance(error, TypeError) or not word or word[0] in "[({'\"":
            raise ValueError(f"value must be a number, text or a list, got {text!r}") from None
        return word


def _assignments(entries: Sequence[str], form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in entries:
        name, _, text = entry.partition("=")
        if not name.strip().isidentifier() or not text.strip():
            raise ValueError(f"a parameter must read {form}, got {entry!r}")
        if name.strip() in found:
            raise ValueError(f"each parameter must be given once, got {name.strip()!r} twice")
        found[name.strip()] = text
    return found


def parse_parameters(entries: Sequence[str]) -> dict[str, Any]:
    """Return the parameters that lines such as ``"eps=1e-2"`` give, values as in :func:`parse_value`.

    Raises:
        ValueError: a line of another form, or a name given twice.

    >>> parse_parameters(["eps=1e-2", "widths=[8, 16]"])
    {'eps': 0.01, 'widths': [8, 16]}
    """
    return {name: parse_value(text) for name, text in _assignments(entries, "NAME=VALUE").items()}


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += 0 if quote else (char in "[({") - (char in "])}")
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def parse_grid(entries: Sequence[str]) -> dict[str, list]:
    """Return the grid that lines such as ``"eps=1e-8,1e-2,1"`` describe, values as in :func:`parse_value`.

    Where one number of a parameter is a float, all become floats.

    Raises:
        ValueError: a line of another form, an empty value, or a name given twice.

    >>> parse_grid(["eps=1e-8,1e-2,1", "widths=[8,16],(16,32)", "norm=lagged,'a,b'"])
    {'eps': [1e-08, 0.01, 1.0], 'widths': [[8, 16], [16, 32]], 'norm': ['lagged', 'a,b']}
    """
    grid: dict[str, list] = {}
    for name, text in _assignments(entries, "NAME=V1,V2,...").items():
        parts = _split(text)
        if not all(map(str.strip, parts)):
            raise ValueError(f"a parameter must read NAME=V1,V2,..., got {name}={text!r}")
        values = [parse_value(part) for part in parts]
        floats = {type(v) for v in values} == {int, float}
        grid[name] = [float(v) for v in values] if floats else values
    return grid


def parse_seeds(text: str) -> list[int]:
    """Return the seeds that numbers and ranges ``a-b`` (both ends included), separated by commas, describe.

    Raises:
        ValueError: another form, a range that falls, a seed given twice or over 2^32, more than 10,000 seeds.

    >>> parse_seeds("0-2,5")
    [0, 1, 2, 5]
    """
    spans = []
    for part in text.split(","):
        first, sign, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (sign and not last.isdecimal()) or (sign and int(last) < int(first)):
            raise ValueError(f"seeds must read like 0-9 or 0,1,5, got {text!r}")
        spans.append(range(int(first), int(last or first) + 1))
    # Before a list is made: its length may be astronomic.
    if sum(span.stop - span.start for span in spans) > _MOST_SEEDS or max(s.stop for s in spans) > _SEED_LIMIT:
        raise ValueError(f"seeds must be at most {_MOST_SEEDS} numbers below {_SEED_LIMIT}, got {text!r}")
    seeds = [seed for span in spans for seed in span]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must differ, got {text!r}")
    return seeds
