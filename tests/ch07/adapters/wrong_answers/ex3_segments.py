from itertools import groupby

from ch07_sglang_radix.adapters.exercises.solutions.ex3_segments import blocks


def none_is_one_too(slots, size):
    return sorted(blocks([slot + 1 for slot in slots], size))


def neighbours_only(slots, size):
    made, at = [], 0
    for slot, run in groupby(slots):
        rows = list(range(at, at + len(list(run))))
        at += len(rows)
        made += [(slot, rows[i : i + size]) for i in range(0, len(rows), size) if slot]
    return sorted(made)


def one_block_each(slots, size):
    return [(slot, [row for row, one in enumerate(slots) if one == slot]) for slot in sorted(set(slots) - {0})]


def mixed(slots, size):  # full blocks, with rows of the next adapter where one has no more
    order = sorted((slot, row) for row, slot in enumerate(slots) if slot)
    return [(order[i][0], [row for _, row in order[i : i + size]]) for i in range(0, len(order), size)]


def as_they_come(slots, size):
    firsts = list(dict.fromkeys(slot for slot in slots if slot))
    return sorted(blocks(slots, size), key=lambda block: firsts.index(block[0]))


def balanced(slots, size):  # as even as they can be, not filled
    made = []
    for slot, rows in one_block_each(slots, size):
        count = -(-len(rows) // size)
        made += [(slot, rows[len(rows) * i // count : len(rows) * (i + 1) // count]) for i in range(count)]
    return made


WRONG = [
    ({"blocks": none_is_one_too}, "blocks("),
    ({"blocks": neighbours_only}, "blocks("),
    ({"blocks": one_block_each}, "blocks("),
    ({"blocks": mixed}, "blocks("),
    ({"blocks": as_they_come}, "blocks("),
    ({"blocks": balanced}, "blocks("),
    ({"most": lambda rows, adapters, size: -(-rows // size)}, "most("),
    ({"most": lambda rows, adapters, size: min(rows, adapters)}, "most("),
    ({"most": lambda rows, adapters, size: -(-rows // size) + adapters}, "most("),
    ({"most": lambda rows, adapters, size: min(rows, adapters + rows // size)}, "most("),
    ({"most": lambda rows, adapters, size: adapters + (rows - adapters) // size}, "most("),
]
