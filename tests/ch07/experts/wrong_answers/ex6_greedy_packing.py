"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from ch07_sglang_radix.experts.exercises.solutions import ex6_greedy_packing as right


def the_same_for_all(load, slots):
    return [slot % len(load) for slot in range(slots)]


def by_load_alone(load, slots):
    experts = list(range(len(load)))
    return experts + [max(experts, key=lambda expert: load[expert])] * (slots - len(load))


def copies_without_the_first(load, slots):
    experts, more = list(range(len(load))), [0] * len(load)
    while len(experts) < slots:
        hottest = max(range(len(load)), key=lambda expert: load[expert] / (more[expert] or 1))
        experts.append(hottest)
        more[hottest] += 1
    return experts


def the_last_of_the_hottest(load, slots):
    turned = right.replicate(load[::-1], slots)
    return [*range(len(load)), *(len(load) - 1 - expert for expert in turned[len(load) :])]


def without_room(weights, packs):
    if len(weights) % packs:
        return right.pack(weights, packs)
    things = [[] for _ in range(packs)]
    for thing in sorted(range(len(weights)), key=lambda thing: -weights[thing]):
        min(things, key=lambda one: sum(weights[i] for i in one)).append(thing)
    return things


def as_they_come(weights, packs):
    order = sorted(range(len(weights)), key=lambda thing: -weights[thing])
    even = [0] * len(weights)
    return [[order.index(thing) for thing in one] for one in right.pack(even, packs)]


def dealt_out_like_cards(weights, packs):
    if len(weights) % packs:
        return right.pack(weights, packs)
    order = sorted(range(len(weights)), key=lambda thing: -weights[thing])
    return [order[one::packs] for one in range(packs)]


def the_lightest_first(weights, packs):
    return right.pack([-weight for weight in weights], packs)


def emptiest_instead_of_lightest(weights, packs):
    things = right.pack([0] * len(weights), packs)
    order = sorted(range(len(weights)), key=lambda thing: -weights[thing])
    return [[order[thing] for thing in one] for one in things]


def a_rest_is_nobodys(weights, packs):
    return right.pack(weights[: len(weights) // packs * packs], packs)


WRONG = [
    ({"replicate": the_same_for_all}, "replicate([6, 1, 2], 5)"),
    ({"replicate": by_load_alone}, "replicate([8, 3], 5)"),
    ({"replicate": copies_without_the_first}, "replicate("),
    ({"replicate": the_last_of_the_hottest}, "replicate([4, 4, 1], 5)"),
    ({"pack": without_room}, "pack("),
    ({"pack": as_they_come}, "pack("),
    ({"pack": dealt_out_like_cards}, "pack([7, 1, 5, 3], 2)"),
    ({"pack": the_lightest_first}, "pack("),
    ({"pack": emptiest_instead_of_lightest}, "pack([7, 1, 5, 3], 2)"),
    ({"pack": a_rest_is_nobodys}, "ValueError is raised"),
]
