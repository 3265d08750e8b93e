"""Attention whose result for a token depends on the tokens before it, and on nothing else: not on the step that computes it.

Softmax and the sum over V add up over keys, in blocks, and a query's row is one of several in a product. Both are cut here by
position, never by what a step happens to bring: positions stand in blocks of BLOCK, counted from the sequence's first token. A
block of queries is one call, whose shape says how many blocks of keys there are and nothing else: for the n-th block
[1, Hkv/R, BLOCK * g, d] against [1, Hkv/R, n * BLOCK, d]. The token at position p is always the row p % BLOCK of it. In decode the
other rows are zeros, in a chunk they are its neighbours: a row does not see them. Keys behind the last token are zeros under a mask
of -inf, as its later neighbours are, and add exactly 0. K and V are always read from the pages, as whoever finds them cached will
read them.

SGLang has two forms, as its sources stood in 2026: srt/layers/attention/triton_backend.py cuts a context into parts of 256 tokens
for decode (SGLANG_TRITON_DECODE_SPLIT_TILE_SIZE), and prompts go through one kernel of one stage; srt/managers/schedule_policy.py
rounds the length of a chunk that is cut off a prompt down to a multiple of SGLANG_TRITON_PREFILL_TRUNCATION_ALIGN_SIZE. Here one
form does prompts, chunks and decode, and a chunk may end anywhere.
"""

import torch

from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.merge import attention_with_lse

BLOCK = 16  # positions; a decode step computes as many rows for one that it needs


class BatchInvariantAttention:
    """The contract (contract.py) on a CPU, one sequence at a time: torch's kernel may pack K by the number of sequences."""

    capturable = False
    windows = False
    reads_codes = True
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, cache: PagedKVCache, meta: AttentionMetadata):
        meta.refuse_other_pages(cache.page_size)
        self.cache = cache
        self.real = (meta.slot_mapping >= 0).nonzero().squeeze(-1)
        self.slots = meta.slot_mapping[self.real]
        cache.begin(self.slots)
        starts, lens = meta.query_start.tolist(), meta.context_lens.tolist()
        self.sequences = [
            _Sequence(cache, meta.page_table[b], slice(starts[b], starts[b + 1]), lens[b])
            for b in range(len(lens))
            if starts[b + 1] > starts[b] and meta.slot_mapping[starts[b]] >= 0
        ]

    @staticmethod
    def tile_members(num_q: int, num_kv: int) -> int:
        """Who begins alike is not served together: that would be another order."""
        return 0

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store this step's k, v, then attend. q [T, Hq/R, d] -> o [T, Hq/R, d]."""
        self.cache.write(layer, self.slots, k[self.real], v[self.real])
        o = torch.zeros_like(q)
        for one in self.sequences:
            o[one.rows] = one.attend(layer, q[one.rows])
        return o


class _Sequence:
    """One sequence with n >= 1 new tokens, the last of `length`."""

    def __init__(self, cache: PagedKVCache, table: torch.Tensor, rows: slice, length: int):
        self.cache, self.rows, self.length = cache, rows, length
        first = length - (rows.stop - rows.start)
        self.blocks = range(first // BLOCK, -(-length // BLOCK))
        self.behind = first % BLOCK  # the first new token's row in its block
        self.pages = cache.halves_of(table[: -(-length // cache.page_size)])

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q [n, Hq/R, d] -> o [n, Hq/R, d]."""
        known = self.cache.gather(layer, self.pages)[:, : self.length]  # [2, S, Hkv/R, d]
        kv = q.new_zeros(2, self.blocks.stop * BLOCK, *known.shape[2:])
        kv[:, : self.length] = known
        k, v = kv.transpose(1, 2)[:, None]  # [1, Hkv/R, S, d]
        blocks = q.new_zeros(len(self.blocks) * BLOCK, *q.shape[1:])
        blocks[self.behind : self.behind + len(q)] = q
        # the query heads of a group become rows of one query: [blocks, Hkv/R, BLOCK * g, d]
        blocks = blocks.unflatten(1, (k.shape[1], -1)).unflatten(0, (-1, BLOCK)).transpose(1, 2).flatten(2, 3)
        group = blocks.shape[2] // BLOCK
        o = torch.cat(
            [
                attention_with_lse(
                    block[None], k[:, :, : (n + 1) * BLOCK], v[:, :, : (n + 1) * BLOCK], _mask(n, group, q.dtype)
                )[0]
                for n, block in zip(self.blocks, blocks, strict=True)
            ]
        )
        o = o.unflatten(2, (BLOCK, -1)).transpose(1, 2).flatten(0, 1).flatten(1, 2)  # [blocks * BLOCK, Hq/R, d]
        return o[self.behind : self.behind + len(q)]


def _mask(n: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """[BLOCK * g, (n + 1) * BLOCK]: each row of block n sees its own position and all before."""
    hidden = torch.full((BLOCK, BLOCK), -torch.inf, dtype=dtype).triu_(1).repeat_interleave(group, dim=0)
    return torch.cat((hidden.new_zeros(len(hidden), n * BLOCK), hidden), dim=1)
