"""Which rank holds which expert, so that all ranks have alike much to do: DeepSeek's expert-parallel load balancer (EPLB).

    load    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]      rows that 12 experts got lately
      1     groups to nodes      a token's experts are of few groups (DeepSeek-V3), so a group stays on one node
      2     replicas             who has most to do per copy gets one more, until all slots are used
      3     replicas to GPUs     the heaviest first, each to the lightest GPU that has room
    slots   [5, 6, 5, 7, 8, 4, 3, 4, | 10, 9, 10, 2, 0, 1, 11, 1]    2 nodes, 8 GPUs of 2 slots

This is the hierarchical policy. Where groups do not divide evenly among nodes, or there are none, 1 is left out: the global one.
Published as github.com/deepseek-ai/EPLB; SGLang 0.5.23 has it in srt/eplb/eplb_algorithms/deepseek.py. Pure functions of one
layer's numbers; every rank would get the same, but one alone asks (rebalancer.py).

What is ours: ranks need not have equally many slots, and a new placement is arranged so that what stays on a rank stays in its
slot (`arranged`), since a slot that changes costs a message.
"""

from collections import Counter
from collections.abc import Sequence


def pack(weights: Sequence[float], rooms: Sequence[int]) -> list[list[int]]:
    """Things into packs, rooms[p] of them into pack p: the heaviest first, each into the lightest pack that has room.

    Returns the things of each pack, in the order in which they came. Of two alike the first is taken. As in the original, packs
    with room for one each are filled in order: nothing would be gained.
    Raises ValueError unless there is room for exactly all of them.
    """
    if sum(rooms) != len(weights):
        raise ValueError(f"{len(weights)} things, and room for {sum(rooms)} in {len(rooms)} packs; make it the same")
    if all(room == 1 for room in rooms):
        return [[thing] for thing in range(len(weights))]
    packs: list[list[int]] = [[] for _ in rooms]
    filled = [0.0] * len(rooms)
    for thing in sorted(range(len(weights)), key=lambda thing: -weights[thing]):
        lightest = min((p for p in range(len(rooms)) if len(packs[p]) < rooms[p]), key=filled.__getitem__)
        packs[lightest].append(thing)
        filled[lightest] += weights[thing]
    return packs


def replicate(load: Sequence[float], slots: int) -> list[int]:
    """The expert of each slot: each has one, the rest goes, one by one, to the expert with most to do per copy.

    Raises ValueError if there are fewer slots than experts.
    """
    if slots < len(load):
        raise ValueError(f"{slots} slots cannot hold {len(load)} experts; use at least {len(load)}")
    copies, experts = [1] * len(load), list(range(len(load)))
    while len(experts) < slots:
        hottest = max(range(len(load)), key=lambda expert: load[expert] / copies[expert])
        experts.append(hottest)
        copies[hottest] += 1
    return experts


def place(load: Sequence[float], rooms: Sequence[int], groups: int = 1, nodes: int = 1) -> list[list[int]]:
    """The experts that each rank holds, rooms[r] of them on rank r. load: of each expert, such as the rows it got.

    groups: of experts that a router chooses together; nodes: of equally many ranks each, where a message inside is cheap. If
    groups divide evenly among nodes, no group is split over two of them. Raises ValueError for numbers that do not go together.
    """
    if len(load) % groups:
        raise ValueError(f"{len(load)} experts are not {groups} groups of the same size")
    if len(rooms) % nodes:
        raise ValueError(f"{len(rooms)} ranks are not {nodes} nodes of the same size")
    if groups % nodes:
        groups, nodes = 1, 1  # the global policy
    size, ranks = len(load) // groups, len(rooms) // nodes
    of_group = [sum(load[group * size : (group + 1) * size]) for group in range(groups)]
    held: list[list[int]] = []
    for node, its_groups in enumerate(pack(of_group, [groups // nodes] * nodes)):
        experts = [group * size + i for group in its_groups for i in range(size)]
        its_load = [load[expert] for expert in experts]
        its_rooms = rooms[node * ranks : (node + 1) * ranks]
        replicas = replicate(its_load, sum(its_rooms))
        copies = Counter(replicas)
        packs = pack([its_load[one] / copies[one] for one in replicas], its_rooms)
        held += [[experts[replicas[thing]] for thing in things] for things in packs]
    return held


def arranged(held: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same experts on the same ranks, each in the slot where that rank has it already: `before`, slot by slot, if it has."""
    return [_in_their_slots(list(now), old) for now, old in zip(held, before, strict=True)]


def _in_their_slots(new: list[int], old: Sequence[int]) -> list[int]:
    slots: list[int | None] = []
    for expert in old:
        slots.append(expert if expert in new else None)
        if expert in new:
            new.remove(expert)
    return [new.pop(0) if expert is None else expert for expert in slots]


def rank_loads(load: Sequence[float], held: Sequence[Sequence[int]]) -> list[float]:
    """What each rank has to do if the copies of an expert share its load evenly."""
    copies = Counter(expert for experts in held for expert in experts)
    return [sum(load[expert] / copies[expert] for expert in experts) for experts in held]


def balancedness(loads: Sequence[float]) -> float:
    """Mean over maximum: the share of all ranks' time in which they compute while the busiest one does. 1 is best.

    SGLang's number (srt/eplb/expert_distribution.py, compute_utilization_rate). 1 if nobody has anything to do.
    """
    most = max(loads)
    return sum(loads) / len(loads) / most if most else 1.0
