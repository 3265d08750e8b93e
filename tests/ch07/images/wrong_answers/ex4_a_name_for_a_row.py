"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from ch07_sglang_radix.images.exercises.solutions import ex4_a_name_for_a_row as right

MASK = (1 << 48) - 1


def other_end_first(sha, row):
    right.name(sha, row)
    return 1 << 62 | (int.from_bytes(sha, "little") >> 48 * (row % 4) & MASK) << 14 | row


def from_the_top(sha, row):
    right.name(sha, row)
    return 1 << 62 | (int.from_bytes(sha, "big") >> (256 - 48 * (row % 4 + 1)) & MASK) << 14 | row


def one_slice(sha, row):
    right.name(sha, row)
    return 1 << 62 | (int.from_bytes(sha, "big") & MASK) << 14 | row


def slices_of_64(sha, row):
    right.name(sha, row)
    return 1 << 62 | (int.from_bytes(sha, "big") >> 64 * (row % 4) & MASK) << 14 | row


def no_mark(sha, row):
    return right.name(sha, row) & ~(1 << 62)


def row_of_four(sha, row):
    return right.name(sha, row) & ~((1 << 14) - 1) | row % 4


def any_row(sha, row):
    return 1 << 62 | (int.from_bytes(sha, "big") >> 48 * (row % 4) & MASK) << 14 | row


def a_bit_too_many(sha, row):
    return right.name(sha, row) << 1


WRONG = [
    ({"name": other_end_first}, "of the number 1, 0)"),
    ({"name": from_the_top}, "of the number 1, 0)"),
    ({"name": one_slice}, "of the number 1, 1)"),
    ({"name": slices_of_64}, "of a picture"),
    ({"name": no_mark}, "wanted 4611686018427404288"),
    ({"name": row_of_four}, "of the number 1, 4)"),
    ({"name": any_row}, "wanted ValueError"),
    ({"name": a_bit_too_many}, "of the number 1, 0)"),
]
