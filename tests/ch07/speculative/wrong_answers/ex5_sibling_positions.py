"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from ch07_sglang_radix.speculative.exercises.solutions import ex5_sibling_positions as right


def as_they_lie(parents, root):
    return [root + node for node in range(len(parents))]


def from_zero(parents, root):
    return right.positions(parents, 0)


def behind_the_parent_s_number(parents, root):
    return [root if parent < 0 else root + parent + 1 for parent in parents]


def one_further(parents, root):
    return right.positions(parents, root + 1)


def siblings_in_a_row(parents, root):
    standing = []
    for parent in parents:
        at = root if parent < 0 else standing[parent] + 1
        while at in standing:
            at += 1
        standing.append(at)
    return standing


def two_levels(parents, root):
    return [root + (parent >= 0) + (parent > 0) for parent in parents]


def from_the_back(path, first):
    return right.moves(path, first)[::-1]


def the_other_way_round(path, first):
    return [(to, source) for source, to in right.moves(path, first)]


def nodes_not_slots(path, first):
    return right.moves(path, 0)


def nothing_is_moved(path, first):
    return []


def to_themselves_as_well(path, first):
    return [(first + node, first + place) for place, node in enumerate(path)]


def without_the_root(path, first):
    return [(first + node, first + place) for place, node in enumerate(path[1:]) if node != place]


def one_short(path, first):
    return right.moves(path[:-1], first)


WRONG = [
    ({"positions": as_they_lie}, "positions([-1, 0, 0, 1, 3], 7): got [7, 8, 9, 10, 11], wanted [7, 8, 8, 9, 10]"),
    ({"positions": from_zero}, "got [0, 1, 1, 2, 3]"),
    ({"positions": behind_the_parent_s_number}, "positions([-1, 0, 0, 1, 3], 7)"),
    ({"positions": one_further}, "got [8, 9, 9, 10, 11]"),
    ({"positions": siblings_in_a_row}, "positions("),
    ({"positions": two_levels}, "got [7, 8, 8, 9, 9]"),
    ({"moves": from_the_back}, "what lies in the first"),
    ({"moves": the_other_way_round}, "what lies in the first 10 slots after moves([0, 2, 3], 7)"),
    ({"moves": nodes_not_slots}, "what lies in the first 10 slots after moves([0, 2, 3], 7)"),
    ({"moves": nothing_is_moved}, "what lies in the first 10 slots after moves([0, 2, 3], 7)"),
    ({"moves": to_themselves_as_well}, "how many copies: got 3, wanted 2"),
    ({"moves": without_the_root}, "what lies in the first"),
    ({"moves": one_short}, "what lies in the first"),
]
