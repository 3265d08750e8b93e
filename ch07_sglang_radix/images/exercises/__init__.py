"""Exercises of the wing `images`; see README.md."""
