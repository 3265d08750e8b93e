"""Exercise 5: Where a node stands, and where it lies (20 minutes).

Read  "A tree and its mask" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.speculative.exercises.check 5

Each node of a tree has a slot of its own: node i lies `i` slots behind the root's. But it stands, for the model, where its token
would stand in the text. Siblings are guesses for the same place.

`positions(parents, root)`: of each node, the position that goes into the rotary embedding, if the root stands at `root`.

After the step one path is right. Its tokens' K and V must lie in consecutive slots, as if they had come one by one.

`moves(path, first)`: which slot is copied to which, in the order in which it is done: [(from, to), ...]. `path` are the nodes that
were right, the root first; the root lies in slot `first`. What lies right already is not moved, and nothing may be overwritten that
is still to be copied. A parent has a smaller number than its children.

    positions([-1, 0, 0, 1, 3], 7)   ->  [7, 8, 8, 9, 10]
    moves([0, 2, 3], 7)              ->  [(9, 8), (10, 9)]
"""

from collections.abc import Sequence


def positions(parents: Sequence[int], root: int) -> list[int]:
    raise NotImplementedError  # your turn


def moves(path: Sequence[int], first: int) -> list[tuple[int, int]]:
    raise NotImplementedError  # your turn
