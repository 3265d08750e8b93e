"""What every rank of a side does about rooms: it carries out rank 0's orders, and moves the bytes of its heads.

    the rank's own thread     obey(orders): reserve, send, close, poll; between two steps, in rank 0's order
    the links' threads        take(message): of a Write, copy it to its pages; of the others, tell the room (rooms.py)

One lock guards the rooms. A page is written only while its room is there and has not failed, and under the lock; so once `close`
has come back nothing can write to its pages any more. SGLang's class of this name (0.5.23, srt/disaggregation/mooncake/conn.py,
MooncakeKVManager) has the same two halves.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch

from ch07_sglang_radix.disaggregation import orders
from ch07_sglang_radix.disaggregation.head_slices import HeadSlice, head_slices, latent_slices
from ch07_sglang_radix.disaggregation.kv_pages import KVPages
from ch07_sglang_radix.disaggregation.messages import (
    VERSION,
    AnyMessage,
    Done,
    Fail,
    Hello,
    Kept,
    Metadata,
    Reserve,
    RoomMessage,
    Write,
)
from ch07_sglang_radix.disaggregation.rooms import Receiver, Room, Sender, State, agreed, expected_by, told_by
from ch07_sglang_radix.disaggregation.transport import Link, PeerPages, Transport
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.parallel_state import gather

MOST_BYTES = 8 << 20  # of one Write: the next link need not wait for all of a long prompt
REMEMBERED = 4096  # rooms that are over, so that what still comes for them is known to be late
UNKNOWN_SLOT = -1


class KVManager:
    """mode: prefill or decode. transport: made with this as its handler (attach.py). log: if a list, each message and its peer."""

    def __init__(self, wrapper: TPRadixAttentionModelWrapper, mode: str):
        self.wrapper, self.mode, self.tp = wrapper, mode, wrapper.tp
        self.pages = KVPages(wrapper.kv_cache.tensors)
        self.parts = self.pages.parts
        self.hello = Hello(VERSION, mode, self.tp.rank, self.tp.size)
        self.transport: Transport
        self.log: list[tuple[int, AnyMessage]] | None = None
        self._lock = threading.RLock()
        self._rooms: dict[int, Sender | Receiver] = {}
        self._links: dict[tuple[int, int], Link] = {}  # (room, peer) -> which it talks by
        self._claimed: set[int] = set()  # rooms that rank 0 has asked about
        self._over: OrderedDict[int, str] = OrderedDict()  # room -> why it failed, "" if it did not
        self._slots: dict[int, int] = {}  # decode rank 0: slot -> room
        self._engines: dict[int, list[str]] = {}  # decode: the ranks' addresses of each prefill engine
        self._to: dict[tuple[int, int], Link] = {}  # decode: (engine, prefill rank) -> link, as long as it is not lost

    # --- what rank 0 says

    def obey(self, words: Sequence[int]) -> list[State]:
        """Carry out a task's orders. On rank 0: the agreed states that a `poll` among them asks for."""
        states: list[State] = []
        for kind, told in orders.decode(words):
            if kind == orders.MEET:
                self._engines[told[0]] = orders.as_text(told[1:]).split()
            elif kind == orders.RESERVE:
                self._reserve(*told[:5], list(told[5:]))
            elif kind == orders.SEND:
                self._send(told[0], bool(told[1]), list(told[2:]))
            elif kind == orders.CLOSE:
                self._close(told[0], orders.as_text(told[2:]) if told[1] else "")
            elif kind == orders.TURN_AWAY:
                self._turn_away(*told[:2], orders.as_text(told[2:]))
            elif kind == orders.BEGIN:
                self._begin(*told)
            else:
                states = self._poll(told)
        return states

    def _begin(self, row: int, token: int, shift: int) -> None:
        table = self.wrapper.table
        there, tokens = (torch.tensor([one], device=self.tp.device) for one in (row, token))
        table.set_tokens(there, tokens)
        if table.shift is not None:  # always: whoever had the row before may have left one
            table.set_shifts(there, np.array([shift]))

    def _poll(self, rooms: Sequence[int]) -> list[State]:
        mine = torch.tensor(self.states(rooms))
        ranks = gather(mine, self.tp, "rooms")  # COMM gather [rooms]: how far each rank is; rank 0 takes the minimum
        return [agreed(states) for states in torch.stack(ranks).T.tolist()] if ranks else []

    def states(self, rooms: Iterable[int]) -> list[int]:
        """Of this rank alone."""
        with self._lock:
            self._claimed |= set(rooms)
            return [self._state(room) for room in rooms]

    def _state(self, room: int) -> int:
        if room in self._over:
            return State.FAILED
        one = self._rooms.get(room)
        if isinstance(one, Receiver):
            self._thank(one)
        return one.state if one else State.BOOTSTRAPPING

    def _thank(self, one: Receiver) -> None:
        """Once it has everything, whatever came last, a message or a connection: those it has it from may let go."""
        one.connected = all(self._links[one.number, peer].peer for peer in one.told)
        if one.whole and one.connected and not one.why and not one.thanked:
            one.thanked = True
            for peer in one.told:
                self._links[one.number, peer].send(Done(one.number, peer in one.read_at))

    def why(self, room: int) -> str:
        """The reason for which a room has failed, as far as this rank knows."""
        with self._lock:
            one = self._rooms.get(room)
            return self._over.get(room) or (one.why if one else "") or "another rank of this side has failed"

    def _close(self, room: int, why: str) -> None:
        """Forget it. why: it has failed, and the other side is told; "": it is done."""
        with self._lock:
            one = self._rooms.get(room)
            for peer, message in one.farewell(why) if one and why else ():
                self._links[room, peer].send(message)
            self._forget(room, why)

    def _forget(self, room: int, why: str) -> None:
        one = self._rooms.pop(room, None)
        if isinstance(one, Receiver):
            self._slots.pop(one.slot, None)
        for peer in one.peers if one else ():
            self._links.pop((room, peer), None)
        self._claimed.discard(room)
        self._over[room] = why
        while len(self._over) > REMEMBERED:
            self._over.popitem(last=False)

    # --- prefill

    def first_missing(self, room: int) -> int:
        """The first page that the decode side lacks; asked of a room beyond Bootstrapping."""
        with self._lock:
            return self._rooms[room].first

    def digest(self, room: int) -> int:
        """The decode side's; asked as `first_missing`."""
        with self._lock:
            return self._rooms[room].digest

    def metadata(self, room: int, token: int, cached_tokens: int, seed: int, *logprobs: list) -> None:
        """Rank 0: the last message of a room, behind its pages."""
        with self._lock:
            one = self._rooms.get(room)
            if one and not one.why:
                slot = one.reserved[0].slot
                told = Metadata(slot, room, token, cached_tokens, seed, *logprobs)
                self._links[room, 0].send(told)
                self._note(0, told)

    def _send(self, room: int, last: bool, pages: list[int]) -> None:
        """pages: ours, the next of the prompt's; they stay as they are until the room is over."""
        most = max(MOST_BYTES // self.pages.bytes_of(1, self.pages.heads), 1)
        ready = self.pages.event()
        with self._lock:
            one = self._rooms.get(room)
            for begin in range(0, max(len(pages), 1), most) if one else ():
                some = pages[begin : begin + most]
                for peer, write in one.send(len(some), last and begin + most >= len(pages)):
                    link = self._links[room, peer]
                    if mine := self._slice_for(peer, link.peer.ranks):
                        size = self.pages.bytes_of(len(some), len(mine.heads))
                        link.send(write, self.pages.cut(some, mine.heads, ready, partial(self._keeps, one)), size)
                        self._note(peer, write)

    def _keeps(self, one: Sender) -> bool:
        """Are its pages still the room's? A room that fails keeps them until `close`."""
        with self._lock:
            return self._rooms.get(one.number) is one

    def _slice_for(self, peer: int, decode_ranks: int) -> HeadSlice | None:
        slices = self._slices(self.tp.size, peer, decode_ranks)
        return next((one for one in slices if one.source == self.tp.rank), None)

    def _slices(self, prefill_ranks: int, rank: int, decode_ranks: int) -> list[HeadSlice]:
        """What decode rank `rank` gets from whom."""
        if self.pages.planes == 1:  # one row for all heads, the same on every rank
            return latent_slices(prefill_ranks, rank, decode_ranks)
        return head_slices(self.wrapper.config.num_kv_heads, prefill_ranks, rank, decode_ranks)

    # --- decode

    def knows(self, engine: int) -> bool:
        """Rank 0: are all ranks of this prefill engine still connected?"""
        with self._lock:
            return all((engine, i) in self._to for i in range(len(self._engines[engine])))

    def metadata_of(self, room: int) -> Metadata:
        """Rank 0, of a room at Success."""
        with self._lock:
            return self._rooms[room].metadata

    def _reserve(self, room: int, engine: int, slot: int, first: int, digest: int, pages: list[int]) -> None:
        ranks = len(self._engines[engine])
        sources = frozenset(one.source for one in self._slices(ranks, self.tp.rank, self.tp.size))
        told = told_by(self.tp.rank, sources, ranks)
        with self._lock:
            mine = slot if self.tp.rank == 0 else None
            one = self._rooms[room] = Receiver(room, "", pages, sources if pages else frozenset(), mine, told)
            if mine is not None:
                self._slots[slot] = room
            for i in told:
                link = self._links[room, i] = self._link_to(engine, i)
                message = Reserve(room, slot, first, pages, digest)
                link.send(message)
                self._note(i, message)
            self._thank(one)  # if nothing is missing, and the metadata is rank 0's

    def _turn_away(self, room: int, engine: int, why: str) -> None:
        """Rank 0 to rank 0, which closes it for the others: the room ends before anything was reserved for it. A rank that heard of
        it sooner would have failed for no reason that rank 0 knows."""
        if self.tp.rank == 0:
            with self._lock:
                first, *_ = [self._link_to(engine, i) for i in range(len(self._engines[engine]))]  # all: see `knows`
                first.send(Fail(room, why))

    def _link_to(self, engine: int, rank: int) -> Link:
        """The one there is, or if it was lost a new one."""
        if (engine, rank) not in self._to:
            self._to[engine, rank] = self.transport.connect(self._engines[engine][rank])
        return self._to[engine, rank]

    # --- what the links say (transport.Handler)

    def greeted(self, link: Link) -> None:
        if link.peer.mode == self.mode:
            raise ValueError(f"both sides are {self.mode} engines")

    def place(self, link: Link, write: Write, size: int) -> memoryview | None:
        with self._lock:
            one = self._rooms.get(write.room)
            if not isinstance(one, Receiver) or not one.expects(link.peer.rank, write):
                return None
            heads = len(self._slice_from(link).heads)
        if size != self.pages.bytes_of(len(write.pages), heads):
            raise ValueError(
                f"{len(write.pages)} pages of {heads} heads are {self.pages.bytes_of(len(write.pages), heads):,} bytes here, and "
                f"{size:,} are announced"
            )
        return memoryview(np.empty(size, dtype=np.uint8))

    def _slice_from(self, link: Link) -> HeadSlice:
        slices = self._slices(link.peer.ranks, self.tp.rank, self.tp.size)
        return next(one for one in slices if one.source == link.peer.rank)

    def take(self, link: Link, message: RoomMessage, payload: memoryview | PeerPages | None) -> None:
        with self._lock:
            if self.mode == "prefill":
                self._take_from_decode(link, message)
            else:
                self._take_from_prefill(link, message, payload)

    def _take_from_decode(self, link: Link, message: RoomMessage) -> None:
        room, peer = message.room, link.peer.rank
        free = self._links.get((room, peer), link) is link  # else another decode engine's, whose request goes on
        if room in self._over or not free:
            if isinstance(message, Reserve):  # it comes too late, or the number is used twice
                said = "over" if free else "another decode engine's; a balancer gives each answer another number"
                link.send(Fail(room, self._over.get(room) or f"room {room} is {said}"))
            return
        if isinstance(message, Reserve):
            self._links[room, peer] = link
        elif room not in self._rooms:
            if isinstance(message, Fail):  # it was given up before anything was reserved
                self._over[room] = message.why
            return
        one = self._rooms.setdefault(room, Sender(room))
        one.take(peer, message, self._expected(link.peer.ranks))
        if isinstance(message, Done) and message.read and peer in one.reserved and not one.why:
            link.send(Kept(room))
        if one.why and room not in self._claimed:  # its request has not come: nobody else would close it
            self._forget(room, one.why)

    def _expected(self, decode_ranks: int) -> frozenset[int]:
        sources_of = {
            j: frozenset(one.source for one in self._slices(self.tp.size, j, decode_ranks)) for j in range(decode_ranks)
        }
        return expected_by(self.tp.rank, sources_of)

    def _take_from_prefill(self, link: Link, message: RoomMessage, payload: memoryview | PeerPages | None) -> None:
        room = self._slots.get(message.slot, UNKNOWN_SLOT) if isinstance(message, Metadata) else message.room
        one = self._rooms.get(room)
        if one is None or self._links.get((room, link.peer.rank)) is not link:
            return  # late: the room is over
        if isinstance(message, Write):
            if payload is None or not one.expects(link.peer.rank, message):
                return
            self.pages.write(message.pages, self._slice_from(link), payload)  # under the lock: that makes `close` final
        one.take(link.peer.rank, message, isinstance(payload, PeerPages))
        self._note(link.peer.rank, message)
        self._thank(one)

    def lost(self, link: Link, why: str) -> None:
        with self._lock:
            self._to = {key: one for key, one in self._to.items() if one is not link}
            other = "decode" if self.mode == "prefill" else "prefill"
            for room, peer in [key for key, one in self._links.items() if one is link]:
                one = self._rooms.get(room)
                if one is None:
                    continue
                if one.state is not State.SUCCESS:
                    one.fail(f"rank {peer} of the {other} side is gone: {why}")
                if isinstance(one, Sender) and room not in self._claimed:
                    self._forget(room, one.why)

    # --- small things

    def rooms(self) -> list[Room]:
        with self._lock:
            return list(self._rooms.values())

    def _note(self, peer: int, message: AnyMessage) -> None:
        if self.log is not None:
            self.log.append((peer, message))
