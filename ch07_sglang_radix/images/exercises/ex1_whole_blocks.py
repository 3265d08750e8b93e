"""Exercise 1: Whole blocks (20 minutes).

Read  "From pixels to rows" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.images.exercises.check 1

A tower sees whole blocks of `factor` x `factor` pixels, and a prompt has room for so many. To what size is a picture resized?

First each side to the nearest multiple of `factor` (Python's round). If that area is above max_pixels, both sides of the PICTURE
are divided by b = sqrt(height * width / max_pixels) and rounded DOWN to multiples, but to `factor` at least; if it is below
min_pixels, both are multiplied by b = sqrt(min_pixels / (height * width)) and rounded UP. So the bounds hold afterwards, and the
picture keeps its proportions as well as blocks can.

A picture whose one side is more than 200 times the other: ValueError.

    returns  (height, width)

    smart_resize(480, 640, 28, 56 * 56, 28 * 28 * 1280)   ->  (476, 644)
    smart_resize(30, 100, 28, 56 * 56, 28 * 28 * 1280)    ->  (28, 112)
"""


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    raise NotImplementedError  # your turn
