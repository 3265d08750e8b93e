"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from ch07_sglang_radix.experts.exercises.solutions import ex5_uneven_splits as right


def by_expert_alone(choices, owner):
    return right.order(choices, [0] * len(owner))


def by_rank_alone(choices, owner):
    all_of_them = [(token, place) for token, experts in enumerate(choices) for place in range(len(experts))]
    return sorted(all_of_them, key=lambda choice: owner[choices[choice[0]][choice[1]]])


def as_they_stand(choices, owner):
    return [(token, place) for token, experts in enumerate(choices) for place in range(len(experts))]


def a_row_for_a_token(choices, owner, ranks):
    to = [rank for experts in choices for rank in {owner[expert] for expert in experts}]
    return [to.count(rank) for rank in range(ranks)]


def only_ranks_that_get_some(choices, owner, ranks):
    return [n for n in right.send_counts(choices, owner, ranks) if n]


def nothing_without_tokens(choices, owner, ranks):
    return right.send_counts(choices, owner, ranks) if choices else []


def what_it_sent_itself(counts, rank):
    return counts[rank]


def what_everybody_sent_in_all(counts, rank):
    return [sum(sent) for sent in counts]


def in_the_order_of_arrival(order, outputs, tokens, k):
    return [outputs[token * k : token * k + k] for token in range(tokens)]


def sorted_once_more(order, outputs, tokens, k):
    flat = [outputs[token * k + place] for token, place in order]
    return [flat[token * k : token * k + k] for token in range(tokens)]


WRONG = [
    ({"order": by_expert_alone}, "order([[0, 1], [2, 3]], [1, 0, 1, 0])"),
    ({"order": by_rank_alone}, "order("),
    ({"order": as_they_stand}, "order([[2, 0], [1, 2]], [0, 0, 1, 1])"),
    ({"send_counts": a_row_for_a_token}, "send_counts("),
    ({"send_counts": only_ranks_that_get_some}, "send_counts([[0, 1], [1, 0]], [0, 0, 1, 1], 2)"),
    ({"send_counts": nothing_without_tokens}, "send_counts([], [0, 0, 1, 1, 2], 3)"),
    ({"receive_counts": what_it_sent_itself}, "receive_counts("),
    ({"receive_counts": what_everybody_sent_in_all}, "receive_counts("),
    ({"home": in_the_order_of_arrival}, "home("),
    ({"home": sorted_once_more}, "home("),
]
