"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from fractions import Fraction

from ch07_sglang_radix.speculative.exercises.solutions import ex2_residual as right


def the_target_s_probability(p, q, x):
    return p[x]


def the_other_way_round(p, q, x):
    return min(Fraction(1), q[x] / p[x]) if p[x] else Fraction(1)


def above_one(p, q, x):
    return p[x] / q[x]


def all_or_nothing(p, q, x):
    return Fraction(int(p[x] >= q[x]))


def the_lesser(p, q, x):
    return min(p[x], q[x])


def the_target(p, q):
    return list(p)


def not_divided(p, q):
    return [max(Fraction(0), a - b) for a, b in zip(p, q, strict=True)] if p != q else list(p)


def with_signs(p, q):
    return [a - b for a, b in zip(p, q, strict=True)]


def too_much_of_the_draft(p, q):
    return right.residual(q, p)


def distances(p, q):
    apart = [abs(a - b) for a, b in zip(p, q, strict=True)]
    return [one / sum(apart) for one in apart] if sum(apart) else list(p)


def divided_by_nothing(p, q):
    lacking = [max(Fraction(0), a - b) for a, b in zip(p, q, strict=True)]
    return [one / sum(lacking) for one in lacking]


def only_what_was_never_proposed(p, q):
    left = [a if not b else Fraction(0) for a, b in zip(p, q, strict=True)]
    return [one / sum(left) for one in left] if sum(left) else list(p)


WRONG = [
    (
        {"keep": the_target_s_probability},
        "keep(p, q, 0) with p = 1/2 3/10 1/5, q = 1/5 1/2 3/10: got '1/2', wanted '1'",
    ),
    ({"keep": the_other_way_round}, "keep(p, q, 0)"),
    ({"keep": above_one}, "got '5/2', wanted '1'"),
    ({"keep": all_or_nothing}, "keep(p, q, 1)"),
    ({"keep": the_lesser}, "keep(p, q, 0)"),
    ({"residual": the_target}, "wanted ['1', '0', '0']"),
    ({"residual": not_divided}, "got ['3/10', '0', '0']"),
    ({"residual": with_signs}, "got ['3/10', '-1/5', '-1/10']"),
    ({"residual": too_much_of_the_draft}, "wanted ['1', '0', '0']"),
    ({"residual": distances}, "wanted ['1', '0', '0']"),
    ({"residual": divided_by_nothing}, "ZeroDivisionError"),
    ({"residual": only_what_was_never_proposed}, "residual(p, q)"),
]
