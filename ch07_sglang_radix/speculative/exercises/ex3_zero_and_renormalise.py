"""Exercise 3: Siblings, one after the other (20 minutes).

Read  "The same distribution" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.speculative.exercises.check 3

A tree has several guesses for one place. They were chosen, not drawn: the most probable tokens of a draft, say. So each is kept
with the probability that the target gives it. A guess that is refused was looked at and lost its chance: the target cannot draw it
any more, and what is left of the distribution is divided by its sum again before the next sibling is tried.

`siblings(p, children, coins)` tries the children in their order. Child number i is kept if coins[i] < p(child), with p as it stands
by then. Returns the pair (the child that was kept, None), or (None, what the last token is drawn from) if none was.

    p          a Fraction for each token, of sum 1; it is not to be changed
    children   tokens, all different
    coins      a Fraction in [0, 1) for each

    p = 1/2 3/10 1/5
    siblings(p, [0, 2], [1/4, 0])     ->  (0, None)                   1/4 < 1/2
    siblings(p, [0, 2], [1/2, 1/4])   ->  (2, None)                   p is 0 3/5 2/5 when 2 is tried
    siblings(p, [0, 2], [1/2, 1/2])   ->  (None, [0, 1, 0])
"""

from collections.abc import Sequence
from fractions import Fraction


def siblings(
    p: Sequence[Fraction], children: Sequence[int], coins: Sequence[Fraction]
) -> tuple[int | None, list[Fraction] | None]:
    raise NotImplementedError  # your turn
