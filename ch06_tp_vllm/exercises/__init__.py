"""Exercises of chapter 6; see README.md."""
