"""Exercise 1: One token more (15 minutes).

Read  "Guess, verify, keep" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.speculative.exercises.check 1

A verify step computes a chain: the last token, which is known, and behind it n guesses. `drawn` has n + 1 tokens: what the
target draws after the last token, after the first guess, and so on, each as if all guesses up to there were right.

`keep(guesses, drawn)`: what comes out of the step. As long as a guess is what was drawn in its place, it is kept. What was
drawn in the place of the first wrong guess, or behind the last one if all are right, comes out as well, and nothing after it.

    keep([5, 6, 7], [5, 6, 9, 4])        ->  [5, 6, 9]       7 is wrong; 4 was drawn after it

`into(answer, kept, most, ends)`: the answer, grown by these tokens as if they had come one by one: it has `most` tokens at
most, and one of `ends` is its last. Returns a new list. The answer that comes in may still grow.

    into([1], [5, 6, 9], 3, {9})         ->  [1, 5, 6]       there is room for two
    into([1], [5, 6, 9], 8, {6})         ->  [1, 5, 6]       after 6 nothing is drawn
"""

from collections.abc import Sequence


def keep(guesses: Sequence[int], drawn: Sequence[int]) -> list[int]:
    raise NotImplementedError  # your turn


def into(answer: Sequence[int], kept: Sequence[int], most: int, ends: set[int]) -> list[int]:
    raise NotImplementedError  # your turn
