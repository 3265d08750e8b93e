from types import ModuleType

from common.teaching.expect import ask, expect

RIGHT = {
    (12, 2): [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]],
    (12, 3): [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]],
    (5, 1): [[0, 1, 2, 3, 4]],
    (10, 2): [[0, 1, 7, 8, 9], [2, 3, 4, 5, 6]],
    (3, 2): [[2], [0, 1]],
    (1, 2): [[0], []],
}
EQUAL = (24, 3)


def check(m: ModuleType) -> None:
    for (n, ranks), want in RIGHT.items():
        expect(f"{n} tokens on {ranks} rank(s): the tokens of each", ask(m.zigzag, n, ranks), want)
    expect("12 tokens on 2 ranks: pairs of rank 0's queries and rank 1's keys", ask(m.pairs, 12, 2, 0, 1), 18)
    expect("12 tokens on 2 ranks: pairs of rank 1's queries and rank 0's keys", ask(m.pairs, 12, 2, 1, 0), 18)
    expect("12 tokens on 2 ranks: pairs among rank 1's own", ask(m.pairs, 12, 2, 1, 1), 21)
    expect("3 tokens on 2 ranks: pairs of rank 1's queries and rank 0's keys", ask(m.pairs, 3, 2, 1, 0), 0)
    n, ranks = EQUAL
    count = [[ask(m.pairs, n, ranks, mine, theirs) for theirs in range(ranks)] for mine in range(ranks)]
    expect(f"{n} tokens on {ranks} ranks: pairs by rank and block", count, [[36, 32, 32], [32, 36, 32], [32, 32, 36]])
