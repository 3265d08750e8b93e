"""Solution of the project `schedule`."""

from ch06_tp_vllm.projects.frame import SchedulerFrame
from ch06_tp_vllm.request import Request, RequestStatus
from ch06_tp_vllm.scheduler import ScheduledRequest, SchedulerOutput


class MyScheduler(SchedulerFrame):
    def schedule(self) -> SchedulerOutput:
        step: dict[Request, int] = {}  # tokens to compute, in order
        sent_back = self.num_preemptions
        for request in list(self.running):
            num_new = min(
                request.num_tokens - request.num_computed_tokens, self.max_num_batched_tokens - sum(step.values())
            )
            if num_new == 0:
                break
            # a settle or a preemption for one before it may have taken it out, and its last token may be on its way
            ready = request.status is RequestStatus.RUNNING and request.num_tokens < request.max_tokens
            if ready and self._make_room(request, num_new, step):
                step[request] = num_new
        if self.num_preemptions == sent_back:
            while self.waiting and self.free_rows and self._start(self.waiting[0], step):
                pass
        scheduled = [
            ScheduledRequest(r, r.num_computed_tokens, n, r.num_computed_tokens + n == r.num_tokens)
            for r, n in step.items()
        ]
        return SchedulerOutput(scheduled, self.num_preemptions - sent_back)

    def _make_room(self, request: Request, num_new: int, step: dict[Request, int]) -> bool:
        """Slots for the request; False if it has finished or was sent back itself."""
        wanted = request.num_computed_tokens + num_new
        if self.blocks.allocate_slots(request, wanted):
            return True
        self.settle()  # whoever has come to an end leaves blocks, and who is sent back needs all its tokens
        for gone in [r for r in step if r.status is not RequestStatus.RUNNING]:
            del step[gone]
        if request.status is not RequestStatus.RUNNING:
            return False
        while not self.blocks.allocate_slots(request, wanted):
            newest = self.running.pop()
            self.release(newest)
            newest.status, newest.num_computed_tokens = RequestStatus.PREEMPTED, 0
            newest.num_preemptions += 1
            self.num_preemptions += 1
            self.waiting.insert(0, newest)
            step.pop(newest, None)
            if newest is request:
                return False
        return True

    def _start(self, request: Request, step: dict[Request, int]) -> bool:
        """Take the head of the queue in, if budget and blocks are there."""
        computed = self.blocks.get_computed_blocks(request)
        cached = len(computed) * self.blocks.block_size
        budget = self.max_num_batched_tokens - sum(step.values())
        num_new = request.num_tokens - cached
        if num_new > budget:
            num_new = budget if self.enable_chunked_prefill else 0
        # the whole prompt must fit, not just this part: else it takes blocks, is sent back, and begins again
        if (
            num_new == 0
            or self.blocks.blocks_needed(request, request.num_tokens, computed) > self.blocks.num_free_blocks
        ):
            return False
        self.blocks.allocate_slots(request, cached + num_new, computed)
        self.running.append(self.waiting.pop(0))
        request.status, request.row, request.num_computed_tokens = RequestStatus.RUNNING, self.free_rows.pop(), cached
        request.num_blocks_sent, request.drawn_here = 0, False
        if request.num_cached_tokens is None:
            request.num_cached_tokens = cached
        step[request] = num_new
        return True
