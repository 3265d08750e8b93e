"""Exercise 3: How far a side is (15 minutes).

Read  "A room" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.disaggregation.exercises.check 3

Each rank knows only about the pages of its own heads. Rank 0 hears from all of them, and decides about each room.

    states     by rank, for each room a number: Failed 0, Bootstrapping 1, WaitingForInput 2, Transferring 3, Success 4
    returns    (rooms that go on to run, rooms that end with an error), as their places in the lists, ascending

A room runs when no rank lacks anything, and ends as soon as one rank cannot go on; for all others rank 0 asks again.

    decide([[4, 3], [4, 4]])  ->  ([0], [])     rank 0 still waits for pages of room 1
    decide([[4, 3], [0, 4]])  ->  ([], [0])     rank 1 has lost room 0, which rank 0 has whole
"""


def decide(states: list[list[int]]) -> tuple[list[int], list[int]]:
    raise NotImplementedError  # your turn
