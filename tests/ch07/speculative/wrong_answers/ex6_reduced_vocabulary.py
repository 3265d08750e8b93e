"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""


def the_ids_themselves(vocabulary):
    return list(vocabulary)


def the_other_way_round(vocabulary):
    return [i - token for i, token in enumerate(vocabulary)]


def from_one_to_the_next(vocabulary):
    return [b - a for a, b in zip([0, *vocabulary], vocabulary, strict=False)]


def from_one_counted(vocabulary):
    return [token - i for i, token in enumerate(vocabulary, 1)]


def in_order(vocabulary):
    return [token - i for i, token in enumerate(sorted(vocabulary))]


def flat(parts, d2t):
    return [x for part in parts for x in part][: len(d2t)]


def the_draft_id(parts, d2t):
    logits = flat(parts, d2t)
    return logits.index(max(logits))


def d2t_holds_ids(parts, d2t):
    return d2t[the_draft_id(parts, d2t)]


def the_row_on_its_rank(parts, d2t):
    found = the_draft_id(parts, d2t) % len(parts[0])
    return found + d2t[found]


def the_offset_of_the_row_on_its_rank(parts, d2t):
    found = the_draft_id(parts, d2t)
    return found + d2t[found % len(parts[0])]


def padding_is_a_token(parts, d2t):
    logits = [x for part in parts for x in part]
    found = logits.index(max(logits))
    return found + (d2t[found] if found < len(d2t) else d2t[-1])


def padding_left_out_by_its_value(parts, d2t):
    logits = flat(parts, d2t)
    found = max(range(len(logits)), key=lambda i: (logits[i] if logits[i] > 0 else 0.0, i))
    return found + d2t[found]


def of_equals_the_last(parts, d2t):
    logits = flat(parts, d2t)
    found = max(range(len(logits)), key=lambda i: (logits[i], i))
    return found + d2t[found]


def rank_0_alone(parts, d2t):
    return the_target(parts[0].index(max(parts[0])), d2t)


def the_target(draft_id, d2t):
    return draft_id + d2t[draft_id]


WRONG = [
    ({"offsets": the_ids_themselves}, "offsets([0, 3, 4, 9]): got [0, 3, 4, 9], wanted [0, 2, 2, 6]"),
    ({"offsets": the_other_way_round}, "got [0, -2, -2, -6]"),
    ({"offsets": from_one_to_the_next}, "got [0, 3, 1, 5]"),
    ({"offsets": from_one_counted}, "got [-1, 1, 1, 5]"),
    ({"offsets": in_order}, "offsets([2, 0, 1])"),
    ({"best": the_draft_id}, "got 2, wanted 4"),
    ({"best": d2t_holds_ids}, "got 2, wanted 4"),
    ({"best": the_row_on_its_rank}, "got 0, wanted 4"),
    ({"best": the_offset_of_the_row_on_its_rank}, "got 2, wanted 4"),
    ({"best": padding_is_a_token}, "best([[0.1, 0.7], [0.2, 5.0]], [0, 2, 2])"),
    ({"best": padding_left_out_by_its_value}, "best([[-3.0, -1.0, -2.0]]"),
    ({"best": of_equals_the_last}, "best([[0.3, 0.8], [0.8, 0.1]], [0, 2, 2, 6]): got 4, wanted 3"),
    ({"best": rank_0_alone}, "got 3, wanted 4"),
]
