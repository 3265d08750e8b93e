"""Solution of exercise 3: Siblings, one after the other."""

from collections.abc import Sequence
from fractions import Fraction


def siblings(
    p: Sequence[Fraction], children: Sequence[int], coins: Sequence[Fraction]
) -> tuple[int | None, list[Fraction] | None]:
    left = list(p)
    for child, coin in zip(children, coins, strict=True):
        if coin < left[child]:
            return child, None
        left[child] = Fraction(0)
        total = sum(left)
        left = [one / total for one in left]
    return None, left
