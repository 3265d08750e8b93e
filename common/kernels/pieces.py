"""Many pieces of attention in one launch: what some queries see of some keys (common/attention/context_parallel.py).

    program    (block of queries, query head, piece)

A step of many short prompts is that many pieces for every block of keys that comes by, and for the pages of what was there before:
launched one by one they cost the CPU more than the GPU. What a piece's queries see is merged into what they have seen before.
"""

import torch
import triton
import triton.language as tl

from common.attention.context_table import Pieces
from common.attention.kv_cache import LayerPages
from common.attention.kv_format import KVFormat
from common.kernels.kv_rows import (
    added,
    codes,
    head_start,
    in_pairs,
    kept_of,
    nothing,
    queries,
    row_bits,
    scale_of_rows,
    scored,
    whole,
)
from common.kernels.launch import cdiv, launch, let_next_start, next_power_of_2, wait_for_previous
from common.kernels.paged_attention import LN_2, LOG2_E, _slots

BLOCK = 64  # queries of a program; of float32 fewer, whose products are made of ordinary additions, all in registers
BLOCK_32 = 16


def attend_pieces(o, lse, q, k, v, pieces: Pieces) -> None:
    """o [T, Hq, d] and lse [T, Hq], float32, become attention over what they were and the pieces; no query is in two of them.

    q [T, Hq, d], k, v [S, Hkv, d].
    """
    _launch(o, lse, q, (k, v, k, v), (pieces.numbers, pieces.numbers), pieces, k.shape[1], 0, 0, 1.0, 1.0)


def attend_paged_pieces(
    o,
    lse,
    q,
    pages: LayerPages,
    form: KVFormat,
    page_size: int,
    pieces: Pieces,
    queries: torch.Tensor,
    ids: torch.Tensor,
) -> None:
    """The same with keys in pages: the first query and key of a piece are places in `queries` [m], rows of q, and page `ids`."""
    kept, scales = kept_of(pages, form), (pages.k_scale, pages.v_scale)
    _launch(o, lse, q, kept, (queries, ids), pieces, pages.k.shape[2], page_size, row_bits(form), *scales)


def _launch(o, lse, q, kept, lists, pieces: Pieces, kv_heads: int, page_size: int, bits: int, k_scale, v_scale) -> None:
    (_, heads, d), f32, numbers = q.shape, q.dtype == torch.float32, pieces.numbers
    block = BLOCK_32 if f32 else BLOCK
    launch(
        _pieces, (cdiv(pieces.longest, block), heads, numbers.shape[1]), q, *kept, o, lse, numbers, *lists,
        numbers.stride(0), q.stride(0), d**-0.5 * LOG2_E * k_scale, v_scale, P=page_size, H=heads, HKV=kv_heads, D=d,
        BD=max(16, next_power_of_2(d)), BM=block, BN=32 if f32 else 64, F32=f32, BITS=bits, num_stages=2,
    )  # fmt: skip


@triton.jit(do_not_specialize=("columns",))
def _pieces(
    q, k_kept, v_kept, k_scales, v_scales, o, lse, pieces, rows, ids, columns, q_stride, scale, v_scale, P: tl.constexpr,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    F32: tl.constexpr, BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    block, h, piece = tl.program_id(0), tl.program_id(1), pieces + tl.program_id(2)
    count = tl.load(piece + columns).to(tl.int32)
    if block * BM < count:
        first, start, triangle = tl.load(piece), tl.load(piece + 2 * columns), tl.load(piece + 4 * columns) > 0
        keys = tl.load(piece + 3 * columns).to(tl.int32)
        number, i = block * BM + tl.arange(0, BM), tl.arange(0, BD)
        known = number < count
        row = first + number
        if P > 0:
            row = tl.load(rows + row, mask=known, other=0)
        live = known[:, None] & (i < D)[None, :]
        qs = tl.load(q + row[:, None] * q_stride + h * D + i[None, :], mask=live, other=0.0)  # [BM, BD]
        PAIRS: tl.constexpr = in_pairs(q, k_kept, D, BD)
        START: tl.constexpr = head_start(q, k_kept)
        qs, score_scale = queries(qs, scale, k_kept, PAIRS)
        last = tl.where(triangle, number, keys)  # key that a query sees
        stop = tl.where(triangle, tl.minimum(keys, (block + 1) * BM), keys)
        m = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = nothing(BM, BD, PAIRS)
        for begin in range(0, stop, BN):
            n = begin + tl.arange(0, BN)
            there = n < stop
            slot = start + n
            if P > 0:
                slot = _slots(ids + start, n, stop, P)
            at = slot * HKV + h // (H // HKV)
            ks = codes(k_kept, at, there, qs[0].dtype, D, BD, BITS, PAIRS)
            vs = codes(v_kept, at, there, qs[0].dtype, D, BD, BITS, PAIRS)
            scores = scored(qs, ks, F32, PAIRS) * score_scale  # [BM, BN]
            scores = scale_of_rows(scores, k_scales, at, there, BITS)
            scores = tl.where(there[None, :] & (n[None, :] <= last[:, None]), scores, -float("inf"))
            m_new = tl.maximum(m, tl.max(scores, 1) - START)
            p, old = tl.exp2(scores - m_new[:, None]), tl.exp2(m - m_new)
            total = total * old + tl.sum(p, 1)
            acc = added(acc, old, scale_of_rows(p, v_scales, at, there, BITS), vs, F32, PAIRS)
            m = m_new
        told, sum_at = (m + tl.log2(total)) * LN_2, lse + row * H + h
        before = tl.load(sum_at, mask=known, other=0.0)
        best = tl.maximum(before, told)
        old, new = tl.exp(before - best), tl.exp(told - best)
        o_at = o + (row * H + h)[:, None] * D + i[None, :]
        seen = tl.load(o_at, mask=live, other=0.0) * old[:, None] + whole(acc, PAIRS) * (v_scale * new / total)[:, None]
        tl.store(o_at, seen / (old + new)[:, None], mask=live)
        tl.store(sum_at, best + tl.log(old + new), mask=known)
