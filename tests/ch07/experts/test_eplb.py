"""The load balancer: the numbers of the original, and what must be true of every placement."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch07_sglang_radix.experts.eplb import arranged, balancedness, pack, place, rank_loads, replicate

LOAD = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]  # the original's example
ROOMS = [2] * 8


def test_the_golden_case_of_the_hierarchical_policy():
    held = place(LOAD, ROOMS, groups=4, nodes=2)
    assert [expert for experts in held for expert in experts] == [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]
    assert 1 / balancedness(rank_loads(LOAD, held)) == pytest.approx(1.21, abs=0.005)


def test_the_golden_case_of_the_global_policy():
    held = place(LOAD, ROOMS)
    assert 1 / balancedness(rank_loads(LOAD, held)) == pytest.approx(1.07, abs=0.005)
    assert place(LOAD, ROOMS, groups=3, nodes=2) == held  # groups that do not divide among nodes are none


def test_groups_stay_on_one_node():
    held = place(LOAD, ROOMS, groups=4, nodes=2)
    nodes = [{expert // 3 for experts in held[first : first + 4] for expert in experts} for first in (0, 4)]
    assert not nodes[0] & nodes[1]


def test_packs_with_room_for_one_are_filled_in_order():
    assert pack([1, 3, 2], [1, 1, 1]) == [[0], [1], [2]]


def test_the_lightest_that_has_room_gets_the_heaviest():
    assert pack([7, 1, 5, 3], [2, 2]) == [[0, 1], [2, 3]]
    assert pack([5, 4, 3], [1, 2]) == [[0], [1, 2]]


def test_replicas_go_to_who_has_most_to_do_per_copy():
    assert replicate([6, 1, 2], 5) == [0, 1, 2, 0, 0]
    assert replicate([8, 3], 5) == [0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pack([1, 2, 3], [1, 1]), "3 things, and room for 2 in 2 packs"),
        (lambda: replicate([1, 2, 3], 2), "2 slots cannot hold 3 experts"),
        (lambda: place([1, 2, 3], [2, 2], groups=2), "3 experts are not 2 groups"),
        (lambda: place([1, 2], [1, 1, 1], nodes=2), "3 ranks are not 2 nodes"),
    ],
)
def test_what_does_not_go_together_is_one_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


loads = st.lists(st.integers(0, 1000), min_size=1, max_size=24)


@st.composite
def problems(draw):
    """Loads, and ranks with room for all experts and a few copies; one more slot on the first ranks where it does not divide."""
    load = draw(loads)
    ranks, redundant = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    total = max(len(load) + redundant, ranks)
    return load, [total // ranks + (rank < total % ranks) for rank in range(ranks)]


@given(problems())
def test_every_expert_has_a_slot_and_every_slot_an_expert(problem):
    load, rooms = problem
    held = place(load, rooms)
    assert [len(experts) for experts in held] == rooms
    assert {expert for experts in held for expert in experts} == set(range(len(load)))
    assert sum(rank_loads(load, held)) == pytest.approx(sum(load))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.data())
def test_the_same_under_the_hierarchical_policy(nodes, per_node, size, ranks, more, data):
    groups = nodes * per_node
    load = data.draw(st.lists(st.integers(0, 1000), min_size=groups * size, max_size=groups * size))
    room = -(-per_node * size // ranks) + more
    held = place(load, [room] * (nodes * ranks), groups, nodes)
    assert [len(experts) for experts in held] == [room] * (nodes * ranks)
    assert {expert for experts in held for expert in experts} == set(range(len(load)))
    on_node = [
        {expert // size for experts in held[node * ranks : (node + 1) * ranks] for expert in experts}
        for node in range(nodes)
    ]
    assert sum(map(len, on_node)) == groups


@given(loads, st.integers(0, 12))
def test_no_other_expert_would_have_less_per_copy_with_one_copy_fewer(load, redundant):
    """Greedy is best here: whoever has a second copy would without it be the busiest of all."""
    copies = Counter(replicate(load, len(load) + redundant))
    worst = max(load[expert] / copies[expert] for expert in range(len(load)))
    assert all(load[expert] / (n - 1) >= worst for expert, n in copies.items() if n > 1)


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_packs_of_the_same_size_differ_by_less_than_the_heaviest_thing(packs, room, data):
    """What one pack has more than another is at most one thing of the heaviest kind: no order of giving out is that bad."""
    weights = data.draw(st.lists(st.integers(0, 1000), min_size=packs * room, max_size=packs * room))
    sums = [sum(weights[thing] for thing in things) for things in pack(weights, [room] * packs)]
    assert max(sums) - min(sums) <= max(weights)
    assert max(sums) <= sum(weights) / packs + max(weights)


@given(problems(), st.data())
def test_what_stays_on_a_rank_stays_in_its_slot(problem, data):
    load, rooms = problem
    before = place(load, rooms)
    load = data.draw(st.permutations(load))
    held = place(load, rooms)
    after = arranged(held, before)
    for new, wanted, old in zip(after, held, before, strict=True):
        assert Counter(new) == Counter(wanted)
        stayed = sum(a == b for a, b in zip(new, old, strict=True))
        assert stayed == sum((Counter(new) & Counter(old)).values())
    assert arranged(before, before) == before


def test_balancedness_is_the_mean_over_the_maximum():
    assert balancedness([30, 10, 20]) == pytest.approx(2 / 3)
    assert balancedness([5, 5]) == balancedness([0, 0]) == 1.0
    assert rank_loads([6, 2], [[0, 1], [0, 0]]) == [4.0, 4.0]
