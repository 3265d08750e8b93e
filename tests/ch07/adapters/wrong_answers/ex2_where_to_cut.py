import numpy as np

from ch07_sglang_radix.adapters.exercises.solutions.ex2_where_to_cut import added


def share_of(size, rank, ranks):
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


def instead(kind, function):
    return lambda k, x, a, b, rank, ranks: (function if k == kind else added)(
        *(() if k == kind else (k,)), x, a, b, rank, ranks
    )


def column_along_r(x, a, b, rank, ranks):  # A's rows are cut, and the sums of the ranks would have to be added up
    some = share_of(len(a), rank, ranks)
    return (x @ a[some].T @ b[:, some].T)[:, share_of(len(b), rank, ranks)]


def every_column(x, a, b, rank, ranks):
    return x @ a.T @ b.T


def first_rows(x, a, b, rank, ranks):
    return x @ a.T @ b[: len(b) // ranks].T


def interleaved(x, a, b, rank, ranks):
    return x @ a.T @ b[rank::ranks].T


def row_b_cut(x, a, b, rank, ranks):  # this rank's rows of B alone: the others' sums are lost
    y, some = np.zeros((len(x), len(b)), dtype=x.dtype), share_of(len(b), rank, ranks)
    y[:, some] = x @ a[:, share_of(a.shape[1], rank, ranks)].T @ b[some].T
    return y


def a_whole(x, a, b, rank, ranks):  # A is not cut, x is
    return x @ a.T @ b.T


def divided(x, a, b, rank, ranks):
    return added("row", x, a, b, rank, ranks) / ranks


def on_rank_0(x, a, b, rank, ranks):
    return added("row", x, a, b, rank, ranks) * (rank == 0)


WRONG = [
    ({"added": instead("column", column_along_r)}, "column"),
    ({"added": instead("column", every_column)}, "column"),
    ({"added": instead("column", first_rows)}, "column"),
    ({"added": instead("column", interleaved)}, "column on 2 ranks"),
    ({"added": instead("row", row_b_cut)}, "row"),
    ({"added": instead("row", a_whole)}, "wanted"),
    ({"added": instead("row", divided)}, "row"),
    ({"added": instead("row", on_rank_0)}, "row"),
]
