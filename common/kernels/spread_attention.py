"""Decode where the tokens of a sequence are spread over ranks (common/attention/context_parallel.py), as kernels in a graph.

    attend    `decode` of paged_attention.py over this rank's pages; o and lse go straight into the message
    gather    one message a layer: all ranks' o and lse, of each 2 B Hq d + 4 B Hq bytes with 16-bit numbers
    merge     one program a few heads: the parts become one, in the order of the ranks, so that all get the same bits

Which pages are here, and how many tokens, is worked out on the GPU (plan.py). So a step is the same launches whatever its numbers.
"""

import torch
import triton
import triton.language as tl

from common.attention.context_parallel import ContextParallelAttention
from common.attention.context_table import RingMetadata, TableMetadata
from common.attention.kv_cache import PagedKVCache
from common.distributed.collectives import all_gather_rows
from common.kernels.launch import launch, let_next_start, wait_for_previous
from common.kernels.paged_attention import DecodeWorkspace, decode

HEADS = 4  # of a program that merges
ALIGNED = 16  # words that o, and a rank's message, are filled up to: loads of four words, whatever the batch


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
        self.workspace = self.workspace or DecodeWorkspace(q, k.shape[1])
        mine = self.answers = self.answers or Answers(q)
        pages, form = self.cache.layer(layer), self.cache.format
        decode(q, k, v, pages, form, self.meta.here, self.workspace, turning, (mine.o, mine.lse))
        name = f"layers.{layer}.merge"
        parts = all_gather_rows(
            mine.words, self.cp, name
        )  # COMM all-gather [B, Hq, d+1]: o and lse over each rank's pages
        return merge_answers(parts, mine)


class Answers:
    """What a rank has to say of a decode step, in one tensor of 32-bit words: o like q [B, Hq, d], then lse [B, Hq] float32.

    All layers use it in turn.
    """

    def __init__(self, q: torch.Tensor):
        rows = q.shape[0] * q.shape[1]
        first, n = _aligned(triton.cdiv(q.numel() * q.element_size(), 4)), _aligned(rows)
        self.words = torch.zeros(first + n, dtype=torch.int32, device=q.device)
        self.o = self.words[:first].view(q.dtype)[: q.numel()].view(q.shape)
        self.lse = self.words[first:].view(torch.float32)[:rows].view(q.shape[:2])


def _aligned(words: int) -> int:
    return triton.cdiv(words, ALIGNED) * ALIGNED


def merge_answers(parts: torch.Tensor, like: Answers) -> torch.Tensor:
    """parts [R * n] int32, the words of all ranks -> attention over the keys of all [B, Hq, d]; 0 where nobody has any."""
    (batch, heads, d), dtype = like.o.shape, like.o.dtype
    rows, n = batch * heads, len(like.words)
    first = n - _aligned(rows)
    o = torch.empty(like.o.shape, dtype=dtype, device=parts.device)
    launch(
        _merge_answers, (triton.cdiv(rows, HEADS),), parts.view(dtype), parts[first:].view(torch.float32), o, rows,
        n * 4 // dtype.itemsize, n, R=len(parts) // n, D=d, BD=triton.next_power_of_2(d), BH=HEADS,
    )  # fmt: skip
    return o


@triton.jit(do_not_specialize=("rows",))
def _merge_answers(
    parts, lse, o, rows, o_stride, lse_stride, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    h, i = tl.program_id(0) * BH + tl.arange(0, BH), tl.arange(0, BD)
    live = (h < rows)[:, None] & (i < D)[None, :]
    at = h[:, None] * D + i[None, :]
    wait_for_previous(PDL)
    best = tl.full([BH], -float("inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, BD], tl.float32)
    for r in tl.static_range(R):
        value = tl.load(parts + r * o_stride + at, mask=live, other=0.0).to(tl.float32)
        told = tl.load(lse + r * lse_stride + h, mask=h < rows, other=0.0)
        best, total, old, new = weighed(best, total, told)
        acc = acc * old[:, None] + value * new[:, None]
    tl.store(o + at, (acc / tl.where(total > 0, total, 1.0)[:, None]).to(o.dtype.element_ty), mask=live)


@triton.jit
def weighed(best, total, lse):
    """One part more: the largest log-sum-exp so far, the sum of all weights beside it, and what the older parts and the new one
    weigh. A part without keys weighs 0."""
    most = tl.maximum(best, lse)
    beside = tl.where(most == -float("inf"), 0.0, most)
    old, new = tl.exp(best - beside), tl.exp(lse - beside)
    return most, total * old + new, old, new
