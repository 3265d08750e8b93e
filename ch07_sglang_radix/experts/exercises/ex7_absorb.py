"""Exercise 7: One query for all rows (20 minutes).

Read  "A row for all heads" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.experts.exercises.check 7

A page holds a row of each token: a latent of c numbers, then r numbers of its key that know its position. A head makes its key of
a row as [Wk latent | those r numbers], and its value as Wv latent. A decode has one query and very many rows: so do not make keys
and values, but move the two matrices to where there is one of each.

`absorb(query, wk)`: of the query dn plain numbers come first, then r that know its position; `wk` is Wk, dn lists of c numbers.
Returns the c + r numbers whose product with a row is the product of the query with the key made of that row, whatever the row.

    absorb([1, 1, 1, 2], [[1, 1], [0, 2]])                ->  [1, 3, 1, 2]        1 * [1, 1] + 1 * [0, 2], and the rest as it is

`attend(absorbed, rows, wv, scale)`: each row's share is the softmax of scale * (absorbed . row), and the output the mean of the
values by these shares. `wv` is Wv, dv lists of c numbers, which you should need once, not once for each row. Scores may be in
the thousands. Returns dv numbers.

    attend([1, 3, 1, 2], [[1, 0, 1, 0], [2, 1, 0, 1], [0, 3, 1, 1]], [[1, -1]], 0.1)        ->  [-1.0262...]
"""

from collections.abc import Sequence


def absorb(query: Sequence[float], wk: Sequence[Sequence[float]]) -> list[float]:
    raise NotImplementedError  # your turn


def attend(
    absorbed: Sequence[float], rows: Sequence[Sequence[float]], wv: Sequence[Sequence[float]], scale: float
) -> list[float]:
    raise NotImplementedError  # your turn
