"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from ch07_sglang_radix.images.exercises.solutions import ex3_a_cut_picture as right


def rows_from_0(pictures, start, stop):
    parts, shift = right.in_chunk(pictures, start, stop)
    return [(number, 0, count, place) for number, _, count, place in parts], shift


def place_in_the_prompt(pictures, start, stop):
    parts, shift = right.in_chunk(pictures, start, stop)
    return [(number, first, count, place + start) for number, first, count, place in parts], shift


def whole_pictures(pictures, start, stop):
    parts, shift = right.in_chunk(pictures, start, stop)
    return [part for part in parts if part[2] == pictures[part[0]][1] * pictures[part[0]][2]], shift


def shifted_when_begun(pictures, start, stop):
    parts, _ = right.in_chunk(pictures, start, stop)
    return parts, sum(max(h, w) - h * w for at, h, w in pictures if at < start)


def shifted_when_in_the_chunk(pictures, start, stop):
    parts, _ = right.in_chunk(pictures, start, stop)
    return parts, sum(max(h, w) - h * w for at, h, w in pictures if at + h * w <= stop)


def shifted_one_late(pictures, start, stop):
    parts, _ = right.in_chunk(pictures, start, stop)
    return parts, sum(max(h, w) - h * w for at, h, w in pictures if at + h * w < start)


def one_row_more(pictures, start, stop):
    return right.in_chunk(pictures, start, stop + 1)


def the_last_only(pictures, start, stop):
    parts, shift = right.in_chunk(pictures, start, stop)
    return parts[-1:], shift


WRONG = [
    ({"in_chunk": rows_from_0}, "got [(0, 0, 4, 0)], wanted [(0, 2, 4, 0)]"),
    ({"in_chunk": place_in_the_prompt}, "the rows"),
    ({"in_chunk": whole_pictures}, "got [], wanted [(0, 0, 2, 2)]"),
    ({"in_chunk": shifted_when_begun}, "the shift: got -3, wanted 0"),
    ({"in_chunk": shifted_when_in_the_chunk}, "the shift: got -3, wanted 0"),
    ({"in_chunk": shifted_one_late}, "the shift: got 0, wanted -3"),
    ({"in_chunk": one_row_more}, "the rows"),
    ({"in_chunk": the_last_only}, "wanted [(0, 0, 4, 1), (1, 0, 4, 7)]"),
]
