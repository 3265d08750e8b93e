"""Solution of exercise 2: What is left after a refusal."""

from collections.abc import Sequence
from fractions import Fraction


def keep(p: Sequence[Fraction], q: Sequence[Fraction], x: int) -> Fraction:
    return min(Fraction(1), p[x] / q[x])


def residual(p: Sequence[Fraction], q: Sequence[Fraction]) -> list[Fraction]:
    lacking = [max(Fraction(0), target - draft) for target, draft in zip(p, q, strict=True)]
    total = sum(lacking)
    return [one / total for one in lacking] if total else list(p)
