"""What a message costs, against the algorithms played rank by rank."""

import random

import pytest

from common.distributed.cost_model import Link, Sample, rounds, wire_bytes

OPS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "gather", "broadcast", "send", "receive", "exchange")


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


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_reduce_scatter_and_an_all_gather_are_an_all_reduce(ranks):
    halves = {"reduce_scatter": 840, "all_gather": 840 // ranks}
    assert sum(wire_bytes(op, n, ranks) for op, n in halves.items()) == wire_bytes("all_reduce", 840, ranks)
    assert sum(rounds(op, ranks) for op in halves) == rounds("all_reduce", ranks)
    link = Link(1.0, 100.0)
    assert sum(link.seconds(op, n, ranks) for op, n in halves.items()) == pytest.approx(
        link.seconds("all_reduce", 840, ranks)
    )


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_pairs_exchange_all_but_what_a_rank_keeps(ranks):
    sent = sum(840 // ranks for rank in range(ranks) for other in range(ranks) if rank != other)
    assert wire_bytes("all_to_all", 840, ranks) == sent
    assert rounds("all_to_all", ranks) == ranks - 1
    assert Link(1.0, 100.0).seconds("all_to_all", 840, ranks) == pytest.approx((ranks - 1) * (1 + 840 / ranks / 100))


@pytest.mark.parametrize("ranks", [2, 8])
def test_what_is_sent_from_one_to_one_crosses_once(ranks):
    assert wire_bytes("send", 840, ranks) + wire_bytes("receive", 840, ranks) == 840
    assert Link(1.0, 840.0).seconds("send", 840, ranks) == 2


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_round_a_ring_every_rank_sends_on_what_it_has(ranks):
    assert wire_bytes("exchange", 840, ranks) == ranks * 840
    times = ranks - 1  # until every rank has seen every block: an all-gather
    assert times * wire_bytes("exchange", 840, ranks) == wire_bytes("all_gather", 840, ranks)
    assert times * Link(1.0, 100.0).seconds("exchange", 840, ranks) == Link(1.0, 100.0).seconds(
        "all_gather", 840, ranks
    )


@pytest.mark.parametrize("op", OPS)
def test_one_rank_alone_sends_nothing(op):
    assert (wire_bytes(op, 840, 1), rounds(op, 1), Link(1.0, 1.0, 1.0).seconds(op, 840, 1)) == (0, 0, 0.0)


def test_a_small_message_costs_latency_and_a_large_one_bandwidth():
    gloo = Link(latency_s=50e-6, bytes_per_s=1e9)
    assert gloo.seconds("all_reduce", 896, 2) == pytest.approx(2 * 50e-6, rel=0.01)
    assert gloo.seconds("all_reduce", 1 << 30, 2) == pytest.approx((1 << 30) / 1e9, rel=0.01)


def test_an_operation_starts_once_however_many_messages_it_has():
    assert Link(1.0, 1e9, start_s=5.0).seconds("all_reduce", 0, 4) == 5 + 6


@pytest.mark.parametrize("op", [op for op in OPS if op != "receive"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_link_is_read_from_two_measurements(op, ranks):
    link = Link(latency_s=30e-6, bytes_per_s=2e9)
    small, large = (Sample(op, ranks, n, link.seconds(op, n, ranks)) for n in (256, 1 << 22))
    found = Link.fit([small, large])
    assert found.latency_s == pytest.approx(link.latency_s)
    assert found.bytes_per_s == pytest.approx(link.bytes_per_s)
    assert found.error([small, large]) == pytest.approx(0, abs=1e-9)
    swapped = [Sample(op, ranks, small.nbytes, large.seconds), Sample(op, ranks, large.nbytes, small.seconds)]
    with pytest.raises(ValueError, match="too alike to tell bytes from messages"):
        Link.fit(swapped)


def test_many_noisy_measurements_of_all_operations_give_the_link_and_how_far_off_it_is():
    link, rng = Link(latency_s=40e-6, bytes_per_s=1e9), random.Random(0)
    samples = [
        Sample(op, ranks, 4**k, link.seconds(op, 4**k, ranks) * rng.uniform(0.9, 1.1))
        for op in OPS if op != "receive" for ranks in (2, 3, 4) for k in range(4, 12)
    ]  # fmt: skip
    found = Link.fit(samples)
    assert found.latency_s == pytest.approx(link.latency_s, rel=0.05)
    assert found.bytes_per_s == pytest.approx(link.bytes_per_s, rel=0.05)
    assert 0.04 < found.error(samples) < 0.07, "a tenth at most, evenly: 0.1 / sqrt(3)"
    for other in (Link(50e-6, 1e9), Link(40e-6, 0.8e9)):
        assert found.error(samples) < other.error(samples), "the nearest link"


def test_a_message_never_costs_less_than_nothing():
    found = Link.fit(
        [Sample("send", 2, 1000, 0.9), Sample("send", 2, 2000, 2.0)]
    )  # a line through these starts below 0
    assert found.latency_s == 0
    assert found.seconds("send", 1000, 2) > 0
