"""Exercises of the wing `parallelism`; see README.md."""
