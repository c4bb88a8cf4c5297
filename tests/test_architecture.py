"""Who may import whom, one name everywhere, thin systems, public objects documented, used and in the API pages."""

import ast
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from effnb.lab.judge.claims import load, load_all
from effnb.lab.paths import root
from effnb.lab.run.stale import chapters

ROOT = root()
SOURCES = sorted((ROOT / "effnb").rglob("*.py"))
PARTS = sorted(p.parent.name for p in (ROOT / "effnb").glob("*/__init__.py") if p.parent.name not in ("lab", "models"))
REFERENCES = set(re.findall(r"@\w+\{([^,\s]+),", (ROOT / "book" / "references.bib").read_text()))
#: Rooms of the bench: who may import whom; `paths` lies below all of them.
ROOMS = {"measure": (), "judge": ("measure",), "run": ("measure", "judge"), "publish": ("measure", "judge", "run")}
#: Public names that no chapter, benchmark, page or other system uses, and why they stay.
UNUSED = json.loads((ROOT / "tests" / "unused_names.json").read_text())


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """The modules of this package that a file imports, the file itself left out."""
    names = {name for name in imports_of(path) if name in MODULES}
    # `from effnb.lab.run import stale` means the module, not the package around it.
    return {n for n in names if not any(m.startswith(n + ".") for m in names)} - {module_of(path)}


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "effnb").parts
    return parts[0] if len(parts) > 1 else ""


def statement_lines(path: Path) -> int:
    """Lines that hold code: no docstring, comment or blank."""
    lines: set[int] = set()
    docstrings: set[int] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings |= set(range(first.lineno, first.end_lineno + 1))
        if isinstance(node, ast.stmt):
            lines |= set(range(node.lineno, node.end_lineno + 1))
    text = path.read_text().splitlines()
    return sum(bool(text[n - 1].strip()) and not text[n - 1].strip().startswith("#") for n in lines - docstrings)


def systems() -> dict[str, list[Path]]:
    """System to its modules: the folders of the parts, and single files."""
    found = {}
    for part in PARTS:
        for path in sorted((ROOT / "effnb" / part).iterdir()):
            if path.is_dir() and (path / "__init__.py").is_file():
                found[f"{part}/{path.name}"] = sorted(path.rglob("*.py"))
            elif path.suffix == ".py" and not path.name.startswith("_"):
                found[f"{part}/{path.stem}"] = [path]
    return found


SYSTEMS = systems()
HOUSE = [p for p in SOURCES if p.name != "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    """Methods never import the lab or another part, the lab imports no method, its rooms import downwards only."""
    part, wanted = part_of(path), ours(path) - {"effnb"}
    if part == "lab":
        room = path.relative_to(ROOT / "effnb" / "lab").parts[0]
        below = [f"effnb.lab.{r}" for r in (*ROOMS.get(room, ROOMS), room if room in ROOMS else "show")]
        allowed = ("effnb.common", "effnb.lab.paths", *below) if room in ROOMS or room == "paths.py" else ("effnb.",)
        wanted = {n for n in wanted if room in ROOMS or not n.startswith(("effnb.lab", "effnb.common"))}
    elif not part:
        allowed = ()
    else:
        allowed = ("effnb.common", "effnb.masks", "effnb.models", f"effnb.{part}")
        allowed = allowed if part != "models" else ("effnb.common", "effnb.models")
    wrong = {name for name in wanted if not (allowed and name.startswith(tuple(allowed)))}
    assert not wrong, f"{path.relative_to(ROOT)} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", [p for p in SOURCES if part_of(p) != "lab"], ids=lambda p: str(p.relative_to(ROOT)))
def test_methods_need_only_torch_numpy_scipy_at_import(path):
    top = [n for n in tree(path).body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in top if isinstance(n, ast.ImportFrom)}
    foreign = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "numpy", "scipy", "effnb"}


def test_nothing_imports_from_benchmarks_or_data():
    scripts = {p.stem for folder in ("benchmarks", "data") for p in (ROOT / folder).glob("*.py")}
    for path in SOURCES:
        wrong = {name.split(".")[0] for name in imports_of(path)} & (scripts | {"benchmarks"})
        assert not wrong, f"{path} imports {wrong}"
    for path in chapters().values():
        code = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        text = "\n".join(code)
        wrong = [name for name in scripts if re.search(rf"^\s*(?:from|import) {name}\b", text, re.MULTILINE)]
        assert not wrong and "sys.path" not in text, f"{path.name} imports {wrong or 'by sys.path'}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_read_at_one_sitting(path):
    assert statement_lines(path) <= 350


@pytest.mark.parametrize("path", HOUSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_a_splinter(path):
    """Below 80 lines a module must serve three others."""
    if len(path.read_text().splitlines()) < 80:
        users = [m for m, p in MODULES.items() if module_of(path) in ours(p)]
        assert len(users) >= 3 or part_of(path) == "", f"{path.relative_to(ROOT)} is short, and only {users} import it"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_is_one_to_six_files(system):
    assert 1 <= len([p for p in SYSTEMS[system] if p.name != "__init__.py"]) <= 6


def test_there_are_no_import_circles():
    graph = {module: ours(path) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_has_four_floors_at_most(system):
    inside = {module_of(p): p for p in SYSTEMS[system] if p.name != "__init__.py"}

    def floors(module: str) -> int:
        return 1 + max((floors(other) for other in ours(inside[module]) if other in inside), default=0)

    assert max(map(floors, inside), default=0) <= 4


def test_one_module_starts_subprocesses_and_lists_the_thread_variables():
    lab = [p for p in SOURCES if part_of(p) == "lab"]
    assert [p.name for p in lab if "subprocess" in imports_of(p)] == ["process.py"]
    assert [p.name for p in lab if "OMP_NUM_THREADS" in p.read_text()] == ["process.py"]


def test_no_placeholder_of_the_skeleton_is_left():
    files = [
        *SOURCES,
        *(ROOT / "notebooks").glob("*.ipynb"),
        *(ROOT / "book").rglob("*.yaml"),
        *(ROOT / "book").rglob("*.md"),
    ]
    files += [*(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), ROOT / "book" / "references.bib"]
    marker = "PLACE" + "HOLDER"  # in two pieces: this file is read too
    left = [p for p in files if marker in p.read_text() and "skeleton" not in p.parts and p.name != "test_cli.py"]
    assert not left, f"placeholders left in {left}"


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
        assert set(profiles[system]) <= {"smoke", "study"} and "smoke" in profiles[system]
        # No parameters that nobody has ever run.
        studied = (ROOT / "book" / "results" / "study" / f"{system}.json").is_file()
        assert ("study" in profiles[system]) == studied, f"the study of {system} and its parameters go together"
        assert f"notebooks/{path.stem}" in contents


def public(part: str):
    module = importlib.import_module(f"effnb.{part}")
    return [(part, name, getattr(module, name)) for name in module.__all__]


PUBLIC = [item for part in [*PARTS, "models"] for item in public(part)]


@pytest.mark.parametrize(("part", "name", "thing"), PUBLIC, ids=lambda v: v if isinstance(v, str) else "")
def test_public_objects_are_documented(part, name, thing):
    """One line, a known reference where a paper defines it, errors where arguments can be wrong, an API page."""
    page = (ROOT / "book" / "api" / f"{part}.md").read_text()
    whole = f"automodule:: {getattr(thing, '__module__', '')}\n" in page
    assert whole or re.search(rf"\b{name}\b", page), f"{name} is missing in book/api/{part}.md"
    if inspect.ismodule(thing):
        assert thing.__doc__
        return
    if not (inspect.isfunction(thing) or inspect.isclass(thing)):
        return
    text = inspect.getdoc(thing) or ""
    assert text, f"{name} has no docstring"
    if key := re.search(r"^Reference:\s*([\w-]+(?:,\s*[\w-]+)*)", text, flags=re.MULTILINE):
        assert set(re.split(r",\s*", key[1])) <= REFERENCES, f"{name}: {key[1]} is not in references.bib"
    if inspect.isfunction(thing):
        if [p for p in inspect.signature(thing).parameters if p not in ("self", "args", "kwargs")]:
            assert "Args:" in text, f"{name} has no Args"
        if re.search(r"^\s+raise (ValueError|TypeError)", inspect.getsource(thing), flags=re.MULTILINE):
            assert "Raises:" in text, f"{name} raises, but does not say so"


def _users() -> str:
    """Everything that counts as a use: chapters, benchmarks, prose, the scripts of data/."""
    texts = [(ROOT / "README.md").read_text(), *(p.read_text() for p in (ROOT / "book").glob("*.md"))]
    texts += [p.read_text() for folder in ("benchmarks", "data") for p in (ROOT / folder).glob("*.py")]
    for path in chapters().values():
        texts += ["".join(c["source"]) for c in json.loads(path.read_text())["cells"]]
    return "\n".join(texts)


def test_every_public_name_is_used_or_on_the_list():
    text, unused = _users(), []
    for part, name, thing in PUBLIC:
        home = getattr(thing, "__module__", "")
        others = [
            p for p in SOURCES if part_of(p) not in ("lab", "") and not module_of(p).startswith(home.rsplit(".", 1)[0])
        ]
        elsewhere = any(re.search(rf"\b{name}\b", p.read_text()) for p in others if p.name != "__init__.py")
        if not elsewhere and not re.search(rf"\b{name}\b", text):
            unused.append(f"{part}.{name}")
    assert sorted(unused) == sorted(UNUSED), "names without a user must be on tests/unused_names.json, with a reason"
    assert all(reason.strip() for reason in UNUSED.values())


def test_claims_cite_known_sources_and_real_sections():
    for system, path in chapters().items():
        cells = json.loads(path.read_text())["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        slugs = {re.sub(r"[^a-z0-9]+", "-", h.lower()).strip("-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
        slugs |= set(re.findall(r"^\(([\w-]+)\)=", text, re.MULTILINE))
        for claim in load(system).claims:
            assert claim.source.key in REFERENCES, f"{claim.id}: unknown source"
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


SECTIONS = (
    "At a glance", "Idea", "Method", "Experiment", "Cost", "Theory check", "Claims", "At study scale",
    "Where it breaks, and what did not reproduce", "Paper against official code", "Use it on your model", "Try it",
    "References",
)  # fmt: skip


@pytest.mark.parametrize("system", sorted(chapters()))
def test_chapters_are_in_the_house_style(system):
    path = chapters()[system]
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    sources = ["".join(c["source"]) for c in code]
    assert path.stat().st_size <= 300_000
    short = ["".join(c["source"]) for c in code if "parameters" not in c["metadata"].get("tags", [])]
    assert [s for s in short if s.count("\n") >= 20] == [], "a code cell has more than 20 lines"
    wide = [line for s in sources for line in s.splitlines() if len(line) > 88]
    assert wide == [], "code lines are at most 88 columns, what a page shows without scrolling"
    tags = [t for c in code for t in c["metadata"].get("tags", [])]
    assert [tags.count(t) for t in ("lead", "at-a-glance", "parameters", "study")] == [1, 1, 1, 1]
    assert 'device: str = "auto"' in "".join(sources) and "lab.begin(" in "".join(sources)
    assert any(s.startswith("# NBVAL_CHECK_OUTPUT") for s in sources)
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    figures = [h for o in outputs for h in o.get("data", {}).get("text/html", []) if "<img" in h]
    assert len(figures) <= 9, "six figures, and three more at study scale"
    headings = re.findall(
        r"^## (.+)$", "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"), re.M
    )
    found = [h for h in headings if h in SECTIONS]
    assert found == [s for s in SECTIONS if s in found] and set(SECTIONS) - set(found) == set()


def test_no_helper_is_defined_in_two_notebooks():
    homes: dict[str, list[str]] = {}
    for system, path in chapters().items():
        code = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        for source in code:
            body = "\n".join(line for line in source.splitlines() if not line.startswith("%"))
            for node in ast.parse(body).body:
                if isinstance(node, ast.FunctionDef):
                    assert node.end_lineno - node.lineno < 12, f"{node.name} of {system} is longer than 12 lines"
                    if len(node.body) == 1:  # one statement over the chapter's own names is no helper to share
                        continue
                    homes.setdefault(ast.dump(node.args) + ast.dump(ast.Module(node.body, [])), []).append(system)
    assert not {key: found for key, found in homes.items() if len(set(found)) > 1}
