"""Solution of exercise 5: Where a node stands, and where it lies."""

from collections.abc import Sequence


def positions(parents: Sequence[int], root: int) -> list[int]:
    standing: list[int] = []
    for parent in parents:
        standing.append(root if parent < 0 else standing[parent] + 1)
    return standing


def moves(path: Sequence[int], first: int) -> list[tuple[int, int]]:
    # a node has a number that is not smaller than its place on the path: from the front, nobody's slot is taken too early
    return [(first + node, first + place) for place, node in enumerate(path) if node != place]
