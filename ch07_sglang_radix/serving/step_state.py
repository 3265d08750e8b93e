"""Where rank 0's scheduler stands, in one small message for whoever counts or draws: metrics, and /server_info's conservation.

The scheduler's process tells it when main has asked for it (Control "tell_steps"): after a step, TELL_EVERY_S apart at least,
and whenever it comes to rest. The totals count from the scheduler's start, so a reader that takes differences loses nothing by
what is not told.
"""

import time
from collections.abc import Callable

import msgspec

from ch07_sglang_radix.scheduler_state import SchedulerState
from ch07_sglang_radix.serving.channels import Push
from ch07_sglang_radix.serving.messages import Event

STEP_STATE = "step_state"  # name of the event
TELL_EVERY_S = 0.05


class StepState(msgspec.Struct, frozen=True, array_like=True):
    """Tokens are slots of the pool: available + evictable + protected + held = max_total_num_tokens."""

    step: int = 0
    running: int = 0
    queue: int = 0

    max_total_num_tokens: int = 0
    available: int = 0
    evictable: int = 0  # in the tree, used by nobody
    protected: int = 0  # in the tree, used by running requests
    held: int = 0  # of running requests and other owners, not in the tree
    new_token_ratio: float = 0.0

    # totals
    prompt_tokens: int = 0  # of the prompts admitted
    cached_tokens: int = 0  # of those, found in the tree
    sampled: int = 0
    retracted: int = 0
    evicted: int = 0  # slots

    queue_times: list[float] = []  # seconds that each request has waited which was admitted since the last message


class StepTeller:
    """Reads a scheduler between its steps, changes nothing in it, and costs nothing until `switch_on`."""

    def __init__(self, state: SchedulerState, main: Push, clock: Callable[[], float] = time.monotonic):
        self._state, self._main, self._clock = state, main, clock
        self._on = False
        self._told_at = self._began = clock()
        self._queued_at: dict[int, float] = {}
        self._waited: list[float] = []

    def switch_on(self) -> None:
        self._on = True

    def queued(self, rid: int) -> None:
        """A request has been put into the queue."""
        if self._on:
            self._queued_at[rid] = self._clock()

    def begin(self) -> None:
        """A step begins."""
        self._began = self._clock()

    def turn(self) -> None:
        """The loop has come round."""
        if not self._on:
            return
        self._note_admitted()
        now = self._clock()
        if now - self._told_at >= TELL_EVERY_S or not self._state.unfinished:
            self._told_at = now
            self._main.send(Event(STEP_STATE, self._read()))

    def _note_admitted(self) -> None:
        """How long each request has waited for its first step; after a retraction it does not wait for the first time."""
        s = self._state
        for req, _ in s.last_prefill:
            queued_at = self._queued_at.pop(req.rid, None)
            if queued_at is not None:
                self._waited.append(max(self._began - queued_at, 0.0))
        if len(self._queued_at) > len(s.waiting):  # somebody was aborted in the queue
            waiting = {req.rid for req in s.waiting}
            self._queued_at = {rid: at for rid, at in self._queued_at.items() if rid in waiting}

    def _read(self) -> StepState:
        s = self._state
        waited, self._waited = self._waited, []
        return StepState(
            step=s.step_number, running=sum(not req.probe for req in s.admitted), queue=len(s.waiting),
            max_total_num_tokens=s.pool.size, available=s.pool.free_slots, evictable=s.tree.evictable_size,
            protected=s.tree.protected_size, held=s.held_slots, new_token_ratio=s.new_token_ratio,
            prompt_tokens=s.served["prompt"], cached_tokens=s.served["cached"], sampled=s.work["sampled"],
            retracted=s.retractions, evicted=s.tree.evicted, queue_times=waited,
        )  # fmt: skip
