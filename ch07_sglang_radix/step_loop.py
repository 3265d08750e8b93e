"""The loop: plan a step, launch it on all ranks, collect its logits and draw, settle what was drawn. Rank 0's.

With overlap, step N+1 is prepared and queued while a GPU still computes step N, and only then are N's tokens
looked at:

    GPU        | step N      | step N+1    | step N+2    |
    rank 0     | queue N+1, take N's tokens | queue N+2, take N+1's ...

The tokens themselves never leave the device in between: N+1 reads them where N left them. An end that its
length tells is known ahead; a stop token is seen one step late, and that step's token is thrown away.

With num_continuous_decode_steps=k the tokens of k decode steps are looked at together, while the same requests run, nobody waits
and nobody gets its last token by length: fewer calls a token on rank 0, and a stream that tells of k tokens at a time. A stop token
or text is seen up to k - 1 steps later than else; what was drawn behind it is thrown away, so the answers are the same for every k.
Steps are still planned one by one: who arrives is planned for in the next one, behind which all that is drawn is looked at.
Whom somebody aborts has the tokens that were looked at.

Over several pipeline stages a step takes a while to come back, and every stage would stand idle but one. So those that run
are dealt out to `lanes`, as many as there are stages: micro-batches whose steps follow each other through the stages.

    stage 0    | lane 0 | lane 1 | lane 0 | lane 1 |       step() is one lane's turn: take the tokens of its last
    stage 1             | lane 0 | lane 1 | lane 0 |       step, which has come back by now, and send its next one

With attention data parallelism every data rank plans its own part of the step; one task goes out with all parts, one gather brings
the logits of all rows that emit, one sampling draws for them, one broadcast tells the tokens. Who has nothing to do has an
empty part: its ranks still compute their columns of the MLP for the rows of the others.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from ch07_sglang_radix.data_rank import DataRank
from ch07_sglang_radix.grammar_manager import GrammarManager
from ch07_sglang_radix.invariants import check_invariants
from ch07_sglang_radix.prefill_adder import Answer
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.step_plan import StepPlan
from ch07_sglang_radix.step_tasks import score_prompts
from ch07_sglang_radix.tasks import ParallelTask, PrefillTask, StepTask, VerifyTask
from ch07_sglang_radix.trace import Trace
from ch07_sglang_radix.verify_step import QueuedRuns
from common.request.queued_step import QueuedStep
from common.sampling.batch import SamplingBatch

HELD_S = 0.002  # between two looks at closed gates, while nothing else is to be done


class Flight:
    """A step that all ranks have been told to do: what each data rank wanted, and its logits if they are there already.

    emitting: who gets a token out of it, or a run of tokens if it `verifies`; it has one plan then.
    """

    def __init__(self, lane: int, plans: Sequence[StepPlan | None], logits: torch.Tensor | None):
        self.lane, self.plans, self.logits = lane, plans, logits
        self.plans_there = there = [plan for plan in plans if plan]
        self.emitting = there[0].emitting if len(there) == 1 else [req for plan in there for req in plan.emitting]
        kinds = [type(plan.task) for plan in there]
        self.prefills, self.verifies = PrefillTask in kinds, VerifyTask in kinds


class StepLoop(DataRank):
    """Data rank 0, and the loop over all of them.

    `after_step`: called after each step, in order; the check and the trace are its first users. `beside`: called before each step,
    for what goes on beside the steps (disaggregation/); each says whether something is on its way that no step moves.
    `at_flush`: called when every cached prefix is forgotten, by who has read requests as well (speculative/).
    `queued`: called with each request that has just been queued. `before_launch`: called with what each data rank wants done,
    before the ranks are told of it: what they must have by then (images/). `at_new_weights`: called on every rank when its weights
    have changed (quantization/).
    """

    def start_loop(
        self, overlap: bool | None, chunked_prefill_size: int, enable_mixed_chunk: bool, small_request_share: float,
        gather_best: bool, check: bool, trace: str | Path | None, others: Sequence[DataRank] = (),
        num_continuous_decode_steps: int = 1,
    ) -> None:  # fmt: skip
        """others: the data ranks besides this one. The other arguments are TPScheduler's."""
        self.overlap = self.tp.device.type == "cuda" if overlap is None else overlap
        self.trace: Trace | None = None
        self.after_step: list[Callable[[], None]] = []
        self.beside: list[Callable[[], bool]] = []
        self.at_flush: list[Callable[[], None]] = []
        self.queued: list[Callable[[Req], None]] = []
        self.before_launch: list[Callable[[Sequence[StepPlan | None]], None]] = []
        self.at_new_weights: list[Callable[[], None]] = []
        self._on_its_way = False  # as they said
        if self.replica.rank > 0:
            return
        self.grammars = GrammarManager(self.wrapper)
        self.data_ranks: list[DataRank] = [self, *others]
        limits = (chunked_prefill_size, enable_mixed_chunk, small_request_share, gather_best)
        for rank in self.data_ranks:
            rank.decide_with(self.settle_all, self.grammars, *limits)
        self._flights: deque[Flight] = deque()  # whose logits have not come back, the oldest first
        # the steps whose tokens are drawn, and nobody has looked at; several are decode steps of the same requests
        self._queued: list[QueuedStep[Req] | QueuedRuns] = []
        self.num_continuous_decode_steps = num_continuous_decode_steps
        if check:
            self.after_step += [partial(check_invariants, rank) for rank in self.data_ranks]
        if trace:
            self.trace = Trace(trace, self.data_ranks)
            if self.speculation:
                self.speculation.remember = True
            self.after_step.append(self.trace.end)

    @property
    def everybody(self) -> list[Req]:
        """Everybody who waits or runs, on all data ranks."""
        return [req for rank in self.data_ranks for req in rank.unfinished]

    def totals(self) -> dict[str, int]:
        """Over all data ranks: tokens that there is room for, who holds them, and how many requests wait and run."""
        ranks = self.data_ranks
        return {
            "size": sum(rank.pool.size for rank in ranks), "free": sum(rank.pool.free_slots for rank in ranks),
            "evictable": sum(rank.tree.evictable_size for rank in ranks),
            "protected": sum(rank.tree.protected_size for rank in ranks),
            "held": sum(rank.held_slots for rank in ranks),
            "session_held": sum(rank.memory.sessions.held_slots for rank in ranks),
            "evicted": sum(rank.tree.evicted for rank in ranks),
            "waiting": sum(len(rank.waiting) for rank in ranks),
            "retractions": sum(rank.retractions for rank in ranks),
            "running": sum(not req.probe for rank in ranks for req in rank.admitted),
        }  # fmt: skip

    @property
    def busy(self) -> bool:
        """Is anything waiting, running or on its way?"""
        return bool(self.everybody or self._flights or self._queued or self._on_its_way)

    def step(self) -> bool:
        """One lane's turn: schedule, execute, sample, account. False if there was nothing to do."""
        if self.trace:
            self.trace.begin()
        if self.grammars.compiling:
            self.grammars.take(lambda req, why: self.data_ranks[req.data_rank].outcome.refuse(req, why))
        self._on_its_way = bool(self.beside) and any([call() for call in self.beside])
        if self._queued and isinstance(self._queued[-1], QueuedRuns):
            self._queued[-1].measure()  # how many tokens came out says where the next step begins
        on_its_way = bool(self._queued or self._flights)  # planning may settle it, and end all who would have run
        plans = self._plan_next()
        if any(plans):
            flight = self._launch(plans)
            if self.trace:
                self.trace.queued()
            if self.num_lanes > 1:
                self._flights.append(flight)
                self._settle()
            else:
                queued, most = self._collect(flight), self._most_unseen(flight)
                if len(self._queued) >= most:
                    self._settle()
                self._queued.append(queued)
                if not self.overlap and len(self._queued) >= most:
                    self._settle()
        elif on_its_way:
            if self.trace:
                self.trace.queued()
            self.settle_all()
        elif not (stuck := [rank for rank in self.data_ranks if rank.waiting or rank.chunked]) and not self._on_its_way:
            return False
        elif self._on_its_way or any(Answer.HELD.value in rank.held.values() for rank in self.data_ranks):
            time.sleep(HELD_S)
            return True
        elif any(
            rank.memory.sessions.forget_oldest() for rank in stuck
        ):  # nobody else has pages that could be waited for
            return True
        else:
            first = (stuck[0].chunked or stuck[0].waiting[0]).rid
            raise AssertionError(f"request {first} cannot start although nothing runs: pages were lost")
        for call in list(self.after_step):  # one may take itself out
            call()
        return True

    def _most_unseen(self, flight: Flight) -> int:
        """How many steps may be queued whose tokens nobody has looked at, beside this one if steps overlap."""
        goes_on = flight.emitting is self.batch.reqs and self.batch.steps_left > 0
        same = not self._queued or self._queued[0].requests is flight.emitting
        if goes_on and same and not (self.waiting or self.chunked or self.elsewhere):
            return self.num_continuous_decode_steps
        return 1

    def _plan_next(self) -> list[StepPlan | None]:
        """What each data rank wants done; all None if no lane has anything to do."""
        plans: list[StepPlan | None] = [None]
        for _ in range(self.num_lanes):  # a lane with nothing to do passes its turn on
            lane = (self.lane + 1) % self.num_lanes
            for rank in self.data_ranks:
                rank.lane = lane
            if self.num_lanes > 1:
                self._land(lane)
            plans = [rank.plan() for rank in self.data_ranks]
            if any(plans):
                break
        return plans

    def _land(self, lane: int) -> None:
        """Take back what this lane has on its way: its next step begins with the tokens of its last one.

        All that was launched before comes back first: the stages work in one order.
        """
        while len(self._flights) >= self.num_lanes or any(f.lane == lane and f.emitting for f in self._flights):
            self._settle()
            self._queued = [self._collect(self._flights.popleft())]
        if not self.overlap:
            self._settle()
        for rank in self.data_ranks:
            rank.even_out_lanes()

    def _launch(self, plans: Sequence[StepPlan | None]) -> Flight:
        """Have all ranks do it. With one lane the logits are there at once, or queued on the device."""
        task = self._one_task(plans)
        if self.trace:
            self.trace.task(task)
        try:
            for call in self.before_launch:
                call(plans)
            logits = self.control.execute(task) if self.num_lanes == 1 else self.control.begin(task)
        except BaseException as error:
            for rank, plan in zip(self.data_ranks, plans, strict=True):
                if plan:
                    rank.outcome.fail(plan.reqs, error)
            if self.control.replica.size > 1 or not isinstance(error, Exception):
                raise  # the other ranks are somewhere in the middle of it; or somebody wants us to stop
            return Flight(self.lane, (), None)
        flight = Flight(self.lane, plans, logits)
        if flight.prefills and (scoring := [plan for plan in flight.plans_there if plan.task.scores]):
            score_prompts(self.control, scoring)  # now: the other ranks have come to it
        prefill = flight.prefills
        self.steps["prefill" if prefill else "decode"] += 1
        self.work["tokens"] += self._rows_of(flight)
        self.work["inputs"] += sum([plan.task.num_tokens for plan in flight.plans_there])
        self.work["samplings"] += bool(flight.emitting)
        self.work["sampled"] += sum([plan.counted for plan in flight.plans_there])
        for rank, plan in zip(self.data_ranks, plans, strict=True):
            if plan:
                plan.launched()
            if prefill and not (plan and isinstance(plan.task, PrefillTask)):
                rank.last_prefill = []
        return flight

    def _one_task(self, plans: Sequence[StepPlan | None]) -> StepTask:
        """What all ranks are told: the only plan's task, or one with a part for each data rank, empty ones included."""
        if len(plans) == 1:
            return plans[0].task
        return ParallelTask(self.step_number, tuple(plan and plan.task for plan in plans))

    def _rows_of(self, flight: Flight) -> int:
        """Rows that the model is fed with, over all data ranks; in a plain decode step each has as many as the largest."""
        if flight.prefills or flight.verifies:
            return sum(plan.task.num_tokens for plan in flight.plans_there)
        alike = any([plan.task.alike for plan in flight.plans_there])
        most = max([len(plan.task.rows) for plan in flight.plans_there])
        return self.wrapper.decode_rows(most, alike) * len(flight.plans)

    def _collect(self, flight: Flight) -> QueuedStep[Req] | QueuedRuns:
        """Its logits have come back, or are on their way: draw a token for each row that emits."""
        emitting, logits = flight.emitting, flight.logits
        if self.num_lanes > 1 and emitting:
            logits = self.control.finish()
        if not emitting:
            return QueuedStep()
        if any([plan.needs_last_token for plan in flight.plans_there]):
            self._settle()  # a grammar or a penalty must know every token before the one it is for
        if len(self.data_ranks) == 1:
            sampling = flight.plans[0].sampling()
        else:
            sampling = SamplingBatch([req.sampling_row() for req in emitting])  # one sampling for the rows of all
        drawn = self.control.sample(logits, sampling)
        if flight.verifies:
            return QueuedRuns(self.speculation, emitting, drawn, self.wrapper.verifier.accepted)
        return QueuedStep(emitting, drawn)

    def _settle(self) -> None:
        """Look at the tokens that are drawn."""
        steps, self._queued = self._queued, []
        if len(steps) > 1:
            self.outcome.take_steps(steps)
            return
        for step in steps:
            taken = step.take()
            if len(self.data_ranks) == 1:
                self.outcome.take(taken)
                return
            for number, rank in enumerate(self.data_ranks):
                rank.outcome.take([one for one in taken if one[0].data_rank == number])

    def settle_all(self) -> None:
        """Wait for everything that is on its way, and look at it."""
        self._settle()
        while self._flights:
            self._queued = [self._collect(self._flights.popleft())]
            self._settle()
