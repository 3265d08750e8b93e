"""What a step is made of: requests -> the task that tells every rank what to do, and afterwards the numbers as if it were done.

A prefill task carries prompt tokens, a decode task none: every rank has the last token of each row. Both name the pages that are
new to the ranks' page tables. Once the task is out, `*_launched` moves every length on: the next step is made from these.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from ch07_sglang_radix.admission import PrefillBatch
from ch07_sglang_radix.control_plane import ControlPlane
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.schedule_batch import ScheduleBatch
from ch07_sglang_radix.scheduler_state import SchedulerState
from ch07_sglang_radix.step_plan import StepPlan
from ch07_sglang_radix.tasks import DecodeTask, PrefillSequence, PrefillTask
from ch07_sglang_radix.tp_model_wrapper import LAST_TOKEN
from ch07_sglang_radix.verify_step import Speculation
from common.sampling.batch import SamplingBatch

MAX_BEST = 1024  # with a larger top_k every rank sends all its logits
MIN_NEW_TOKEN_RATIO_FACTOR, RATIO_DECAY_STEPS = 0.14, 600  # of the ratio it begins with; SGLang's


class StepTasks:
    """gather_best: where all requests of a step are greedy or have a small top_k, ranks send their best logits only."""

    def __init__(self, state: SchedulerState, gather_best: bool):
        self.state, self.gather_best = state, gather_best

    # --- a prefill step

    def prefill(self, batch: PrefillBatch) -> StepPlan:
        """Who gets a token out of it: prompts that end in it, and the decodes that take part."""
        s, reqs, decodes = self.state, batch.reqs, batch.decodes
        sequences = [PrefillSequence(req.row, req.kv_len, n, int(_completes(req, n))) for req, n in reqs]
        sequences += [PrefillSequence(req.row, req.kv_len, 1, 1) for req in decodes]
        tokens = [req.all_ids[req.kv_len : req.kv_len + n] for req, n in reqs]
        tokens += [np.full(len(decodes), LAST_TOKEN)]
        emitting = [req for req, n in reqs if _completes(req, n)] + decodes
        updates = s.memory.page_updates([*(req for req, _ in reqs), *decodes])
        token_ids = tuple(np.concatenate(tokens).tolist())
        scored = tuple(num_scored(req, n) for req, n in reqs) + (0,) * len(decodes)
        everybody = [*(req for req, _ in reqs), *decodes]
        columns = self._columns(everybody)
        if any(scored):
            columns["scored"] = scored
        if any(req.pictures for req in everybody):
            columns["shift"] = tuple(req.pictures.shift(req.kv_len) if req.pictures else 0 for req in everybody)
        task = PrefillTask(s.front.step_number, updates, tuple(sequences), token_ids, self._best(emitting), columns)
        return StepPlan(
            task, everybody, emitting, sum(not req.probe for req in emitting),
            any(req.needs_last_token for req in emitting), partial(self.prefill_launched, batch, emitting),
            lambda: SamplingBatch([req.sampling_row() for req in emitting]),
        )  # fmt: skip

    def prefill_launched(self, batch: PrefillBatch, emitting: list[Req]) -> None:
        s = self.state
        for req in emitting:
            req.pending += 1
            req.wanted -= 1
        for req, n in batch.reqs:
            req.kv_len += n
            if not req.probe:
                s.memory.share(req)
        for req in batch.decodes:
            req.kv_len += 1
        complete = emitting[: len(emitting) - len(batch.decodes)]
        for req in complete:
            req.lane = s.lane
        s.running += complete
        if batch.decodes:
            s.forget_batches()  # its positions have moved on without it

    # --- a decode step

    def decode(self, batch: ScheduleBatch) -> StepPlan:
        """One more token for each request of the batch; there is room for it."""
        reqs, updates = batch.reqs, batch.grow()
        rows, positions = tuple(batch.rows.tolist()), tuple(batch.positions.tolist())
        best, columns = self._best(reqs), self._columns(reqs)
        task = DecodeTask(self.state.front.step_number, updates, rows, positions, best, batch.alike, columns)
        return StepPlan(
            task, reqs, reqs, batch.counted, batch.needs_last_token, self.decode_launched, batch.next_sampling
        )

    def decode_launched(self) -> None:
        self._expect_less()
        self.state.batch.advance()

    def _expect_less(self) -> None:
        """The longer nobody had to go back, the less the running requests are expected to need."""
        s = self.state
        least = s.init_new_token_ratio * MIN_NEW_TOKEN_RATIO_FACTOR
        decay = (s.init_new_token_ratio - least) / RATIO_DECAY_STEPS
        s.new_token_ratio = max(s.new_token_ratio - decay, least)

    # --- a verify step

    def verify(self, speculation: Speculation) -> StepPlan | None:
        """A run of tokens for each who wants more; None if a plain decode step is due."""
        return speculation.plan(self._best, self._columns, self.verify_launched)

    def verify_launched(self) -> None:
        self._expect_less()
        self.state.forget_batches()  # how far each has come is known when the paths are

    # --- all

    def _columns(self, reqs: Sequence[Req]) -> dict[str, tuple[int, ...]]:
        """What the task says of each sequence besides its row (tasks.COLUMNS)."""
        if self.state.front.lora is None:
            return {}
        slots = tuple(self.state.front.lora.slots.get(req.lora_id, 0) for req in reqs)
        return {"adapter": slots} if any(slots) else {}

    def _best(self, reqs: Sequence[Req]) -> int:
        """How many of its best logits each rank gives in this step; 0: all."""
        if not self.gather_best or any(req.grammar for req in reqs):
            return 0
        params = [req.params for req in reqs]
        if any(p.logprobs or p.edits or not (p.greedy or p.top_k > 0) for p in params):
            return 0
        best = max((1 if p.greedy else p.top_k for p in params), default=0)
        return best if best <= MAX_BEST else 0


def score_prompts(control: ControlPlane, plans: Sequence[StepPlan]) -> None:
    """Log-probabilities of prompt tokens, for those who ask for them. Waits for the device."""
    asked = [
        (req, sequence.cached, n)
        for plan in plans
        for req, sequence, n in zip(plan.reqs, plan.task.sequences, plan.task.columns["scored"], strict=True)
        if n
    ]
    tokens = [token for req, first, n in asked for token in req.prompt_ids[first + 1 : first + 1 + n]]
    top = [req.params.prompt_logprobs for req, _, n in asked for _ in range(n)]
    ids = [req.params.token_ids_logprob for req, _, n in asked for _ in range(n)]
    told = control.prompt_logprobs(tokens, top, ids)
    for req, first, n in asked:
        mine, told = told[:n], told[n:]
        req.prompt_logprobs += mine[req.first_scored - first :]  # those before were not asked for, or told already


def num_scored(req: Req, n: int) -> int:
    """Of the next n tokens, from the first on, so many whose next token's log-probability is asked for."""
    last = len(req.prompt_ids) - 1  # the prompt's last token has no next one in it
    return max(0, min(n, last - req.kv_len)) if req.first_scored < last else 0


def _completes(req: Req, n: int) -> bool:
    """Do n more tokens bring it to its end, so that a token can be drawn?"""
    return req.kv_len + n == req.seq_len
