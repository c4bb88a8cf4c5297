"""Names that every doctest may use without importing them."""

import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(torch=torch, np=numpy, nn=torch.nn)
