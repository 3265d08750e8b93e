"""Decode over latent pages (common/attention/latent.py): one row of c + r numbers a token, for all heads.

    absorb    q, turned and times Wk; the new tokens' rows into the pages (latent_rows.py)
    _decode   one program a (sequence, block of heads, part of the context): partial softmax over its rows
    _values   one program a (sequence, head, some rows of Wv): the parts by log-sum-exp, times Wv; of few sequences. Many have
              their parts merged by a launch, one program a (sequence, head), and are multiplied by the GEMM library

A head's query is c + r wide, its key is the row, its value the first c columns of the same row: loaded once, multiplied
twice. All heads share it, so a step reads S (c + r) numbers a sequence, from memory once and from the cache for each further
block of heads; what the rows cost in products is 2 S H (2 c + r), some 2 H a byte in bf16: with 128 heads the
tensor cores are as busy as the memory. DeepSeek-V2 (2024), section 2.1; split-KV decoding (Dao et al. 2023).
"""

import torch
import triton
import triton.language as tl

from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import LayerPages, PagedKVCache
from common.attention.kv_format import KVFormat
from common.attention.latent import LatentNativeAttention
from common.kernels.kv_rows import (
    added,
    both_queries,
    codes,
    head_start,
    in_pairs,
    kept_of,
    nothing,
    row_bits,
    scale_of_rows,
    scored,
    whole,
)
from common.kernels.latent_rows import absorb
from common.kernels.launch import (
    cdiv,
    launch,
    let_next_start,
    next_power_of_2,
    num_processors,
    shared_memory,
    wait_for_previous,
)
from common.kernels.paged_attention import LOG2_E, _merge, _slots, merged

MAX_SPLITS = 128  # there is one "head" of keys, so one context must be cut up finer to fill the chip
PROGRAMS_PER_PROCESSOR = 2  # a program's rows take half of the shared memory
LEAST = 64  # tokens that are worth a part, whole blocks
FEW = 4  # sequences whose parts are merged by each program of `_values` anew: more would read them too often


class TritonLatentAttention(LatentNativeAttention):
    """The same contract; a step in which every sequence has one new token is stored and attended to by kernels of its own.

    Other steps expand what they read, in products large enough for the GEMM library: they are the plain form's, and so are trees.
    """

    capturable = True  # into CUDA graphs

    def __init__(self, cache: PagedKVCache, meta: AttentionMetadata):
        self.space, self.decoding = None, meta.max_query_len == 1 and meta.window is None
        if self.decoding:
            meta.refuse_other_pages(cache.page_size)
        else:
            super().__init__(cache, meta)
        self.cache, self.meta = cache, meta

    @property
    def turns(self) -> bool:
        """Whether it wants q and rows as the projections gave them, and a LatentTurning (common/layers/mla.py)."""
        return self.decoding

    def __call__(
        self, layer: int, q: torch.Tensor, row: torch.Tensor, kv_b: torch.Tensor, scale: float, turning=None
    ) -> torch.Tensor:
        if not self.decoding:
            return super().__call__(layer, q, row, kv_b, scale)
        dn, pages, form = q.shape[-1] - (row.shape[-1] - kv_b.shape[-1]), self.cache.layer(layer), self.cache.format
        q = absorb(q, row, kv_b, pages, form, self.meta.slot_mapping, turning)  # [B, H/R, c + r]
        self.space = self.space or LatentWorkspace(q, kv_b.shape[-1])
        means = decode(q, pages, form, self.meta, scale, self.space)  # [B, H/R, c]
        return values(means, kv_b, dn, self.meta, self.space)  # [B, H/R, dv]


class LatentWorkspace:
    """Room for the parts of one decode step, and how it is cut up; all layers use it in turn.

    part [B, H/R, splits, c] and lse [B, H/R, splits] float32. How long it takes: NOTES.md.
    """

    def __init__(self, q: torch.Tensor, rank: int):
        """q [B, H/R, c + r], rank c."""
        batch, heads, width = q.shape
        self.heads = min(max(next_power_of_2(heads), 16), 64) if q.dtype != torch.float32 else 16  # a program
        programs, processors = batch * cdiv(heads, self.heads), num_processors(q.device)
        roomy = shared_memory(q.device) >= 3 * 64 * width * q.itemsize  # two turns of 64 rows, and the queries
        # rows a turn, turns on their way, warps
        if q.dtype == torch.float32:
            self.block, self.stages, self.warps = 16, 2, 4
        elif self.heads > 16:
            self.block, self.stages, self.warps = 32, 2, 8
        elif roomy and programs <= processors // 32:  # an empty chip
            self.block, self.stages, self.warps = 64, 3, 8
        else:
            self.block, self.stages, self.warps = 32, 3, 4
        wanted = PROGRAMS_PER_PROCESSOR * processors // max(programs, 1)
        self.splits = min(MAX_SPLITS, 1 << (max(wanted, 1).bit_length() - 1))
        room = (batch, heads, self.splits) if self.splits > 1 else (0, 0, 0)
        self.rank = rank
        self.part = torch.empty(*room, rank, dtype=torch.float32, device=q.device)
        self.lse = torch.empty(room, dtype=torch.float32, device=q.device)

    def shape(self, heads: int) -> dict[str, int]:
        """What all kernels of a step must agree about."""
        return dict(H=heads, C=self.rank, BC=max(16, next_power_of_2(self.rank)), BN=self.block, LEAST=LEAST)


def decode(
    q: torch.Tensor, pages: LayerPages, form: KVFormat, meta: AttentionMetadata, scale: float, space: LatentWorkspace
) -> torch.Tensor:
    """q [B, H/R, c + r] absorbed, pages [N, P, 1, c + r], the new tokens' rows among them -> means of latents [B, H/R, c].

    Those of a context that is cut into parts lie in `space` instead, until `merge` or `values` adds them up. A sequence
    without a slot (-1) is padding: its pages are not read, and its mean is zero.
    """
    (batch, heads, width), rank = q.shape, space.rank
    o = torch.empty(batch, heads, rank, dtype=q.dtype, device=q.device)
    launch(
        _decode, (space.splits, cdiv(heads, space.heads), batch), q, pages.k, kept_of(pages, form)[2], o, space.part,
        space.lse, meta.slot_mapping, meta.page_table, meta.context_lens, meta.page_table.stride(0), q.stride(0), q.stride(1),
        scale * LOG2_E * pages.k_scale, pages.k_scale, space.splits, BITS=row_bits(form), P=meta.page_size, R=width - rank,
        BR=max(16, next_power_of_2(width - rank)), BH=space.heads, AHEAD=space.stages > 2, F32=q.dtype == torch.float32,
        **space.shape(heads), num_warps=space.warps, num_stages=space.stages,
    )  # fmt: skip
    return o


def merge(means: torch.Tensor, meta: AttentionMetadata, space: LatentWorkspace) -> None:
    """What `decode` gave, whole."""
    batch, heads, _ = means.shape
    if space.splits > 1:
        launch(
            _merge_parts, (heads, batch), space.part, space.lse, means, meta.context_lens, space.splits, TOGETHER=8,
            **space.shape(heads),
        )  # fmt: skip


def values(
    means: torch.Tensor, kv_b: torch.Tensor, dn: int, meta: AttentionMetadata, space: LatentWorkspace
) -> torch.Tensor:
    """What `decode` gave, and kv_b [H/R, dn + dv, c] -> o [B, H/R, dv]."""
    batch, heads, _ = means.shape
    dv = kv_b.shape[1] - dn
    o = torch.empty(batch, heads, dv, dtype=means.dtype, device=means.device)
    if batch <= FEW:
        # else fewer and larger programs, which read the parts less often
        few = batch * heads <= num_processors(means.device)
        rows = 16 if few else 32
        launch(
            _values, (cdiv(dv, rows), heads, batch), means, space.part, space.lse, meta.context_lens, kv_b, o, space.splits,
            kv_b.stride(0), N=dn, DV=dv, BD=rows, TOGETHER=8, **space.shape(heads), num_warps=4 if few else 8,
        )  # fmt: skip
        return o
    merge(means, meta, space)
    torch.bmm(means.transpose(0, 1), kv_b[:, dn:].transpose(1, 2), out=o.transpose(0, 1))
    return o


@triton.jit
def _share(context, splits, LEAST: tl.constexpr, BN: tl.constexpr):
    """Tokens a part, in whole blocks."""
    return tl.maximum(tl.cdiv(tl.cdiv(context, splits), BN) * BN, LEAST)


@triton.jit(do_not_specialize=("table_stride", "splits"))
def _decode(
    q, pages, scales, o, part, lse, slots, page_table, context_lens, table_stride, q_stride, head_stride, scale, page_scale,
    splits, BITS: tl.constexpr, P: tl.constexpr, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
    BR: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, LEAST: tl.constexpr, AHEAD: tl.constexpr, F32: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    s, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    context, slot = tl.load(context_lens + b).to(tl.int32), tl.load(slots + b)
    h, i, j = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BC), tl.arange(0, BR)
    in_c, in_r = (h < H)[:, None] & (i < C)[None, :], (h < H)[:, None] & (j < R)[None, :]
    q_at = q + b * q_stride + h[:, None] * head_stride
    qc = tl.load(q_at + i[None, :], mask=in_c, other=0.0)  # [BH, BC], times the latent
    qr = tl.load(q_at + C + j[None, :], mask=in_r, other=0.0)  # [BH, BR], times the key that was turned
    PAIRS: tl.constexpr = in_pairs(q, pages, C, BC, R) and BR >= 32
    START: tl.constexpr = head_start(q, pages)
    qc, qr, score_scale = both_queries(qc, qr, scale, pages, PAIRS)
    share = _share(context, splits, LEAST, BN)
    parts = tl.maximum(tl.cdiv(context, share), 1)
    if s < parts:
        m = tl.full([BH], -float("inf"), tl.float32)
        total = tl.zeros([BH], tl.float32)
        acc = nothing(BH, BC, PAIRS)
        table, stop = page_table + b * table_stride, tl.where(slot >= 0, tl.minimum((s + 1) * share, context), 0)
        if AHEAD:
            coming = _slots(table, s * share + tl.arange(0, BN), stop, P)
        for first in range(s * share, stop, BN):
            n = first + tl.arange(0, BN)
            there = n < stop
            if AHEAD:  # page ids a block ahead: only then are the rows of the next block on their way early
                at = coming
                coming = _slots(table, n + BN, stop, P)
            else:
                at = _slots(table, n, stop, P)
            latent = codes(pages, at, there, qc[0].dtype, C, BC, BITS, PAIRS, C + R)
            turned = codes(pages, at, there, qc[0].dtype, R, BR, BITS, PAIRS, C + R, C)
            scores = scored(qr, turned, F32, PAIRS, scored(qc, latent, F32, PAIRS))
            scores = scale_of_rows(scores * score_scale, scales, at, there, BITS)  # [BH, BN]
            scores = tl.where(there[None, :], scores, -float("inf"))
            m_new = tl.maximum(m, tl.max(scores, 1) - START)
            p, old = tl.exp2(scores - m_new[:, None]), tl.exp2(m - m_new)
            total = total * old + tl.sum(p, 1)
            acc = added(acc, old, scale_of_rows(p, scales, at, there, BITS), latent, F32, PAIRS)
            m = m_new
        nobody = total == 0
        acc = whole(acc, PAIRS) / tl.where(nobody, 1.0, total)[:, None] * page_scale
        heads = b * H + h
        if parts == 1:
            tl.store(o + heads[:, None] * C + i[None, :], acc.to(o.dtype.element_ty), mask=in_c)
        else:
            at = heads * splits + s
            tl.store(part + at[:, None] * C + i[None, :], acc, mask=in_c)
            tl.store(lse + at, tl.where(nobody, -1e30, m + tl.log2(total)), mask=h < H)


@triton.jit(do_not_specialize=("splits",))
def _merge_parts(
    part, lse, o, context_lens, splits, H: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    TOGETHER: tl.constexpr, LEAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    context = tl.load(context_lens + b).to(tl.int32)
    parts = tl.cdiv(context, _share(context, splits, LEAST, BN))
    if parts > 1:  # a single one has written its result
        _merge(part, lse, o, lse, b * H + h, parts, splits, 1, 1, C, BC, TOGETHER, False)


@triton.jit(do_not_specialize=("splits",))
def _values(
    means, part, lse, context_lens, kv_b, o, splits, kv_stride, N: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    H: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, TOGETHER: tl.constexpr, LEAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d, i = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BC)
    w_at = kv_b + h.to(tl.int64) * kv_stride + (N + d)[:, None] * C + i[None, :]
    # nobody writes it: on its way before all else
    w = tl.load(w_at, mask=(d < DV)[:, None] & (i < C)[None, :], other=0.0)
    wait_for_previous(PDL)
    context, head = tl.load(context_lens + b).to(tl.int32), b * H + h
    parts = tl.cdiv(context, _share(context, splits, LEAST, BN))
    if parts > 1:
        mean, _ = merged(part, lse, head, parts, splits, 1, 1, C, BC, TOGETHER)
        mean = tl.reshape(mean, [BC])
    else:
        mean = tl.load(means + head * C + i, mask=i < C, other=0.0).to(tl.float32)
    y = tl.sum(w.to(tl.float32) * mean[None, :], 1)
    tl.store(o + head * DV + d, y.to(o.dtype.element_ty), mask=d < DV)
