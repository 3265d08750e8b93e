"""Exercise 1: Reserve first (20 minutes).

Read  "A room" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.disaggregation.exercises.check 1

The decode side gives a prompt its pages before anything is computed for it, and must not give away what the answers that are being
written will need. Say how many of the prompts that wait get pages now.

    free       slots that are free
    waiting    [(prompt tokens, most tokens of its answer)], the first came first
    running    tokens that each answer that is being written may still get
    reserved   of these no more than so many are kept free for each answer, running or about to begin
    returns    how many of `waiting`, from the first on, get pages

A prompt gets pages if they, and what is kept for all answers (its own, those before it, those running) fit into what is free. Who
comes first is never overtaken. If no answer is running and none is about to begin, the prompt alone must fit: else it would wait
for ever for room that nobody gives back.

    how_many(95, [(40, 20), (40, 20)], [], 8)  ->  1        the first leaves 55, and the second needs 40 + 8 + 8
    how_many(96, [(40, 20), (40, 20)], [], 8)  ->  2
"""


def how_many(free: int, waiting: list[tuple[int, int]], running: list[int], reserved: int) -> int:
    raise NotImplementedError  # your turn
