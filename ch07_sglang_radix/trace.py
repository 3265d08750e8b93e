"""What every step did, as JSON lines: `Engine(trace="steps.jsonl")`. Notebooks and figures are drawn from such files.

    step       number of the step; kind: prefill, decode, verify, or settle (nothing queued, tokens of the last one taken)
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
    experts    of an engine that reads it, in the line of a step after which it was read: since the last reading rows of each
               rank, summed over layers, and of_experts: of each expert, in each layer that has some; balancedness
               (expert_load.py), and moved: slots that got another expert
    parts      with attention data parallelism, in place of scheduled: kind is "parallel", and each data rank has kind, scheduled,
               held and decodes of its own, or null for no work; all numbers above are sums over them, chunked is the first's
    verified   where guesses are verified, in the line of the step in which their fate became known (the verify step itself, or with
               overlap the one behind it): of each request its guesses (tokens, the last one known in front), their parents, and
               the path of nodes that was right
    ledger, ms messages and times: common/teaching/trace.py

Everything that counts up is counted anyway; a step's line is the difference. Costs nothing when off.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ch07_sglang_radix.scheduler_state import SchedulerState
from ch07_sglang_radix.tasks import DecodeTask, ParallelTask, PrefillTask, StepTask, VerifyTask, num_words
from common.teaching.trace import StepLog


class Trace(StepLog):
    """One line a step, written by rank 0 as the steps go."""

    def __init__(self, path: str | Path, ranks: Sequence[SchedulerState]):
        """ranks: the data ranks; the first is the front."""
        self._state, self._ranks = ranks[0], ranks
        super().__init__(path, self._state.tp.ledger)

    def begin(self) -> None:
        super().begin()
        self._task: StepTask | None = None
        self._before = self._counters()
        if self._state.speculation:
            self._state.speculation.newest = []

    def task(self, task: StepTask) -> None:
        """What the step tells the ranks to do."""
        self._task = task

    def end(self) -> None:
        """After the step: write its line."""
        s, counters = self._state, self._counters()
        change = {key: counters[key] - self._before[key] for key in counters}
        load, more = s.expert_load, {}
        if change["readings"]:
            more = {
                "experts": {
                    "rows": load.newest.sum(0).tolist(), "of_experts": load.newest_of_expert.tolist(),
                    "balancedness": round(load.balancedness, 4), "moved": change["moved"],
                }
            }  # fmt: skip
        if s.speculation and s.speculation.newest:
            more |= {"verified": s.speculation.newest}
        self.write({
            **self._scheduled(), **more, "policy": s.policy.active, "waiting": self._sum(lambda rank: len(rank.waiting)),
            "running": self._sum(lambda rank: len(rank.running)), "chunked": s.chunked.rid if s.chunked else None,
            "finished": change["finished"], "retracted": change["retracted"],
            "pages": {
                "taken": change["taken"], "given": change["given"],
                "free": self._sum(lambda rank: rank.pool.num_free_pages),
            },
            "tree": {
                "inserted": change["inserted"], "evicted": change["evicted"], "splits": change["splits"],
                "evictable": self._sum(lambda rank: rank.tree.evictable_size),
                "protected": self._sum(lambda rank: rank.tree.protected_size),
            },
        })  # fmt: skip

    def _sum(self, count: Callable[[SchedulerState], int]) -> int:
        return sum(map(count, self._ranks))

    def _scheduled(self) -> dict[str, Any]:
        task, s = self._task, self._state
        if task is None:
            return {"step": s.step_number, "kind": "settle", "words": 0, "scheduled": []}
        facts = {"step": task.step, "words": num_words(task)}
        if isinstance(task, ParallelTask):
            parts = [part and self._part(part, rank) for part, rank in zip(task.parts, self._ranks, strict=True)]
            return facts | {"kind": "parallel", "parts": parts}
        return facts | self._part(task, s)

    def _part(self, task: PrefillTask | DecodeTask, s: SchedulerState) -> dict[str, Any]:
        if isinstance(task, VerifyTask):
            return {"kind": "verify", "scheduled": [req.rid for req in s.speculation.reqs], "nodes": task.nodes}
        if isinstance(task, DecodeTask):
            return {"kind": "decode", "scheduled": [req.rid for req in s.decoding]}
        prefills = task.sequences[: len(s.last_prefill)]
        rows = [
            [
                req.rid,
                sequence.cached,
                sequence.new,
                len(req.prompt_ids),
                "chunk" if req is s.resumed else s.policy.active,
            ]
            for (req, _), sequence in zip(s.last_prefill, prefills, strict=True)
        ]
        decodes = len(task.sequences) - len(rows)
        return {"kind": "prefill", "scheduled": rows, "held": s.held, "decodes": decodes}

    def _counters(self) -> dict[str, int]:
        s = self._state
        return {
            "taken": self._sum(lambda rank: rank.pool.taken), "given": self._sum(lambda rank: rank.pool.given),
            "inserted": self._sum(lambda rank: rank.tree.inserted), "evicted": self._sum(lambda rank: rank.tree.evicted),
            "splits": self._sum(lambda rank: rank.tree.splits), "finished": s.num_finished,
            "retracted": self._sum(lambda rank: rank.retractions),
            "readings": s.expert_load.readings if s.expert_load else 0, "moved": s.expert_load.moved if s.expert_load else 0,
        }  # fmt: skip
