"""Decode where the tokens of a sequence are spread over ranks (common/attention/context_parallel.py), as kernels in a graph.

    attend    `decode` of paged_attention.py over this rank's pages; o and lse go straight into the message
    gather    one message a layer: all ranks' o and lse, of each 2 B Hq d + 4 B Hq bytes with 16-bit numbers
    merge     the parts become one (merge.py), on every rank with the same bits. Where all ranks of tp share the tokens, on
              GPUs that see one another's memory, gathering and merging are one kernel (all_reduce.py; not in float16)

Which pages are here, and how many tokens, is worked out on the GPU (plan.py). So a step is the same launches whatever its numbers.
"""

import torch

from common.attention.context_parallel import ContextParallelAttention
from common.attention.context_table import RingMetadata, TableMetadata
from common.attention.kv_cache import PagedKVCache
from common.distributed.collectives import all_gather_merge
from common.kernels.merge import Answers, merge_answers
from common.kernels.paged_attention import DecodeWorkspace, decode


class TritonContextParallelAttention(ContextParallelAttention):
    """The same attention; a decode step can be captured, and turns q and k itself."""

    capturable = True

    def __init__(self, cache: PagedKVCache, meta: RingMetadata | TableMetadata):
        self.turns = isinstance(meta, TableMetadata)  # and is a decode step
        self.workspace = self.answers = None
        if self.turns:
            meta.here.refuse_other_pages(cache.page_size)
            self.cache, self.meta, self.cp = cache, meta, meta.cp
        else:
            super().__init__(cache, meta)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turning=None) -> torch.Tensor:
        if not self.turns:
            return super().__call__(layer, q, k, v)
        self.workspace = self.workspace or DecodeWorkspace(q, k.shape[1], self.cache.format)
        mine = self.answers = self.answers or Answers(q)
        pages, form = self.cache.layer(layer), self.cache.format
        decode(q, k, v, pages, form, self.meta.here, self.workspace, turning, (mine.o, mine.lse))
        name = f"layers.{layer}.merge"
        return all_gather_merge(mine, merge_answers, self.cp, name)  # COMM all-gather [B, Hq, d+1]: o and lse, merged
