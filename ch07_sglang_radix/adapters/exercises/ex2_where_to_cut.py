"""Exercise 2: Where A and B are cut (20 minutes).

Read  "Two thin matrices" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.adapters.exercises.check 2

R ranks hold a matrix W [out, in] together, and an adapter has A [r, in] and B [out, r] for it. What does rank k add to its y, so
that no message is needed but those that the layer has anyway?

    column-parallel   rank k has the rows of W from k * out/R on. Every rank has all of x, [T, in], and gives its columns of y,
                      [T, out/R]; nobody talks.
    row-parallel      rank k has the columns of W from k * in/R on, and of x those columns, [T, in/R]. It gives a partial sum,
                      [T, out]; then all partial sums are added up.

`added(kind, x, a, b, rank, ranks)`: what this rank adds to its y, before any message. Rank and R are such that R divides what
is cut; the factor s is left out.

    kind     "column" or "row"
    x        what this rank has of it, an array
    a, b     the whole A [r, in] and B [out, r], arrays; take what this rank needs of them
    returns  an array of the shape of its y

    with A = [[1, 2]], B = [[1], [3]], x = [[1, 1]] on two ranks: s B (A x) is [[3, 9]]
    added("column", [[1, 1]], A, B, 1, 2)   ->  [[9]]
    added("row", [[1]], A, B, 0, 2)         ->  [[1, 3]]      from the first column of x
    added("row", [[1]], A, B, 1, 2)         ->  [[2, 6]]      from the second; the sum of both is [[3, 9]]
"""

import numpy as np


def added(kind: str, x: np.ndarray, a: np.ndarray, b: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    raise NotImplementedError  # your turn
