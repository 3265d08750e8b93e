"""Exercises of the wing `adapters`; see README.md."""
