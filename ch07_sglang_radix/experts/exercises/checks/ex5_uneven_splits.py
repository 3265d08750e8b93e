from types import ModuleType

from common.teaching.expect import ask, expect

TWO, THREE, SCATTERED = [0, 0, 1, 1], [0, 0, 1, 1, 2], [1, 0, 1, 0]
ORDERS = [  # choices, owner, what they are
    ([[2, 0], [1, 2]], TWO, [(0, 1), (1, 0), (0, 0), (1, 1)]),
    ([[0, 1], [1, 0]], TWO, [(0, 0), (1, 1), (0, 1), (1, 0)]),  # all to one rank, the experts side by side
    ([[4], [4], [0]], THREE, [(2, 0), (0, 0), (1, 0)]),
    ([[0, 1], [2, 3]], SCATTERED, [(0, 1), (1, 1), (0, 0), (1, 0)]),  # by rank before expert
    ([], TWO, []),
]
COUNTS = [
    ([[2, 0], [1, 2]], TWO, 2, [2, 2]),
    ([[0, 1], [1, 0]], TWO, 2, [4, 0]),  # a row for each choice, and a number for the rank that gets none
    ([[4], [4], [0]], THREE, 3, [1, 0, 2]),
    ([], THREE, 3, [0, 0, 0]),
]
MATRIX = [[2, 2, 1], [0, 3, 5], [0, 0, 4]]
HOME = [
    ([(0, 1), (1, 0), (0, 0), (1, 1)], ["a", "b", "c", "d"], 2, 2, [["c", "a"], ["b", "d"]]),
    ([(2, 0), (0, 0), (1, 0)], ["a", "b", "c"], 3, 1, [["b"], ["c"], ["a"]]),  # no order is its own way back
    ([], [], 0, 2, []),
]


def check(m: ModuleType) -> None:
    for choices, owner, want in ORDERS:
        expect(f"order({choices}, {owner})", ask(m.order, choices, owner), want)
    for choices, owner, ranks, want in COUNTS:
        expect(f"send_counts({choices}, {owner}, {ranks})", ask(m.send_counts, choices, owner, ranks), want)
    for rank, want in enumerate(([2, 0, 0], [2, 3, 0], [1, 5, 4])):
        expect(f"receive_counts({MATRIX}, {rank})", ask(m.receive_counts, MATRIX, rank), want)
    for sent, outputs, tokens, k, want in HOME:
        expect(f"home({sent}, {outputs}, {tokens}, {k})", ask(m.home, sent, outputs, tokens, k), want)
