"""Names that every doctest may use without importing them, and one profile for property tests."""

import numpy
import pytest
import torch
from hypothesis import settings

# The same examples on every machine, and no time limit for a single one: a busy machine must not turn a law red.
settings.register_profile("effnb", deadline=None, derandomize=True)
settings.load_profile("effnb")


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(torch=torch, np=numpy, nn=torch.nn)
