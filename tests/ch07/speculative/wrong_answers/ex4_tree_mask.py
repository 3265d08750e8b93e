"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from ch07_sglang_radix.speculative.exercises.solutions import ex4_tree_mask as right


def causal(parents):
    return [[other <= node for other in range(len(parents))] for node in range(len(parents))]


def parent_and_itself(parents):
    return [[other in (node, parent) for other in range(len(parents))] for node, parent in enumerate(parents)]


def with_the_root(parents):
    return [[other in (0, node, parent) for other in range(len(parents))] for node, parent in enumerate(parents)]


def without_itself(parents):
    return [
        [sees and other != node for other, sees in enumerate(row)] for node, row in enumerate(right.tree_mask(parents))
    ]


def turned_round(parents):
    return [list(row) for row in zip(*right.tree_mask(parents), strict=True)]


def by_depth(parents):
    depth = [sum(row) for row in right.tree_mask(parents)]
    return [
        [depth[other] < depth[node] or other == node for other in range(len(parents))] for node in range(len(parents))
    ]


def with_siblings(parents):
    return [
        [sees or parents[other] == parents[node] for other, sees in enumerate(row)]
        for node, row in enumerate(right.tree_mask(parents))
    ]


def nodes_not_slots(parents, cached, node):
    return [other for other, sees in enumerate(right.tree_mask(parents)[node]) if sees]


def the_tree_alone(parents, cached, node):
    return [slot for slot in right.seen(parents, cached, node) if slot >= cached]


def as_if_they_lay_side_by_side(parents, cached, node):
    return list(range(cached + sum(right.tree_mask(parents)[node])))


def one_slot_early(parents, cached, node):
    return [*range(cached - 1), *(slot - 1 for slot in right.seen(parents, cached, node) if slot >= cached)]


def from_the_node_up(parents, cached, node):
    own = [slot for slot in right.seen(parents, cached, node) if slot >= cached]
    return [*range(cached), *reversed(own)]


WRONG = [
    (
        {"tree_mask": causal},
        "tree_mask([-1, 0, 0, 0])[2]: got [True, True, True, False], wanted [True, False, True, False]",
    ),
    ({"tree_mask": parent_and_itself}, "tree_mask([-1, 0, 1, 2])[2]"),
    ({"tree_mask": with_the_root}, "tree_mask([-1, 0, 1, 2])[3]"),
    ({"tree_mask": without_itself}, "tree_mask([-1])[0]"),
    ({"tree_mask": turned_round}, "tree_mask([-1, 0, 1, 2])[0]"),
    ({"tree_mask": by_depth}, "tree_mask([-1, 0, 0, 1])[3]"),
    ({"tree_mask": with_siblings}, "tree_mask([-1, 0, 0, 0])[1]"),
    ({"seen": nodes_not_slots}, "seen([-1], 3, 0)"),
    ({"seen": the_tree_alone}, "seen([-1], 3, 0)"),
    ({"seen": as_if_they_lay_side_by_side}, "seen([-1, 0, 0, 0], 0, 2)"),
    ({"seen": one_slot_early}, "seen([-1], 0, 0)"),
    ({"seen": from_the_node_up}, "seen([-1, 0, 1, 2], 0, 1)"),
]
