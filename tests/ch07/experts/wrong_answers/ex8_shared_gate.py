"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

import torch

from ch07_sglang_radix.experts.exercises.solutions import ex8_shared_gate as right


def without_a_gate(x, g, routed, shared):
    return routed + shared


def without_a_sigmoid(x, g, routed, shared):
    return routed + (x @ g)[:, None] * shared


def softmax_over_the_tokens(x, g, routed, shared):
    return routed + torch.softmax(x @ g, dim=0)[:, None] * shared


def the_gate_opens_for_both(x, g, routed, shared):
    return torch.sigmoid(x @ g)[:, None] * (routed + shared)


def what_one_gets_the_other_loses(x, g, routed, shared):
    counts = torch.sigmoid(x @ g)[:, None]
    return (1 - counts) * routed + counts * shared


def a_gate_of_what_the_expert_gives(x, g, routed, shared):
    return right.part(shared, g, routed, shared)


def one_gate_for_all_tokens(x, g, routed, shared):
    return routed + torch.sigmoid((x @ g).mean() if len(x) else x.sum()) * shared


def a_gate_for_each_number(x, g, routed, shared):
    return routed + torch.sigmoid(x * g) * shared


def in_place(x, g, routed, shared):
    return routed.add_(torch.sigmoid(x @ g)[:, None] * shared)


WRONG = [
    ({"part": without_a_gate}, "one token: got [[5.0, 7.0]], wanted [[3.0, 4.0]]"),
    ({"part": without_a_sigmoid}, "one token: got [[1.0, 1.0]], wanted [[3.0, 4.0]]"),
    ({"part": softmax_over_the_tokens}, "one token"),
    ({"part": the_gate_opens_for_both}, "one token"),
    ({"part": what_one_gets_the_other_loses}, "one token"),
    ({"part": a_gate_of_what_the_expert_gives}, "one token"),
    ({"part": one_gate_for_all_tokens}, "the sum over 1 rank(s), of tokens with gates"),
    ({"part": a_gate_for_each_number}, "the sum over 1 rank(s)"),
    ({"part": in_place}, "routed is as it was before"),
]
