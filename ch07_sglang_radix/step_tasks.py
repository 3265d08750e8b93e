"""What a step is made of: requests -> the task that tells every rank what to do, and afterwards the numbers as if it were done.

A prefill task carries prompt tokens, a decode task none: every rank has the last token of each row. Both name the pages that are
new to the ranks' page tables. Once the task is out, `*_queued` moves every length on: the next step is made from these.
"""

from collections.abc import Sequence

import numpy as np

from ch07_sglang_radix.admission import PrefillBatch
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.scheduler_state import SchedulerState
from ch07_sglang_radix.tasks import DecodeTask, PrefillSequence, PrefillTask
from common.sampling.batch import SamplingBatch

LAST_TOKEN = -1  # in a prefill task: the last token of the row, which may be known to the device only
MAX_BEST = 1024  # with a larger top_k every rank sends all its logits
MIN_NEW_TOKEN_RATIO_FACTOR, RATIO_DECAY_STEPS = 0.14, 600  # of the ratio it begins with; SGLang's


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
        scored = tuple(num_scored(req, n) for req, n in reqs) + (0,) * len(decodes)
        columns = {"scored": scored} if any(scored) else {}
        task = PrefillTask(s.step_number, updates, tuple(sequences), token_ids, self._best(emitting), columns)
        return task, emitting

    def prefill_queued(self, batch: PrefillBatch, emitting: list[Req]) -> None:
        s = self.state
        s.work["tokens"] += sum(n for _, n in batch.reqs) + len(batch.decodes)
        s.steps["prefill"] += 1
        for req, n in batch.reqs:
            req.kv_len += n
            if not req.probe:
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
        least = s.init_new_token_ratio * MIN_NEW_TOKEN_RATIO_FACTOR
        decay = (s.init_new_token_ratio - least) / RATIO_DECAY_STEPS
        s.new_token_ratio = max(s.new_token_ratio - decay, least)
        s.batch.advance()

    def score_prompts(self, task: PrefillTask, reqs: Sequence[Req]) -> None:
        """Log-probabilities of prompt tokens, for those of `reqs` that ask for them. Waits for the device."""
        asked = [
            (req, s.cached, n) for req, s, n in zip(reqs, task.sequences, task.columns["scored"], strict=True) if n
        ]
        tokens = [token for req, first, n in asked for token in req.prompt_ids[first + 1 : first + 1 + n]]
        top = [req.params.prompt_logprobs for req, _, n in asked for _ in range(n)]
        ids = [req.params.token_ids_logprob for req, _, n in asked for _ in range(n)]
        told = self.state.control.prompt_logprobs(tokens, top, ids)
        for req, first, n in asked:
            mine, told = told[:n], told[n:]
            req.prompt_logprobs += mine[req.first_scored - first :]  # those before were not asked for, or told already

    # --- both

    def sampling(self, task: PrefillTask | DecodeTask, emitting: Sequence[Req]) -> SamplingBatch:
        """How to draw a token for each row that emits."""
        if isinstance(task, DecodeTask):
            return self.state.batch.next_sampling()
        return SamplingBatch([req.sampling_row() for req in emitting])

    def _best(self, reqs: Sequence[Req]) -> int:
        """How many of its best logits each rank gives in this step; 0: all."""
        params = [req.params for req in reqs]
        if not self.gather_best or any(req.grammar for req in reqs):
            return 0
        if any(p.logprobs or p.edits or not (p.greedy or p.top_k > 0) for p in params):
            return 0
        best = max((1 if p.greedy else p.top_k for p in params), default=0)
        return best if best <= MAX_BEST else 0


def num_scored(req: Req, n: int) -> int:
    """Of the next n tokens, from the first on, so many whose next token's log-probability is asked for."""
    last = len(req.prompt_ids) - 1  # the prompt's last token has no next one in it
    return max(0, min(n, last - req.kv_len)) if req.first_scored < last else 0


def _completes(req: Req, n: int) -> bool:
    """Do n more tokens bring it to its end, so that a token can be drawn?"""
    return req.kv_len + n == req.seq_len
