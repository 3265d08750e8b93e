"""Exercises of the wing `experts`; see README.md."""
