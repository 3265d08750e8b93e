"""Exercise 1: Which nibble is first (20 minutes).

Read  "One row of weights" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.quantization.exercises.check 1

Codes of a few bits lie side by side in words of 32 bits: code i of a row has bits b*i .. b*i + b-1 of one long string, of which
word 0 is bits 0 .. 31, from the lowest. With 4 bits the first code of a word is in its low nibble; with 3 bits a code may begin in
one word and end in the next. A file holds words as signed numbers: 0xFFFFFFFF is -1.

`unpack(words, bits, count)`: the first `count` codes of these words, whole numbers from 0 on.
`pack(codes, bits)`: the words of these codes, signed, as many as are needed; bits left over are 0.

    words    a list of whole numbers, -2**31 .. 2**31 - 1
    bits     2, 3, 4 or 8
    returns  a list of whole numbers

    unpack([0x76543210], 4, 8)              ->  [0, 1, 2, 3, 4, 5, 6, 7]
    unpack([-1], 8, 2)                      ->  [255, 255]
    pack([1, 2, 3, 4, 5, 6, 7, 8], 4)       ->  [-2023406815]           0x87654321
    pack([0] * 10 + [5], 3)                 ->  [1073741824, 1]         5 = 0b101: 01 ends word 0, 1 begins word 1
"""

from collections.abc import Sequence


def unpack(words: Sequence[int], bits: int, count: int) -> list[int]:
    raise NotImplementedError  # your turn


def pack(codes: Sequence[int], bits: int) -> list[int]:
    raise NotImplementedError  # your turn
