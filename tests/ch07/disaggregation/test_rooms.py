"""Both sides of a room over a wire that loses, delays, repeats, reorders and breaks: the bytes are right or nobody goes on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ch07_sglang_radix.disaggregation.head_slices import head_slices
from ch07_sglang_radix.disaggregation.messages import Done, Fail, Kept, Metadata, Reserve, Write
from ch07_sglang_radix.disaggregation.rooms import Receiver, Sender, State, agreed, expected_by, told_by

ROOM, SLOT, KV_HEADS, TOKEN = 77, 3, 2, 42
ANOTHER_S = -1  # a page of the prefill side that the room has let go


class Simulated(RuleBasedStateMachine):
    """One room between P and D ranks. A message is on the wire until a rule delivers, repeats or loses it. reads: a Write has no
    bytes; who gets it reads them where they lie then."""

    @initialize(
        prefill=st.integers(1, 3), decode=st.integers(1, 3), first=st.integers(0, 2), missing=st.integers(0, 5),
        reads=st.booleans(),
    )  # fmt: skip
    def begin(self, prefill, decode, first, missing, reads):
        self.reads = reads
        self.prefill, self.decode, self.missing = prefill, decode, missing
        cut = {j: head_slices(KV_HEADS, prefill, j, decode) for j in range(decode)}
        sources = {j: frozenset(one.source for one in cut[j]) for j in range(decode)}
        self.expected = {i: expected_by(i, sources) for i in range(prefill)}
        self.senders = [Sender(ROOM) for _ in range(prefill)]
        self.ours = [100 + n for n in range(first, first + missing)]  # the prefill side's page ids
        pages = [7 + n for n in range(missing)]  # the decode side's
        self.receivers = [
            Receiver(
                ROOM, "", pages, sources[j] if pages else frozenset(), SLOT if j == 0 else None,
                told_by(j, sources[j], prefill),
            )
            for j in range(decode)
        ]  # fmt: skip
        self.landed = [{} for _ in range(decode)]  # (page, source) -> whose page it was
        self.wire = []  # (to which side, from rank, to rank, message, the prefill side's pages in it)
        self.had_everything = set()
        for j, one in enumerate(self.receivers):
            for i in one.told:
                self.wire.append(("prefill", j, i, Reserve(ROOM, SLOT, first, pages, 0), ()))
                if one.state is State.SUCCESS:
                    self.wire.append(("prefill", j, i, Done(ROOM), ()))
        self.seen = [one.state for one in (*self.senders, *self.receivers)]

    def deliver(self, at):
        side, source, to, message, ours = self.wire[at]
        if side == "prefill":
            sender = self.senders[to]
            sender.take(source, message, self.expected[to])
            if isinstance(message, Done) and message.read and source in sender.reserved and not sender.why:
                self.wire.append(("decode", to, source, Kept(ROOM), ()))
            return
        one = self.receivers[to]
        before = one.whole
        if isinstance(message, Write) and not one.expects(source, message):
            return
        if isinstance(message, Write):
            if self.reads and self.senders[source].why:
                ours = [ANOTHER_S] * len(ours)
            self.landed[to] |= {(page, source): mine for page, mine in zip(message.pages, ours, strict=True)}
        one.take(source, message, self.reads)
        if one.whole and not before and not one.why:
            self.wire += [("prefill", to, i, Done(ROOM, i in one.read_at), ()) for i in one.told]

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def arrives(self, data):
        at = data.draw(st.integers(0, len(self.wire) - 1))
        self.deliver(at)
        del self.wire[at]

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def arrives_and_comes_again(self, data):
        at = data.draw(st.integers(0, len(self.wire) - 1))
        if not (
            self.reads and isinstance(self.wire[at][3], Write)
        ):  # no link does that, and what is read may have changed
            self.deliver(at)

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def is_lost(self, data):
        del self.wire[data.draw(st.integers(0, len(self.wire) - 1))]

    @rule(count=st.integers(1, 3))
    def a_chunk_is_computed(self, count):
        """Rank 0 knows that all ranks have a reservation, and tells all to send."""
        if agreed(one.state for one in self.senders) < State.WAITING_FOR_INPUT or self.senders[0].all_sent:
            return
        begin = self.senders[0].sent
        count = min(count, self.missing - begin)
        last = begin + count == self.missing
        for i, one in enumerate(self.senders):
            for j, write in one.send(count, last):
                if any(slice_.source == i for slice_ in head_slices(KV_HEADS, self.prefill, j, self.decode)):
                    self.wire.append(("decode", i, j, write, tuple(self.ours[begin : begin + count])))
        if last:
            self.wire.append(("decode", 0, 0, Metadata(SLOT, ROOM, TOKEN, 0, 0), ()))

    @rule(data=st.data())
    def a_rank_dies(self, data):
        """Its links break: whoever talked to it hears so, unless it is done."""
        dead = data.draw(st.integers(0, self.prefill + self.decode - 1))
        for one in self.senders if dead >= self.prefill else self.receivers:
            if one.state is not State.SUCCESS:
                one.fail(f"rank {dead} is gone")

    @rule(side=st.sampled_from(["prefill", "decode"]))
    def a_side_gives_up(self, side):
        ranks = self.senders if side == "prefill" else self.receivers
        other = "decode" if side == "prefill" else "prefill"
        for rank, one in enumerate(ranks):
            self.wire += [(other, rank, to, message, ()) for to, message in one.farewell("given up")]

    @rule()
    def metadata_of_another_room_comes(self):
        if self.receivers[0].state is not State.SUCCESS:
            self.receivers[0].take(0, Metadata(SLOT, ROOM + 1, 13, 0, 0))
            assert self.receivers[0].state is State.FAILED

    @invariant()
    def nobody_goes_back_and_failed_is_for_ever(self):
        states = [one.state for one in (*self.senders, *self.receivers)]
        for before, now in zip(self.seen, states, strict=True):
            assert now >= before or now is State.FAILED
            assert before is not State.FAILED or now is State.FAILED
        self.seen = states

    @invariant()
    def who_is_done_has_every_page_from_every_source_and_the_right_token(self):
        for rank, one in enumerate(self.receivers):
            for (page, _), mine in self.landed[rank].items():
                assert self.ours[page - 7] == mine or (mine == ANOTHER_S and one.state is not State.SUCCESS)
            if one.whole:
                self.had_everything.add(rank)
            if one.state is State.SUCCESS:
                assert {(page, source) for page in one.pages for source in one.sources} <= self.landed[rank].keys()
        if agreed(one.state for one in self.receivers) is State.SUCCESS:
            assert self.receivers[0].metadata.token == TOKEN

    @invariant()
    def the_prefill_side_lets_go_only_when_the_decode_side_has_everything(self):
        if agreed(one.state for one in self.senders) is State.SUCCESS:
            assert self.had_everything == set(range(self.decode))


Simulated.TestCase.settings = settings(stateful_step_count=40)
TestSimulated = Simulated.TestCase


# --- one at a time


def receiver(**more):
    return Receiver(ROOM, "", [7, 8], frozenset({0, 1}), SLOT, frozenset({0, 1}), **more)


def test_a_sender_waits_for_every_rank_that_has_something_to_do_with_it():
    one = Sender(ROOM)
    assert one.state is State.BOOTSTRAPPING
    one.take(0, Reserve(ROOM, SLOT, 0, [7, 8], 0), frozenset({0, 1}))
    assert one.state is State.BOOTSTRAPPING
    one.take(1, Reserve(ROOM, SLOT, 0, [7, 8], 0), frozenset({0, 1}))
    assert one.state is State.WAITING_FOR_INPUT
    assert one.send(1, False) == [(0, Write(ROOM, [7])), (1, Write(ROOM, [7]))]
    assert one.state is State.TRANSFERRING
    one.send(1, True)
    one.take(0, Done(ROOM), frozenset({0, 1}))
    assert one.state is State.TRANSFERRING, "rank 1 has not said so"
    one.take(1, Done(ROOM), frozenset({0, 1}))
    assert one.state is State.SUCCESS


def test_ranks_that_reserve_different_pages_are_no_side():
    one = Sender(ROOM)
    one.take(0, Reserve(ROOM, SLOT, 0, [7, 8], 0), frozenset({0, 1}))
    one.take(1, Reserve(ROOM, SLOT, 1, [8], 0), frozenset({0, 1}))
    assert one.state is State.FAILED
    assert one.why == "decode ranks reserve 2 pages from 0 on and 1 from 1 on"


def test_nothing_is_sent_before_it_is_known_where_to():
    one = Sender(ROOM)
    assert one.send(1, False) == []
    one.take(0, Reserve(ROOM, SLOT, 0, [7], 0), frozenset({0}))
    assert one.send(1, True) == [(0, Write(ROOM, [7]))]
    assert one.send(1, True) == [], "no more will come"


def test_metadata_of_another_room_fails_the_room_whose_slot_it_is():
    one = receiver()
    one.take(0, Metadata(SLOT, 5, 1, 0, 0))
    assert one.state is State.FAILED
    assert one.why == "slot 3 is room 77's, and got the metadata of room 5"


def test_pages_that_are_not_the_room_s_are_not_written_to():
    one = receiver()
    assert one.expects(1, Write(ROOM, [8]))
    assert not one.expects(1, Write(ROOM, [8, 9])), "page 9 is somebody else's"
    assert not one.expects(2, Write(ROOM, [8])), "rank 2 has no heads for this one"
    one.fail("over")
    assert not one.expects(1, Write(ROOM, [8])), "its pages may be another's by now"


def test_all_pages_without_the_first_token_are_not_enough_and_the_other_way_round():
    one = receiver()
    for source in (0, 1):
        one.take(source, Write(ROOM, [7, 8]))
    assert one.state is State.TRANSFERRING
    one.take(0, Metadata(SLOT, ROOM, TOKEN, 0, 0))
    assert one.state is State.SUCCESS
    other = receiver()
    other.take(0, Metadata(SLOT, ROOM, TOKEN, 0, 0))
    other.take(0, Write(ROOM, [7, 8]))
    assert other.state is State.TRANSFERRING, "source 1 has sent nothing"


def test_who_has_read_pages_waits_until_it_hears_that_they_were_the_room_s():
    one = receiver()
    one.take(0, Write(ROOM, [7, 8]), read=True)
    one.take(1, Write(ROOM, [7, 8]))
    one.take(0, Metadata(SLOT, ROOM, TOKEN, 0, 0))
    assert one.whole
    assert one.state is State.TRANSFERRING
    other = receiver(got={0: {7, 8}, 1: {7, 8}}, metadata=one.metadata, read_at={0})
    one.take(0, Kept(ROOM))
    assert one.state is State.SUCCESS
    other.take(0, Fail(ROOM, "aborted"))
    assert other.state is State.FAILED, "somebody else's K and V may have been read"


def test_who_has_everything_does_not_care_that_the_other_side_fails():
    one = Receiver(ROOM, "", [], frozenset(), None, frozenset({0}))
    assert one.state is State.SUCCESS, "nothing is missing"
    one.take(0, Fail(ROOM, "the prefill engine ends"))
    assert one.state is State.SUCCESS


@given(st.lists(st.sampled_from(State), min_size=1))
def test_a_side_is_where_its_last_rank_is_and_one_failure_fails_all(states):
    assert agreed(states) is min(states)
    assert (agreed(states) is State.FAILED) == (State.FAILED in states)


def test_both_sides_are_told_when_one_gives_up():
    one = receiver()
    assert sorted(one.farewell("no pages")) == [(0, Fail(ROOM, "no pages")), (1, Fail(ROOM, "no pages"))]
    assert one.why == "no pages"
    one.fail("a second reason")
    assert one.why == "no pages"


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_reserves_at_all_prefill_ranks_so_that_each_learns_how_many_decode_ranks_there_are(rank):
    assert told_by(rank, frozenset({2}), 4) == (frozenset({0, 1, 2, 3}) if rank == 0 else frozenset({2}))
