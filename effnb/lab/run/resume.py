"""Resumable work (to come)."""


def resumable(function):
    """Return the function."""
    return function
