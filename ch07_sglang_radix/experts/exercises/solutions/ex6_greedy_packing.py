"""Solution of exercise 6: The lightest that has room."""

from collections.abc import Sequence


def replicate(load: Sequence[float], slots: int) -> list[int]:
    experts, copies = list(range(len(load))), [1] * len(load)
    while len(experts) < slots:
        hottest = max(range(len(load)), key=lambda expert: load[expert] / copies[expert])
        experts.append(hottest)
        copies[hottest] += 1
    return experts


def pack(weights: Sequence[float], packs: int) -> list[list[int]]:
    room, more = divmod(len(weights), packs)
    if more:
        raise ValueError(f"{len(weights)} things cannot be shared out evenly among {packs} packs")
    things, weight = [[] for _ in range(packs)], [0.0] * packs
    for thing in sorted(range(len(weights)), key=lambda thing: -weights[thing]):
        lightest = min((one for one in range(packs) if len(things[one]) < room), key=lambda one: weight[one])
        things[lightest].append(thing)
        weight[lightest] += weights[thing]
    return things
