"""What a message costs, against the algorithms played rank by rank."""

import pytest

from common.distributed.cost_model import Link, rounds, wire_bytes


def ring(ranks, pieces_each, times):
    """(bytes, rounds): in each round every rank hands one piece to its neighbour."""
    return ranks * pieces_each * times, times


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_ring_all_reduce_hands_every_part_round_twice(ranks):
    part = 840 // ranks  # of 840 bytes: one for each rank
    sent, steps = ring(ranks, part, 2 * (ranks - 1))
    assert wire_bytes("all_reduce", 840, ranks) == sent
    assert rounds("all_reduce", ranks) == steps
    assert Link(1.0, 100.0).seconds("all_reduce", 840, ranks) == pytest.approx(steps * (1 + part / 100))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_ring_all_gather_hands_every_shard_round_once(ranks):
    sent, steps = ring(ranks, 840, ranks - 1)
    assert wire_bytes("all_gather", 840, ranks) == sent
    assert rounds("all_gather", ranks) == steps


@pytest.mark.parametrize(("ranks", "steps"), [(2, 1), (3, 2), (4, 2), (5, 3), (8, 3)])
def test_a_tree_broadcast_reaches_twice_as_many_each_round(ranks, steps):
    reached, n = 1, 0
    while reached < ranks:
        reached, n = 2 * reached, n + 1
    assert n == steps == rounds("broadcast", ranks)
    assert wire_bytes("broadcast", 840, ranks) == (ranks - 1) * 840, "everybody but rank 0 gets it once"


def test_rank_0_receives_all_of_a_gather():
    assert wire_bytes("gather", 840, 4) == 3 * 840
    assert Link(1.0, 840.0).seconds("gather", 840, 4) == 1 + 3


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "gather", "broadcast"])
def test_one_rank_alone_sends_nothing(op):
    assert (wire_bytes(op, 840, 1), rounds(op, 1), Link(1.0, 1.0).seconds(op, 840, 1)) == (0, 0, 0.0)


def test_a_small_message_costs_latency_and_a_large_one_bandwidth():
    gloo = Link(latency_s=50e-6, bytes_per_s=1e9)
    assert gloo.seconds("all_reduce", 896, 2) == pytest.approx(2 * 50e-6, rel=0.01)
    assert gloo.seconds("all_reduce", 1 << 30, 2) == pytest.approx((1 << 30) / 1e9, rel=0.01)


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "gather", "broadcast"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_link_is_read_from_two_measurements(op, ranks):
    link = Link(latency_s=30e-6, bytes_per_s=2e9)
    small, large = ((n, link.seconds(op, n, ranks)) for n in (256, 1 << 22))
    found = Link.fit(op, ranks, small, large)
    assert found.latency_s == pytest.approx(link.latency_s)
    assert found.bytes_per_s == pytest.approx(link.bytes_per_s)
    with pytest.raises(ValueError, match="too alike to tell bytes from messages"):
        Link.fit(op, ranks, large, small)
