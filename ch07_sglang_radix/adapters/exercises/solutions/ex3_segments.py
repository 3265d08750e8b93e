"""Solution of exercise 3: Blocks of one adapter each."""

from collections.abc import Sequence


def blocks(slots: Sequence[int], size: int) -> list[tuple[int, list[int]]]:
    made = []
    for slot in sorted({slot for slot in slots if slot}):
        rows = [row for row, one in enumerate(slots) if one == slot]
        made += [(slot, rows[first : first + size]) for first in range(0, len(rows), size)]
    return made


def most(rows: int, adapters: int, size: int) -> int:
    begun = min(rows, adapters)  # every adapter that is there begins one, the rows left over fill whole ones
    return begun + (rows - begun) // size
