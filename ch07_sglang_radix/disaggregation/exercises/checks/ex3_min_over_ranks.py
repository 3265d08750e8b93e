from types import ModuleType

from common.teaching.expect import ask, expect

CASES = [
    ([[4, 3], [4, 4]], ([0], [])),
    ([[4, 3], [0, 4]], ([], [0])),
    ([[4]], ([0], [])),
    ([[0]], ([], [0])),
    ([[]], ([], [])),
    ([[], []], ([], [])),
    ([[1, 2, 3], [1, 2, 3]], ([], [])),
    ([[4, 4, 4], [4, 0, 4], [4, 4, 1]], ([0], [1])),
    ([[0, 4], [0, 4]], ([1], [0])),
    ([[3, 0], [0, 3], [4, 4]], ([], [0, 1])),
    ([[4, 4, 0, 4], [4, 4, 4, 4]], ([0, 1, 3], [2])),
]


def check(m: ModuleType) -> None:
    for states, wanted in CASES:
        expect(f"rooms that run and that end at {states}", ask(m.decide, states), wanted)
