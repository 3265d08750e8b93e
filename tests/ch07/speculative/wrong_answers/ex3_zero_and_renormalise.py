"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from fractions import Fraction

from ch07_sglang_radix.speculative.exercises.solutions import ex3_zero_and_renormalise as right


def walk(p, children, coins, refuse, takes=lambda coin, chance: coin < chance):
    left = list(p)
    for child, coin in zip(children, coins, strict=True):
        if takes(coin, left[child]):
            return child, None
        left = refuse(left, child)
    return None, left


def zeroed(left, child):
    return [Fraction(0) if token == child else one for token, one in enumerate(left)]


def divided(left):
    return [one / sum(left) for one in left]


def not_divided(p, children, coins):
    return walk(p, children, coins, zeroed)


def divided_at_the_end(p, children, coins):
    child, left = walk(p, children, coins, zeroed)
    return child, left and divided(left)


def nothing_is_zeroed(p, children, coins):
    return walk(p, children, coins, lambda left, child: left)


def all_zeroed_first(p, children, coins):
    child, left = right.siblings(p, children, coins)
    if child is None:
        return child, left
    rest = p
    for other in children[: children.index(child) + 1]:
        rest = zeroed(rest, other)
    return child, divided(rest) if sum(rest) else None


def one_coin(p, children, coins):
    return right.siblings(p, children, [coins[0]] * len(coins) if coins else [])


def also_when_equal(p, children, coins):
    return walk(
        p, children, coins, lambda left, child: divided(zeroed(left, child)), lambda coin, chance: coin <= chance
    )


def the_target_again(p, children, coins):
    child, left = right.siblings(p, children, coins)
    return child, left and list(p)


def the_number_of_the_child(p, children, coins):
    child, left = right.siblings(p, children, coins)
    return child if child is None else children.index(child), left


def the_best_first(p, children, coins):
    order = sorted(range(len(children)), key=lambda i: -p[children[i]])
    return right.siblings(p, [children[i] for i in order], [coins[i] for i in order])


def in_place(p, children, coins):
    for child, coin in zip(children, coins, strict=True):
        if coin < p[child]:
            return child, None
        p[:] = divided(zeroed(p, child))
    return None, p


def the_child_alone(p, children, coins):
    return right.siblings(p, children, coins)[0]


WRONG = [
    ({"siblings": not_divided}, "siblings(p, [0, 2], [1/2, 1/4]) with p = 1/2 3/10 1/5"),
    ({"siblings": divided_at_the_end}, "siblings(p, [0, 2], [1/2, 1/4])"),
    ({"siblings": nothing_is_zeroed}, "siblings(p, [0, 2], [1/2, 1/4])"),
    ({"siblings": all_zeroed_first}, "wanted [0, None]"),
    ({"siblings": one_coin}, "siblings("),
    ({"siblings": also_when_equal}, "siblings(p, [0, 2], [1/2, 1/4])"),
    ({"siblings": the_target_again}, "wanted [None, ['0', '1', '0']]"),
    ({"siblings": the_number_of_the_child}, "got [1, None], wanted [2, None]"),
    ({"siblings": the_best_first}, "siblings(p, [0, 1, 2]"),
    ({"siblings": in_place}, "p afterwards"),
    ({"siblings": the_child_alone}, "wanted a pair"),
]
