"""Distributions as a check shows them."""

from collections.abc import Iterable
from fractions import Fraction


def shown(values: Iterable) -> str:
    return " ".join(map(str, values))


def tenths(*numbers: int) -> list[Fraction]:
    return [Fraction(n, 10) for n in numbers]


def exact(value: object) -> object:
    """A Fraction as its text, so that got and wanted read alike; what is none stays as it is."""
    if isinstance(value, Fraction) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    return [exact(one) for one in value] if isinstance(value, list | tuple) else value
