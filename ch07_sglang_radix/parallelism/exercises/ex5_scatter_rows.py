"""Exercise 5: An all-reduce cut in two (20 minutes).

Read  "Sequence parallelism" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.parallelism.exercises.check 5

After a row-parallel layer every rank has partial sums of all T rows. The reduce-scatter gives rank r the r-th part of the rows,
summed over the ranks; the parts are equally long, so T is filled up with rows of zeros behind the last one. On its rows alone a
rank adds the layer's bias, once, and does what comes next. The all-gather puts the parts one behind the other, and what was
filled up is cut off.

A row is a number here.

    scatter_rows(partials, bias)    partials [R][T]: each rank's partial sums. Returns [R][T/R]: each rank's rows, bias added
    gather_rows(parts, tokens)      parts [R][T/R] -> [T]

    partials [[1, 2, 3], [10, 20, 30]], bias 0.5   ->  [[11.5, 22.5], [33.5, 0.5]]     a row of padding may hold anything
    parts [[11.5, 22.5], [33.5, 0.5]], tokens 3    ->  [11.5, 22.5, 33.5]
"""


def scatter_rows(partials: list[list[float]], bias: float) -> list[list[float]]:
    raise NotImplementedError  # your turn


def gather_rows(parts: list[list[float]], tokens: int) -> list[float]:
    raise NotImplementedError  # your turn
