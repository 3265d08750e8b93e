"""The formulas against messages that are counted one by one."""

import pytest

from common.distributed.cost_model import Link, trips, wire_bytes

SIZES = [1, 2, 3, 4, 5, 7, 8, 16]


class Wire:
    """R ranks that hand in n bytes each; `hop` is a set of messages at the same time, (from, to, bytes)."""

    def __init__(self, size: int):
        self.sent, self.received, self.trips = [0] * size, [0] * size, 0

    def hop(self, messages) -> None:
        self.trips += 1
        for source, target, n in messages:
            self.sent[source] += n
            self.received[target] += n

    @property
    def busiest(self) -> int:
        return max(*self.sent, *self.received)


def play(op: str, n: int, size: int) -> Wire:
    """Carry it out. n is a multiple of R, so that nothing is rounded."""
    wire, ring = Wire(size), [(rank, (rank + 1) % size) for rank in range(size)]
    if op == "all_reduce":
        for _ in range(2 * (size - 1)):  # R - 1 hops of partial sums, R - 1 hops of sums
            wire.hop([(a, b, n // size) for a, b in ring])
    elif op == "all_gather":
        for _ in range(size - 1):
            wire.hop([(a, b, n) for a, b in ring])
    elif op == "gather" and size > 1:
        wire.hop([(rank, 0, n) for rank in range(1, size)])
    elif op == "broadcast":
        have = 1
        while have < size:
            wire.hop([(rank, have + rank, n) for rank in range(have) if have + rank < size])
            have *= 2
    return wire


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "gather", "broadcast"])
def test_the_formula_is_what_counting_gives(op, size):
    n = 7 * size * 16
    wire = play(op, n, size)
    assert (wire_bytes(op, n, size), trips(op, size)) == (wire.busiest if size > 1 else 0, wire.trips)


@pytest.mark.parametrize("size", SIZES)
def test_the_ring_factors_are_the_textbook_s(size):
    n = 1000 * size
    assert wire_bytes("all_reduce", n, size) == 2 * (size - 1) / size * n
    assert wire_bytes("all_gather", n, size) == (size - 1) / size * (size * n)


def test_one_rank_sends_nothing():
    for op in ("all_reduce", "all_gather", "gather", "broadcast"):
        assert (wire_bytes(op, 12345, 1), trips(op, 1)) == (0, 0)


def test_a_byte_that_does_not_split_is_rounded_up():
    assert wire_bytes("all_reduce", 10, 3) == 14  # 13.3


def test_an_unknown_op_is_an_error():
    with pytest.raises(KeyError):
        wire_bytes("reduce", 1, 2)


def test_a_small_message_costs_trips_and_a_large_one_bytes():
    link = Link(latency_s=10e-6, bytes_per_s=10e9)
    assert link.seconds("all_reduce", 0, 8) == pytest.approx(14 * 10e-6)
    assert link.seconds("all_reduce", 10**9, 8) == pytest.approx(14 * 10e-6 + 0.175)
    assert link.seconds("broadcast", 8, 4) == pytest.approx(2 * 10e-6, rel=1e-3)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("op", ["all_reduce", "gather"])
def test_a_link_is_found_again_from_two_of_its_times(op, size):
    link = Link(latency_s=25e-6, bytes_per_s=3e9)
    times = [(n, link.seconds(op, n, size)) for n in (8 * size, 1_000_000 * size)]
    found = Link.fit(op, size, *times)
    assert (found.latency_s, found.bytes_per_s) == (pytest.approx(25e-6), pytest.approx(3e9))


def test_two_times_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="8000 bytes took 1e-05 s and 8 bytes 1e-05 s: too alike"):
        Link.fit("all_reduce", 2, (8, 1e-5), (8000, 1e-5))
