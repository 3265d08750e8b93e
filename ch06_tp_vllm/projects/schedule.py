"""Project: write the scheduler's `schedule()`. README.md says how it is graded, and has hints.

The scheduler has (see frame.py):

    waiting, running                        requests in the order in which they came: a list each
    free_rows                               rows of the ranks' tables that nobody has; pop one for a request that starts
    max_num_batched_tokens, max_num_seqs    tokens and sequences that a step holds at most
    enable_chunked_prefill                  may a step compute a part of a prompt?
    settle()                                makes tokens known that are still being drawn; requests may finish and leave by it
    release(request)                        takes its blocks and its row
    num_preemptions                         count it up with every request that is sent back

`blocks` is the block manager:

    get_computed_blocks(request)                  -> ids of cached blocks that a request without any can start with
    allocate_slots(request, n, computed=[])       -> True: its block_table has slots for its first n tokens, the `computed` blocks
                                                     first, for a request without any; False: no, and nothing has changed
    blocks_needed(request, n, computed=[])        -> free blocks that takes
    num_free_blocks, block_size, free(request)

A request has:

    status                  RequestStatus.WAITING, RUNNING, PREEMPTED; .finished of it is True at the end
    num_tokens              prompt and answer, a token that is still being drawn included
    num_computed_tokens     of those, whose K and V are there or on their way. The engine counts it up after each step
    max_tokens              num_tokens will never be more. When it is reached, the last token is being drawn: nothing is left
                            to compute
    block_table, row        its blocks, its row

A step computes tokens num_computed .. num_computed + num_new - 1 of each scheduled request, every one of which has a slot.
If they reach num_tokens, a token is drawn (`emits`). In which order, and for whom, is vLLM V1's rule:

    1. Running requests first, in order, each with all that it lacks, as long as the budget of tokens lasts; the last one
       gets what is left. One whose last token is being drawn lacks nothing.
    2. If a running request cannot have slots: settle, and try again. As long as there are none, the newest running request
       is sent back: its blocks and its row are released, status PREEMPTED, num_computed_tokens 0, num_preemptions of
       the request and of the scheduler up by one; it goes to the head of the queue with its tokens kept, and takes no part
       in this step (nor does anybody who has finished by settling). It may be the request that asks itself.
    3. If nobody was sent back, waiting requests start, in order, behind what get_computed_blocks finds, as long as there
       are budget, rows and blocks; the first that cannot start ends it. A prompt longer than the rest of the budget is
       cut if enable_chunked_prefill, and waits otherwise. The gate: a request starts only if the free blocks suffice for
       all its num_tokens, also if this step computes but a part of them (it takes blocks for that part alone). A request
       that starts leaves the queue, joins the end of `running`, and has

           status RUNNING, row a free row, num_computed_tokens the cached ones,
           num_blocks_sent 0, drawn_here False (no rank knows anything about this row),
           num_cached_tokens the cached ones too, if it was None (so it is set once, at the first start)

An empty step (nobody scheduled) is right if there is nothing to compute.
"""

from ch06_tp_vllm.projects.frame import SchedulerFrame
from ch06_tp_vllm.scheduler import SchedulerOutput


class MyScheduler(SchedulerFrame):
    def schedule(self) -> SchedulerOutput:
        """SchedulerOutput([ScheduledRequest(request, num_computed, num_new, emits), ...], num_preempted), both of scheduler.py."""
        raise NotImplementedError  # your turn
