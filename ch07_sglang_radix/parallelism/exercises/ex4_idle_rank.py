"""Exercise 4: A rank without work (15 minutes).

Read  "DP attention" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.parallelism.exercises.check 4

Data ranks attend for requests of their own; before the MLP their rows come together, and afterwards each takes its own back.
The messages are collectives: whoever is missing stops all others for ever, so a rank without rows calls them too.

In a prefill step (padded False) every data rank brings as many rows as it has tokens. In a decode step (padded True) all bring
as many as the one that has most: the same shape every time. If nobody has anything there is no step, and no message.

    rows_brought(tokens, padded)         rows that each data rank brings, a list; None if there is no step
    rows_of(rank, tokens, padded)        (first, last + 1): where its real rows, without padding, lie among all that were brought

    tokens [5, 0, 2], padded False   ->  [5, 0, 2]     rank 2 finds its own at (5, 7), rank 1 at (5, 5)
    tokens [5, 0, 2], padded True    ->  [5, 5, 5]     rank 2 finds its own at (10, 12), rank 1 at (5, 5)
"""


def rows_brought(tokens: list[int], padded: bool) -> list[int] | None:
    raise NotImplementedError  # your turn


def rows_of(rank: int, tokens: list[int], padded: bool) -> tuple[int, int]:
    raise NotImplementedError  # your turn
