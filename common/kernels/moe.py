"""A mixture of experts in four launches, whatever the number of experts (common/layers/moe_runner.py has the slower forms).

Up to four tokens have two of their own (moe_gemv.py). Many:

    _sort      one program an expert: the (token, choice) pairs that chose it, in order, padded to whole blocks
    _gate_up   one program a (block, tile of F): rows of x for its pairs, times gate and up of one expert, SwiGLU
    _down      one program a (block, tile of D): times down, times the router's weight of each pair
    _sum       one program a (token, tile of D): its k rows added, the lowest expert number first

A pair is token * k + choice. A block holds `rows` places of one expert's pairs; where the expert has no more of them it
holds the sentinel T * k, which loads nothing and stores nothing. How many blocks there are is known only to the GPU, so the
grid is the largest number there can be (`most_blocks`), and programs beyond the last block end at once: nothing waits for
the CPU, and the launches fit into a CUDA graph. An expert that nobody chose has no block, and its weights are not read: a
step moves 3 F D numbers for each expert that was touched, not for each that there is. A pair with expert -1 (one of
another rank's) is in no block and adds nothing.

No atomics: every number is written by one program, sums run in a fixed order in float32, and two runs are equal bit for bit.
MegaBlocks (Gale et al. 2022) pads to blocks; the sorted pairs are vLLM's and SGLang's fused_moe.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from common.kernels import moe_gemv
from common.kernels.expert_blocks import ExpertBlocks, most_blocks
from common.kernels.launch import (
    cdiv,
    launch,
    let_next_start,
    next_power_of_2,
    num_processors,
    shared_memory,
    wait_for_previous,
)

CHUNK = 4096  # pairs that `_sort` looks at in one go


@dataclass(frozen=True)
class Gemm:
    """How a program of a matrix product works: rows of W and columns a turn, warps, turns that are on their way."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """block: pairs a program. gate_up: rows of gate and as many of up. Measured: NOTES.md; others: bench_experts.py --part tune."""

    block: int
    gate_up: Gemm
    down: Gemm


def tiles_for(
    pairs: int, num_experts: int, intermediate: int, hidden: int, dtype: torch.dtype, processors: int, room: int = 227 << 10,
) -> Tiles:  # fmt: skip
    """For `pairs` spread over the experts about evenly; room: bytes of shared memory that a program can have.

    Few pairs an expert: the bytes of W are the cost. One block should hold them all, or W is read again, and there must be
    programs enough to keep the memory busy. Many: the products are the cost, and padding is half a block an expert.
    """
    if dtype == torch.float32:
        return Tiles(16, Gemm(32, 32, 4, 2), Gemm(32, 32, 4, 2))
    touched = min(pairs, num_experts)
    average = pairs / touched
    if average >= 128:
        stages = min(4, room // (2 * 64 * (2 * 128 + 128)))
        return Tiles(128, Gemm(128, 64, 8, stages), Gemm(256, 64, 8, min(stages, 3)))
    block = min(max(next_power_of_2(int(1.5 * average)), 16), 64)
    if block == 64:
        return Tiles(64, Gemm(128, 64, 8, 3), Gemm(128, 64, 8, 4))
    gate_up, down = Gemm(32, 128, 4, 4), Gemm(64, 128, 4, 4)
    return Tiles(block, _narrow(gate_up, touched, intermediate, processors), _narrow(down, touched, hidden, processors))


def _narrow(gemm: Gemm, blocks: int, out: int, processors: int) -> Gemm:
    """Fewer rows of W a program until two programs a processor have work."""
    while gemm.rows > 16 and blocks * cdiv(out, gemm.rows) < 2 * processors:
        gemm = replace(gemm, rows=gemm.rows // 2)
    return gemm


def run(
    x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor,
    added: torch.Tensor | None = None, shared=None, tiles: Tiles | None = None,
) -> torch.Tensor:  # fmt: skip
    """x [T, D], weights [T, k], experts [T, k] int64 (-1: not here), w13 [E, 2F, D] (gate, up), w2 [E, D, F] -> [T, D].

    added [T, D]: what comes to each sum last, before it is rounded. shared: SharedMatrices of an expert for all tokens, where
    `goes_along` (moe_gemv.py) says so. tiles: of the four launches, whatever T.
    """
    (tokens, hidden), top = x.shape, experts.shape[1]
    if not tokens:
        return torch.empty_like(x)
    weights, experts = weights.contiguous(), experts.contiguous()
    if tokens <= moe_gemv.TOKENS and tiles is None:
        return moe_gemv.run(x, weights, experts, w13, w2, added, shared)
    num_experts, intermediate, pairs = len(w13), w2.shape[2], tokens * top
    processors, room = num_processors(x.device), shared_memory(x.device)
    tiles = tiles or tiles_for(pairs, num_experts, intermediate, hidden, x.dtype, processors, room)
    blocks = sort_by_expert(experts, num_experts, tiles.block)
    h = torch.empty(pairs, intermediate, dtype=x.dtype, device=x.device)
    y = torch.empty(pairs, hidden, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    shape = dict(TOP=top, D=hidden, F=intermediate, BM=tiles.block, F32=x.dtype == torch.float32)
    for kernel, gemm, width, args in (
        (_gate_up, tiles.gate_up, intermediate, (x, w13, h, x.stride(0))),
        (_down, tiles.down, hidden, (h, w2, y, weights)),
    ):
        launch(
            kernel, (cdiv(width, gemm.rows), len(blocks.experts)), *args, blocks.pairs, blocks.experts, blocks.count,
            pairs, **shape, BN=gemm.rows, BK=gemm.columns, num_warps=gemm.warps, num_stages=gemm.stages,
        )  # fmt: skip
    launch(
        _sum, (tokens, cdiv(hidden, 1024)), y, experts, out, out if added is None else added, TOP=top,
        KP=next_power_of_2(top), D=hidden, BLOCK=1024, ADDED=added is not None,
    )  # fmt: skip
    return out


def sort_by_expert(experts: torch.Tensor, num_experts: int, block: int) -> ExpertBlocks:
    """experts [T, k] int64 -> the pairs by expert, in blocks: what `expert_blocks` says in plain PyTorch, in one launch.

    The tensors are as long as they can become; what stands behind the last block is not written.
    """
    pairs, device = experts.numel(), experts.device
    most = most_blocks(pairs, num_experts, block)
    order = torch.empty(most * block, dtype=torch.int32, device=device)
    owner = torch.empty(most, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    chunk = min(max(next_power_of_2(pairs), 128), CHUNK)
    launch(
        _sort, (num_experts,), experts, order, owner, count, pairs, E=num_experts, EB=next_power_of_2(num_experts + 1),
        BM=block, CHUNK=chunk, num_warps=4 if chunk <= 1024 else 8,
    )  # fmt: skip
    return ExpertBlocks(order, owner, count)


@triton.jit(do_not_specialize=("pairs",))
def _sort(
    experts, order, owner, count, pairs, E: tl.constexpr, EB: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    e, i, bins = tl.program_id(0), tl.arange(0, CHUNK), tl.arange(0, EB)
    chosen = tl.zeros([EB], tl.int32)  # how often each expert was; what is not here falls into bin E
    for first in range(0, pairs, CHUNK):
        ids = tl.load(experts + first + i, mask=first + i < pairs, other=-1).to(tl.int32)
        chosen += tl.histogram(tl.where((ids >= 0) & (ids < E), ids, E), EB)
    blocks = tl.where(bins < E, tl.cdiv(chosen, BM), 0)
    first_block = tl.sum(tl.where(bins < e, blocks, 0), 0)
    own = tl.sum(tl.where(bins == e, blocks, 0), 0)
    if e == 0:
        tl.store(count, tl.sum(blocks, 0))
    if own > 0:
        at = first_block * BM
        for first in range(0, pairs, CHUNK):
            ids = tl.load(experts + first + i, mask=first + i < pairs, other=-1).to(tl.int32)
            mine = (ids == e).to(tl.int32)
            tl.store(order + at + tl.cumsum(mine, 0) - mine, first + i, mask=mine > 0)
            at += tl.sum(mine, 0)
        padding = at + tl.arange(0, BM)
        tl.store(order + padding, tl.zeros([BM], tl.int32) + pairs, mask=padding < (first_block + own) * BM)
        for first in range(0, own, 64):
            j = first + tl.arange(0, 64)
            tl.store(owner + first_block + j, tl.zeros([64], tl.int32) + e, mask=j < own)


@triton.jit
def _block(order, owner, count, block, BM: tl.constexpr):
    """The pairs of a block [BM], and its expert: -1 if there is no such block."""
    there = block < tl.load(count)
    rows = tl.load(order + block * BM + tl.arange(0, BM), mask=there, other=0)
    return rows, tl.load(owner + block, mask=there, other=-1).to(tl.int64)


@triton.jit(do_not_specialize=("pairs",))
def _gate_up(
    x, w13, h, x_stride, order, owner, count, pairs, TOP: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr,
    F32: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    rows, e = _block(order, owner, count, tl.program_id(1), BM)
    if e >= 0:
        live = rows < pairs
        n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
        x_at = x + (rows // TOP).to(tl.int64)[None, :] * x_stride + k[:, None]
        w_at = w13 + (e * 2 * F + n)[:, None] * D + k[None, :]
        gate, up = tl.zeros([BN, BM], tl.float32), tl.zeros([BN, BM], tl.float32)
        for first in range(0, D, BK):
            xs = tl.load(x_at + first, mask=live[None, :] & (first + k < D)[:, None], other=0.0)  # [BK, BM]
            seen = (n < F)[:, None] & (first + k < D)[None, :]
            g = tl.load(w_at + first, mask=seen, other=0.0)  # [BN, BK]
            u = tl.load(w_at + F * D + first, mask=seen, other=0.0)
            gate = tl.dot(g, xs, gate, input_precision="ieee" if F32 else "tf32")
            up = tl.dot(u, xs, up, input_precision="ieee" if F32 else "tf32")
        act = gate * tl.sigmoid(gate) * up
        at = rows.to(tl.int64)[None, :] * F + n[:, None]
        tl.store(h + at, act.to(h.dtype.element_ty), mask=live[None, :] & (n < F)[:, None])


@triton.jit(do_not_specialize=("pairs",))
def _down(
    h, w2, y, weights, order, owner, count, pairs, TOP: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr,
    F32: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    rows, e = _block(order, owner, count, tl.program_id(1), BM)
    if e >= 0:
        live = rows < pairs
        n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
        h_at = h + rows.to(tl.int64)[None, :] * F + k[:, None]
        w_at = w2 + (e * D + n)[:, None] * F + k[None, :]
        acc = tl.zeros([BN, BM], tl.float32)
        for first in range(0, F, BK):
            hs = tl.load(h_at + first, mask=live[None, :] & (first + k < F)[:, None], other=0.0)  # [BK, BM]
            w = tl.load(w_at + first, mask=(n < D)[:, None] & (first + k < F)[None, :], other=0.0)  # [BN, BK]
            acc = tl.dot(w, hs, acc, input_precision="ieee" if F32 else "tf32")
        acc *= tl.load(weights + rows, mask=live, other=0.0).to(tl.float32)[None, :]
        at = rows.to(tl.int64)[None, :] * D + n[:, None]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=live[None, :] & (n < D)[:, None])


@triton.jit
def _sum(
    y, experts, out, added, TOP: tl.constexpr, KP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    t, j = tl.program_id(0).to(tl.int64), tl.arange(0, KP)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(experts + t * TOP + j, mask=j < TOP, other=-1)
    lower = (ids[None, :] < ids[:, None]) | ((ids[None, :] == ids[:, None]) & (j[None, :] < j[:, None]))
    place = tl.sum(lower.to(tl.int32), 1)  # of each choice among all KP: those that are not here come first
    total = tl.zeros([BLOCK], tl.float32)
    for turn in tl.static_range(KP):
        choice = tl.sum(tl.where(place == turn, j, 0), 0)
        e = tl.max(tl.where(place == turn, ids, -1), 0)
        total += tl.load(y + (t * TOP + choice) * D + i, mask=(i < D) & (e >= 0), other=0.0).to(tl.float32)
    if ADDED:
        total += tl.load(added + t * D + i, mask=i < D, other=0.0).to(tl.float32)
    tl.store(out + t * D + i, total.to(out.dtype.element_ty), mask=i < D)
