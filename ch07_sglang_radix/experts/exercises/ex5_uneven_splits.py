"""Exercise 5: Counts first (25 minutes).

Read  "Tokens travel" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.experts.exercises.check 5

`choices[token]` are the experts that each of this rank's tokens goes to, `owner[expert]` is the rank that holds an expert. A
row is sent for every choice: a token with two experts on one rank is sent there twice. A rank may have no token, and a rank
may be sent nothing; both still take part, so there is a number for every rank.

    order(choices, owner)                the choices in the order in which their rows are sent, as (token, place among its
                                         experts): by rank, then by expert, then by token, so that the receiver finds the
                                         rows of an expert side by side
    send_counts(choices, owner, ranks)   rows for rank 0, 1, ...
    receive_counts(counts, rank)         counts[r] are the send counts of rank r: rows that come to `rank` from 0, 1, ...
    home(order, outputs, tokens, k)      outputs[i] is the answer to the i-th row that was sent. Returns [tokens][k]: the
                                         answer to each choice

    owner [0, 0, 1, 1], choices [[2, 0], [1, 2]]
        order                        ->  [(0, 1), (1, 0), (0, 0), (1, 1)]     experts 0, 1 on rank 0; then 2 and 2 on rank 1
        send_counts, 2 ranks         ->  [2, 2]
    receive_counts([[2, 2], [0, 3]], 1)             ->  [2, 3]
    home([(0, 1), (1, 0), (0, 0), (1, 1)], ["a", "b", "c", "d"], 2, 2)   ->  [["c", "a"], ["b", "d"]]
"""


def order(choices: list[list[int]], owner: list[int]) -> list[tuple[int, int]]:
    raise NotImplementedError  # your turn


def send_counts(choices: list[list[int]], owner: list[int], ranks: int) -> list[int]:
    raise NotImplementedError  # your turn


def receive_counts(counts: list[list[int]], rank: int) -> list[int]:
    raise NotImplementedError  # your turn


def home(order: list[tuple[int, int]], outputs: list, tokens: int, k: int) -> list[list]:
    raise NotImplementedError  # your turn
