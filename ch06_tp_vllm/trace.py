"""What every step did, as JSON lines: `LLMEngine(trace="steps.jsonl")`. Timelines and block pictures are drawn from them.

    step       number of the step (a line without any keeps the last one's)
    scheduled  [[request, computed before, computed now, "prefill" | "decode"], ...] in order; a request is called "id/answer".
               Empty: nothing was queued, only the tokens of the last step were taken
    blocks     {request: [the blocks it got in this step]}, those found in the prefix cache included; free: how many are left
    aborted    requests that were aborted since the last line, and gave back all their blocks
    preempted  requests that went back to the queue to make room for this step, and gave back theirs
    finished   requests that ended in it, and gave back theirs
    waiting, running: how many, afterwards
    ledger, ms messages and times: common/teaching/trace.py

Costs nothing when off.
"""

from pathlib import Path

from ch06_tp_vllm.request import Request, RequestStatus
from ch06_tp_vllm.scheduler import Scheduler, SchedulerOutput
from common.distributed.ledger import Ledger
from common.teaching.trace import StepLog


class Trace(StepLog):
    """One line a step, written by rank 0 as the steps go."""

    def __init__(self, path: str | Path, ledger: Ledger, scheduler: Scheduler):
        super().__init__(path, ledger)
        self._scheduler = scheduler
        self._aborted: list[str] = []
        self._holding: dict[Request, int] = {}  # blocks of those that ran in the last step, as far as they were told

    def scheduled(self, output: SchedulerOutput) -> None:
        """What the step will do, before anybody does it."""
        self._rows, self._blocks = [], {}
        for s in output.scheduled:
            request, table = s.request, s.request.block_table
            kind = "decode" if s.num_new == 1 and request.drawn_here else "prefill"
            self._rows.append([request.request_id, s.num_computed, s.num_new, kind])
            if len(table) > self._holding.get(request, 0):
                self._blocks[request.request_id] = table[self._holding.get(request, 0) :]
            self._holding[request] = len(table)

    def aborted(self, request: Request) -> None:
        """Between two steps."""
        self._aborted.append(request.request_id)
        self._holding.pop(request, None)

    def end(self, step: int) -> None:
        """After the step: write its line."""
        left = [r for r in self._holding if r.status is not RequestStatus.RUNNING]
        for request in left:
            del self._holding[request]
        scheduler = self._scheduler
        self.write({
            "step": step, "scheduled": self._rows, "blocks": self._blocks,
            "free": scheduler.blocks.num_free_blocks, "aborted": self._aborted,
            "preempted": [r.request_id for r in left if r.status is RequestStatus.PREEMPTED],
            "finished": [r.request_id for r in left if r.status.finished],
            "waiting": len(scheduler.waiting), "running": len(scheduler.running),
        })  # fmt: skip
        self._aborted = []
