"""Exercise 4: A name for a row (20 minutes).

Read  "Same image, same key" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.images.exercises.check 4

The radix tree compares numbers. Of row `row` of a picture with this SHA-256 make one that no token id is, that another picture's
rows do not have, and of which a rank can read the row:

    bit 62         1
    bits 14 .. 61  48 bits of the SHA: as one number, most significant byte first, its bits 48 i .. 48 i + 47, i = row % 4
    bits 0 .. 13   row

It must fit into a signed integer of 64 bits. More rows than 14 bits count: ValueError.

    name((1).to_bytes(32, "big"), 0)   ->  2**62 + 2**14
    name((1).to_bytes(32, "big"), 1)   ->  2**62 + 1
"""


def name(sha: bytes, row: int) -> int:
    raise NotImplementedError  # your turn
