"""Exercise 3: A chunk that cuts a picture (25 minutes).

Read  "Three positions a token" and "Same image, same key" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.images.exercises.check 3

A long prompt is computed in chunks, and where a chunk ends nobody asks what stands there. Of a chunk, tokens start .. stop-1 of the
prompt, say which rows of which pictures take the place of which of ITS tokens, and what the rank must be told of what came before:
the shift of those pictures that are whole before `start`, max(height, width) - height * width of each. (One that is cut has not
shifted anything yet.)

    pictures  [(at, height, width), ...]: tokens at .. at + height * width - 1 of the prompt are its rows
    returns   ([(picture, first row, how many, place in the chunk), ...], shift)

    in_chunk([(2, 2, 3)], 0, 4)    ->  ([(0, 0, 2, 2)], 0)
    in_chunk([(2, 2, 3)], 4, 10)   ->  ([(0, 2, 4, 0)], 0)
    in_chunk([(2, 2, 3)], 8, 10)   ->  ([], -3)
"""

from collections.abc import Sequence


def in_chunk(
    pictures: Sequence[tuple[int, int, int]], start: int, stop: int
) -> tuple[list[tuple[int, int, int, int]], int]:
    raise NotImplementedError  # your turn
