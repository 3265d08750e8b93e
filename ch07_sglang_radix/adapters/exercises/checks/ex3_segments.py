from contextlib import suppress
from itertools import combinations_with_replacement
from types import ModuleType

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    for slots, size, want in (
        ([2, 0, 1, 2, 2], 2, [(1, [2]), (2, [0, 3]), (2, [4])]),
        ([0, 0], 2, []),
        ([], 4, []),
        ([3], 4, [(3, [0])]),
        ([1, 1, 1, 1], 2, [(1, [0, 1]), (1, [2, 3])]),
        ([1, 2, 1, 2, 1], 4, [(1, [0, 2, 4]), (2, [1, 3])]),
        ([5, 5, 0, 4, 5, 5, 5], 3, [(4, [3]), (5, [0, 1, 4]), (5, [5, 6])]),
        ([10, 9, 10, 1], 1, [(1, [3]), (9, [1]), (10, [0]), (10, [2])]),
    ):
        got = ask(m.blocks, list(slots), size, why="blocks", several=True)
        with suppress(TypeError, ValueError):  # else it is shown as it is
            got = [(slot, list(rows)) for slot, rows in got]
        expect(f"blocks({slots}, {size})", got, want)
    for rows, adapters, size in (
        (5, 2, 2),
        (3, 8, 16),
        (1, 1, 16),
        (0, 4, 16),
        (6, 1, 2),
        (7, 3, 4),
        (8, 3, 2),
        (5, 5, 1),
        (9, 2, 3),
    ):
        tried = combinations_with_replacement(range(adapters + 1), rows)
        want = max(sum(-(-slots.count(slot) // size) for slot in set(slots) - {0}) for slots in tried)
        expect(f"most({rows}, {adapters}, {size})", ask(m.most, rows, adapters, size, why="a number of blocks"), want)
