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


class ExpertState(msgspec.Struct, frozen=True, array_like=True):
    """Totals of rows, and how even they were: expert_load.py."""

    layers: list[int]
    of_expert: list[list[int]]  # of each of these layers
    of_rank: list[list[int]]
    balancedness: list[float]  # of each reading since the last message


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

    verified: int = 0  # requests in verify steps
    proposed: int = 0  # guesses that were verified
    correct: int = 0  # and right

    queue_times: list[float] = []  # seconds that each request has waited which was admitted since the last message
    lora_slots_used: int = 0  # slots of adapters, of those that there are
    lora_slots: int = 0
    experts: ExpertState | None = None  # if they have been read since then


class StepTeller:
    """Reads a scheduler between its steps, changes nothing in it, and costs nothing until `switch_on`."""

    def __init__(
        self, state: SchedulerState, main: Push, dp_rank: int | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self._state, self._main, self._dp_rank, self._clock = state, main, dp_rank, clock
        self._on = False
        self._told_at = self._began = clock()
        self._queued_at: dict[int, float] = {}
        self._waited: list[float] = []
        self._balancedness: list[float] = []  # of readings that main has not been told of
        self._readings = 0

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
        self._note_reading()
        now = self._clock()
        if now - self._told_at >= TELL_EVERY_S or not self._state.everybody:
            self._told_at = now
            self._main.send(Event(STEP_STATE, self._read(), self._dp_rank))

    def _note_admitted(self) -> None:
        """How long each request has waited for its first step; after a retraction it does not wait for the first time."""
        s = self._state
        for req in (req for rank in s.data_ranks for req, _ in rank.last_prefill):
            queued_at = self._queued_at.pop(req.rid, None)
            if queued_at is not None:
                self._waited.append(max(self._began - queued_at, 0.0))
        if len(self._queued_at) > sum(len(rank.waiting) for rank in s.data_ranks):  # somebody was aborted in the queue
            waiting = {req.rid for rank in s.data_ranks for req in rank.waiting}
            self._queued_at = {rid: at for rid, at in self._queued_at.items() if rid in waiting}

    def _note_reading(self) -> None:
        load = self._state.expert_load
        if load and load.readings != self._readings:
            self._readings = load.readings
            self._balancedness.append(load.balancedness)

    def _experts(self) -> ExpertState | None:
        even, self._balancedness = self._balancedness, []
        if not even:
            return None
        load = self._state.expert_load
        return ExpertState(load.layers, load.of_expert.tolist(), load.of_rank.tolist(), even)

    def _guessed(self) -> dict[str, int]:
        told = self._state.speculation
        if told is None:
            return {}
        return {"verified": told.sequences, "proposed": told.sequences * (told.nodes - 1), "correct": told.correct}

    def _read(self) -> StepState:
        s, total = self._state, self._state.totals()
        waited, self._waited = self._waited, []
        lora = s.lora.facts() if s.lora else {}
        return StepState(
            step=s.step_number, running=total["running"], queue=total["waiting"], max_total_num_tokens=total["size"],
            available=total["free"], evictable=total["evictable"], protected=total["protected"], held=total["held"],
            new_token_ratio=s.new_token_ratio,
            prompt_tokens=s.served["prompt"], cached_tokens=s.served["cached"], sampled=s.work["sampled"],
            retracted=total["retractions"], evicted=total["evicted"], queue_times=waited, **self._guessed(),
            lora_slots_used=lora.get("lora_pool_slots_used", 0), lora_slots=lora.get("lora_pool_slots_total", 0),
            experts=self._experts(),
        )  # fmt: skip
