"""The line that opens each chapter's run: versions, threads, data."""

import platform

import numpy
import torch

import effnb
from effnb.lab.measure.data import Source


def banner(*datasets: Source) -> None:
    """Print versions, threads and the data used: one line, nothing that changes from run to run.

    Args:
        datasets: what :func:`effnb.lab.measure.data.load` returned.

    >>> banner()
    effnb 0..., Python 3..., torch 2..., numpy 2..., ... thread...; data: generated
    """
    threads = torch.get_num_threads()
    python = ".".join(platform.python_version_tuple()[:2])
    used = "; ".join(dataset.describe() for dataset in datasets) or "generated"
    torch_version = torch.__version__.split("+")[0]
    print(
        f"effnb {effnb.__version__}, Python {python}, torch {torch_version}, numpy {numpy.__version__}, "
        f"{threads} thread{'s' * (threads != 1)}; data: {used}"
    )
