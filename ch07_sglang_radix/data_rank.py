"""Who decides for one data rank: a queue, a tree, pools, and what is to be done with them next.

Without attention data parallelism there is one, and it is the scheduler itself (scheduler.py). With it there are several, and
the scheduler is the first of them. All live on rank 0: every one plans, and what they want becomes one task with a part for each
(step_loop.py). SGLang has a scheduler process for each, which exchange how many tokens they bring before every step
(0.5.23, srt/managers/scheduler_dp_attn_mixin.py); here rank 0 knows.
"""

from collections.abc import Callable, Sequence

from ch07_sglang_radix.admission import Admission
from ch07_sglang_radix.outcome import Outcome
from ch07_sglang_radix.prefill_adder import Gate
from ch07_sglang_radix.retraction import Retraction
from ch07_sglang_radix.scheduler_state import SchedulerState
from ch07_sglang_radix.step_plan import StepPlan
from ch07_sglang_radix.step_tasks import StepTasks
from ch07_sglang_radix.verify_step import Speculation

LOAD_BALANCE_METHODS = ("total_tokens", "total_requests", "round_robin")


class DataRank(SchedulerState):
    """A state and those who move it. `decide_with` gives it what it decides with; only rank 0 of all ranks decides."""

    speculation: Speculation | None = None  # where a decode step may verify guesses

    @property
    def load(self) -> tuple[int, int]:
        """(tokens that its requests have or will have at most, requests)"""
        return sum(req.max_len for req in self.unfinished), len(self.unfinished)

    def decide_with(
        self, settle: Callable[[], None], gate: Gate, chunked_prefill_size: int, enable_mixed_chunk: bool,
        small_request_share: float, gather_best: bool,
    ) -> None:  # fmt: skip
        """settle: makes every token known that is on its way. The others are TPScheduler's."""
        if self.wrapper.verifier:
            self.speculation = Speculation(self, self.wrapper.verifier.options.nodes, settle)
        self.outcome = Outcome(self)
        self.retraction = Retraction(self, settle)
        limits = (chunked_prefill_size, enable_mixed_chunk, small_request_share)
        self.admission = Admission(self, *limits, self.make_room)
        self.admission.gates.append(gate)
        self.step_tasks = StepTasks(self, gather_best)
        self._owes_decode = [False] * self.num_lanes  # those that run have waited for a prefill step

    def plan(self) -> StepPlan | None:
        """The next step of the lane whose turn it is; None if there is nothing to do."""
        running = self.in_lane
        decoding = self.batch.is_of(running) or any(req.wanted for req in running)
        prefill = None if decoding and self._owes_decode[self.lane] else self.admission.next_prefill()
        if prefill:
            self._owes_decode[self.lane] = not self.admission.enable_mixed_chunk
            return self.step_tasks.prefill(prefill)
        if not decoding:
            return None
        self._owes_decode[self.lane] = False
        if self.speculation and (plan := self.step_tasks.verify(self.speculation)):
            return plan
        self.make_room()
        batch, running = self.batch, self.in_lane
        if not batch.is_of(running):
            batch.become([req for req in running if req.wanted], running)
        # none: room was made by looking at the last steps' tokens, and they were the last
        return self.step_tasks.decode(batch) if batch.reqs else None

    def make_room(self) -> None:
        """Before a plain decode step. What is kept for guesses goes first: nobody waits, or goes back to the queue, for these."""
        if self.speculation:
            self.speculation.give_back()
        self.retraction.make_room()


def pick_data_rank(ranks: Sequence[DataRank], method: str, turn: int, session: str | None = None) -> DataRank:
    """Where the turn-th request goes: to whoever has the fewest tokens or requests, or to the next one; ties: the first. But a
    session's turn goes where the session's pages are.

    Nobody looks for its prefix: what another data rank has cached of it is computed again. SGLang's controller knows no trees
    either (0.5.23, srt/managers/data_parallel_controller.py: LoadBalanceMethod).
    """
    if len(ranks) == 1:  # and nobody has to be asked what they have to do
        return ranks[0]
    for rank in ranks if session else ():
        if session in rank.memory.sessions.slots:
            return rank
    if method == "round_robin":
        return ranks[turn % len(ranks)]
    return min(ranks, key=lambda rank: rank.load if method == "total_tokens" else rank.load[1])
