"""Exercises of the wing `quantization`; see README.md."""
