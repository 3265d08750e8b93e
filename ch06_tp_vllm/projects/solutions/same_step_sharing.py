"""Solution of the project `same_step_sharing`."""

from collections.abc import Sequence

from ch06_tp_vllm.projects.frame import BlockManagerFrame
from ch06_tp_vllm.request import Request


class SharingBlockManager(BlockManagerFrame):
    def allocate_slots(self, request: Request, num_tokens: int, computed: Sequence[int] = ()) -> bool:
        if not super().allocate_slots(request, num_tokens, computed):
            return False
        known = request.num_tokens - request.pending
        self.cache_full_blocks(request, min(num_tokens, known))
        return True

    def free(self, request: Request) -> None:
        never_filled = range(request.num_computed_tokens // self.block_size, request.num_blocks_named)
        for i in never_filled:
            self.forget(request.block_table[i])
        super().free(request)
