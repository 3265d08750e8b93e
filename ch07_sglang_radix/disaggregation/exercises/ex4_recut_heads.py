"""Exercise 4: Heads re-cut (30 minutes).

Read  "Heads re-cut" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.disaggregation.exercises.check 4

The prefill side has another number of ranks than the decode side, so its pages hold other heads. Say what one decode rank asks of
whom.

    held       for each prefill rank, the heads on its page, in order; a head may be on several ranks, or twice on one
    wanted     the heads on this decode rank's page, in order; a head may be there twice
    returns    {prefill rank: [(place on its page, [places on mine])]}

Each place of mine is filled exactly once. A head travels once, from one rank, however often it is needed here. Ranks that send
nothing are not in it.

    slices([[0, 1]], [0, 0])        ->  {0: [(0, [0, 1])]}           one head, sent once, put down twice
    slices([[0], [1]], [0, 1])      ->  {0: [(0, [0])], 1: [(0, [1])]}
"""


def slices(held: list[list[int]], wanted: list[int]) -> dict[int, list[tuple[int, list[int]]]]:
    raise NotImplementedError  # your turn
