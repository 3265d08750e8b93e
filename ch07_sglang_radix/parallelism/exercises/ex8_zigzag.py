"""Exercise 8: Equal work (20 minutes).

Read  "A context over several ranks" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.parallelism.exercises.check 8

A prompt's tokens are dealt out to ranks, and token t attends to t + 1 tokens: the last ones are the most work. Cut the n tokens
into 2 * ranks runs, run j being the tokens from n * j // (2 * ranks) up to where the next one begins. Rank i takes run i and
the i-th from the end; where a prompt is short, runs are empty.

Then the ring: in some step rank `mine` holds the keys of rank `theirs`. Count the (query, key) pairs it has to compute: its own
tokens as queries, the other's as keys, and a query sees its own token and those before it.

    zigzag   n tokens -> [tokens of rank 0, tokens of rank 1, ...], each in ascending order
    pairs    n, ranks, mine, theirs -> how many

    zigzag(12, 2)       ->  [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]
    pairs(12, 2, 0, 1)  ->  18: tokens 9, 10, 11 see all of 3 .. 8, and tokens 0, 1, 2 see none
"""


def zigzag(n: int, ranks: int) -> list[list[int]]:
    raise NotImplementedError  # your turn


def pairs(n: int, ranks: int, mine: int, theirs: int) -> int:
    raise NotImplementedError  # your turn
