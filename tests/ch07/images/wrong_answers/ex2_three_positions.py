"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from ch07_sglang_radix.images.exercises.solutions import ex2_three_positions as right


def walked(
    pieces, line_of=lambda line, column: line, step=max, time=lambda at, line: at, from_zero=False, transposed=False
):
    found, at = [], 0
    for piece in pieces:
        if isinstance(piece, int):
            found += [(at + i,) * 3 for i in range(piece)]
            at += piece
            continue
        height, width = piece
        begins = 0 if from_zero else at
        for i in range(height * width):
            line, column = (i % height, i // height) if transposed else divmod(i, width)
            found.append((time(at, line), begins + line_of(line, column), begins + column))
        at += step(height, width)
    return found, at - len(found)


def by_number(pieces):
    return walked(pieces, step=lambda height, width: height * width)


def by_height(pieces):
    return walked(pieces, step=lambda height, width: height)


def by_both(pieces):
    return walked(pieces, step=lambda height, width: height + width)


def time_goes_on(pieces):
    return walked(pieces, time=lambda at, line: at + line)


def from_the_corner(pieces):
    return walked(pieces, from_zero=True)


def columns_first(pieces):
    return walked(pieces, transposed=True)


def shift_forward(pieces):
    found, shift = right.positions(pieces)
    return found, -shift


def last_position(pieces):
    found, _ = right.positions(pieces)
    return found, max(found[-1]) - len(found)


WRONG = [
    ({"positions": by_number}, "wanted [(0, 0, 0)"),
    ({"positions": by_height}, "the tokens"),
    ({"positions": by_both}, "the tokens"),
    ({"positions": time_goes_on}, "the tokens"),
    ({"positions": from_the_corner}, "the tokens"),
    ({"positions": columns_first}, "the tokens"),
    ({"positions": shift_forward}, "the shift: got 3, wanted -3"),
    ({"positions": last_position}, "the shift: got -1, wanted 0"),
]
