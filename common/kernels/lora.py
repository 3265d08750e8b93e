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
3584 eight adapters are a 14th of it. Not timed yet: ch07_sglang_radix/benchmarks/bench_lora.py --device cuda.

No atomics: every number of h and y is written by one program, sums run in a fixed order in float32.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from common.kernels.launch import launch, let_next_start, num_processors, wait_for_previous

FEW, MANY = 16, 64  # rows a block; a tensor core takes 16 at least
LONG = 512  # rows of a step that has blocks of MANY
TILE_R, TILE_IN, TILE_OUT = 64, 128, 64
LEAST_SHARE = 512  # of `in`, a program


def rows_per_block(tokens: int) -> int:
    return FEW if tokens < LONG else MANY


def most_blocks(tokens: int, slots: int) -> int:
    """More cannot be: every adapter that is there begins one, the rows left over fill whole ones."""
    block, present = rows_per_block(tokens), min(tokens, slots)
    return present + (tokens - present) // block


def adapter_blocks(slots: np.ndarray, room: int | None = None) -> np.ndarray:
    """slots [T], 0 for none -> of each block its slot, then the rows of all blocks, T where a block has no more: [n + n * block].

    room: n; blocks beyond those that there are have slot 0. By default there are no others.
    """
    tokens, block = len(slots), rows_per_block(len(slots))
    order = np.argsort(slots, kind="stable")[np.count_nonzero(slots == 0) :]
    present, counts = np.unique(slots[order], return_counts=True)
    blocks = -(-counts // block)
    n = int(blocks.sum()) if room is None else room
    owner, rows = np.zeros(n, dtype=np.int64), np.full(n * block, tokens)
    owner[: blocks.sum()] = np.repeat(present, blocks)
    shift = (blocks.cumsum() - blocks) * block - (
        counts.cumsum() - counts
    )  # of each adapter's rows, for those padded before
    rows[np.arange(len(order)) + np.repeat(shift, counts)] = order
    return np.concatenate((owner, rows))


def shrink(
    x: torch.Tensor, a: torch.Tensor, starts: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """x [T, in], a [slots, ranks, in], starts [slots, parts + 1], slots [n] and rows [n, block] of blocks -> h, parts of the sum
    A x: [shares, n * block, ranks] float32. Rows of a that an adapter does not have are not written."""
    (n, block), (_, ranks, width) = rows.shape, a.shape
    tile_r = min(max(triton.next_power_of_2(ranks), 16), TILE_R)
    tiles = triton.cdiv(ranks, tile_r)
    wanted = triton.cdiv(2 * num_processors(x.device), max(n * tiles, 1))  # two programs a processor
    share = triton.cdiv(triton.cdiv(width, max(min(wanted, width // LEAST_SHARE), 1)), TILE_IN) * TILE_IN
    shares = triton.cdiv(width, share)
    h = torch.empty(shares, n * block, ranks, dtype=torch.float32, device=x.device)
    launch(
        _shrink, (n, tiles, shares), x, a, h, slots, rows, starts, len(x), x.stride(0), n, width, share, RANKS=ranks,
        PARTS=starts.shape[1] - 1, BM=block, BR=tile_r, BK=TILE_IN * 2 // x.element_size(), F32=x.dtype == torch.float32,
    )  # fmt: skip
    return h


def expand(
    y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, starts: torch.Tensor, scales: torch.Tensor, sizes: tuple[int, ...],
    slots: torch.Tensor, rows: torch.Tensor,
) -> None:  # fmt: skip
    """y [T, out] += s B h; h as `shrink` gives it, b [slots, out, r_max], scales [slots, parts], sizes: columns of each part."""
    (n, block), max_rank = rows.shape, b.shape[2]
    three = (*sizes, 0, 0)[:3]
    launch(
        _expand, (n, sum(triton.cdiv(size, TILE_OUT) for size in sizes)), h, b, y, slots, rows, starts, scales, len(y),
        y.stride(0), len(h), SIZE0=three[0], SIZE1=three[1], SIZE2=three[2], RANKS=h.shape[2], R=max_rank, PARTS=len(sizes),
        BM=block, BN=TILE_OUT, BR=min(max(triton.next_power_of_2(max_rank), 16), TILE_R), F32=y.dtype == torch.float32,
    )  # fmt: skip


@triton.jit(do_not_specialize=("tokens", "blocks"))
def _shrink(
    x, a, h, slots, rows, starts, tokens, x_stride, blocks, width, share, RANKS: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, F32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    block, p = tl.program_id(0), tl.program_id(2)
    m, r, k = block * BM + tl.arange(0, BM), tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BK)
    wait_for_previous(PDL)  # slots are written between steps, so nothing is read before
    slot = tl.load(slots + block) - 1
    if slot >= 0:
        total = tl.load(starts + slot * (PARTS + 1) + PARTS)  # rows of A that this adapter has
        if tl.program_id(1) * BR < total:
            row = tl.load(rows + m)
            x_at = x + row[:, None] * x_stride + k[None, :]
            a_at = a + (slot * RANKS + r[None, :]) * width + k[:, None]
            acc = tl.zeros([BM, BR], tl.float32)
            for first in range(p * share, tl.minimum((p + 1) * share, width), BK):
                inside = first + k < width  # a share is whole tiles
                xs = tl.load(x_at + first, mask=(row < tokens)[:, None] & inside[None, :], other=0.0)  # [BM, BK]
                thin = tl.load(a_at + first, mask=(r < total)[None, :] & inside[:, None], other=0.0)  # [BK, BR]
                acc += tl.dot(xs, thin, input_precision="ieee" if F32 else None)
            at = h + (p * blocks * BM + m[:, None]) * RANKS + r[None, :]
            tl.store(at, acc, mask=(r < RANKS)[None, :])


@triton.jit(do_not_specialize=("tokens", "shares"))
def _expand(
    h, b, y, slots, rows, starts, scales, tokens, y_stride, shares, SIZE0: tl.constexpr, SIZE1: tl.constexpr, SIZE2: tl.constexpr,
    RANKS: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    F32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    block, tile = tl.program_id(0), tl.program_id(1)
    # which part of the layer: tiles of the first, then of the second, then of the third
    second, third = tl.cdiv(SIZE0, BN), tl.cdiv(SIZE0, BN) + tl.cdiv(SIZE1, BN)
    part = (tile >= second).to(tl.int32) + (tile >= third).to(tl.int32)
    first = tl.where(part == 2, SIZE0 + SIZE1, tl.where(part == 1, SIZE0, 0))
    size = tl.where(part == 2, SIZE2, tl.where(part == 1, SIZE1, SIZE0))
    tile -= tl.where(part == 2, third, tl.where(part == 1, second, 0))
    m, n = block * BM + tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    wait_for_previous(PDL)
    slot = tl.load(slots + block) - 1
    if slot >= 0:
        start = tl.load(starts + slot * (PARTS + 1) + part)
        rank = tl.load(starts + slot * (PARTS + 1) + part + 1) - start
        if rank > 0:
            row = tl.load(rows + m)
            all_rows = tl.num_programs(0) * BM
            acc = tl.zeros([BM, BN], tl.float32)
            for low in range(0, rank, BR):
                r = low + tl.arange(0, BR)
                inner = tl.zeros([BM, BR], tl.float32)
                for p in range(shares):
                    at = h + (p * all_rows + m[:, None]) * RANKS + start + r[None, :]
                    inner += tl.load(at, mask=(r < rank)[None, :], other=0.0)
                wide = (slot * (SIZE0 + SIZE1 + SIZE2) + first + n[None, :]) * R + r[:, None]
                thin = tl.load(b + wide, mask=(r < rank)[:, None] & (n < size)[None, :], other=0.0)  # [BR, BN]
                acc += tl.dot(inner.to(thin.dtype), thin, input_precision="ieee" if F32 else None)
            live = (row < tokens)[:, None] & (n < size)[None, :]
            y_at = y + row[:, None] * y_stride + first + n[None, :]
            before = tl.load(y_at, mask=live, other=0.0).to(tl.float32)
            factor = tl.load(scales + slot * PARTS + part)
            tl.store(y_at, (before + factor * acc).to(y.dtype.element_ty), mask=live)
