"""Fixtures of the bench's own tests."""

import pytest


@pytest.fixture
def toy_book(tmp_path, monkeypatch):
    """A checkout with the chapter ``toy``; every path function points there."""
    from toy import make_toy_book  # the methods' tests run where the bench's libraries are not installed

    return make_toy_book(tmp_path, monkeypatch)
