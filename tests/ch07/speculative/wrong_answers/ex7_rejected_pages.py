"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from ch07_sglang_radix.speculative.exercises.solutions import ex7_rejected_pages as right


def without_the_root(length, num_slots, nodes, page_size):
    return right.pages_to_take(length, num_slots, nodes - 1, page_size)


def always_new(length, num_slots, nodes, page_size):
    return -(-nodes // page_size)


def rounded_down(length, num_slots, nodes, page_size):
    return max(0, (length + nodes - num_slots) // page_size)


def below_nothing(length, num_slots, nodes, page_size):
    return -(-(length + nodes - num_slots) // page_size)


def by_all_nodes(length, path, wanted):
    return length + min(path[-1] + 1, wanted)


def by_guesses(length, path, wanted):
    return length + min(len(path) - 1, wanted)


def beyond_what_was_asked(length, path, wanted):
    return length + len(path)


def with_the_last_token(ids, slots, shared, page_size):
    return right.at_the_end([*ids, 0], slots, shared, page_size)


def a_part_of_a_page(ids, slots, shared, page_size):
    known = len(ids) - 1
    return list(ids[:known]), list(slots[:known]), list(slots[-(-known // page_size) * page_size :])


def without_its_reserve(ids, slots, shared, page_size):
    tokens, kept, back = right.at_the_end(ids, slots, shared, page_size)
    return tokens, kept, back[: -(-len(ids) // page_size) * page_size - len(kept)]


def everything_back(ids, slots, shared, page_size):
    tokens, kept, _ = right.at_the_end(ids, slots, shared, page_size)
    return tokens, kept, list(slots)


def rejected_ones_too(ids, slots, shared, page_size):
    tokens, _, _ = right.at_the_end(ids, slots, shared, page_size)
    return tokens, list(slots), []


WRONG = [
    ({"pages_to_take": without_the_root}, "pages_to_take(4, 4, 1, 4): got 0, wanted 1"),
    ({"pages_to_take": always_new}, "pages_to_take(13, 16, 6, 4): got 2, wanted 1"),
    ({"pages_to_take": rounded_down}, "pages_to_take(13, 16, 6, 4): got 0, wanted 1"),
    ({"pages_to_take": below_nothing}, "pages_to_take("),
    ({"length_after": by_all_nodes}, "length_after(13, [0, 2, 5], 9): got 19, wanted 16"),
    ({"length_after": by_guesses}, "length_after(13, [0, 1, 2], 9): got 15, wanted 16"),
    ({"length_after": beyond_what_was_asked}, "length_after(13, [0, 1, 2, 3], 2)"),
    ({"at_the_end": with_the_last_token}, "at_the_end("),
    ({"at_the_end": a_part_of_a_page}, "at_the_end("),
    ({"at_the_end": without_its_reserve}, "given back"),
    ({"at_the_end": everything_back}, "given back"),
    ({"at_the_end": rejected_ones_too}, "slots"),
]
