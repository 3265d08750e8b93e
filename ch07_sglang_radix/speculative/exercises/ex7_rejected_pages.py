"""Exercise 7: No trace (20 minutes).

Read  "Rejected tokens leave no trace" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.speculative.exercises.check 7

A request's row lists slots, whole pages of them: `slots[i]` is where K and V of its token i lie. `length` tokens have theirs
there; the newest token was drawn and not fed in yet, so it has none. A verify step feeds in `nodes` tokens at places length,
length + 1, ...

`pages_to_take(length, num_slots, nodes, page_size)`: how many pages the row lacks for such a step.

    pages_to_take(13, 16, 6, 4)                  ->  1        places 13 .. 18; 16 slots end at place 15

`length_after(length, path, wanted)`: path has the nodes that were right, the root first, and each brings a token. But only
`wanted` more tokens were asked for, and what comes out beyond is thrown away.

    length_after(13, [0, 1, 2], 9)               ->  16

`at_the_end(ids, slots, shared, page_size)`: the request has ended. ids: prompt and answer, of which the last token has no K and
V. The first `shared` of the slots are the tree's already. Returns what is put into the tree, tokens and slots, in whole pages,
and the slots that are given back: those of the row that are not in the tree then. What is the tree's may be put into it once more.

    at_the_end([1, 2, 3, 4, 5, 6], [8, 9, 4, 5, 0, 1, 6, 7], 2, 2)  ->  ([1, 2, 3, 4], [8, 9, 4, 5], [0, 1, 6, 7])
"""

from collections.abc import Sequence


def pages_to_take(length: int, num_slots: int, nodes: int, page_size: int) -> int:
    raise NotImplementedError  # your turn


def length_after(length: int, path: Sequence[int], wanted: int) -> int:
    raise NotImplementedError  # your turn


def at_the_end(
    ids: Sequence[int], slots: Sequence[int], shared: int, page_size: int
) -> tuple[list[int], list[int], list[int]]:
    raise NotImplementedError  # your turn
