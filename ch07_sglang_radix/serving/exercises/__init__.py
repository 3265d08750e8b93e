"""Exercises of the wing `serving`; see README.md."""
