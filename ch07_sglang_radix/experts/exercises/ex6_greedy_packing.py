"""Exercise 6: The lightest that has room (20 minutes).

Read  "Hot experts" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.experts.exercises.check 6

An expert that many tokens choose makes its rank late for all others. Two things help: copies of it, and a place beside experts
that few choose.

`replicate(load, slots)`: there is one slot for each expert, expert i in slot i, and some slots are left. Each of those, in their
order, gets a copy of the expert whose copies have most to do: load divided by the number of copies it has so far. Of two alike,
the first. A copy is one more slot, so all copies share the load. Returns the expert of each slot.

    replicate([6, 1, 2], 5)          ->  [0, 1, 2, 0, 0]     6 / 1 is the most; then 6 / 2 against 1 and 2

`pack(weights, packs)`: as many things go into each pack as into any other. Take the heaviest thing first (of two alike, the
first), and give it to the lightest of those packs that still have room (of two alike, the first). Returns the things of each
pack, in the order in which they went in. Raise ValueError if they cannot be shared out evenly.

    pack([7, 1, 5, 3], 2)            ->  [[0, 1], [2, 3]]    7 | -, then 7 | 5, 7 | 5 + 3, and the first alone has room for 1
"""

from collections.abc import Sequence


def replicate(load: Sequence[float], slots: int) -> list[int]:
    raise NotImplementedError  # your turn


def pack(weights: Sequence[float], packs: int) -> list[list[int]]:
    raise NotImplementedError  # your turn
