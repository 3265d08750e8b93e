from types import ModuleType

from ch07_sglang_radix.speculative.exercises.checks.fractions_shown import exact, shown, tenths
from common.teaching.expect import ask, expect

CASES = (  # p, q, residual
    (tenths(5, 3, 2), tenths(2, 5, 3), "1 0 0"),
    (tenths(1, 2, 3, 4), tenths(4, 3, 2, 1), "0 0 1/4 3/4"),
    (tenths(5, 1, 4), tenths(2, 8, 0), "3/7 0 4/7"),  # the draft never proposes the last
    (tenths(0, 6, 4), tenths(4, 4, 2), "0 1/2 1/2"),  # the target never says the first
    (tenths(5, 5), tenths(5, 5), "1/2 1/2"),
    (tenths(0, 10), tenths(10, 0), "0 1"),
)


def check(m: ModuleType) -> None:
    for p, q, left in CASES:
        given = f"with p = {shown(p)}, q = {shown(q)}"
        for x, proposed in enumerate(q):
            if proposed:
                got = ask(m.keep, list(p), list(q), x, why="a Fraction")
                expect(f"keep(p, q, {x}) {given}", exact(got), str(min(1, p[x] / proposed)))
        got = ask(m.residual, list(p), list(q), why="a Fraction for each token", several=len(p))
        expect(f"residual(p, q) {given}", exact(got), left.split())
