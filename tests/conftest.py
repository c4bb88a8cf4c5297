"""Fixtures of the bench's own tests."""

import pytest
from toy import make_toy_book


@pytest.fixture
def toy_book(tmp_path, monkeypatch):
    """A checkout with the chapter ``toy``; every path function points there."""
    return make_toy_book(tmp_path, monkeypatch)
