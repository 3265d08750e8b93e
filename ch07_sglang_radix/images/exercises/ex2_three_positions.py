"""Exercise 2: Three positions (20 minutes).

Read  "Three positions a token" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.images.exercises.check 2

A prompt is texts, of which the number of tokens is given, and pictures, of which the rows (height, width) are given. Of each token,
one after the other, make (time, line, column): text counts on in all three alike; a picture stands still in time, and its line and
column walk over its rows, all from the position where it begins; behind it the text goes on max(height, width) further.

And the shift: the next token's position less its number.

    returns  ([(time, line, column), ...], shift)

    positions([2, (2, 3), 1])   ->  ([(0, 0, 0), (1, 1, 1),
                                      (2, 2, 2), (2, 2, 3), (2, 2, 4), (2, 3, 2), (2, 3, 3), (2, 3, 4),
                                      (5, 5, 5)], -3)
"""

from collections.abc import Sequence


def positions(pieces: Sequence[int | tuple[int, int]]) -> tuple[list[tuple[int, int, int]], int]:
    raise NotImplementedError  # your turn
