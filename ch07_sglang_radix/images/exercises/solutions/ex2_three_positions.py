"""Solution of exercise 2: Three positions."""

from collections.abc import Sequence


def positions(pieces: Sequence[int | tuple[int, int]]) -> tuple[list[tuple[int, int, int]], int]:
    found, at = [], 0
    for piece in pieces:
        if isinstance(piece, int):
            found += [(at + i,) * 3 for i in range(piece)]
            at += piece
        else:
            height, width = piece
            found += [(at, at + line, at + column) for line in range(height) for column in range(width)]
            at += max(height, width)
    return found, at - len(found)
