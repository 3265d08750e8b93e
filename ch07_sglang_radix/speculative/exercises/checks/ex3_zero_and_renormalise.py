from fractions import Fraction
from itertools import product
from types import ModuleType

from ch07_sglang_radix.speculative.exercises.checks.fractions_shown import exact, shown, tenths
from common.teaching.expect import ask, expect

CASES = (  # p, children, coins in twentieths: kept, left
    (tenths(5, 3, 2), [0, 2], (5, 0), 0, None),
    (tenths(5, 3, 2), [0, 2], (10, 5), 2, None),
    (tenths(5, 3, 2), [0, 2], (10, 10), None, "0 1 0"),
    (tenths(5, 3, 2), [2], (4,), None, "5/8 3/8 0"),  # a coin of exactly p(2) is not below it
    (tenths(5, 3, 2), [2], (3,), 2, None),
    (tenths(1, 2, 3, 4), [3, 2], (8, 9), 2, None),
    (tenths(1, 2, 3, 4), [3, 2], (8, 10), None, "1/3 2/3 0 0"),
    (tenths(1, 2, 3, 4), [0, 1, 2], (19, 5, 8), 2, None),  # 4/9 is not below 2/9, and 8/20 is below 3/7
    (tenths(0, 6, 4), [0], (0,), None, "0 3/5 2/5"),
    (tenths(0, 10), [0, 1], (0, 19), 1, None),
    (tenths(5, 5), [], (), None, "1/2 1/2"),
)
QUARTERS = [Fraction(i, 4) for i in range(4)]
P = [Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)]


def check(m: ModuleType) -> None:
    for p, children, twentieths, kept, left in CASES:
        coins = [Fraction(n, 20) for n in twentieths]
        given = list(p)
        got = ask(m.siblings, given, list(children), list(coins), why="a pair", several=2)
        call = f"siblings(p, {children}, [{', '.join(map(str, coins))}]) with p = {shown(p)}"
        expect(call, [got[0], exact(got[1])], [kept, left.split() if left else None])
        expect(f"{call}: p afterwards", exact(given), exact(p))
    out = [Fraction(0)] * 3  # how often each token comes out, over all coins that there are in quarters
    for coins in product(QUARTERS, repeat=2):
        child, rest = ask(m.siblings, list(P), [0, 1], list(coins), why="a pair", several=2)
        share = [Fraction(int(token == child)) for token in range(3)] if child is not None else rest
        out = [old + Fraction(new) / 16 for old, new in zip(out, share, strict=True)]
    expect(f"what comes out with p = {shown(P)}, children 0 and 1, over all coins", exact(out), exact(P))
