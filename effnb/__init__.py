"""Efficient deep learning, reproduced: the thin package beneath the book."""

__version__ = "0.1.0"
