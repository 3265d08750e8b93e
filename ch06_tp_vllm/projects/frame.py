"""What the projects of this chapter stand on: the engine's own parts, without what the reader writes."""

from collections.abc import Callable

from ch06_tp_vllm.block_manager import BlockManager
from ch06_tp_vllm.request import Request
from ch06_tp_vllm.scheduler import SchedulerOutput


class SchedulerFrame:
    """The queue, the running requests, the rows and the blocks. `schedule` is the reader's."""

    def __init__(
        self, blocks: BlockManager, *, max_num_batched_tokens: int, max_num_seqs: int, enable_chunked_prefill: bool = True,
        settle: Callable[[], None] = lambda: None, **_,
    ):  # fmt: skip
        self.blocks, self.settle = blocks, settle
        self.max_num_batched_tokens, self.max_num_seqs = max_num_batched_tokens, max_num_seqs
        self.enable_chunked_prefill = enable_chunked_prefill
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.free_rows = list(range(max_num_seqs))[::-1]  # the next one last
        self.num_preemptions = 0

    def schedule(self) -> SchedulerOutput:
        raise NotImplementedError

    def add(self, request: Request) -> None:
        """A new request: to the tail of the queue."""
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """A request whose status says so leaves, from wherever it is."""
        if request in self.running:
            self.running.remove(request)
            self.release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def release(self, request: Request) -> None:
        """Take its blocks and its row."""
        self.blocks.free(request)
        self.free_rows.append(request.row)
        request.row = -1


class BlockManagerFrame(BlockManager):
    """The block manager as it was: a block is named after the step that fills it, and keeps its name whoever leaves."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"name_blocks_at_allocation": False})

    def free(self, request: Request) -> None:
        """Let go of all blocks of a request, the tail first; every name stays."""
        request.num_blocks_named = 0
        super().free(request)

    def forget(self, block_id: int) -> None:
        """Take a block's name, if it has one: nobody finds it any more."""
        self._forget(self.blocks[block_id])
