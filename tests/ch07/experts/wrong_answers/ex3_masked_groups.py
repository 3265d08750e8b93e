"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from ch07_sglang_radix.experts.exercises.solutions import ex3_masked_groups as right


def with_worth(scores, groups, chosen, k, worth, mask=None, members=None):
    """As the solution, but for what a group counts, what hides the others, and which experts a group has."""
    size = len(scores) // groups
    members = members or (lambda group: range(group * size, (group + 1) * size))
    best = sorted(range(groups), key=lambda group: -worth([scores[i] for i in members(group)]))[:chosen]
    allowed = {expert for group in best for expert in members(group)}
    if mask is None:
        return sorted(sorted(allowed), key=lambda expert: -scores[expert])[:k]
    hidden = [score if expert in allowed else mask for expert, score in enumerate(scores)]
    return sorted(range(len(scores)), key=lambda expert: -hidden[expert])[:k]


def two_best(scores):
    return sum(sorted(scores)[-2:])


def masked_with_zero(scores, groups, chosen, k):
    return with_worth(scores, groups, chosen, k, two_best, mask=0)


def by_the_best_alone(scores, groups, chosen, k):
    return with_worth(scores, groups, chosen, k, max)


def by_all_of_the_group(scores, groups, chosen, k):
    return with_worth(scores, groups, chosen, k, sum)


def every_third_expert(scores, groups, chosen, k):
    return with_worth(scores, groups, chosen, k, two_best, members=lambda group: range(group, len(scores), groups))


def without_groups(scores, groups, chosen, k):
    return right.choose(scores, 1, 1, k)


def one_group_alone(scores, groups, chosen, k):
    return with_worth(scores, groups, 1, k, two_best)


def numbers_within_the_group(scores, groups, chosen, k):
    size = len(scores) // groups
    return [expert % size for expert in right.choose(scores, groups, chosen, k)]


def in_order_of_their_numbers(scores, groups, chosen, k):
    return sorted(right.choose(scores, groups, chosen, k))


WRONG = [
    ({"choose": masked_with_zero}, "choose([-4, -2, -8, -9], groups=2, chosen=1, k=2): got [2, 3], wanted [1, 0]"),
    ({"choose": by_the_best_alone}, "choose([9, 1, 6, 5, 0, 0], groups=3, chosen=1, k=2)"),
    ({"choose": by_all_of_the_group}, "choose([1, 5, 4, 1, 4, 5, 4, 0]"),
    ({"choose": every_third_expert}, "choose("),
    ({"choose": without_groups}, "choose([9, 1, 6, 5, 0, 0], groups=3, chosen=1, k=2): got [0, 2], wanted [2, 3]"),
    ({"choose": one_group_alone}, "chosen=2"),
    ({"choose": numbers_within_the_group}, "choose("),
    ({"choose": in_order_of_their_numbers}, "got [0, 1], wanted [1, 0]"),
]
