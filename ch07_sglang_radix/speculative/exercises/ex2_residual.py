"""Exercise 2: What is left after a refusal (20 minutes).

Read  "The same distribution" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.speculative.exercises.check 2

A draft has drawn a token x from its own distribution q; the target would have drawn from p. How often may x be kept, and what is
drawn from if it is not, so that in the end every token comes out as often as p says?

`keep(p, q, x)`: the probability with which x is kept. Where the draft proposes x more often than the target says (q(x) > p(x)),
some of these proposals are too many; where it proposes x less often, none is. x was drawn from q, so q(x) > 0.

`residual(p, q)`: what is drawn from after a refusal. Every token lacks what the draft did not bring: p(x) - q(x) where that is
more than nothing, and nothing elsewhere; divided by their sum, since one token must come out. If p and q are equal nothing is
ever refused: return p.

    p, q   a Fraction for each token of the vocabulary, of sum 1: nothing is rounded

    p = 1/2 3/10 1/5      q = 1/4 1/2 1/4
    keep(p, q, 0)  ->  1          keep(p, q, 1)  ->  3/5
    residual(p, q) ->  [1, 0, 0]
"""

from collections.abc import Sequence
from fractions import Fraction


def keep(p: Sequence[Fraction], q: Sequence[Fraction], x: int) -> Fraction:
    raise NotImplementedError  # your turn


def residual(p: Sequence[Fraction], q: Sequence[Fraction]) -> list[Fraction]:
    raise NotImplementedError  # your turn
