"""What every step did, as JSON lines: `Engine(trace="steps.jsonl")`. Notebooks and figures are drawn from such files.

    step       number of the step; kind: prefill, decode, or settle (nothing queued, tokens of the last one taken)
    words      int64 words of the task on the wire
    scheduled  prefill: [[request, cached, computed now, prompt, why], ...] in order, why: "chunk" (the next part of a prompt
               that was begun) or the policy that put it there; decode: [request, ...]
    held       prefill: {request: why not}, "later" (it shares what another computes in this step, or would be a second
               prompt in parts), "held" (a gate is closed: its grammar is being compiled) or "full" (no budget, row or
               pages; nobody behind it was asked)
    decodes    running requests that took part in a prefill step (mixed chunk)
    policy     the schedule policy that ordered the queue
    waiting    requests left in the queue; running; chunked: the request whose prompt is computed in part, or null
    finished   requests whose results appeared in this step; retracted: how many went back to the queue
    pages      taken, given back; free afterwards
    tree       slots inserted and evicted, nodes split; evictable and protected afterwards
    ledger, ms messages and times: common/teaching/trace.py

Everything that counts up is counted anyway; a step's line is the difference. Costs nothing when off.
"""

from pathlib import Path
from typing import Any

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.scheduler_state import SchedulerState
from ch07_sglang_radix.tasks import DecodeTask, PrefillTask, num_words
from common.teaching.trace import StepLog


class Trace(StepLog):
    """One line a step, written by rank 0 as the steps go."""

    def __init__(self, path: str | Path, state: SchedulerState):
        super().__init__(path, state.tp.ledger)
        self._state = state

    def begin(self) -> None:
        super().begin()
        self._task: PrefillTask | DecodeTask | None = None
        self._before = self._counters()

    def task(self, task: PrefillTask | DecodeTask) -> None:
        """What the step tells the ranks to do."""
        self._task = task

    def end(self) -> None:
        """After the step: write its line."""
        s, counters = self._state, self._counters()
        change = {key: counters[key] - self._before[key] for key in counters}
        self.write({
            **self._scheduled(), "policy": s.policy.active, "waiting": len(s.waiting), "running": len(s.running),
            "chunked": s.chunked.rid if s.chunked else None, "finished": change["finished"],
            "retracted": change["retracted"],
            "pages": {"taken": change["taken"], "given": change["given"], "free": s.pool.num_free_pages},
            "tree": {
                "inserted": change["inserted"], "evicted": change["evicted"], "splits": change["splits"],
                "evictable": s.tree.evictable_size, "protected": s.tree.protected_size,
            },
        })  # fmt: skip

    def _scheduled(self) -> dict[str, Any]:
        task, s = self._task, self._state
        if task is None:
            return {"step": s.step_number, "kind": "settle", "words": 0, "scheduled": []}
        facts = {"step": task.step, "words": num_words(task)}
        if isinstance(task, DecodeTask):
            return facts | {"kind": "decode", "scheduled": [req.rid for req in s.decoding]}
        prefills = task.sequences[: len(s.last_prefill)]
        rows = [
            [req.rid, sequence.cached, sequence.new, len(req.prompt_ids), self._why(req)]
            for (req, _), sequence in zip(s.last_prefill, prefills, strict=True)
        ]
        decodes = len(task.sequences) - len(rows)
        return facts | {"kind": "prefill", "scheduled": rows, "held": s.held, "decodes": decodes}

    def _why(self, req: Req) -> str:
        return "chunk" if req is self._state.resumed else self._state.policy.active

    def _counters(self) -> dict[str, int]:
        s = self._state
        return {
            "taken": s.pool.taken, "given": s.pool.given, "inserted": s.tree.inserted, "evicted": s.tree.evicted,
            "splits": s.tree.splits, "finished": s.num_finished, "retracted": s.retractions,
        }  # fmt: skip
