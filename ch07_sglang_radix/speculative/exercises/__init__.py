"""Exercises of the wing `speculative`; see README.md."""
