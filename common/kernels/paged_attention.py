"""The attention contract (common/attention/contract.py) as Triton kernels: one file, as they share workspace and merge.

    store_kv   one program a token: k, v of the step to their slots                        (prefill)
    extend     one program a (block of new tokens, query head): causal, behind any cached prefix; where steps may not matter,
               every kind of step
    decode     one program a (sequence, KV head, part of the context): stores the new token, attends with a
               partial softmax; the last of a sequence's programs to end merges the parts by log-sum-exp. Where pages are
               spread over ranks it attends to those here, and tells the log-sum-exp of what it has seen as well
    nodes      a tree of new tokens a sequence: one program a (sequence, block of nodes, KV head, part of the context), behind
               store_kv; which of the last tokens each node sees says a mask; parts are merged as those of decode
    prefix     before it, if sequences begin alike: their queries together over the pages that they share, one
               program a (tile of sequences, KV head, part); decode merges what comes out as parts of its own

No kernel waits for the CPU and no launch depends on a number that is only on the GPU. A decode step reads K
and V of each context once, 2 S Hkv/R d numbers a sequence, whatever the number of query heads: the g heads of
a group share the load. FlashAttention-2 (Dao 2023), split-KV decoding (Dao et al. 2023).
"""

import torch
import triton
import triton.language as tl

from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import LayerPages, PagedKVCache
from common.attention.kv_format import KVFormat
from common.kernels.fused import turned
from common.kernels.kv_rows import (
    added,
    codes,
    encoded_row,
    head_start,
    in_pairs,
    kept_of,
    nothing,
    put,
    queries,
    row_bits,
    scale_of_rows,
    scored,
    whole,
)
from common.kernels.launch import (
    cdiv,
    counters,
    launch,
    let_next_start,
    next_power_of_2,
    num_processors,
    wait_for_previous,
)

MAX_SPLITS = 32  # parts of one context at most
PROGRAMS_PER_PROCESSOR = 8  # of a decode step: a part is short enough that the longest context does not lag behind
PREFIX_SPLITS = 8  # parts of a shared prefix
PREFIX_LEAST = tl.constexpr(256)  # tokens that are worth one
VARYING = ("table_stride", "tiles_stride", "splits", "stride", "least")  # not worth a compiled variant each
LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


NODE_ROWS = 64  # queries of a `nodes` program at most, unless a group has more
TILE_ROWS = 64  # queries of a `prefix` program: g for each of its sequences


class TritonAttention:
    """attention(layer, q [T, Hq/R, d], k, v [T, Hkv/R, d]) -> o [T, Hq/R, d]; same answers as TorchNativeAttention."""

    capturable = True  # into CUDA graphs
    windows = True
    reads_codes = True
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, cache: PagedKVCache, meta: AttentionMetadata):
        meta.refuse_other_pages(cache.page_size)
        self.cache, self.meta = cache, meta
        self.max_query_len = meta.max_query_len or int(meta.query_start.diff().max())
        self.decodes = self.max_query_len == 1 and meta.window is None
        self.turns = self.decodes and not meta.prefixes  # q and k, if asked to
        self.workspace = None

    @staticmethod
    def tile_members(num_q: int, num_kv: int) -> int:
        """Sequences that begin alike and can be served by one program."""
        return TILE_ROWS // (num_q // num_kv)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turning=None) -> torch.Tensor:
        pages, form = self.cache.layer(layer), self.cache.format
        kv_heads = k.shape[1]
        if self.decodes:
            self.workspace = self.workspace or DecodeWorkspace(q, kv_heads, form, self.meta.prefixes is not None)
            return decode(q, k, v, pages, form, self.meta, self.workspace, turning)
        store_kv(k, v, pages, form, self.meta.slot_mapping)
        if self.meta.window is not None:
            blocks = node_blocks(q, kv_heads, self.max_query_len) * len(self.meta.context_lens)
            self.workspace = self.workspace or DecodeWorkspace(q, kv_heads, form, programs=blocks * kv_heads)
            return attend_nodes(q, pages, form, self.meta, self.max_query_len, self.workspace)
        return extend(q, pages, form, self.meta, self.max_query_len)


class BatchInvariantTritonAttention(TritonAttention):
    """The same, with a result for a token that does not depend on the step that computes it: `extend` computes every kind of step.

    It goes over a context from its first token on, in blocks that nothing moves. Decode has no parts, no prefixes and
    no kernel of its own, whose order would be another.
    """

    windows = False

    def __init__(self, cache: PagedKVCache, meta: AttentionMetadata):
        super().__init__(cache, meta)
        self.turns = False

    @staticmethod
    def tile_members(num_q: int, num_kv: int) -> int:
        return 0

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        pages, form = self.cache.layer(layer), self.cache.format
        store_kv(k, v, pages, form, self.meta.slot_mapping)
        return extend(q, pages, form, self.meta, self.max_query_len, fixed=True)


def store_kv(k, v, pages: LayerPages, form: KVFormat, slot_mapping) -> None:
    """k, v [T, Hkv/R, d] -> their slots; -1 goes nowhere. Reads 2 T Hkv/R d numbers, and writes what the pages hold for them."""
    tokens, heads, d = k.shape
    if not form.coded:
        launch(
            _store_kv, (tokens,), k, v, pages.k, pages.v, slot_mapping, k.stride(0), v.stride(0), ROW=heads * d,
            BLOCK=next_power_of_2(heads * d),
        )  # fmt: skip
        return
    launch(
        _store_codes, (tokens, heads), k, v, *kept_of(pages, form), slot_mapping, k.stride(0), v.stride(0), pages.k_scale,
        pages.v_scale, HKV=heads, D=d, BD=max(16, next_power_of_2(d)), MOST=form.most, BITS=row_bits(form), num_warps=1,
    )  # fmt: skip


@triton.jit
def _store_kv(
    k, v, k_cache, v_cache, slots, k_stride, v_stride, ROW: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    let_next_start(PDL)
    wait_for_previous(PDL)
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t)
    if slot >= 0:
        i = tl.arange(0, BLOCK)
        tl.store(k_cache + slot * ROW + i, tl.load(k + t * k_stride + i, mask=i < ROW), mask=i < ROW)
        tl.store(v_cache + slot * ROW + i, tl.load(v + t * v_stride + i, mask=i < ROW), mask=i < ROW)


@triton.jit
def _store_codes(
    k, v, k_cache, v_cache, k_scales, v_scales, slots, k_stride, v_stride, k_scale, v_scale, HKV: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, MOST: tl.constexpr, BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + t)
    if slot >= 0:
        i, row = tl.arange(0, BD), slot * HKV + h
        new_k = tl.load(k + t * k_stride + h * D + i, mask=i < D, other=0.0)
        new_v = tl.load(v + t * v_stride + h * D + i, mask=i < D, other=0.0)
        code, own = encoded_row(new_k, k_scale, k_cache, MOST, BITS)
        put(k_cache, k_scales, row, code, own, D, BD, BITS)
        code, own = encoded_row(new_v, v_scale, v_cache, MOST, BITS)
        put(v_cache, v_scales, row, code, own, D, BD, BITS)


class DecodeWorkspace:
    """Room for the parts of one decode step, or of a step of trees; all layers use it in turn.

    part [B, Hq/R, all, d] and lse [B, Hq/R, all] float32, all = prefix_splits + splits: those of a shared prefix, then
    the sequence's own. arrived [at least B Hkv/R]: how many of its own are there, zero between two layers. B are rows of q; what
    reads a context once for several rows says how many programs that makes a part.
    """

    def __init__(
        self, q: torch.Tensor, kv_heads: int, form: KVFormat, shared: bool = False, programs: int = 0
    ):  # fmt: skip
        (batch, heads, d), processors = q.shape, num_processors(q.device)
        programs, fp8 = programs or batch * kv_heads, form.coded and not form.row_scales
        wanted = max(1, min(MAX_SPLITS, PROGRAMS_PER_PROCESSOR * processors // programs))
        self.splits = 1 << (wanted.bit_length() - 1)
        # how a program works, and the tokens that are worth a part: measured on an H200, see bench_kernels.py
        self.warps, self.stages, self.together = 2, 2, 8
        if programs <= processors // 16:  # an empty chip: many parts
            self.block, self.least = 64, 64
        elif programs <= processors // 2:
            self.block, self.least = 128, 256
        elif programs <= 3 * processors // 4:
            self.block, self.least = 128, 384
        elif programs <= 6 * processors or d <= 64 or fp8:  # a full one: fewer registers, more programs at a time
            self.block, self.least, self.stages, self.together = 64, 384, 3, 4
        else:
            self.block, self.least, self.warps = 128, 512, 4
        if q.dtype == torch.float32:
            self.block, self.warps, self.stages = 32, 4, 2
        self.prefix_splits = PREFIX_SPLITS if shared else 0
        everything = self.prefix_splits + self.splits
        self.arrived = counters(q.device)
        if programs > len(self.arrived):
            self.arrived = torch.zeros(programs, dtype=torch.int32, device=q.device)
        self.part = torch.empty(batch, heads, everything, d, dtype=torch.float32, device=q.device)
        self.lse = torch.empty(batch, heads, everything, dtype=torch.float32, device=q.device)


def decode(
    q, k, v, pages: LayerPages, form: KVFormat, meta: AttentionMetadata, space: DecodeWorkspace, turning=None, part=None
) -> torch.Tensor:
    """q [B, Hq/R, d], k, v [B, Hkv/R, d] of one new token a sequence -> o [B, Hq/R, d]; stores k and v.

    turning (a Turning of common/layers/rotary.py): q and k have no position in them yet. part (o [B, Hq/R, d], lse [B, Hq/R]
    float32): the pages hold a part of each context only, perhaps none of it, and the new token if its slot is not -1; what they
    say is written there, o 0 and lse -inf for nothing at all.
    """
    (batch, heads, d), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    o, sums = part or (torch.empty(q.shape, dtype=q.dtype, device=q.device), space.lse)  # those are not written
    shape = dict(
        P=meta.page_size,
        HKV=kv_heads,
        G=group,
        D=d,
        BD=max(16, next_power_of_2(d)),
        F32=q.dtype == torch.float32,
        BITS=row_bits(form),
    )
    kept, scale, stride = kept_of(pages, form), d**-0.5 * LOG2_E, space.prefix_splits + space.splits
    tokens = meta.context_lens  # not read
    cos, sin = turning.rotary if turning else (q, q)  # nor these
    q_weight, k_weight, eps = (turning and turning.norms) or (q, q, 0.0)
    if meta.prefixes:
        tiles, tokens = meta.prefixes.tiles, meta.prefixes.tokens
        launch(
            _prefix, (space.prefix_splits, kv_heads, tiles.shape[1]), q, *kept, space.part, space.lse, tiles,
            meta.page_table, tiles.stride(0), meta.page_table.stride(0), q.stride(0), scale * pages.k_scale, pages.v_scale, stride,
            SPLITS=space.prefix_splits, BM=TILE_ROWS, BN=32 if shape["F32"] else 64, num_stages=2, **shape,
        )  # fmt: skip
    launch(
        _decode, (space.splits, kv_heads, batch), q, k, v, *kept, o, sums, space.part, space.lse, space.arrived,
        meta.slot_mapping, meta.page_table, meta.context_lens, tokens, cos, sin, q_weight, k_weight, eps,
        meta.page_table.stride(0), q.stride(0), k.stride(0), v.stride(0), scale, pages.k_scale, pages.v_scale,
        space.splits, stride, space.least, MOST=form.most, GP=max(16, next_power_of_2(group)),
        PG=next_power_of_2(group), TOGETHER=space.together,
        BN=space.block, PREFIX_SPLITS=space.prefix_splits, AHEAD=space.stages > 2, TURN=bool(turning), SPREAD=part is not None,
        NORM=bool(turning and turning.norms), num_warps=space.warps, num_stages=space.stages, **shape,
    )  # fmt: skip
    return o


@triton.jit
def _prefix_share(tokens, SPLITS: tl.constexpr):
    """Tokens a part of a shared prefix."""
    return tl.maximum(tl.cdiv(tl.cdiv(tokens, SPLITS), 64) * 64, PREFIX_LEAST)


@triton.jit(do_not_specialize=VARYING)
def _prefix(
    q, k_cache, v_cache, k_scales, v_scales, part, lse, tiles, page_table, tiles_stride, table_stride, q_stride, scale,
    v_scale, stride, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, P: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, F32: tl.constexpr, BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    s, h, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, count = tl.load(tiles + tile), tl.load(tiles + tiles_stride + tile)
    tokens = tl.load(tiles + 2 * tiles_stride + tile).to(tl.int32)
    share = _prefix_share(tokens, SPLITS)
    if (count > 0) & (s * share < tokens):
        r, i = tl.arange(0, BM), tl.arange(0, BD)
        b = first + r // G  # the sequence of a row, and its query head
        head = h * G + r % G
        live = (r // G < count)[:, None] & (i < D)[None, :]
        qs = tl.load(q + b[:, None] * q_stride + head[:, None] * D + i[None, :], mask=live, other=0.0)  # [BM, BD]
        PAIRS: tl.constexpr = in_pairs(q, k_cache, D, BD)
        START: tl.constexpr = head_start(q, k_cache)
        qs, score_scale = queries(qs, scale, k_cache, PAIRS)
        m = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = nothing(BM, BD, PAIRS)
        stop = tl.minimum((s + 1) * share, tokens)
        table = page_table + first * table_stride
        for start in range(s * share, stop, BN):
            m, total, acc = _attend(
                qs, m, total, acc, k_cache, v_cache, k_scales, v_scales, table, start, stop,
                tl.full([BM], 0, tl.int32) + stop - 1, h, score_scale, P, HKV, D, BD, BN, F32, BITS, PAIRS, START, True,
            )  # fmt: skip
        at = (b * HKV * G + head) * stride + s
        acc = whole(acc, PAIRS) / total[:, None] * v_scale
        tl.store(part + at[:, None] * D + i[None, :], acc, mask=live)
        tl.store(lse + at, m + tl.log2(total), mask=r // G < count)


@triton.jit
def _slots(page_table_row, n, length, P: tl.constexpr):
    """Positions n -> slots; 0 behind the end (loaded under a mask anyway)."""
    page = tl.load(page_table_row + n // P, mask=n < length, other=0)
    # Triton 3.6 takes each sum for a multiple of 16, since both summands begin with one: rows of 30 floats were read 16 bytes at a
    # time, from addresses that are no multiples of 16
    return tl.multiple_of(page * P + n % P, 1)


@triton.jit(do_not_specialize=VARYING)
def _decode(
    q, k, v, k_cache, v_cache, k_scales, v_scales, o, sums, part, lse, arrived, slots, page_table, context_lens, prefix_tokens, cos,
    sin, q_weight, k_weight, eps, table_stride, q_stride, k_stride, v_stride, scale, k_scale, v_scale, splits, stride, least,
    MOST: tl.constexpr, PREFIX_SPLITS: tl.constexpr,
    P: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, PG: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, TOGETHER: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr, TURN: tl.constexpr,
    NORM: tl.constexpr, SPREAD: tl.constexpr, F32: tl.constexpr, BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    s, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    cached = tl.load(context_lens + b).to(tl.int32)
    if SPREAD:
        cached -= (tl.load(slots + b) >= 0).to(tl.int32)
    else:
        cached -= 1
    before, shared = 0, 0  # parts of a shared prefix, and its tokens
    if PREFIX_SPLITS > 0:
        shared = tl.load(prefix_tokens + b).to(tl.int32)
        before = tl.cdiv(shared, _prefix_share(shared, PREFIX_SPLITS))
    share = tl.maximum(tl.cdiv(tl.cdiv(cached - shared, splits), BN) * BN, least)  # tokens a part, in whole blocks
    parts = tl.maximum(tl.cdiv(cached - shared, share), 1)
    if s < parts:
        start, stop = shared + s * share, tl.minimum(shared + (s + 1) * share, cached)
        g, i = tl.arange(0, GP), tl.arange(0, BD)
        live = (g[:, None] < G) & (i[None, :] < D)
        row = h * G + g  # query heads of this group
        heads_at = q + b * q_stride + row[:, None] * D
        if TURN:
            qs = turned(heads_at, q_weight, cos + b * D, sin + b * D, i, live, eps, D, NORM).to(q.dtype.element_ty)
        else:
            qs = tl.load(heads_at + i[None, :], mask=live, other=0.0)  # [GP, BD]
        PAIRS: tl.constexpr = in_pairs(q, k_cache, D, BD)
        START: tl.constexpr = head_start(q, k_cache)
        qs, score_scale = queries(qs, scale * k_scale, k_cache, PAIRS)
        m = tl.full([GP], -float("inf"), tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = nothing(GP, BD, PAIRS)
        table = page_table + b * table_stride
        coming = _slots(table, start + tl.arange(0, BN), stop, P)
        for first in range(start, stop, BN):
            n = first + tl.arange(0, BN)
            if AHEAD:  # page ids a block ahead: only then are K and V of the next block on their way early
                at = coming * HKV + h  # [BN]
                coming = _slots(table, n + BN, stop, P)
            else:
                at = _slots(table, n, stop, P) * HKV + h
            there = n < stop
            ks = codes(k_cache, at, there, qs[0].dtype, D, BD, BITS, PAIRS)
            vs = codes(v_cache, at, there, qs[0].dtype, D, BD, BITS, PAIRS)
            scores = scored(qs, ks, F32, PAIRS) * score_scale  # [GP, BN]
            scores = tl.where(there[None, :], scale_of_rows(scores, k_scales, at, there, BITS), -float("inf"))
            m_new = tl.maximum(m, tl.max(scores, 1) - START)
            p = tl.exp2(scores - m_new[:, None])
            old = tl.exp2(m - m_new)
            total = total * old + tl.sum(p, 1)
            acc = added(acc, old, scale_of_rows(p, v_scales, at, there, BITS), vs, F32, PAIRS)
            m = m_new
        acc = whole(acc, PAIRS)  # [GP, BD]
        newest = s == parts - 1
        if SPREAD:
            newest = newest & (tl.load(slots + b) >= 0)
        if newest:  # the new token is in no page yet: attend to it here, and store it
            head_at = k + b * k_stride + h * D
            if TURN:
                one = tl.zeros([1, 1], tl.int32)
                new_k = turned(head_at + one, k_weight, cos + b * D, sin + b * D, i, (i < D)[None, :], eps, D, NORM)
                new_k = tl.reshape(new_k, [BD]).to(k.dtype.element_ty)
            else:
                new_k = tl.load(head_at + i, mask=i < D, other=0.0)
            new_v = tl.load(v + b * v_stride + h * D + i, mask=i < D, other=0.0)
            code_k, own_k = encoded_row(new_k, k_scale, k_cache, MOST, BITS)  # as the page will hold it
            code_v, own_v = encoded_row(new_v, v_scale, v_cache, MOST, BITS)
            score = tl.sum(whole(qs, PAIRS).to(tl.float32) * code_k[None, :], 1)  # [GP]
            score *= scale * own_k if qs[0].dtype == q.dtype.element_ty else tl.reshape(score_scale, [GP])
            m_new = tl.maximum(m, score - START)
            p, old = tl.exp2(score - m_new), tl.exp2(m - m_new)
            total = total * old + p
            if BITS > 0:
                p *= own_v
            acc = acc * old[:, None] + p[:, None] * code_v[None, :]
            m = m_new
            slot = tl.load(slots + b)
            if slot >= 0:
                put(k_cache, k_scales, slot * HKV + h, code_k, own_k, D, BD, BITS)
                put(v_cache, v_scales, slot * HKV + h, code_v, own_v, D, BD, BITS)
        if SPREAD:
            total = tl.where(total > 0, total, 1.0)  # no token at all
        acc = acc / total[:, None] * v_scale
        out = o + (b * HKV * G + row[:, None]) * D + i[None, :]
        if before + parts == 1:
            tl.store(out, acc.to(o.dtype.element_ty), mask=live)
            if SPREAD:
                tl.store(sums + b * HKV * G + row, (m + tl.log2(total)) * LN_2, mask=g < G)
        else:
            heads = (b * HKV + h) * G
            at = (heads + g) * stride + before + s
            tl.store(part + at[:, None] * D + i[None, :], acc, mask=live)
            tl.store(lse + at, m + tl.log2(total), mask=g < G)
            tl.debug_barrier()  # all threads have stored before one says so
            count = tl.atomic_add(arrived + b * HKV + h, 1, sem="acq_rel")
            if count == parts - 1:  # all parts are there
                tl.store(arrived + b * HKV + h, 0)
                _merge(part, lse, o, sums, heads, before + parts, stride, G, PG, D, BD, TOGETHER, SPREAD)


@triton.jit
def _merge(
    part, lse, o, sums, heads, parts, stride, G: tl.constexpr, PG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    TOGETHER: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """The parts of the G query heads from `heads` on -> o, and their log-sum-exp."""
    j, i = tl.arange(0, PG), tl.arange(0, BD)
    out = o + (heads + j)[:, None] * D + i[None, :]
    whole, total = merged(part, lse, heads, parts, stride, G, PG, D, BD, TOGETHER)
    tl.store(out, whole.to(o.dtype.element_ty), mask=(j < G)[:, None] & (i < D)[None, :])
    if SPREAD:
        tl.store(sums + heads + j, total * LN_2, mask=j < G)


@triton.jit
def merged(
    part, lse, heads, parts, stride, G: tl.constexpr, PG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """The parts of the G query heads from `heads` on -> [PG, BD] float32, and the binary logarithm of their sum [PG]; TOGETHER of
    them are loaded at once."""
    j, i = tl.arange(0, PG), tl.arange(0, BD)
    best = tl.full([PG], -float("inf"), tl.float32)
    total = tl.zeros([PG], tl.float32)
    acc = tl.zeros([PG, BD], tl.float32)
    for first in range(0, parts, TOGETHER):
        c = first + tl.arange(0, TOGETHER)
        at = (heads + j)[None, :] * stride + c[:, None]  # [TOGETHER, PG]
        there = (c < parts)[:, None] & (j < G)[None, :]
        sums = tl.load(lse + at, mask=there, other=-1e30, cache_modifier=".cg")
        live = there[:, :, None] & (i < D)[None, None, :]
        values = tl.load(part + at[:, :, None] * D + i[None, None, :], mask=live, other=0.0, cache_modifier=".cg")
        best_now = tl.maximum(best, tl.max(sums, 0))
        weight, old = tl.exp2(sums - best_now[None, :]), tl.exp2(best - best_now)
        acc = acc * old[:, None] + tl.sum(values * weight[:, :, None], 0)
        total = total * old + tl.sum(weight, 0)
        best = best_now
    return acc / total[:, None], best + tl.log2(total)


def _node_rows(q, kv_heads: int, nodes: int) -> int:
    """Queries of a `nodes` program: the g query heads of a KV head for each of some nodes."""
    group = q.shape[1] // kv_heads
    return max(16, next_power_of_2(group), min(NODE_ROWS, next_power_of_2(nodes * group)))


def node_blocks(q, kv_heads: int, nodes: int) -> int:
    """Blocks that the nodes of a sequence make."""
    return cdiv(nodes, _node_rows(q, kv_heads, nodes) // (q.shape[1] // kv_heads))


def attend_nodes(
    q, pages: LayerPages, form: KVFormat, meta: AttentionMetadata, nodes: int, space: DecodeWorkspace
) -> torch.Tensor:
    """q [B * n, Hq/R, d], n = `nodes` new tokens a sequence that have been stored, meta.window [B * n, W] -> o [B * n, Hq/R, d].

    Reads K and V of a context once for every block of nodes. No launch depends on what lies on the GPU. Its block sizes were not
    measured on one yet.
    """
    (_, heads, d), kv_heads = q.shape, pages.k.shape[2]
    o, f32 = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.dtype == torch.float32
    blocks, group, window = node_blocks(q, kv_heads, nodes), heads // kv_heads, meta.window.view(torch.uint8)
    launch(
        _nodes, (space.splits, kv_heads, len(meta.context_lens) * blocks), q, *kept_of(pages, form), o, space.part, space.lse,
        space.arrived, meta.page_table, meta.context_lens, window, meta.page_table.stride(0), q.stride(0), window.stride(0),
        d**-0.5 * LOG2_E * pages.k_scale, pages.v_scale, space.splits, space.splits, space.least,
        BITS=row_bits(form), NODES=nodes, BLOCKS=blocks, WIDTH=window.shape[1],
        P=meta.page_size, HKV=kv_heads, G=group, PG=next_power_of_2(group), D=d, BD=max(16, next_power_of_2(d)),
        BM=_node_rows(q, kv_heads, nodes), BN=32 if f32 else 64, TOGETHER=space.together, F32=f32, num_warps=4, num_stages=2,
    )  # fmt: skip
    return o


@triton.jit(do_not_specialize=VARYING)
def _nodes(
    q, k_cache, v_cache, k_scales, v_scales, o, part, lse, arrived, page_table, context_lens, window, table_stride, q_stride,
    window_stride, scale, v_scale, splits, stride, least, BITS: tl.constexpr, NODES: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr, P: tl.constexpr, HKV: tl.constexpr,
    G: tl.constexpr, PG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TOGETHER: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    s, h, of = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, first_node = of // BLOCKS, (of % BLOCKS) * (BM // G)
    length = tl.load(context_lens + b).to(tl.int32)
    base = length - WIDTH  # all before it is seen by every node
    share = tl.maximum(tl.cdiv(tl.cdiv(length, splits), BN) * BN, least)  # tokens a part, in whole blocks
    parts = tl.cdiv(length, share)
    if s < parts:
        start, stop = s * share, tl.minimum((s + 1) * share, length)
        r, i = tl.arange(0, BM), tl.arange(0, BD)
        node = first_node + r // G
        real = (r // G < BM // G) & (node < NODES)
        row = b * NODES + node  # of q
        head = row * (HKV * G) + h * G + r % G  # of o
        live = real[:, None] & (i < D)[None, :]
        qs = tl.load(
            q + row[:, None] * q_stride + (h * G + r % G)[:, None] * D + i[None, :], mask=live, other=0.0
        )  # [BM, BD]
        PAIRS: tl.constexpr = in_pairs(q, k_cache, D, BD)
        START: tl.constexpr = head_start(q, k_cache)
        qs, score_scale = queries(qs, scale, k_cache, PAIRS)
        m = tl.full([BM], -1e30, tl.float32)  # not -inf: a part may hold no token that some node sees
        total = tl.zeros([BM], tl.float32)
        acc = nothing(BM, BD, PAIRS)
        table = page_table + b * table_stride
        for first in range(start, stop, BN):
            n = first + tl.arange(0, BN)
            at, there = _slots(table, n, stop, P) * HKV + h, n < stop
            ks = codes(k_cache, at, there, qs[0].dtype, D, BD, BITS, PAIRS)
            vs = codes(v_cache, at, there, qs[0].dtype, D, BD, BITS, PAIRS)
            scores = scored(qs, ks, F32, PAIRS) * score_scale  # [BM, BN]
            scores = scale_of_rows(scores, k_scales, at, there, BITS)
            if first + BN > base:
                w = n - base
                inside = real[:, None] & ((w >= 0) & (n < stop))[None, :]
                seen = tl.load(window + row[:, None] * window_stride + w[None, :], mask=inside, other=0)
                scores = tl.where((seen != 0) | (w < 0)[None, :], scores, -float("inf"))
            m_new = tl.maximum(m, tl.max(scores, 1) - START)
            p, old = tl.exp2(scores - m_new[:, None]), tl.exp2(m - m_new)
            total = total * old + tl.sum(p, 1)
            acc = added(acc, old, scale_of_rows(p, v_scales, at, there, BITS), vs, F32, PAIRS)
            m = m_new
        total = tl.where(total > 0, total, 1.0)
        acc = whole(acc, PAIRS) / total[:, None] * v_scale
        if parts == 1:
            tl.store(o + head[:, None] * D + i[None, :], acc.to(o.dtype.element_ty), mask=live)
        else:
            to = head * stride + s
            tl.store(part + to[:, None] * D + i[None, :], acc, mask=live)
            tl.store(lse + to, m + tl.log2(total), mask=real)
            tl.debug_barrier()  # all threads have stored before one says so
            count = tl.atomic_add(arrived + of * HKV + h, 1, sem="acq_rel")
            if count == parts - 1:  # all parts are there
                tl.store(arrived + of * HKV + h, 0)
                for k in range(first_node, tl.minimum(first_node + BM // G, NODES)):
                    heads = ((b * NODES + k) * HKV + h) * G
                    _merge(part, lse, o, lse, heads, parts, stride, G, PG, D, BD, TOGETHER, False)


def extend(
    q, pages: LayerPages, form: KVFormat, meta: AttentionMetadata, max_query_len: int, block_m=64, block_n=64, warps=4, stages=2,
    fixed=False,
) -> torch.Tensor:  # fmt: skip
    """q [T, Hq/R, d], several new tokens a sequence behind cached ones -> o [T, Hq/R, d].

    Reads K and V of a context once for every block of new tokens and query head. fixed: a token's bits do not depend on the step.
    Its place in a block of queries is then that of its position, and all blocks of keys have a mask: without one, a compiler may
    contract the scaling of a score and what is taken off it into one rounding, and which blocks need none depends on the step.
    The query heads of a KV head share a block then, so that a decode step, too, reads K and V once.
    """
    (_, heads, d), kv_heads = q.shape, pages.k.shape[2]
    group = heads // kv_heads if fixed else 1
    seats = next_power_of_2(group)  # of a token in a block
    block_m = max(block_m, seats)
    tokens = block_m // seats
    o = (torch.zeros if meta.padded else torch.empty)(q.shape, dtype=q.dtype, device=q.device)
    longest = max_query_len + tokens - 1 if fixed else max_query_len  # with what stands before it in its block
    grid = (cdiv(longest, tokens), heads // group, len(meta.context_lens))
    launch(
        _extend, grid, q, *kept_of(pages, form), o, meta.page_table, meta.query_start, meta.context_lens,
        meta.page_table.stride(0), q.stride(0), d**-0.5 * LOG2_E * pages.k_scale, pages.v_scale,
        BITS=row_bits(form), P=meta.page_size,
        H=heads, HKV=kv_heads, D=d, BD=max(16, next_power_of_2(d)), BM=block_m, GROUP=group, SEATS=seats,
        BN=32 if q.dtype == torch.float32 else block_n,
        F32=q.dtype == torch.float32, FIXED=fixed, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return o


@triton.jit(do_not_specialize=VARYING)
def _extend(
    q, k_cache, v_cache, k_scales, v_scales, o, page_table, query_start, context_lens, table_stride, q_stride, scale, v_scale,
    BITS: tl.constexpr, P: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, GROUP: tl.constexpr, SEATS: tl.constexpr, BN: tl.constexpr, F32: tl.constexpr, FIXED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    block, h, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q_first, q_last = tl.load(query_start + b), tl.load(query_start + b + 1)
    new = (q_last - q_first).to(tl.int32)
    length = tl.load(context_lens + b).to(tl.int32)
    tokens: tl.constexpr = BM // SEATS  # of a block, GROUP heads each
    before = 0  # tokens of the first block that are not new
    if FIXED:
        before = (length - new) % tokens
    if block * tokens < new + before:  # the longest rows of a sequence come first
        r, i = tl.arange(0, BM), tl.arange(0, BD)
        m_i, head = block * tokens - before + r // SEATS, h * GROUP + r % SEATS
        position = length - new + m_i  # of each new token
        live = ((m_i >= 0) & (m_i < new) & (r % SEATS < GROUP))[:, None] & (i[None, :] < D)
        q_at = q + (q_first + m_i)[:, None] * q_stride + head[:, None] * D
        qs = tl.load(q_at + i[None, :], mask=live, other=0.0)  # [BM, BD]
        PAIRS: tl.constexpr = in_pairs(q, k_cache, D, BD)
        START: tl.constexpr = head_start(q, k_cache)
        qs, score_scale = queries(qs, scale, k_cache, PAIRS)
        m = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = nothing(BM, BD, PAIRS)
        table, kv = page_table + b * table_stride, h // (H // HKV // GROUP)
        seen_by_all = (length - new + block * tokens + 1) // BN * BN  # whole blocks that need no mask
        if FIXED:
            seen_by_all = seen_by_all * 0
        stop = tl.minimum(length - new - before + (block + 1) * tokens, length)  # nobody in this block sees further
        for first in range(0, seen_by_all, BN):
            m, total, acc = _attend(
                qs, m, total, acc, k_cache, v_cache, k_scales, v_scales, table, first, stop, position, kv,
                score_scale, P, HKV, D, BD, BN, F32, BITS, PAIRS, START, False,
            )  # fmt: skip
        for first in range(seen_by_all, stop, BN):
            m, total, acc = _attend(
                qs, m, total, acc, k_cache, v_cache, k_scales, v_scales, table, first, stop, position, kv,
                score_scale, P, HKV, D, BD, BN, F32, BITS, PAIRS, START, True,
            )  # fmt: skip
        acc = whole(acc, PAIRS) / total[:, None] * v_scale
        rows = (q_first + m_i) * H + head
        tl.store(o + rows[:, None] * D + i[None, :], acc.to(o.dtype.element_ty), mask=live)


@triton.jit
def _attend(
    qs, m, total, acc, k_cache, v_cache, k_scales, v_scales, table, first, stop, position, kv, scale, P: tl.constexpr,
    HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, F32: tl.constexpr, BITS: tl.constexpr,
    PAIRS: tl.constexpr, START: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of the context for one block of queries: the running maximum, sum and output."""
    n = first + tl.arange(0, BN)
    at, there = _slots(table, n, stop, P) * HKV + kv, n < stop
    ks = codes(k_cache, at, there, qs[0].dtype, D, BD, BITS, PAIRS)
    vs = codes(v_cache, at, there, qs[0].dtype, D, BD, BITS, PAIRS)
    scores = scored(qs, ks, F32, PAIRS) * scale  # [BM, BN]
    scores = scale_of_rows(scores, k_scales, at, there, BITS)
    if MASKED:
        scores = tl.where(n[None, :] <= position[:, None], scores, -float("inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) - START)
    p = tl.exp2(scores - m_new[:, None])
    old = tl.exp2(m - m_new)
    total = total * old + tl.sum(p, 1)
    return m_new, total, added(acc, old, scale_of_rows(p, v_scales, at, there, BITS), vs, F32, PAIRS)
