"""Exercises of the wing `disaggregation`; see README.md."""
