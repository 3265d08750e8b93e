"""One room on one rank, without a wire: messages go in, messages come out, and it always has one of five states.

    Bootstrapping      the prefill rank lacks a reservation, the decode rank a connection
    WaitingForInput    reserved on all sides; nothing has travelled
    Transferring       some pages have
    Success            sender: every receiver has said Done. Receiver: every page is there, and on rank 0 the first token; if it
                       has read pages where the sender has them, that they were still the room's then
    Failed             for ever, with one reason

A side is where the one of its ranks is that is furthest behind: the minimum, and Failed is the least. So one rank's failure fails
all, and nobody goes on with a page that a peer lacks. SGLang 0.5.23: KVPoll in srt/disaggregation/base/conn.py, poll_and_all_reduce
in srt/disaggregation/utils.py; there every rank gets the minimum, here rank 0, which alone decides.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from ch07_sglang_radix.disaggregation.messages import Done, Fail, Kept, Metadata, Reserve, RoomMessage, Write

DEFLECTED = "the decode engine computes this prompt itself"  # the one reason to give a room up that is no failure


class State(IntEnum):
    FAILED = 0
    BOOTSTRAPPING = 1
    WAITING_FOR_INPUT = 2
    TRANSFERRING = 3
    SUCCESS = 4


def agreed(states: Iterable[int]) -> State:
    """What a side may believe when its ranks are in these states."""
    return State(min(states))


@dataclass(eq=False)
class Room:
    """number: the balancer's, below 2^63. why: the first reason for which it failed, "" while it has not."""

    number: int
    why: str = ""

    @property
    def peers(self) -> Collection[int]:
        """Ranks of the other side that have heard of it."""
        raise NotImplementedError

    def fail(self, why: str) -> None:
        """From here on it is Failed; a second reason changes nothing."""
        self.why = self.why or why

    def farewell(self, why: str) -> list[tuple[int, RoomMessage]]:
        """It fails on this side: whom to tell."""
        self.fail(why)
        return [(peer, Fail(self.number, why)) for peer in self.peers]


@dataclass(eq=False)
class Sender(Room):
    """A prefill rank's. expected: ranks of the decode side that will reserve here; None until the first has said how many ranks
    there are."""

    expected: frozenset[int] | None = None
    reserved: dict[int, Reserve] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    sent: int = 0  # pages from number `first` on
    all_sent: bool = False

    @property
    def state(self) -> State:
        if self.why:
            return State.FAILED
        if self.expected is None or self.expected - self.reserved.keys():
            return State.BOOTSTRAPPING
        if self.all_sent and not self.expected - self.done:
            return State.SUCCESS
        return State.TRANSFERRING if self.sent or self.all_sent else State.WAITING_FOR_INPUT

    @property
    def peers(self) -> Collection[int]:
        return self.reserved.keys()

    @property
    def first(self) -> int:
        """The first of the prompt's pages that the other side lacks."""
        return next(iter(self.reserved.values())).first

    @property
    def digest(self) -> int:
        return next(iter(self.reserved.values())).digest

    def take(self, peer: int, message: RoomMessage, expected: frozenset[int]) -> None:
        """A message of decode rank `peer`, and which of its ranks have something to do with this one."""
        if isinstance(message, Reserve):
            known = next(iter(self.reserved.values()), message)
            if (message.first, len(message.pages)) != (known.first, len(known.pages)):
                self.fail(f"decode ranks reserve {len(known.pages)} pages from {known.first} on and {len(message.pages)} from "
                          f"{message.first} on")  # fmt: skip
            self.expected = expected
            self.reserved.setdefault(peer, message)
        elif isinstance(message, Done):  # before anything was sent, if nothing was missing
            self.done.add(peer)
        elif isinstance(message, Fail):
            self.fail(message.why)

    def send(self, count: int, last: bool) -> list[tuple[int, Write]]:
        """The next `count` pages are computed: what to write to whom. last: no more will come."""
        if self.state not in (State.WAITING_FOR_INPUT, State.TRANSFERRING) or self.all_sent:
            return []
        begin, self.sent, self.all_sent = self.sent, self.sent + count, last
        writes = [(peer, Write(self.number, one.pages[begin : begin + count])) for peer, one in self.reserved.items()]
        return writes if count else []


@dataclass(eq=False)
class Receiver(Room):
    """A decode rank's. sources: prefill ranks that have pages for it. slot: of its metadata, on rank 0; None elsewhere."""

    pages: Sequence[int] = ()
    sources: frozenset[int] = frozenset()
    slot: int | None = None
    told: frozenset[int] = frozenset()  # ranks that it reserves at: the sources and, from rank 0, all others
    connected: bool = True
    thanked: bool = False  # Done has been said
    metadata: Metadata | None = None
    got: dict[int, set[int]] = field(default_factory=dict)
    read_at: set[int] = field(
        default_factory=set
    )  # sources that have sent no bytes: their pages were read where they lie
    kept_by: set[int] = field(default_factory=set)  # of them, who has said that nobody else had these pages meanwhile

    @property
    def state(self) -> State:
        if self.why:
            return State.FAILED
        if not self.connected:
            return State.BOOTSTRAPPING
        if self.whole and self.read_at <= self.kept_by:
            return State.SUCCESS
        return State.TRANSFERRING if self.got or self.metadata else State.WAITING_FOR_INPUT

    @property
    def whole(self) -> bool:
        """Has everything come? Then it says Done."""
        pages = all(len(self.got.get(source, ())) == len(self.pages) for source in self.sources)
        return pages and (self.slot is None or self.metadata is not None)

    @property
    def peers(self) -> Collection[int]:
        return self.told

    def expects(self, source: int, write: Write) -> bool:
        """May these bytes be written? Only into pages that were reserved, and by who has something for this rank."""
        return not self.why and source in self.sources and set(write.pages) <= set(self.pages)

    def take(self, source: int, message: RoomMessage, read: bool = False) -> None:
        """A message of prefill rank `source`; of a Write, once its bytes lie on their pages. read: this rank has fetched them."""
        if isinstance(message, Write):
            if self.expects(source, message):
                self.got.setdefault(source, set()).update(message.pages)
                self.read_at |= {source} if read else set()
            else:
                self.fail(f"prefill rank {source} writes to pages {message.pages[:8]}, which are not this room's")
        elif isinstance(message, Metadata):
            if message.room != self.number or message.slot != self.slot:
                self.fail(f"slot {self.slot} is room {self.number}'s, and got the metadata of room {message.room}")
            elif not self.why:
                self.metadata = message
        elif isinstance(message, Kept):
            self.kept_by.add(source)
        elif isinstance(message, Fail) and self.state is not State.SUCCESS:  # else it has all that it needs
            self.fail(message.why)


def told_by(rank: int, sources: frozenset[int], prefill_ranks: int) -> frozenset[int]:
    """Prefill ranks at which decode rank `rank` reserves: rank 0 at all of them, so that each learns how many decode ranks there
    are, and so whether to wait for more."""
    return frozenset(range(prefill_ranks)) if rank == 0 else sources


def expected_by(rank: int, sources_of: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """Decode ranks that reserve at prefill rank `rank`, by the sources of each."""
    return frozenset(peer for peer, sources in sources_of.items() if peer == 0 or rank in sources)
