from types import ModuleType

from common.teaching.expect import ask, expect

CASES = (
    (([9, 1, 6, 5, 0, 0], 3, 1, 2), [2, 3]),
    (([-4, -2, -8, -9], 2, 1, 2), [1, 0]),  # masked with 0, both of the other group would win
    (([9, 1, 6, 5, 0, 0], 3, 2, 3), [0, 2, 3]),
    (([9, 1, 6, 5, 7, 0], 3, 2, 3), [0, 2, 3]),  # not 4: its group counts 7
    (([1, 5, 4, 1, 4, 5, 4, 0], 2, 1, 2), [1, 2]),  # both count 9
    (([3, 3, 3, 3], 2, 1, 2), [0, 1]),
    (([1, 2, 3, 4], 2, 2, 3), [3, 2, 1]),
    (([1, 2, 3, 4], 1, 1, 1), [3]),
    (([7, 7, 0, 0, 8, 5, 5, 5], 2, 1, 3), [0, 1, 2]),  # 14 against 13, though the other four have 23 together
    (([-1, -3, 2, -9, -2, -2], 3, 2, 3), [0, 4, 5]),  # -4, -7 and -4
)


def check(m: ModuleType) -> None:
    for (scores, groups, chosen, k), want in CASES:
        what = f"choose({list(scores)}, groups={groups}, chosen={chosen}, k={k})"
        expect(what, ask(m.choose, list(scores), groups, chosen, k, why="numbers of experts", several=True), want)
