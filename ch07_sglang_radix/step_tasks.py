"""What a step is made of: requests -> the task that tells every rank what to do, and afterwards the numbers as if it were done.

A prefill task carries prompt tokens, a decode task none: every rank has the last token of each row. Both name the pages that are
new to the ranks' page tables. Once the task is out, `*_queued` moves every length on: the next step is made from these.
"""

from collections.abc import Sequence

import numpy as np

from ch07_sglang_radix.admission import PrefillBatch
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.scheduler_state import INIT_NEW_TOKEN_RATIO, SchedulerState
from ch07_sglang_radix.tasks import DecodeTask, PrefillSequence, PrefillTask
from common.sampling.batch import SamplingBatch

LAST_TOKEN = -1  # in a prefill task: the last token of the row, which may be known to the device only
MAX_BEST = 1024  # with a larger top_k every rank sends all its logits
MIN_NEW_TOKEN_RATIO, RATIO_DECAY_STEPS = 0.1, 600  # SGLang's


class StepTasks:
    """gather_best: where all requests of a step are greedy or have a small top_k, ranks send their best logits only."""

    def __init__(self, state: SchedulerState, gather_best: bool):
        self.state, self.gather_best = state, gather_best

    # --- a prefill step

    def prefill(self, batch: PrefillBatch) -> tuple[PrefillTask, list[Req]]:
        """(the task, who gets a token out of it: prompts that end in it, and the decodes that take part)."""
        s, reqs, decodes = self.state, batch.reqs, batch.decodes
        sequences = [PrefillSequence(req.row, req.kv_len, n, int(_completes(req, n))) for req, n in reqs]
        sequences += [PrefillSequence(req.row, req.kv_len, 1, 1) for req in decodes]
        tokens = [req.all_ids[req.kv_len : req.kv_len + n] for req, n in reqs]
        tokens += [np.full(len(decodes), LAST_TOKEN)]
        emitting = [req for req, n in reqs if _completes(req, n)] + decodes
        updates = s.memory.page_updates([*(req for req, _ in reqs), *decodes])
        token_ids = tuple(np.concatenate(tokens).tolist())
        return PrefillTask(s.step_number, updates, tuple(sequences), token_ids, self._best(emitting)), emitting

    def prefill_queued(self, batch: PrefillBatch, emitting: list[Req]) -> None:
        s = self.state
        s.work["tokens"] += sum(n for _, n in batch.reqs) + len(batch.decodes)
        s.steps["prefill"] += 1
        for req, n in batch.reqs:
            req.kv_len += n
            s.tree.cache_unfinished_req(req)
        for req in batch.decodes:
            req.kv_len += 1
        s.running += emitting[: len(emitting) - len(batch.decodes)]
        if batch.decodes:
            s.batch = s.empty_batch()  # its positions have moved on without it

    # --- a decode step

    def decode(self, reqs: Sequence[Req]) -> tuple[DecodeTask, list[Req]]:
        """One more token for each of `reqs`; there is room for it."""
        s, batch = self.state, self.state.batch
        batch.become(reqs)
        s.memory.grow_by_a_page([req for req in batch.reqs if req.kv_len == req.allocated_len])
        updates = s.memory.page_updates(batch.reqs)
        rows, positions = tuple(batch.rows.tolist()), tuple(batch.positions.tolist())
        return DecodeTask(s.step_number, updates, rows, positions, self._best(batch.reqs), batch.alike), batch.reqs

    def decode_queued(self) -> None:
        s = self.state
        s.work["tokens"] += s.wrapper.decode_rows(len(s.batch.reqs), bool(s.batch.alike))
        s.steps["decode"] += 1
        decay = (INIT_NEW_TOKEN_RATIO - MIN_NEW_TOKEN_RATIO) / RATIO_DECAY_STEPS
        s.new_token_ratio = max(s.new_token_ratio - decay, MIN_NEW_TOKEN_RATIO)
        s.batch.advance()

    # --- both

    def sampling(self, task: PrefillTask | DecodeTask, emitting: Sequence[Req]) -> SamplingBatch:
        """How to draw a token for each row that emits."""
        if isinstance(task, DecodeTask):
            return self.state.batch.next_sampling()
        return SamplingBatch([req.sampling_row() for req in emitting])

    def _best(self, reqs: Sequence[Req]) -> int:
        """How many of its best logits each rank gives in this step; 0: all."""
        params = [req.params for req in reqs]
        if not self.gather_best or any(p.logprobs or p.edits or not (p.greedy or p.top_k > 0) for p in params):
            return 0
        best = max((1 if p.greedy else p.top_k for p in params), default=0)
        return best if best <= MAX_BEST else 0


def _completes(req: Req, n: int) -> bool:
    """Do n more tokens bring it to its end, so that a token can be drawn?"""
    return req.kv_len + n == req.seq_len
