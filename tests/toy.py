"""The claims and the notebook of a book with one tiny chapter."""

from pathlib import Path

import nbformat
import pytest
import yaml

from effnb.common import write_atomically

CLAIMS = {
    "schema": "effnb-claims/1",
    "system": "toy",
    "title": "Toy",
    "method": "Toy: adds a gain to a baseline",
    "claims": [
        {
            "id": "toy/T1",
            "primary": True,
            "kind": "direction",
            "statement": "The toy gains over its baseline.",
            "source": {"key": "he2015delving", "locator": "abstract"},
            "paper_value": None,
            "paper_value_reason": "a toy",
            "paper": "gains",
            "criterion": {"metric": "gain", "unit": "pt", "op": ">", "threshold": 0.0, "against": "baseline"},
            "conditions": [{"name": "small loss", "metric": "loss", "op": "<", "threshold": 1.0}],
            "as_stated": "same",
            "expected_at_paper_scale": "gains",
            "anchor": "experiment",
            "registered": "2026-11-21",
            "supersedes": None,
        },
        {
            "id": "toy/T2",
            "kind": "exact",
            "statement": "Two and two make four.",
            "source": {"key": "he2015delving", "locator": "abstract"},
            "paper_value": {"value": 4, "unit": "", "metric": "sum"},
            "paper": "4",
            "criterion": {"metric": "sum", "op": "within", "threshold": 4.0, "margin": 1e-9, "interval": "none"},
            "expected_at_paper_scale": "4",
            "anchor": "theory-check",
            "registered": "2026-11-21",
        },
    ],
}

CELLS = [
    ("markdown", "# Toy", []),
    ("code", 'from effnb import lab\n\nlab.show.at_a_glance("toy")', ["at-a-glance"]),
    (
        "code",
        'profile: str = "book"  # parameter set\nseeds: list = [0, 1, 2]  # seeds\ngain: float = 1.0  # gain',
        ["parameters"],
    ),
    ("code", "# NBVAL_CHECK_OUTPUT\nprint(2 + 2)", []),
    ("code", "ours = [gain + 0.1 * seed for seed in seeds]\nbaseline = [0.05 * seed for seed in seeds]", []),
    (
        "code",
        'record = lab.Recorder("toy", profile, seeds)\n'
        'record.record("T1", ours, baseline, {"small loss": [0.1 + 0.01 * s for s in seeds]})\n'
        'record.record("T2", [4.0] * len(seeds))\n'
        'record.note_metric("ours", ours)\n'
        'record.table("gains", ["seed", "gain"], [[str(s), g] for s, g in zip(seeds, ours)], "Gains.")\n'
        "record.save()\nlab.show.report(record)",
        [],
    ),
    ("code", 'lab.show.study("toy")', ["study"]),
]  # fmt: skip

PROFILES = "toy:\n  smoke: {seeds: [0]}\n  study: {seeds: [0, 1, 2, 3]}\n"


def toy_notebook(replace: dict[str, str] | None = None) -> str:
    """The toy chapter's notebook, with ``replace`` applied to all sources."""
    cells = []
    for number, (kind, source, tags) in enumerate(CELLS):
        for old, new in (replace or {}).items():
            source = source.replace(old, new)
        make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        cells.append(make(source, id=f"c{number:02d}", metadata={"tags": tags} if tags else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})) + "\n"


def make_toy_book(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a checkout with the chapter ``toy`` and point every path function at it."""
    monkeypatch.setenv("EFFNB_ROOT", str(folder))
    monkeypatch.setenv("EFFNB_RESULTS", str(folder / "_build" / "results"))
    write_atomically(folder / "_toc.yml", "root: book/index\n")
    write_atomically(folder / "requirements.lock", "numpy==2\n")
    write_atomically(folder / "book" / "claims" / "toy.yaml", yaml.safe_dump(CLAIMS, sort_keys=False))
    write_atomically(folder / "notebooks" / "01_toy.ipynb", toy_notebook())
    write_atomically(
        folder / "notebooks" / "profiles.yaml", "toy:\n  smoke: {seeds: [0]}\n  study: {seeds: [0, 1, 2, 3]}\n"
    )
    return folder
