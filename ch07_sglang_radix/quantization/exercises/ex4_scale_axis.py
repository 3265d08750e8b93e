"""Exercise 4: Which way a scale is cut (20 minutes).

Read  "A scale under a cut" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.quantization.exercises.check 4

R ranks hold a matrix W [out, in] together. With cut "column" rank k has the rows from k * out/R on, with cut "row" the columns from
k * in/R on (the words are of y = x A, where A is W turned). The scales of W lie in a tensor whose shape depends on who shares them:

    tensor    [1, 1]                    all numbers
    channel   [out, 1]                  a row
    group     [out, in/g]               g columns of a row;        sizes = (1, g)
    block     [out/a, in/b]             a rows and b columns;      sizes = (a, b)

`part(strategy, sizes, shape, cut, rank, ranks)`: which rows and which columns of the tensor of scales this rank needs,
((first, behind the last), (first, behind the last)). R divides what is cut. Where a group or a block lies on two ranks, both need
its scale. The last group, or block, may be smaller than the others: then the shape above is rounded up.

    strategy  "tensor", "channel", "group" or "block"
    sizes     (rows, columns) that share a scale; not looked at for "tensor" and "channel"
    shape     (out, in)
    cut       "column" or "row"

    part("channel", (1, 1), (8, 12), "column", 1, 2)    ->  ((4, 8), (0, 1))
    part("channel", (1, 1), (8, 12), "row", 1, 2)       ->  ((0, 8), (0, 1))      copied: a row's scale is for all of its columns
    part("group", (1, 4), (8, 12), "row", 1, 2)         ->  ((0, 8), (1, 3))      columns 6 .. 11 begin in the middle of group 1
"""


def part(
    strategy: str, sizes: tuple[int, int], shape: tuple[int, int], cut: str, rank: int, ranks: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    raise NotImplementedError  # your turn
