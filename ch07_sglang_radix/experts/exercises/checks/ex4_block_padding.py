from types import ModuleType

from common.teaching.expect import ask, expect

BLOCKS = {  # (experts of each token, number of experts, block): pairs, owners
    (((2, 0), (2, 1), (0, 2)), 3, 2): ([1, 4, 3, 6, 0, 2, 5, 6], [0, 1, 2, 2]),
    (((3,), (3,), (3,)), 5, 4): ([0, 1, 2, 3], [3]),  # nobody chose 0, 1, 2 and 4
    (((0, 1), (1, 0)), 2, 2): ([0, 3, 1, 2], [0, 1]),  # nothing to fill up
    (((-1, 0), (1, -1)), 2, 2): ([1, 4, 2, 4], [0, 1]),  # two pairs are another rank's
    (((-1,), (-1,)), 2, 4): ([], []),
    (((0, 2), (0, 2), (0, 2)), 3, 1): ([0, 2, 4, 1, 3, 5], [0, 0, 0, 2, 2, 2]),
    ((), 3, 4): ([], []),
}


def doubled(row: float) -> float:
    return 2 * row


def one_more(row: float) -> float:
    return row + 1


def squared(row: float) -> float:
    return row * row


EXPERTS = [one_more, squared, doubled]
SUMS = (  # x, weights, pairs, owners: sums
    ([10.0, 1.0], [[0.5], [2.0]], [1, 2, 0, 2], [0, 1], [50.0, 4.0]),
    (
        [3.0, 5.0, 7.0], [[0.5, 0.25], [0.75, 1.0], [0.5, 2.0]], [1, 4, 3, 6, 0, 2, 5, 6], [0, 1, 2, 2],
        [0.25 * 4 + 0.5 * 6, 25 + 0.75 * 10, 0.5 * 8 + 2 * 14],
    ),
    ([3.0, 5.0], [[1.0, 0.5], [0.25, 1.0]], [1, 4, 2, 4], [0, 1], [2.0, 6.25]),  # one expert of each is another rank's
    ([3.0, 5.0], [[1.0], [1.0]], [], [], [0.0, 0.0]),  # both are
    ([4.0, 6.0], [[0.5, 0.5], [0.25, 0.75]], [0, 2, 4, 4, 1, 3, 4, 4], [1, 2], [12.0, 18.0]),  # two places a block stay empty
)  # fmt: skip


def check(m: ModuleType) -> None:
    for (chosen, num_experts, block), (pairs, owners) in BLOCKS.items():
        asked = [list(experts) for experts in chosen]
        got = ask(m.pad_to_blocks, asked, num_experts, block)
        said = f"pad_to_blocks({asked}, {num_experts}, {block})"
        expect(f"{said}: a pair of lists", isinstance(got, tuple) and len(got) == 2, True)
        expect(f"{said}: the expert of each block", list(got[1]), owners)
        expect(f"{said}: pairs", list(got[0]), pairs)
    for x, weights, pairs, owners, sums in SUMS:
        got = ask(m.mixture, x, weights, pairs, owners, EXPERTS)
        expect(f"mixture({x}, {weights}, {pairs}, {owners}, experts)", got, sums)
