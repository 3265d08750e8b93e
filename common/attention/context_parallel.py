"""Attention over tokens that are spread over ranks: context parallelism. The contract's call, with messages inside.

A step with several new tokens a sequence (prefill). Each rank has q, k, v of its share of them (zigzag.py). Keys travel:

    ring       my k, v go to the next rank, and those of the previous one come, R-1 times, until everybody has seen every
               block; while a block travels, the one before is attended to. Each rank stores, of what comes by, the rows whose
               page is its own.
    cached     tokens that were in the pages before (a hit in the radix tree, an earlier chunk) may be many more than the new
               ones, so there the queries travel: all ranks gather those that have something cached before them, attend with
               all of them to their own pages, and send each rank its answers back.

On a GPU with Triton what many short prompts see of a block, or of their pages, is one launch (common/kernels/pieces.py).

A step with one new token a sequence (decode). Every rank has all queries; it attends to its own pages of each sequence, and
the answers are gathered. All answers are (o, lse) and become one by merge.py. On a GPU with Triton these are two or three
kernels a layer, in a CUDA graph (common/kernels/spread_attention.py).

Ring Attention: Liu et al. 2023. Queries or keys travelling (pass-Q, pass-KV): Yang et al. 2024, "Context Parallelism for
Scalable Million-Token Inference". vLLM and SGLang call the decode half DCP, decode context parallelism. SGLang 0.5.23 gathers
all keys in place of the ring (srt/layers/utils/cp_utils.py), and spreads pages in decode only (dcp_utils.py).
"""

import torch

from common.attention.context_table import Cached, RingMetadata, ShortPages, SpreadMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.kv_format import wire_dtype
from common.attention.merge import Part, attend, attend_to_each, merge, merge_into
from common.distributed.collectives import all_gather, all_gather_rows, all_to_all, start_exchange

try:  # a CPU build of torch comes without Triton
    from common.kernels import pieces
except ImportError:
    pieces = None


class ContextParallelAttention:
    """attention(layer, q [T, Hq, d], k, v [T, Hkv, d]) -> o [T, Hq, d], T being this rank's rows of the step.

    The heads are those of an attn_tp rank. Every rank of the group makes the same calls, one without rows too.
    """

    capturable = False
    windows = False
    reads_codes = True
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, cache: PagedKVCache, meta: RingMetadata | SpreadMetadata):
        self.cache, self.meta, self.cp = cache, meta, meta.cp
        cache.blank(meta.fresh)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if isinstance(self.meta, SpreadMetadata):
            return self._decode(layer, q, k, v)
        block = torch.stack(self.cache.rounded(layer, k, v))  # as the pages hold them
        part = self._ring(layer, q, block.to(wire_dtype(self.cache.format.dtype, q.dtype)))
        if self.meta.cached:  # after the ring: a sequence may begin with pages that another one fills in this step
            part = self._cached(layer, q, part, self.meta.cached)
        return part[0].to(q.dtype)

    def _ring(self, layer: int, q: torch.Tensor, block: torch.Tensor) -> Part:
        """block [2, T, Hkv, d]: my k and v -> my queries' attention over all new tokens that they see."""
        cp, meta = self.cp, self.meta
        o = torch.zeros(q.shape, dtype=_wide(q.dtype), device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=o.dtype, device=q.device)
        for step in range(cp.size):
            source = (cp.rank - step) % cp.size
            last = step == cp.size - 1
            if not last:
                coming = block.new_empty(2, meta.tokens[source - 1], *block.shape[2:])
                ring = ((cp.rank + 1) % cp.size, coming, (cp.rank - 1) % cp.size, cp, f"layers.{layer}.ring")
                wait = start_exchange(block, *ring)  # COMM exchange [2, T/R, Hkv, d]: k and v go round
            store = meta.stores[source]
            self.cache.write(layer, store.slots, *block[:, store.rows])
            k, v = block.to(q.dtype)
            for piece in meta.pieces[source]:
                own, keys = piece.queries, piece.keys
                part = attend(q[own], k[keys], v[keys], piece.causal)
                if step == 0:  # my own block: every row sees at least itself
                    o[own], lse[own] = part
                else:
                    merge_into((o[own], lse[own]), part)
            if short := meta.short[source]:
                pieces.attend_pieces(o, lse, q, k, v, short)
            if not last:
                block = wait()
        return o, lse

    def _cached(self, layer: int, q: torch.Tensor, part: Part, cached: Cached) -> Part:
        """`part` [T, ...], and what my queries see in everybody's pages."""
        cp, mine = self.cp, cached.mine
        sent = q.new_zeros(cached.width, *q.shape[1:])
        sent[: len(mine)] = q[mine]
        name = f"layers.{layer}.cached"
        everyone = all_gather_rows(sent, cp, name)  # COMM all-gather [width, Hq, d]: queries with something cached
        answers = self._seen_in_pages(layer, everyone, cached.short) if cached.short else _no_keys(everyone)
        for held in cached.pages:
            k, v = self.cache.gather(layer, self.cache.halves_of(held.ids))[:, : held.tokens].to(q.dtype)
            answers[held.queries] = _packed(attend(everyone[held.queries], k, v))
        each = [cached.width] * cp.size
        back = all_to_all(answers, cp, name, each, each)  # COMM all-to-all [width * R, Hq, d+1]: to each its answers
        o, lse = part
        seen = o[mine], lse[mine]
        for answer in back.unflatten(0, (cp.size, -1))[:, : len(mine)]:  # [m, Hq, d+1]
            merge_into(seen, _unpacked(answer))
        o[mine], lse[mine] = seen
        return o, lse

    def _seen_in_pages(self, layer: int, q: torch.Tensor, short: ShortPages) -> torch.Tensor:
        """What the queries q [n, Hq, d] see in my pages, many sequences in one launch; packed."""
        o = torch.zeros(q.shape, dtype=_wide(q.dtype), device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=o.dtype, device=q.device)
        kept = self.cache.layer(layer), self.cache.format, self.cache.page_size
        pieces.attend_paged_pieces(o, lse, q, *kept, short.pieces, short.queries, short.ids)
        return _packed((o.to(q.dtype), lse))

    def _decode(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        store = self.meta.store
        self.cache.write(layer, store.slots, k[store.rows], v[store.rows])
        answers = _no_keys(q)
        for group in self.meta.groups:
            keys = self.cache.gather(layer, self.cache.halves_of(group.ids)).to(q.dtype)  # [2, b * S, Hkv, d]
            part = attend_to_each(q[group.rows], *keys.unflatten(1, (len(group.rows), -1)), group.lens)
            answers[group.rows] = _packed(part)
        name = f"layers.{layer}.merge"
        parts = all_gather(answers, self.cp, name)  # COMM all-gather [B, Hq, d+1]: o and lse over each rank's pages
        return merge(list(map(_unpacked, parts)))[0].to(q.dtype)


# o and its lse in one tensor, so that it is one message: the bits of a float32 are two numbers of 16 bits


def _packed(part: Part) -> torch.Tensor:
    """o [..., d], lse [...] -> [..., d+1] in the dtype of o; d+2 if that has 16 bits."""
    o, lse = part
    return torch.cat((o, lse.unsqueeze(-1).view(o.dtype)), dim=-1)


def _unpacked(x: torch.Tensor) -> Part:
    wide = _wide(x.dtype)
    n = wide.itemsize // x.dtype.itemsize
    return x[..., :-n], x[..., -n:].contiguous().view(wide).squeeze(-1)


def _no_keys(q: torch.Tensor) -> torch.Tensor:
    """What somebody answers to the queries q who has seen no key, packed."""
    return _packed((torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=_wide(q.dtype))))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of a log-sum-exp."""
    return torch.promote_types(dtype, torch.float32)
