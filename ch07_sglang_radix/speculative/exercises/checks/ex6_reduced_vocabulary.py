from types import ModuleType

from common.teaching.expect import ask, expect

VOCABULARIES = (
    [0, 3, 4, 9],
    [0, 1, 2],
    [5],
    [7, 8, 20, 21, 900],
    [2, 0, 1],
)  # the last one is not in order: nobody promised it
HEADS = (  # parts, vocabulary: the best token
    ([[0.1, 0.7], [0.9, 0.2]], [0, 3, 4, 9], 4),
    ([[0.1, 0.7], [0.2, 5.0]], [0, 3, 4], 3),
    ([[0.1, 0.7], [0.2, 0.9]], [0, 3, 4, 9], 9),
    ([[-3.0, -1.0, -2.0]], [5, 6, 30], 6),
    ([[-3.0, -1.0], [-2.0, 0.0]], [5, 6, 30], 6),  # padding of 0 among logits below it
    ([[0.3, 0.8], [0.8, 0.1]], [0, 3, 4, 9], 3),  # of equals the first
    ([[0.1], [0.2], [0.9]], [4, 7, 1000], 1000),
)


def check(m: ModuleType) -> None:
    for vocabulary in VOCABULARIES:
        got = ask(m.offsets, list(vocabulary), why="a list of offsets", several=True)
        expect(f"offsets({vocabulary})", got, [token - i for i, token in enumerate(vocabulary)])
    for parts, vocabulary, want in HEADS:
        d2t = [token - i for i, token in enumerate(vocabulary)]
        got = ask(m.best, [list(part) for part in parts], d2t, why="a token id")
        expect(f"best({parts}, {d2t})", got, want)
