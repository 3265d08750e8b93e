"""Exercise 5: A group on two ranks (25 minutes).

Read  "A scale under a cut" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.quantization.exercises.check 5

A row of W lies in a file as words of 4-bit codes (the first in the lowest nibble, and 8 is added to each code before it is packed,
so that none is negative), and one scale for every `size` of its numbers. A rank needs numbers start .. stop-1 of it, and reads as
little as it can: words and scales are whole, so it reads all that its numbers lie in, and drops what it has read too much.

`columns(read_words, read_scales, size, start, stop)`: the numbers start .. stop-1.

    read_words(first, last)    words first .. last-1 of the row, a list of whole numbers from 0 on; to be called once
    read_scales(first, last)   scales first .. last-1, a list; to be called once
    size                       how many numbers share a scale
    returns                    a list of stop - start numbers

    with words [0x98765432, 0x0000BA98], so codes -6 -5 -4 -3 -2 -1 0 1, 0 1 2 3 -8 -8 -8 -8, size=4, scales [1, 10, 100, 1000]:
    columns(read_words, read_scales, 4, 0, 3)     ->  [-6, -5, -4]              reads word 0, scale 0
    columns(read_words, read_scales, 4, 6, 10)    ->  [0, 10, 0, 100]           reads words 0 and 1, scales 1 and 2
"""

from collections.abc import Callable


def columns(
    read_words: Callable[[int, int], list[int]], read_scales: Callable[[int, int], list[float]], size: int,
    start: int, stop: int,
) -> list[float]:  # fmt: skip
    raise NotImplementedError  # your turn
