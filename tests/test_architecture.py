"""Who may import whom, one name everywhere, short files, public objects documented and in the API pages."""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

from effnb.lab.claims import load, load_all
from effnb.lab.paths import root
from effnb.lab.run.stale import chapters

ROOT = root()
SOURCES = sorted((ROOT / "effnb").rglob("*.py"))
PARTS = sorted(p.parent.name for p in (ROOT / "effnb").glob("*/__init__.py") if p.parent.name not in ("lab", "models"))
REFERENCES = set(re.findall(r"@\w+\{([^,\s]+),", (ROOT / "book" / "references.bib").read_text()))


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, also inside functions; relative ones resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "effnb").parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 250


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    """Methods never import the lab or another part, the lab imports no method."""
    ours = {name for name in imports_of(path) if name.startswith("effnb.")}
    part = part_of(path)
    if part == "lab":
        allowed = ("effnb.lab", "effnb.__version__")
    elif part == "models":
        allowed = ("effnb.models",)
    else:
        allowed = (f"effnb.{part}", "effnb.models")
    wrong = {name for name in ours if not name.startswith(allowed)}
    assert not wrong, f"{part} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", [p for p in SOURCES if part_of(p) not in ("lab", "")], ids=lambda p: p.stem)
def test_methods_need_only_torch_numpy_scipy_at_import(path):
    top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in top if isinstance(n, ast.ImportFrom) and not n.level}
    import sys

    foreign = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "numpy", "scipy", "effnb"}


def test_one_name_everywhere():
    names = set(chapters())
    assert names == {claims.system for claims in load_all()}
    profiles = yaml.safe_load((ROOT / "notebooks" / "profiles.yaml").read_text())
    contents = (ROOT / "_toc.yml").read_text()
    for system, path in chapters().items():
        modules = list((ROOT / "effnb").glob(f"*/{system}.py")) + list((ROOT / "effnb").glob(f"*/{system}/__init__.py"))
        assert len(modules) == 1, f"{system} has modules {modules}"
        assert (ROOT / "tests" / f"test_{system}.py").is_file()
        assert (ROOT / "benchmarks" / f"bench_{system}.py").is_file()
        assert (ROOT / "book" / "results" / "book" / f"{system}.json").is_file()
        assert set(profiles[system]) >= {"smoke", "paper"}
        assert f"notebooks/{path.stem}" in contents


def public(part: str):
    module = importlib.import_module(f"effnb.{part}")
    return [(part, name, getattr(module, name)) for name in module.__all__]


PUBLIC = [item for part in [*PARTS, "models"] for item in public(part)]


@pytest.mark.parametrize(("part", "name", "thing"), PUBLIC, ids=lambda v: v if isinstance(v, str) else "")
def test_public_objects_are_documented(part, name, thing):
    """One line, a reference that exists, errors where there are arguments to get wrong, a place in the API page."""
    page = (ROOT / "book" / "api" / f"{part}.md").read_text()
    whole = f"automodule:: {getattr(thing, '__module__', '')}\n" in page
    assert whole or re.search(rf"\b{name}\b", page), f"{name} is missing in book/api/{part}.md"
    if inspect.ismodule(thing):
        assert thing.__doc__
        return
    text = inspect.getdoc(thing) or ""
    key = re.search(r"^Reference:\s*([\w-]+(?:,\s*[\w-]+)*)", text, flags=re.MULTILINE)
    assert key, f"{name} names no Reference"
    assert set(re.split(r",\s*", key[1])) <= REFERENCES, f"{name}: {key[1]} is not in references.bib"
    source = inspect.getsource(thing)
    if inspect.isfunction(thing):
        if [p for p in inspect.signature(thing).parameters if p not in ("self", "args", "kwargs")]:
            assert "Args:" in text, f"{name} has no Args"
        if re.search(r"^\s+raise (ValueError|TypeError)", source, flags=re.MULTILINE):
            assert "Raises:" in text, f"{name} raises, but does not say so"


def test_claims_cite_known_sources_and_real_sections():
    for system, path in chapters().items():
        cells = json.loads(path.read_text())["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        slugs = {re.sub(r"[^a-z0-9]+", "-", h.lower()).strip("-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
        slugs |= set(re.findall(r"^\(([\w-]+)\)=", text, re.MULTILINE))
        for claim in load(system).claims:
            assert claim.raw["source"]["key"] in REFERENCES, f"{claim.id}: unknown source"
            assert claim.anchor in slugs, f"{claim.id}: no section {claim.anchor!r} in {path.name}, there are {slugs}"


@pytest.mark.parametrize("system", list(chapters()))
def test_papermill_explains_every_parameter(system, caplog):
    import papermill

    found = papermill.inspect_notebook(str(chapters()[system]))
    cells = json.loads(chapters()[system].read_text())["cells"]
    (cell,) = (c for c in cells if "parameters" in c["metadata"].get("tags", []))
    names = [line.split(":")[0] for line in "".join(cell["source"]).splitlines() if line.strip()]
    assert list(found) == names and not caplog.messages
    assert all(parameter["help"] for parameter in found.values())
    text = "".join("".join(c["source"]) for c in cells)
    assert not re.search(r"-p \w+ [\"'\[{]", text), "papermill -p takes a list as a string: use -y"


@pytest.mark.parametrize("system", list(chapters()))
def test_chapters_are_in_the_house_style(system):
    path = chapters()[system]
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert path.stat().st_size <= 300_000
    assert all("".join(c["source"]).count("\n") < 25 for c in code), "a code cell has more than 25 lines"
    tags = [t for c in code for t in c["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1 and tags.count("at-a-glance") == 1
    assert 'device: str = "auto"' in "".join("".join(c["source"]) for c in code)
    assert any("".join(c["source"]).startswith("# NBVAL_CHECK_OUTPUT") for c in code)
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    figures = [h for o in outputs for h in o.get("data", {}).get("text/html", []) if "<img" in h]
    assert len(figures) <= 6
