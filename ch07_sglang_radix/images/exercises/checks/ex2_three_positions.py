from types import ModuleType

from common.teaching.expect import ask, expect

PICTURE = [(2, 2, 2), (2, 2, 3), (2, 2, 4), (2, 3, 2), (2, 3, 3), (2, 3, 4)]


def check(m: ModuleType) -> None:
    for pieces, tokens, shift in (
        ([3], [(0, 0, 0), (1, 1, 1), (2, 2, 2)], 0),
        ([2, (2, 3), 1], [(0, 0, 0), (1, 1, 1), *PICTURE, (5, 5, 5)], -3),
        ([(3, 1), 2], [(0, 0, 0), (0, 1, 0), (0, 2, 0), (3, 3, 3), (4, 4, 4)], 0),
        ([(1, 1), 1], [(0, 0, 0), (1, 1, 1)], 0),
        ([1, (2, 2), 1, (1, 2)], [
            (0, 0, 0), (1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2), (3, 3, 3), (4, 4, 4), (4, 4, 5)
        ], -2),
        ([(2, 2)], [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)], -2),
    ):  # fmt: skip
        got = ask(m.positions, list(pieces), why="a list and a number", several=2)
        expect(f"positions({pieces}), the tokens", got[0], tokens)
        expect(f"positions({pieces}), the shift", got[1], shift)
