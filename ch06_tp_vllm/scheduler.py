"""vLLM V1's scheduler: there is no prefill and no decode, only tokens that are not computed yet.

Every request is num_computed_tokens of num_tokens. A step has a budget of tokens and gives

    1. each running request what it lacks: one token if it decodes, a chunk if its prompt is long
    2. each waiting request, in order, its prompt behind what the prefix cache has, as long as budget and rows last and
       the blocks suffice for its whole prompt

so a step may hold a chunk of one prompt, a whole other one, and forty decodes. A running request that gets no block
preempts the newest one (under the priority policy the least important one): its blocks are freed, its tokens
kept, and it waits at the head of the queue. In such a step no waiting request starts.

vLLM 0.33: v1/core/sched/scheduler.py, Scheduler.schedule. Sarathi-Serve (Agrawal et al. 2024) for the mixed step; Orca
(Yu et al. 2022) for scheduling by iterations.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from ch06_tp_vllm.block_manager import BlockManager
from ch06_tp_vllm.request import Request, RequestStatus

POLICIES = ("fcfs", "priority")


class ScheduledRequest(NamedTuple):
    """num_new tokens behind num_computed ones; `emits` if a token is drawn after the last of them."""

    request: Request
    num_computed: int
    num_new: int
    emits: bool


@dataclass(frozen=True)
class SchedulerOutput:
    """One step. num_preempted requests were sent back to make room for it. num_spec_tokens: of a step that is all decodes, for
    how many guesses each request has slots behind its last token."""

    scheduled: list[ScheduledRequest]
    num_preempted: int = 0
    num_spec_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(s.num_new for s in self.scheduled)

    @property
    def is_decode(self) -> bool:
        """Every sequence goes on from a token that the ranks have drawn: the step that CUDA graphs know."""
        return all(s.num_new == 1 and s.request.drawn_here for s in self.scheduled)


class Scheduler:
    """Who runs next. Rank 0 has one; it touches no tensor.

    max_num_batched_tokens: the budget of a step. max_num_seqs: rows. enable_chunked_prefill: a prompt longer than what is
    left of the budget is cut; without it, it waits for a step of its own. scheduler_reserve_full_isl: a request enters only
    if there are blocks for all its tokens, not just for the first chunk of them ("input sequence length"). watermark: and
    if this share of the pool stays free for those who run. num_spec_tokens: guesses that a decode step may have behind each
    last token. max_loras: adapters that run together at most. settle: makes every token that is still being drawn known; called
    before a request is preempted.
    """

    def __init__(
        self, blocks: BlockManager, *, max_num_batched_tokens: int, max_num_seqs: int, policy: str = "fcfs",
        enable_chunked_prefill: bool = True, scheduler_reserve_full_isl: bool = True, watermark: float = 0.0,
        num_spec_tokens: int = 0, max_loras: int = 0, settle: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        if policy not in POLICIES:
            raise ValueError(f"scheduling_policy={policy!r} is unknown; use {' or '.join(POLICIES)}")
        if max_num_batched_tokens < 1 or max_num_seqs < 1:
            raise ValueError(f"{max_num_batched_tokens=} and {max_num_seqs=} must be at least 1")
        if not 0 <= watermark < 1:
            raise ValueError(f"{watermark=} must be a share of the pool, from 0 to below 1")
        self.blocks, self.policy, self.settle = blocks, policy, settle
        self.max_num_batched_tokens, self.max_num_seqs = max_num_batched_tokens, max_num_seqs
        self.enable_chunked_prefill = enable_chunked_prefill
        self.scheduler_reserve_full_isl, self.num_spec_tokens = scheduler_reserve_full_isl, num_spec_tokens
        self.max_loras = max_loras
        self.watermark_blocks = int(watermark * len(blocks.blocks))
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.free_rows = list(range(max_num_seqs))[::-1]
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        if self.policy == "priority":
            bisect.insort(self.waiting, request, key=_importance)
        else:
            self.waiting.append(request)

    def schedule(self) -> SchedulerOutput:
        """The next step; `scheduled` is empty if there is nothing to compute."""
        budget, scheduled, preempted = self.max_num_batched_tokens, [], []
        for request in list(self.running):
            if budget == 0:
                break
            tokens, computed = request.num_tokens, request.num_computed_tokens
            if request.status is not RequestStatus.RUNNING or tokens >= request.max_tokens:
                continue  # preempted a moment ago, or its last token is being drawn
            num_new = min(tokens - computed, budget)
            # as in most steps of most requests: the last block has room for one more, and is not full then
            fits = computed + num_new < len(request.block_table) * self.blocks.block_size
            if not fits:
                before = len(scheduled)
                has_room = self._make_room(request, computed + num_new, scheduled, preempted)
                if len(scheduled) < before:  # who was sent back gives back
                    budget = self.max_num_batched_tokens - sum(s.num_new for s in scheduled)
                if not has_room:
                    continue
            scheduled.append(ScheduledRequest(request, computed, num_new, computed + num_new == tokens))
            budget -= num_new
        for request in list(self.waiting) if not preempted else ():
            if budget == 0 or not self.free_rows:
                break
            if request.adapter and not self._adapter_has_place(request.adapter):
                continue  # as in vLLM: whoever comes later may enter first
            num_new = self._start(request, budget)
            if num_new == 0:
                break
            computed = request.num_computed_tokens
            scheduled.append(ScheduledRequest(request, computed, num_new, computed + num_new == request.num_tokens))
            budget -= num_new
        output = SchedulerOutput(scheduled, len(preempted))
        return replace(output, num_spec_tokens=self._reserve(output)) if self.num_spec_tokens and scheduled else output

    def _reserve(self, output: SchedulerOutput) -> int:
        """Slots for guesses, if the step is all decodes and budget and blocks suffice; nobody is sent back for a guess."""
        more = self.num_spec_tokens
        if not output.is_decode or output.num_tokens * (1 + more) > self.max_num_batched_tokens:
            return 0
        needed = sum(self.blocks.blocks_needed(s.request, s.num_computed + 1 + more) for s in output.scheduled)
        if needed > self.blocks.num_free_blocks:
            return 0
        for s in output.scheduled:
            self.blocks.allocate_slots(s.request, s.num_computed + 1 + more)
        return more

    def _start(self, request: Request, budget: int) -> int:
        """Take a waiting request in; returns how many of its tokens this step computes, 0 if it does not fit."""
        computed = self.blocks.get_computed_blocks(request)
        cached = len(computed) * self.blocks.block_size
        num_new = request.num_tokens - cached
        if num_new > budget:
            num_new = budget if self.enable_chunked_prefill else 0
        if num_new == 0 or not self._may_enter(request, cached + num_new, computed):
            return 0
        self.blocks.allocate_slots(request, cached + num_new, computed)
        self.waiting.remove(request)
        self.running.append(request)
        request.row, request.num_blocks_sent, request.drawn_here = self.free_rows.pop(), 0, False
        request.status, request.num_computed_tokens = RequestStatus.RUNNING, cached
        if request.num_cached_tokens is None:  # not again after a preemption: it would find its own tokens
            request.num_cached_tokens = cached
            self.blocks.stats.queries += len(request.prompt_token_ids)
            self.blocks.stats.hits += cached
        return num_new

    def _adapter_has_place(self, adapter: int) -> bool:
        running = {request.adapter for request in self.running} - {0}
        return adapter in running or len(running) < self.max_loras

    def _may_enter(self, request: Request, num_tokens: int, computed: list[int]) -> bool:
        """The gate of admission: are there blocks for its first num_tokens, or for all of its tokens?

        A request that enters with the first chunk of its prompt and finds no blocks for the next one is preempted, and
        comes back with the first chunk.
        """
        if self.scheduler_reserve_full_isl:
            num_tokens = request.num_tokens
        spare = self.watermark_blocks if self.running else 0
        return self.blocks.blocks_needed(request, num_tokens, computed) + spare <= self.blocks.num_free_blocks

    def _make_room(self, request: Request, num_tokens: int, scheduled: list, preempted: list) -> bool:
        """Slots for the request, at the cost of the least important running one; False if that is itself."""
        if self.blocks.allocate_slots(request, num_tokens):
            return True
        self.settle()  # somebody may have ended, and who goes back to the queue needs all its tokens
        scheduled[:] = [s for s in scheduled if s.request.status is RequestStatus.RUNNING]
        if request.status is not RequestStatus.RUNNING:
            return False
        while not self.blocks.allocate_slots(request, num_tokens):
            victim = max(self.running, key=_importance) if self.policy == "priority" else self.running[-1]
            self._preempt(victim)
            preempted.append(victim)
            scheduled[:] = [s for s in scheduled if s.request is not victim]
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue with nothing computed. What it left in the cache it may find again."""
        self.running.remove(request)
        self._release(request)
        request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        if self.policy == "priority":
            self.add(request)
        else:
            self.waiting.insert(0, request)

    def finish(self, request: Request) -> None:
        """A request whose status says so leaves, from wherever it is."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _release(self, request: Request) -> None:
        self.blocks.free(request)
        self.free_rows.append(request.row)
        request.row = -1


def _importance(request: Request) -> tuple[int, int]:
    """Sorts the most important first."""
    return request.priority, request.arrival


def num_scored(s: ScheduledRequest) -> int:
    """Tokens of the step, from the request's first one on, whose next token's log-probability is asked for."""
    request = s.request
    if request.params.prompt_logprobs is None or request.index > 0:
        return 0
    asked = len(request.prompt_token_ids) - 1  # all tokens of the prompt but the last have a next one in it
    if len(request.prompt_logprobs) == asked:  # told before it was preempted
        return 0
    return max(0, min(s.num_new, asked - s.num_computed))
