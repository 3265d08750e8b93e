"""The attention contract of common/paged_attention.py as Triton kernels.

    store_kv          one program a token: k, v of the step to their slots
    decode_split      one program a (sequence, KV head, part of the context): partial softmax
    decode_merge      one program a (sequence, query head): the parts into one, by log-sum-exp
    extend            one program a (block of new tokens, query head): causal, behind any cached prefix

No kernel waits for the CPU and no launch depends on a number that is only on the GPU. A decode step reads K
and V of each context once, 2 * S * Hkv/R * d numbers a sequence, whatever the number of query heads: the g
heads of a group share the load. FlashAttention-2 (Dao 2023), split-KV decoding (Dao et al. 2023).
"""

import torch
import triton
import triton.language as tl

from common.kv_cache import PagedKVCache
from common.paged_attention import AttentionMetadata

BLOCK_N = 64  # context tokens a program looks at in one go
BLOCK_M = 64  # new tokens of a prefill that share one load of them
MAX_SPLITS = 32
PROGRAMS_PER_SM = 4  # enough in flight to keep the memory busy


class TritonAttention:
    """attention(layer, q [T, Hq/R, d], k, v [T, Hkv/R, d]) -> o [T, Hq/R, d]; same answers as TorchNativeAttention."""

    def __init__(self, cache: PagedKVCache, meta: AttentionMetadata):
        if meta.page_size != cache.page_size:
            raise ValueError(f"page_size={meta.page_size} of the step is not the cache's page_size={cache.page_size}")
        self.cache, self.meta = cache, meta
        self.max_query_len = meta.max_query_len or int(meta.query_start.diff().max())
        batch, kv_heads = len(meta.context_lens), cache.k.shape[3]
        processors = torch.cuda.get_device_properties(cache.k.device).multi_processor_count
        self.splits = max(1, min(MAX_SPLITS, PROGRAMS_PER_SM * processors // (batch * kv_heads)))

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]  # [N, P, Hkv/R, d]
        store_kv(k, v, k_cache, v_cache, self.meta.slot_mapping)
        if self.max_query_len == 1:
            return decode(q, k_cache, v_cache, self.meta, self.splits)
        return extend(q, k_cache, v_cache, self.meta, self.max_query_len)


def store_kv(k, v, k_cache, v_cache, slot_mapping) -> None:
    """k, v [T, Hkv/R, d] -> their slots; -1 goes nowhere. Moves 4 * T * Hkv/R * d numbers (read and write)."""
    tokens, row = len(k), k.shape[1] * k.shape[2]
    _store_kv[(tokens,)](
        k, v, k_cache, v_cache, slot_mapping, k.stride(0), v.stride(0), row, triton.next_power_of_2(row)
    )


@triton.jit
def _store_kv(k, v, k_cache, v_cache, slots, k_stride, v_stride, ROW: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t)
    if slot >= 0:
        i = tl.arange(0, BLOCK)
        tl.store(k_cache + slot * ROW + i, tl.load(k + t * k_stride + i, mask=i < ROW), mask=i < ROW)
        tl.store(v_cache + slot * ROW + i, tl.load(v + t * v_stride + i, mask=i < ROW), mask=i < ROW)


def decode(q, k_cache, v_cache, meta: AttentionMetadata, splits: int) -> torch.Tensor:
    """q [B, Hq/R, d], one new token a sequence -> o [B, Hq/R, d]."""
    (batch, heads, d), kv_heads = q.shape, k_cache.shape[2]
    group = heads // kv_heads
    q, o = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    part = torch.empty(batch, heads, splits, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(d))
    _decode_split[(batch, kv_heads, splits)](
        q, k_cache, v_cache, part, lse, meta.page_table, meta.context_lens, meta.page_table.stride(0), d**-0.5,
        P=meta.page_size, HKV=kv_heads, G=group, GP=max(16, triton.next_power_of_2(group)), D=d, BD=block_d,
        SPLITS=splits, BN=BLOCK_N, F32=q.dtype == torch.float32,
    )  # fmt: skip
    _decode_merge[(batch * heads,)](part, lse, o, D=d, BD=block_d, SPLITS=splits, BS=triton.next_power_of_2(splits))
    return o


@triton.jit
def _slots(page_table_row, n, length, P: tl.constexpr):
    """Positions n -> slots; 0 behind the end (loaded under a mask anyway)."""
    page = tl.load(page_table_row + n // P, mask=n < length, other=0)
    return page * P + n % P


@triton.jit
def _decode_split(
    q, k_cache, v_cache, part, lse, page_table, context_lens, table_stride, scale,
    P: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SPLITS: tl.constexpr, BN: tl.constexpr, F32: tl.constexpr,
):  # fmt: skip
    b, h, s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(context_lens + b).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BN) * BN  # tokens a split, in whole blocks
    start, stop = s * share, tl.minimum((s + 1) * share, length)
    g, i = tl.arange(0, GP), tl.arange(0, BD)
    rows = (b * HKV + h) * G + g  # rows of q [B * Hq/R]
    live = (g[:, None] < G) & (i[None, :] < D)
    qs = tl.load(q + rows[:, None] * D + i[None, :], mask=live, other=0.0)  # [GP, BD]
    m = tl.full([GP], -float("inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, BD], tl.float32)
    for first in range(start, stop, BN):
        n = first + tl.arange(0, BN)
        at = (_slots(page_table + b * table_stride, n, stop, P) * HKV + h) * D  # [BN]
        seen = (n < stop)[:, None] & (i[None, :] < D)
        k = tl.load(k_cache + at[:, None] + i[None, :], mask=seen, other=0.0)  # [BN, BD]
        scores = tl.dot(qs, tl.trans(k), input_precision="ieee" if F32 else "tf32") * scale  # [GP, BN]
        scores = tl.where((n < stop)[None, :], scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp(scores - m_new[:, None])
        old = tl.exp(m - m_new)
        v = tl.load(v_cache + at[:, None] + i[None, :], mask=seen, other=0.0)
        acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee" if F32 else "tf32")
        total = total * old + tl.sum(p, 1)
        m = m_new
    out = rows * SPLITS + s
    tl.store(part + out[:, None] * D + i[None, :], acc / tl.maximum(total, 1e-30)[:, None], mask=live)
    tl.store(lse + out, m + tl.log(total), mask=g < G)  # -inf for a split that has nothing to see


@triton.jit
def _decode_merge(part, lse, o, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    s, i = tl.arange(0, BS), tl.arange(0, BD)
    sums = tl.load(lse + row * SPLITS + s, mask=s < SPLITS, other=-float("inf"))
    weight = tl.exp(sums - tl.max(sums, 0))
    weight = weight / tl.sum(weight, 0)
    live = (s[:, None] < SPLITS) & (i[None, :] < D)
    parts = tl.load(part + (row * SPLITS + s)[:, None] * D + i[None, :], mask=live, other=0.0)  # [BS, BD]
    tl.store(o + row * D + i, tl.sum(parts * weight[:, None], 0).to(o.dtype.element_ty), mask=i < D)


def extend(q, k_cache, v_cache, meta: AttentionMetadata, max_query_len: int) -> torch.Tensor:
    """q [T, Hq/R, d], several new tokens a sequence behind cached ones -> o [T, Hq/R, d].

    Reads K and V of a context once for every BLOCK_M new tokens and query head.
    """
    (_, heads, d), kv_heads = q.shape, k_cache.shape[2]
    q, o = q.contiguous(), torch.zeros_like(q, memory_format=torch.contiguous_format)
    grid = (triton.cdiv(max_query_len, BLOCK_M), heads, len(meta.context_lens))
    _extend[grid](
        q, k_cache, v_cache, o, meta.page_table, meta.query_start, meta.context_lens, meta.page_table.stride(0),
        d**-0.5, P=meta.page_size, H=heads, HKV=kv_heads, D=d, BD=max(16, triton.next_power_of_2(d)), BM=BLOCK_M,
        BN=32 if q.dtype == torch.float32 else BLOCK_N, F32=q.dtype == torch.float32,
    )  # fmt: skip
    return o


@triton.jit
def _extend(
    q, k_cache, v_cache, o, page_table, query_start, context_lens, table_stride, scale,
    P: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, F32: tl.constexpr,
):  # fmt: skip
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q_first, q_last = tl.load(query_start + b), tl.load(query_start + b + 1)
    new = (q_last - q_first).to(tl.int32)
    if block * BM >= new:
        return
    length = tl.load(context_lens + b).to(tl.int32)
    m_i, i = block * BM + tl.arange(0, BM), tl.arange(0, BD)
    position = length - new + m_i  # of each new token
    rows = (q_first + m_i) * H + h
    live = (m_i < new)[:, None] & (i[None, :] < D)
    qs = tl.load(q + rows[:, None] * D + i[None, :], mask=live, other=0.0)  # [BM, BD]
    m = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    stop = tl.minimum(length - new + (block + 1) * BM, length)  # nobody in this block sees further
    for first in range(0, stop, BN):
        n = first + tl.arange(0, BN)
        at = (_slots(page_table + b * table_stride, n, stop, P) * HKV + h // (H // HKV)) * D
        seen = (n < stop)[:, None] & (i[None, :] < D)
        k = tl.load(k_cache + at[:, None] + i[None, :], mask=seen, other=0.0)  # [BN, BD]
        scores = tl.dot(qs, tl.trans(k), input_precision="ieee" if F32 else "tf32") * scale  # [BM, BN]
        scores = tl.where(n[None, :] <= position[:, None], scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp(scores - m_new[:, None])
        old = tl.exp(m - m_new)
        v = tl.load(v_cache + at[:, None] + i[None, :], mask=seen, other=0.0)
        acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee" if F32 else "tf32")
        total = total * old + tl.sum(p, 1)
        m = m_new
    tl.store(o + rows[:, None] * D + i[None, :], (acc / total[:, None]).to(o.dtype.element_ty), mask=live)
