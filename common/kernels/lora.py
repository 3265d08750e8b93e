"""What adapters add to a batch, y += s B (A x), each row with its own: two launches a layer, however many adapters there are.

    _shrink   one program a (block of rows, tile of r, share of `in`): h = A x, parts of the sum over `in`
    _expand   one program a (block of rows, tile of `out`): the parts added up, times B and s, added to y

A block is up to 16 rows (64 of a long step) that use one adapter, so a program multiplies by one A or B. A prefill is segments of
many rows each (Punica's SGMV, Chen et al. 2023); in a decode step any row may have any adapter (its BGMV): sorted by slot, both are
blocks. Which block is whose is worked out on the CPU (`adapter_blocks`) and stands in one tensor, which a CUDA graph finds at a
fixed place with room for as many blocks as there can be; those that no adapter has end at once, and so do the parts of a layer
that an adapter leaves alone (their rank is 0 in `starts`). The layout of A, B and starts is LoRASlots' (common/layers/lora.py).

Bytes: of each adapter that is there r (in + out) numbers once from memory (its other blocks find them in the cache); in each
row of an adapter in + 2 out numbers of x and y, and r float32 for each share of `in`. W has in * out: at rank 16 and in = out =
3584 eight adapters are a 14th of it. So what counts is how often a program waits: what a step does not write (A, B, and which block
is whose) is loaded while the kernel before still runs, and all parts of h at once (NOTES.md has the times).

No atomics: every number of h and y is written by one program, sums run in a fixed order in float32. In steps of fewer than 512 rows
that order is the layer's: a row gets the same bits whoever else is in the step.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from common.kernels.launch import cdiv, launch, let_next_start, next_power_of_2, shared_memory, wait_for_previous

FEW, MANY = 16, 64  # rows a block; a tensor core takes 16 at least
LONG = 512  # rows of a step that has blocks of MANY


class Cut(NamedTuple):
    """How the work of blocks of so many rows is cut up. Measured, see NOTES.md."""

    most_shares: int  # of `in`: as many loads stand at the beginning of every program of _expand
    tile_in: int  # of 16-bit floats; half as many of float32
    shrink_ranks: int
    shrink_warps: int  # twice as many for float32
    tile_out: int
    tile_out_wide: int  # of a y of more than WIDE columns, which has programs enough
    expand_warps: int


CUTS = {FEW: Cut(64, 512, 32, 2, 256, 512, 8), MANY: Cut(8, 128, 64, 4, 128, 256, 8)}
WIDE = 16_000
MOST_RANKS = 32  # of h that a program of _expand multiplies by at once
AT_ONCE = 1 << 14  # numbers of h that it loads together: 64 registers of each thread of 8 warps
STAGES = 4  # tiles of `in` that are on their way at once


def rows_per_block(tokens: int) -> int:
    return FEW if tokens < LONG else MANY


def most_blocks(tokens: int, slots: int) -> int:
    """More cannot be: every adapter that is there begins one, the rows left over fill whole ones."""
    block, present = rows_per_block(tokens), min(tokens, slots)
    return present + (tokens - present) // block


def adapter_blocks(slots: np.ndarray, room: int | None = None) -> np.ndarray:
    """slots [T], 0 for none -> the rows of all blocks, T where a block has no more, then of each block its slot: [n * block + n].

    In this order both begin at a multiple of 16 bytes, of which Triton compiles another kernel than of others.
    room: n; blocks beyond those that there are have slot 0. By default there are no others.
    """
    tokens, block = len(slots), rows_per_block(len(slots))
    order = np.argsort(slots, kind="stable")[np.count_nonzero(slots == 0) :]
    present, counts = np.unique(slots[order], return_counts=True)
    blocks = -(-counts // block)
    n = int(blocks.sum()) if room is None else room
    owner, rows = np.zeros(n, dtype=np.int64), np.full(n * block, tokens)
    owner[: blocks.sum()] = np.repeat(present, blocks)
    # of each adapter's rows, for those padded before
    shift = (blocks.cumsum() - blocks) * block - (counts.cumsum() - counts)
    rows[np.arange(len(order)) + np.repeat(shift, counts)] = order
    return np.concatenate((rows, owner))


def shrink(
    x: torch.Tensor, a: torch.Tensor, starts: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """x [T, in], a [slots, ranks, in], starts [slots, parts + 1], slots [n] and rows [n, block] of blocks -> h, parts of the sum
    A x: [shares, n * block, ranks] float32. Rows of a that an adapter does not have are not written."""
    (n, block), (_, ranks, width) = rows.shape, a.shape
    cut = CUTS[block]
    tile, tile_r = cut.tile_in * 2 // x.element_size(), _tile(ranks, cut.shrink_ranks)
    # by the layer alone: what a row gets does not depend on who else is in the step, and _expand is compiled once
    turns = cdiv(width, cut.most_shares * tile)
    shares = cdiv(width, turns * tile)
    room = shared_memory(x.device) // ((block + tile_r) * tile * x.element_size())
    h = torch.empty(shares, n * block, ranks, dtype=torch.float32, device=x.device)
    launch(
        _shrink, (cdiv(ranks, tile_r), shares, n), x, a, h, slots, rows, starts, len(x), x.stride(0), width, RANKS=ranks,
        PARTS=starts.shape[1] - 1, BM=block, BR=tile_r, BK=tile, TURNS=turns, F32=x.dtype == torch.float32,
        num_warps=cut.shrink_warps * x.element_size() // 2, num_stages=min(STAGES, room),
    )  # fmt: skip
    return h


def expand(
    y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, starts: torch.Tensor, scales: torch.Tensor, sizes: tuple[int, ...],
    slots: torch.Tensor, rows: torch.Tensor,
) -> None:  # fmt: skip
    """y [T, out] += s B h; h as `shrink` gives it, b [slots, out, r_max], scales [slots, parts], sizes: columns of each part."""
    (n, block), (_, out, max_rank) = rows.shape, b.shape
    cut, three = CUTS[block], (*sizes, 0, 0)[:3]
    columns, shares = cut.tile_out_wide if out > WIDE else cut.tile_out, next_power_of_2(len(h))
    tile_r = _tile(max_rank, max(min(AT_ONCE // (block * shares), MOST_RANKS), 16))
    launch(
        _expand, (sum(cdiv(size, columns) for size in sizes), n), h, b, y, slots, rows, starts, scales, len(y), y.stride(0),
        SIZE0=three[0], SIZE1=three[1], SIZE2=three[2], SHARES=len(h), RANKS=h.shape[2], R=max_rank, PARTS=len(sizes), BM=block,
        BN=columns, BR=tile_r, BP=shares, STEP=math.gcd(*sizes, 16), F32=y.dtype == torch.float32, num_warps=cut.expand_warps,
        num_stages=1,  # tiles of ranks are few, and h in several stages does not fit into shared memory
    )  # fmt: skip


def _tile(ranks: int, most: int) -> int:
    return min(max(next_power_of_2(ranks), 16), most)


@triton.jit(do_not_specialize=("tokens",))
def _shrink(
    x, a, h, slots, rows, starts, tokens, x_stride, width, RANKS: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, TURNS: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    p, block = tl.program_id(1), tl.program_id(2)
    m, r, k = block * BM + tl.arange(0, BM), tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BK)
    slot = tl.load(slots + block) - 1
    total = tl.load(starts + slot * (PARTS + 1) + PARTS, mask=slot >= 0, other=0)  # rows of A that this adapter has
    row = tl.load(rows + m)
    begin = p * TURNS * BK
    x_at, x_live = x + row[:, None] * x_stride + k[None, :], (row < tokens)[:, None]
    a_at, a_live = a + (slot * RANKS + r[None, :]) * width + k[:, None], (r < total)[None, :]
    if TURNS == 1:  # a loop has several loads in flight by itself
        only = tl.load(a_at + begin, mask=a_live & (begin + k < width)[:, None], other=0.0)
    wait_for_previous(PDL)  # every program: the next kernel takes the end of this one for the end of all before
    if tl.program_id(0) * BR < total:
        acc = tl.zeros([BM, BR], tl.float32)
        if TURNS == 1:
            xs = tl.load(x_at + begin, mask=x_live & (begin + k < width)[None, :], other=0.0)
            acc = tl.dot(xs, only, input_precision="ieee" if F32 else None)
        else:
            for first in range(begin, tl.minimum(begin + TURNS * BK, width), BK):
                inside = first + k < width
                xs = tl.load(x_at + first, mask=x_live & inside[None, :], other=0.0)  # [BM, BK]
                thin = tl.load(a_at + first, mask=a_live & inside[:, None], other=0.0)  # [BK, BR]
                acc += tl.dot(xs, thin, input_precision="ieee" if F32 else None)
        at = h + (p * tl.num_programs(2) * BM + m[:, None]) * RANKS + r[None, :]
        tl.store(at, acc, mask=(r < RANKS)[None, :])


@triton.jit(do_not_specialize=("tokens",))
def _expand(
    h, b, y, slots, rows, starts, scales, tokens, y_stride, SIZE0: tl.constexpr, SIZE1: tl.constexpr, SIZE2: tl.constexpr,
    SHARES: tl.constexpr, RANKS: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, BP: tl.constexpr, STEP: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    tile, block = tl.program_id(0), tl.program_id(1)
    # which part of the layer: tiles of the first, then of the second, then of the third
    second, third = tl.cdiv(SIZE0, BN), tl.cdiv(SIZE0, BN) + tl.cdiv(SIZE1, BN)
    part = (tile >= second).to(tl.int32) + (tile >= third).to(tl.int32)
    first = tl.where(part == 2, SIZE0 + SIZE1, tl.where(part == 1, SIZE0, 0))
    size = tl.where(part == 2, SIZE2, tl.where(part == 1, SIZE1, SIZE0))
    # told so, the compiler sees that STEP neighbours have one mask, and loads them at once
    first, size = tl.multiple_of(first, STEP), tl.multiple_of(size, STEP)
    tile -= tl.where(part == 2, third, tl.where(part == 1, second, 0))
    m, n = block * BM + tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    slot = tl.load(slots + block) - 1
    has = slot >= 0
    start = tl.load(starts + slot * (PARTS + 1) + part, mask=has, other=0)
    rank = tl.load(starts + slot * (PARTS + 1) + part + 1, mask=has, other=0) - start
    factor = tl.load(scales + slot * PARTS + part, mask=has, other=0.0)
    row = tl.load(rows + m)
    b_at = b + (slot * (SIZE0 + SIZE1 + SIZE2) + first + n[None, :]) * R
    thin = _columns(b_at, 0, rank, (n < size)[None, :], R, BR)  # not written within a step
    wait_for_previous(PDL)
    if rank > 0:
        live = (row < tokens)[:, None] & (n < size)[None, :]
        y_at = y + row[:, None] * y_stride + first + n[None, :]
        before = tl.load(y_at, mask=live, other=0.0)
        h_at, apart = h + m[:, None, None] * RANKS + start, tl.num_programs(1) * BM * RANKS
        inner = _sum_of_shares(h_at, 0, rank, apart, SHARES, BP, BR)
        acc = tl.dot(inner.to(thin.dtype), thin, input_precision="ieee" if F32 else None)
        if R > BR:
            for low in range(BR, rank, BR):
                more = _columns(b_at, low, rank, (n < size)[None, :], R, BR)
                sums = _sum_of_shares(h_at, low, rank, apart, SHARES, BP, BR)
                acc += tl.dot(sums.to(more.dtype), more, input_precision="ieee" if F32 else None)
        tl.store(y_at, (before.to(tl.float32) + factor * acc).to(y.dtype.element_ty), mask=live)


@triton.jit
def _columns(b_at, low, rank, live, R: tl.constexpr, BR: tl.constexpr):
    """Numbers low .. low + BR - 1 of rows of B, zero from rank on: [BR, BN].

    Eight of them are loaded or not, and what is too much is cut off then: a mask for each would make each a load of its own.
    """
    r = low + tl.arange(0, BR)
    thin = tl.load(b_at + r[:, None], mask=live & (r // 8 * 8 < rank)[:, None] & (r < R)[:, None], other=0.0)
    return tl.where((r < rank)[:, None], thin, 0.0)


@triton.jit
def _sum_of_shares(at, low, rank, apart, SHARES: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr):
    """A x for ranks low .. low + BR - 1, at [BM, 1, 1]: [BM, BR].

    One tile, so that all loads are on their way at once: of a loop, unrolled or not, Triton 3.6 takes each share through shared
    memory by itself. The shares are in its middle: the first dimension goes to warps, and so every sum is one thread's.
    """
    p, r = tl.arange(0, BP)[None, :, None], low + tl.arange(0, BR)[None, None, :]
    return tl.sum(tl.load(at + p * apart + r, mask=(p < SHARES) & (r < rank), other=0.0), 1)
