from ch07_sglang_radix.quantization.exercises.solutions.ex4_scale_axis import part as right


def whole(strategy, sizes, shape):
    return right(strategy, sizes, shape, "column", 0, 1)


def always_cut(strategy, sizes, shape, cut, rank, ranks):
    """Whatever it is, a share of it along the cut."""
    found, axis = list(whole(strategy, sizes, shape)), 0 if cut == "column" else 1
    share = found[axis][1] / ranks
    found[axis] = (int(rank * share), int((rank + 1) * share))
    return tuple(found)


def never_cut(strategy, sizes, shape, cut, rank, ranks):
    return whole(strategy, sizes, shape)


def axes_swapped(strategy, sizes, shape, cut, rank, ranks):
    return right(strategy, sizes, shape, "row" if cut == "column" else "column", rank, ranks)


def channel_cut_by_row(strategy, sizes, shape, cut, rank, ranks):
    if strategy == "channel" and cut == "row":
        return right(strategy, sizes, shape, "column", rank, ranks)
    return right(strategy, sizes, shape, cut, rank, ranks)


def straddled_left_out(strategy, sizes, shape, cut, rank, ranks):
    """The last group only if all of it is held."""
    (a, b), (c, d) = right(strategy, sizes, shape, cut, rank, ranks)
    if strategy == "group" and cut == "row":
        d = max(c + 1, (rank + 1) * shape[1] // ranks // sizes[1])
    return (a, b), (c, d)


def blocks_as_groups(strategy, sizes, shape, cut, rank, ranks):
    """A scale for each row, though a block's rows share one."""
    return right(strategy, (1, sizes[1]), shape, cut, rank, ranks)


def last_is_inside(strategy, sizes, shape, cut, rank, ranks):
    (a, b), (c, d) = right(strategy, sizes, shape, cut, rank, ranks)
    return (a, b - 1), (c, d - 1)


WRONG = [
    ({"part": one}, "part(")
    for one in (
        always_cut,
        never_cut,
        axes_swapped,
        channel_cut_by_row,
        straddled_left_out,
        blocks_as_groups,
        last_is_inside,
    )
]
