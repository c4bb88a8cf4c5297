"""Notebook files: outputs normalised for git, the opening table refreshed, parameter sets filled in."""

from pathlib import Path

import nbformat
import papermill

from effnb.common import write_atomically
from effnb.lab.judge.registry import load
from effnb.lab.judge.results import load_result
from effnb.lab.paths import results_root
from effnb.lab.run.report import glance_html


def refresh_glance(path: Path, system: str, profile: str, results: Path | None = None) -> None:
    """Replace the output of each cell tagged ``at-a-glance`` by the table of the run's own result.

    The cell stands before the run that it reports on; without this step it would show the run before.

    Args:
        path: an executed notebook, changed in place.
        system: its system.
        profile: the profile that was run.
        results: folder of result files; default where this process writes.
    """
    result = load_result(system, profile, results or results_root())
    if result is None:
        return
    markup = glance_html(load(system), result["claims"])
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "at-a-glance" in cell.metadata.get("tags", []):
            data = {"text/html": markup, "text/plain": "<verdict table>"}
            count = cell.execution_count
            cell.outputs = [nbformat.v4.new_output("execute_result", data, execution_count=count)]
    write_atomically(path, nbformat.writes(notebook) + "\n")


def normalize(source: Path, executed: Path) -> str:
    """The source notebook's cells with the executed copy's outputs, and nothing that changes from run to run.

    Args:
        source: the committed notebook.
        executed: papermill's output for it, with the same cell ids.

    Returns:
        The notebook's new text.

    Raises:
        ValueError: a code cell of the source is missing in the executed copy or was run from another source.
    """
    notebook = nbformat.read(source, as_version=4)
    ran = {cell.id: cell for cell in nbformat.read(executed, as_version=4).cells}
    count = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        done = ran.get(cell.id)
        if done is None or done.source != cell.source:
            raise ValueError(
                f"{executed.name}: cell {cell.id!r} is not the one of {source.name}: run the chapter again"
            )
        count += 1
        cell.execution_count, cell.outputs = count, done.outputs
        for output in cell.outputs:
            output.pop("transient", None)
            if "metadata" in output:
                output.metadata = {}
            if output.output_type == "execute_result":
                output.execution_count = count
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    return nbformat.writes(notebook) + "\n"


def prepare(source: Path, parameters: dict, out: Path) -> None:
    """Write a copy of ``source`` with ``parameters`` injected, not run, outputs kept (for nbval).

    Args:
        source: a notebook.
        parameters: values for its parameters cell.
        out: where the copy goes.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(str(source), str(out), parameters=parameters, prepare_only=True, progress_bar=False)
