"""What both sides' rank 0 do: take requests out of the queue, ask all ranks how far they are, end what failed.

turn()     before each step of the scheduler (StepLoop.beside)
  1. new requests with a Handoff leave the queue                       (prefill.py, decode.py)
  2. one task with all orders, and a poll: where is each room?         (orders.py)
  3. who has got further moves on; who has failed ends with an error   (prefill.py, decode.py)
"""

import time
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, ClassVar

from ch07_sglang_radix.disaggregation import orders
from ch07_sglang_radix.disaggregation.held import HeldPages
from ch07_sglang_radix.disaggregation.kv_manager import KVManager
from ch07_sglang_radix.disaggregation.orders import Order
from ch07_sglang_radix.disaggregation.rooms import State
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tasks import WingTask
from common.request.end import End


@dataclass(eq=False)
class Passage:
    """One request on its way through a room. stage: which of its side's queues it stands in. since: when it came there."""

    req: Req
    room: int
    host: str
    port: int
    stage: str
    since: float = field(default_factory=time.monotonic)
    sent: int = 0  # prefill: pages that all ranks were told to send
    told: bool = False  # prefill: and the metadata
    engine: int = 0  # decode: which prefill engine computes it

    def move(self, stage: str) -> None:
        self.stage, self.since = stage, time.monotonic()


class Side:
    """stages: its queues, in order. timeout: seconds that a room may stand in one in which it waits."""

    stages: tuple[str, ...]
    polled: tuple[str, ...]  # in which of them a room has a state
    waits_in: ClassVar[dict[str, str]]  # in which of them time runs, and what has not happened when it is up

    def __init__(self, scheduler: TPScheduler, manager: KVManager, timeout: float):
        self.scheduler, self.manager, self.timeout = scheduler, manager, timeout
        self.memory, self.held = scheduler.memory, HeldPages(scheduler.memory)
        self.passages: dict[int, Passage] = {}  # by room
        self.failed = 0
        self._orders: list[Order] = []
        scheduler.beside.append(self.turn)
        scheduler.queued.append(self._take)
        scheduler.more_owners.append(self.held.owners)
        scheduler.more_users.append(self.held.of.values)

    def turn(self) -> bool:
        """Is a room on its way?"""
        self.before_poll()
        rooms = [one.room for one in self.passages.values() if one.stage in self.polled]
        states = self._tell_all(rooms)
        for room, state in zip(rooms, states, strict=True):
            one = self.passages[room]
            if state is State.FAILED:
                self.fail(one, self.manager.why(room))
            else:
                self.move(one, state)
        for one in list(self.passages.values()):
            if one.stage in self.waits_in and time.monotonic() - one.since > self.timeout:
                self.fail(one, f"{self.timeout:g} s are over in which {self.waits_in[one.stage]}")
        self._tell_all([])
        return bool(self.passages)

    def before_poll(self) -> None:
        """Orders that need no states."""

    def move(self, one: Passage, state: State) -> None:
        """Its ranks agree that it is in this state, which is not Failed."""
        raise NotImplementedError

    def fail(self, one: Passage, why: str) -> None:
        """It comes to nothing: whoever waits for it hears why, on both sides, and what it holds is free."""
        self.failed += 1
        if not one.req.ended:
            self.scheduler.outcome.stop(one.req, End("error", message=why))
        self.leave(one, why)

    def leave(self, one: Passage, why: str = "") -> None:
        """The room is over."""
        self.order(orders.CLOSE, one.room, int(bool(why)), *orders.as_words(why))
        self.held.let_go(one.room)
        self.memory.heirs.pop(one.req, None)
        del self.passages[one.room]

    def digest(self, req: Req) -> int:
        """What tells its prompt's K and V from any others, on both sides alike: 60 bits of a SHA-256 over what they depend on. That
        is the tokens, as the tree names them, a picture's rows by its content; and the files of its LoRA adapter, since an identity
        (lora.py) is one engine's own, and behind the same name there may be other numbers."""
        content = req.lora_id and self.scheduler.lora.content(req.lora_id)
        over = sha256((content or "").encode())
        over.update(req.all_ids[: len(req.prompt_ids)].astype("<i8").tobytes())
        return int(over.hexdigest()[:15], 16)

    def order(self, kind: int, *words: int) -> None:
        self._orders.append(Order(kind, tuple(words)))

    def _tell_all(self, rooms: list[int]) -> list[State]:
        told, self._orders = self._orders, []
        if rooms:
            told.append(Order(orders.POLL, tuple(rooms)))
        if not told:
            return []
        words = orders.encode(told)
        self.scheduler.control.send_task(WingTask(self.scheduler.step_number, orders.WING, words))
        return self.manager.obey(words)

    def _take(self, req: Req) -> None:
        handoff, req.handoff = req.handoff, None
        if handoff is None:
            return
        self.scheduler.waiting.remove(req)
        self.scheduler.elsewhere.append(req)
        if handoff.room in self.passages:
            why = f"room {handoff.room} is in use; a balancer gives each answer another number"
            self.scheduler.outcome.stop(req, End("refused", message=why))
            return
        one = Passage(req, handoff.room, handoff.host, handoff.port, self.stages[0])
        self.passages[one.room] = one
        self.begin(one)

    def begin(self, one: Passage) -> None:
        """It has just been taken out of the queue."""

    def counts(self) -> dict[str, Any]:
        """How many stand in which queue."""
        found = dict.fromkeys(self.stages, 0)
        for one in self.passages.values():
            found[one.stage] += 1
        return found | {"failed": self.failed, "held_pages": sum(len(pages) for _, pages in self.held.owners())}
