"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

import math

from ch07_sglang_radix.experts.exercises.solutions import ex7_absorb as right


def with_wk_the_other_way(query, wk):
    plain, turned = query[: len(wk)], query[len(wk) :]
    return [sum(w * q for w, q in zip(line, plain, strict=False)) for line in wk] + list(turned)


def without_the_turned_part(query, wk):
    return right.absorb(query[: len(wk)], wk)


def the_turned_part_first(query, wk):
    absorbed = right.absorb(query, wk)
    return absorbed[len(wk[0]) :] + absorbed[: len(wk[0])]


def cut_at_c(query, wk):
    """dn and c are two things."""
    c = len(wk[0])
    return right.absorb(list(query[:c])[: len(wk)], wk) + list(query[c:])


def with_a_scale_of_its_own(absorbed, rows, wv, scale):
    return right.attend(absorbed, rows, wv, len(absorbed) ** -0.5)


def without_a_scale(absorbed, rows, wv, scale):
    return right.attend(absorbed, rows, wv, 1.0)


def exponents_of_the_scores_themselves(absorbed, rows, wv, scale):
    scores = [scale * sum(q * x for q, x in zip(absorbed, row, strict=True)) for row in rows]
    weights = [math.exp(score) for score in scores]
    mean = [sum(w * row[j] for w, row in zip(weights, rows, strict=True)) / sum(weights) for j in range(len(wv[0]))]
    return [sum(w * x for w, x in zip(line, mean, strict=True)) for line in wv]


def shares_by_latents_alone(absorbed, rows, wv, scale):
    c = len(wv[0])
    return right.attend(absorbed[:c], [row[:c] for row in rows], wv, scale)


def values_of_the_last_numbers(absorbed, rows, wv, scale):
    return right.attend(absorbed[::-1], [row[::-1] for row in rows], wv, scale)


def mean_of_latents_alone(absorbed, rows, wv, scale):
    same = [[float(i == j) for j in range(len(wv[0]))] for i in range(len(wv[0]))]
    return right.attend(absorbed, rows, same, scale)


def a_value_of_every_row(absorbed, rows, wv, scale):
    scores = [scale * sum(q * x for q, x in zip(absorbed, row, strict=True)) for row in rows]
    weights = [math.exp(score - max(scores)) for score in scores]
    values = [[sum(w * x for w, x in zip(line, row, strict=False)) for line in wv] for row in rows]
    return [sum(w * v[i] for w, v in zip(weights, values, strict=True)) / sum(weights) for i in range(len(wv))]


WRONG = [
    ({"absorb": with_wk_the_other_way}, "absorb, the example"),
    ({"absorb": without_the_turned_part}, "absorb, the example"),
    ({"absorb": the_turned_part_first}, "absorb, "),
    ({"absorb": cut_at_c}, "absorb, c = 3, dn = 2, r = 1"),
    ({"attend": with_a_scale_of_its_own}, "attend, the example"),
    ({"attend": without_a_scale}, "attend, the example"),
    ({"attend": exponents_of_the_scores_themselves}, "OverflowError"),
    ({"attend": shares_by_latents_alone}, "attend, the example"),
    ({"attend": values_of_the_last_numbers}, "attend, the example"),
    ({"attend": mean_of_latents_alone}, "attend, the example"),
    ({"attend": a_value_of_every_row}, "attend, looks at Wv with 30 rows"),
]
