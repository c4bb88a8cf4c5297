"""The worker process of one chapter: ``python -m effnb.lab.run.worker '{"system": ..., ...}'``."""

import json
import logging
import os
import re
import sys
from pathlib import Path

import papermill

from effnb.lab.paths import root
from effnb.lab.run.fanout import die_with_parent
from effnb.lab.run.notebooks import refresh_glance


class _Progress(logging.Handler):
    """Turns papermill's log into lines ``@cell <begun> <all>`` on standard output."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.match(r"Executing Cell (\d+)", record.getMessage()):
            print("@cell", found[1], self.cells, flush=True)


def run(task: dict) -> int:
    """Execute one notebook; the finished copy appears under its name only when the run is over.

    Args:
        task: ``system``, ``profile``, ``source``, ``out`` and ``parameters``.

    Returns:
        0, or 1 if a cell failed; the copy then shows the error.
    """
    source, out = Path(task["source"]), task["out"]
    local = "://" not in out
    part = str(Path(out).with_name(f".{os.getpid()}.{Path(out).name}")) if local else out
    cells = len(json.loads(source.read_text())["cells"]) + 1
    logger = logging.getLogger("papermill")
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [_Progress(cells)], False
    if local:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(source),
            part,
            parameters=task["parameters"],
            kernel_name="python3",
            cwd=str(root()),
            progress_bar=False,
            log_output=True,
        )
        code = 0
    except papermill.PapermillExecutionError as error:
        print(re.sub(r"\x1b\[[0-9;]*m", "", str(error)), flush=True)
        code = 1
    if local:
        if code == 0:
            refresh_glance(Path(part), task["system"], task["profile"])
        os.replace(part, out)
    return code


if __name__ == "__main__":
    die_with_parent()
    sys.exit(run(json.loads(sys.argv[1])))
