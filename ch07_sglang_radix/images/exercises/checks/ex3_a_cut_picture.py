from types import ModuleType

from common.teaching.expect import ask, expect

ONE, TWO = [(2, 2, 3)], [(1, 2, 2), (7, 1, 4)]


def check(m: ModuleType) -> None:
    for pictures, start, stop, parts, shift in (
        (ONE, 0, 10, [(0, 0, 6, 2)], 0),
        (ONE, 0, 4, [(0, 0, 2, 2)], 0),
        (ONE, 4, 10, [(0, 2, 4, 0)], 0),
        (ONE, 4, 6, [(0, 2, 2, 0)], 0),
        (ONE, 0, 2, [], 0),
        (ONE, 8, 10, [], -3),
        (ONE, 7, 8, [(0, 5, 1, 0)], 0),
        (TWO, 0, 12, [(0, 0, 4, 1), (1, 0, 4, 7)], 0),
        (TWO, 3, 9, [(0, 2, 2, 0), (1, 0, 2, 4)], 0),
        (TWO, 5, 12, [(1, 0, 4, 2)], -2),
        (TWO, 11, 12, [], -2),
        ([], 3, 5, [], 0),
    ):
        got = ask(m.in_chunk, list(pictures), start, stop, why="a list and a number", several=2)
        expect(f"in_chunk({pictures}, {start}, {stop}), the rows", got[0], parts)
        expect(f"in_chunk({pictures}, {start}, {stop}), the shift", got[1], shift)
