from types import ModuleType

from common.teaching.expect import ask, expect

STEPS = ([5, 0, 2], [1, 1], [0, 3], [4, 4, 4, 4], [0, 0, 1], [300, 2])


def check(m: ModuleType) -> None:
    for tokens in STEPS:
        brought = ask(m.rows_brought, list(tokens), False, why="everybody's rows", several=True)
        expect(f"prefill of {tokens}: rows that each brings", brought, tokens)
        padded = ask(m.rows_brought, list(tokens), True, why="everybody's rows", several=True)
        expect(f"decode of {tokens}: rows that each brings", padded, [max(tokens)] * len(tokens))
    for padded in (False, True):
        expect(f"nobody has work, padded={padded}", ask(m.rows_brought, [0, 0, 0], padded, why="no step"), None)
    for tokens in STEPS:
        for rank, n in enumerate(tokens):
            first = sum(tokens[:rank])
            expect(f"prefill of {tokens}: rank {rank}'s own rows", own(m, rank, tokens, False), (first, first + n))
            first = rank * max(tokens)
            expect(f"decode of {tokens}: rank {rank}'s own rows", own(m, rank, tokens, True), (first, first + n))


def own(m: ModuleType, rank: int, tokens: list[int], padded: bool) -> tuple:
    return tuple(ask(m.rows_of, rank, list(tokens), padded, why="first, last + 1", several=2))
