"""Exercises of chapter 7; see README.md."""
