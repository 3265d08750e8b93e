"""Where rank 0's scheduler stands after a step, in one small message for whoever counts or draws: metrics, /server_info.

    watch = StepWatch(scheduler)
    watch.queued(rid)        # for each request that is put into the queue
    watch.begin()            # before scheduler.step()
    state = watch.read()     # after it: a StepState

The totals count from the start of the scheduler, so a reader that takes differences loses nothing if messages are skipped.
"""

import time
from collections.abc import Callable

import msgspec

from ch07_sglang_radix.scheduler_state import SchedulerState


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


def held_slots(state: SchedulerState) -> int:
    """Slots outside the free list and the tree, counted at their owners and not by subtraction."""
    requests = sum(req.allocated_len - req.prefix_len for req in state.admitted)
    others = sum(len(pages) for more in state.more_owners for _, pages in more())
    return requests + others * state.page_size


class StepWatch:
    """Reads a scheduler (rank 0) and times who waits in its queue; changes nothing in it."""

    def __init__(self, state: SchedulerState, clock: Callable[[], float] = time.monotonic):
        self._state, self._clock = state, clock
        self._queued_at: dict[int, float] = {}
        self._waited: list[float] = []
        self._began = clock()

    def queued(self, rid: int) -> None:
        self._queued_at[rid] = self._clock()

    def begin(self) -> None:
        self._began = self._clock()

    def read(self) -> StepState:
        s = self._state
        for req, _ in s.last_prefill:
            queued_at = self._queued_at.pop(req.rid, None)
            if queued_at is not None:  # admitted for the first time; after a retraction it is not counted again
                self._waited.append(max(self._began - queued_at, 0.0))
        if len(self._queued_at) > len(s.waiting):  # somebody was aborted in the queue
            waiting = {req.rid for req in s.waiting}
            self._queued_at = {rid: at for rid, at in self._queued_at.items() if rid in waiting}
        waited, self._waited = self._waited, []
        return StepState(
            step=s.step_number, running=len(s.admitted), queue=len(s.waiting), max_total_num_tokens=s.pool.size,
            available=s.pool.free_slots, evictable=s.tree.evictable_size, protected=s.tree.protected_size,
            held=held_slots(s), new_token_ratio=s.new_token_ratio, prompt_tokens=s.served["prompt"],
            cached_tokens=s.served["cached"], sampled=s.work["sampled"], retracted=s.retractions, evicted=s.tree.evicted,
            queue_times=waited,
        )  # fmt: skip
