"""Exercise 3: Blocks of one adapter each (20 minutes).

Read  "Many adapters in one batch" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.adapters.exercises.check 3

A step has T rows, and each of them uses the adapter in some slot, or none, which is slot 0. A program of a kernel multiplies up
to `size` rows by ONE adapter's matrices; so rows are put into blocks, each with rows of one slot. Rows without an adapter are in
no block: they have nothing to add. The lowest slot comes first, and of its rows the lowest; a block is filled before the next one
of the same slot is begun.

`blocks(slots, size)`: [(slot, [row, ...]), ...], none of them empty.

A CUDA graph is captured once, for any mix of adapters, and has a program for every block that there can be. `most(rows, adapters,
size)`: how many blocks can there be at most in a step of so many rows, if no more than so many adapters lie in slots?

    blocks([2, 0, 1, 2, 2], 2)   ->  [(1, [2]), (2, [0, 3]), (2, [4])]
    blocks([0, 0], 2)            ->  []
    most(5, 2, 2)                ->  3       one row of one adapter, four of the other: 1 + 2
    most(3, 8, 16)               ->  3       each row another adapter
"""

from collections.abc import Sequence


def blocks(slots: Sequence[int], size: int) -> list[tuple[int, list[int]]]:
    raise NotImplementedError  # your turn


def most(rows: int, adapters: int, size: int) -> int:
    raise NotImplementedError  # your turn
