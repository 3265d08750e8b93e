"""Decode over latent pages (common/attention/latent.py): one row of c + r numbers a token, for all heads.

    _decode   one program a (sequence, block of heads, part of the context): partial softmax over its rows; the program of
              the last part and the first heads also stores the new token's row
    _merge    one program a (sequence, head): the parts by log-sum-exp; only where a context may have several

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
from common.kernels.kv_rows import codes, encoded, kept_of, put, row_bits, scale_of, scale_of_rows
from common.kernels.launch import launch, let_next_start, num_processors, wait_for_previous
from common.kernels.paged_attention import LOG2_E, _merge, _slots

MAX_SPLITS = 128  # there is one "head" of keys, so one context must be cut up finer to fill the chip
PROGRAMS_PER_PROCESSOR = 2  # a program's rows take half of the shared memory
LEAST = 128  # tokens that are worth a part


class TritonLatentAttention(LatentNativeAttention):
    """The same contract; a step in which every sequence has one new token is stored and attended to by one kernel.

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

    def __call__(
        self, layer: int, q: torch.Tensor, row: torch.Tensor, kv_b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        if not self.decoding:
            return super().__call__(layer, q, row, kv_b, scale)
        c = kv_b.shape[-1]
        dn = q.shape[-1] - (row.shape[-1] - c)
        absorbed = torch.einsum("thd,hdc->thc", q[..., :dn], kv_b[:, :dn])
        q = torch.cat((absorbed, q[..., dn:]), dim=-1)  # [B, H/R, c + r]
        self.space = self.space or LatentWorkspace(q, c)
        pages, form = self.cache.layer(layer), self.cache.format
        means = decode(q, row, pages, form, self.meta, c, scale, self.space)  # [B, H/R, c]
        return torch.einsum("thc,hdc->thd", means, kv_b[:, dn:])


class LatentWorkspace:
    """Room for the parts of one decode step, and how it is cut up; all layers use it in turn.

    part [B, H/R, splits, c] and lse [B, H/R, splits] float32. How long it takes: NOTES.md.
    """

    def __init__(self, q: torch.Tensor, rank: int):
        """q [B, H/R, c + r], rank c."""
        batch, heads, _ = q.shape
        self.heads = min(max(triton.next_power_of_2(heads), 16), 64)  # a program
        self.warps = 4 if self.heads == 16 else 8
        self.block, self.stages = 32, 2  # rows a turn
        if q.dtype == torch.float32:
            self.heads, self.block = 16, 16
        programs = batch * triton.cdiv(heads, self.heads)
        wanted = PROGRAMS_PER_PROCESSOR * num_processors(q.device) // max(programs, 1)
        self.splits = min(MAX_SPLITS, 1 << (max(wanted, 1).bit_length() - 1))
        room = (batch, heads, self.splits) if self.splits > 1 else (0, 0, 0)
        self.part = torch.empty(*room, rank, dtype=torch.float32, device=q.device)
        self.lse = torch.empty(room, dtype=torch.float32, device=q.device)


def decode(
    q, row, pages: LayerPages, form: KVFormat, meta: AttentionMetadata, rank: int, scale: float, space: LatentWorkspace
) -> torch.Tensor:  # fmt: skip
    """q [B, H/R, c + r] absorbed, row [B, c + r] of one new token a sequence, pages [N, P, 1, c + r] -> o [B, H/R, c].

    Stores row at the step's slots (-1: nowhere). Not yet times Wv.
    """
    batch, heads, width = q.shape
    o = torch.empty(batch, heads, rank, dtype=q.dtype, device=q.device)
    shape = dict(H=heads, C=rank, BC=max(16, triton.next_power_of_2(rank)), BN=space.block)
    launch(
        _decode, (space.splits, triton.cdiv(heads, space.heads), batch), q, row, pages.k, kept_of(pages, form)[2], o, space.part,
        space.lse, meta.slot_mapping, meta.page_table, meta.context_lens, meta.page_table.stride(0), q.stride(0), q.stride(1),
        row.stride(0), scale * LOG2_E, pages.k_scale, space.splits, MOST=form.most, BITS=row_bits(form),
        P=meta.page_size, R=width - rank,
        BR=max(16, triton.next_power_of_2(width - rank)), BH=space.heads, LEAST=LEAST, F32=q.dtype == torch.float32,
        **shape, num_warps=space.warps, num_stages=space.stages,
    )  # fmt: skip
    if space.splits > 1:
        launch(
            _merge_parts, (heads, batch), space.part, space.lse, o, meta.context_lens, space.splits, TOGETHER=8, LEAST=LEAST,
            **shape,
        )  # fmt: skip
    return o


@triton.jit
def _share(cached, splits, LEAST: tl.constexpr, BN: tl.constexpr):
    """Tokens a part, in whole blocks."""
    return tl.maximum(tl.cdiv(tl.cdiv(cached, splits), BN) * BN, LEAST)


@triton.jit(do_not_specialize=("table_stride", "splits"))
def _decode(
    q, row, pages, scales, o, part, lse, slots, page_table, context_lens, table_stride, q_stride, head_stride, row_stride,
    scale, page_scale, splits, MOST: tl.constexpr, BITS: tl.constexpr,
    P: tl.constexpr, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, LEAST: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    s, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    cached = tl.load(context_lens + b).to(tl.int32) - 1
    share = _share(cached, splits, LEAST, BN)
    parts = tl.maximum(tl.cdiv(cached, share), 1)
    if s < parts:
        h, i, j = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BC), tl.arange(0, BR)
        in_c, in_r = (h < H)[:, None] & (i < C)[None, :], (h < H)[:, None] & (j < R)[None, :]
        q_at = q + b * q_stride + h[:, None] * head_stride
        qc = tl.load(q_at + i[None, :], mask=in_c, other=0.0)  # [BH, BC], times the latent
        qr = tl.load(q_at + C + j[None, :], mask=in_r, other=0.0)  # [BH, BR], times the key that was turned
        m = tl.full([BH], -float("inf"), tl.float32)
        total = tl.zeros([BH], tl.float32)
        acc = tl.zeros([BH, BC], tl.float32)
        table, stop = page_table + b * table_stride, tl.minimum((s + 1) * share, cached)
        for first in range(s * share, stop, BN):
            n = first + tl.arange(0, BN)
            at, there = _slots(table, n, stop, P), n < stop
            latent = codes(pages, at, there, qc.dtype, C, BC, BITS, C + R)  # [BN, BC]
            turned = codes(pages, at, there, qc.dtype, R, BR, BITS, C + R, C)  # [BN, BR]
            scores = tl.dot(qc, tl.trans(latent), input_precision="ieee" if F32 else "tf32")
            scores = tl.dot(qr, tl.trans(turned), scores, input_precision="ieee" if F32 else "tf32")
            scores = scale_of_rows(scores * (scale * page_scale), scales, at, there, BITS)  # [BH, BN]
            scores = tl.where(there[None, :], scores, -float("inf"))
            m_new = tl.maximum(m, tl.max(scores, 1))
            p, old = tl.exp2(scores - m_new[:, None]), tl.exp2(m - m_new)
            total = total * old + tl.sum(p, 1)
            p = scale_of_rows(p, scales, at, there, BITS)
            acc = acc * old[:, None]
            acc = tl.dot(p.to(latent.dtype), latent, acc, input_precision="ieee" if F32 else "tf32")
            m = m_new
        if s == parts - 1:  # the new token is in no page yet: attend to it here, as the page will hold it
            new = tl.load(row + b * row_stride + i, mask=i < C, other=0.0)
            new_r = tl.load(row + b * row_stride + C + j, mask=j < R, other=0.0)
            own = page_scale
            if BITS > 0:  # one scale for both parts of the row
                own = scale_of(
                    tl.maximum(tl.max(tl.abs(new.to(tl.float32)), 0), tl.max(tl.abs(new_r.to(tl.float32)), 0)), MOST
                )
            new, new_r = encoded(new, own, pages, MOST, BITS), encoded(new_r, own, pages, MOST, BITS)
            score = tl.sum(qc.to(tl.float32) * new[None, :], 1) + tl.sum(qr.to(tl.float32) * new_r[None, :], 1)
            score *= scale * own  # [BH]
            m_new = tl.maximum(m, score)
            p, old = tl.exp2(score - m_new), tl.exp2(m - m_new)
            total = total * old + p
            if BITS > 0:
                p *= own
            acc = acc * old[:, None] + p[:, None] * new[None, :]
            m = m_new
            slot = tl.load(slots + b)
            if (slot >= 0) & (tl.program_id(1) == 0):
                put(pages, scales, slot, new, own, C, BC, BITS, C + R)
                put(pages, scales, slot, new_r, own, R, BR, BITS, C + R, C)
        acc = acc / total[:, None] * page_scale
        heads = b * H + h
        if parts == 1:
            tl.store(o + heads[:, None] * C + i[None, :], acc.to(o.dtype.element_ty), mask=in_c)
        else:
            at = heads * splits + s
            tl.store(part + at[:, None] * C + i[None, :], acc, mask=in_c)
            tl.store(lse + at, m + tl.log2(total), mask=h < H)


@triton.jit(do_not_specialize=("splits",))
def _merge_parts(
    part, lse, o, context_lens, splits, H: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    TOGETHER: tl.constexpr, LEAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cached = tl.load(context_lens + b).to(tl.int32) - 1
    parts = tl.cdiv(cached, _share(cached, splits, LEAST, BN))
    if parts > 1:  # a single one has written its result
        _merge(part, lse, o, b * H + h, parts, splits, 1, 1, C, BC, TOGETHER)
