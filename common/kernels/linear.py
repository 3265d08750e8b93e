"""y = x W^T for few rows: what decode does with every weight matrix of the model.

    one_row    a few rows of W a program, products on the ordinary cores
    few_rows   up to 64 rows of x and 64 or 128 of W a program, on the tensor cores; a W with few rows is cut along
               `in` too, and the last program of a tile to end adds up the parts
    fixed_linear   any rows, never cut along `in`: the bits of a row do not depend on how many there are
               (common/layers/batch_invariant.py)

Whether one of the first two is taken, or the library, is measured (linear_choice.py). Where W is the rows of gate and then those
of up, these two put out silu(gate) * up as well: a launch less, and the 2F numbers of a row are neither written nor read. For
that a program takes the same rows of both, and nothing of what it reads at a time changes.

The rows of x are read from cache, W [out/R, in/R] once from memory: out * in numbers, and two operations a row for
each. Up to some 64 rows memory bandwidth is the whole cost, and a GEMM library tuned for more rows leaves some of
it unused; for a small matrix the cost is the launch, and these kernels start before the previous one has ended.
Weights are never written, so `one_row` has its first tile on the way by then. In `few_rows` that broke the
pipeline of its loop and cost more than it brought, and so did asking the L2 cache for the first tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from common.kernels.fused import silu_times
from common.kernels.launch import (
    cdiv,
    counters,
    launch,
    let_next_start,
    next_power_of_2,
    num_processors,
    shared_memory,
    wait_for_previous,
)

LARGE = 1 << 24  # numbers of W: so many go through the tensor cores even for one row of x
ROWS = 64  # of x a program at most, and of W where W is small
WIDE = 8000  # rows of a W that keeps the whole chip busy without being cut along `in`


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None,
    gated: bool = False,
) -> torch.Tensor:  # fmt: skip
    """x [T, in/R] -> [T, out/R] of `dtype`, x's by default; 16-bit floats, or a single row of any float. Sums are float32.

    gated: W is the rows of gate [F, in], then those of up -> silu(gate) * up [T, F].
    """
    if len(x) == 1 and (weight.numel() <= LARGE or x.dtype == torch.float32):
        return one_row(x, weight, bias, dtype, gated=gated)
    return few_rows(x, weight, bias, dtype, gated)


def one_row(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None,
    second: torch.Tensor | None = None, gated: bool = False,
) -> torch.Tensor:  # fmt: skip
    """x [1, in/R] -> [1, out/R]; second [more, in/R]: another matrix, whose products with x stand behind, without a bias."""
    out, width = weight.shape
    whole = out if second is None else out + len(second)
    y = torch.empty(1, whole // 2 if gated else whole, dtype=dtype or x.dtype, device=x.device)
    block_n, block_k, warps = _blocks(whole, width)
    block_n = max(block_n, 2) if gated else block_n
    launch(
        _one_row, (cdiv(whole, block_n),), x, weight, weight if second is None else second,
        weight if bias is None else bias, y, y.shape[1], out, K=width, BN=block_n, BK=block_k, BIAS=bias is not None,
        TWO=second is not None, GATED=gated, num_warps=warps,
    )  # fmt: skip
    return y


def _blocks(out: int, width: int) -> tuple[int, int, int]:
    """Rows of W a program, columns a turn, warps; measured on an H200, see bench_kernels.py."""
    if width <= 1024:
        return 4, 1024, 2 if out < WIDE else 4
    return (1, 1024, 4) if out <= 1024 else (4, 512, 4)


@triton.jit
def _one_row(
    x, weight, second, bias, y, out, first, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr,
    TWO: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    row = n  # of W, for column n of y
    if GATED:  # two of W for one: gate's and, behind it in the tile, up's
        n = n // 2
        row = n + tl.arange(0, BN) % 2 * out
    rows = weight + row.to(tl.int64) * K
    if TWO:
        rows = tl.where(n < first, rows, second + (n - first).to(tl.int64) * K)
    w_at = rows[:, None] + k[None, :]
    w = tl.load(w_at, mask=(n < out)[:, None] & (k < K)[None, :], other=0.0)
    b = tl.load(bias + row, mask=n < out, other=0.0).to(tl.float32) if BIAS else tl.zeros([BN], tl.float32)
    wait_for_previous(PDL)
    acc = tl.zeros([BN, BK], tl.float32)
    for start in tl.range(0, K, BK, loop_unroll_factor=4):
        following = start + BK + k
        coming = tl.load(w_at + start + BK, mask=(n < out)[:, None] & (following < K)[None, :], other=0.0)
        xs = tl.load(x + start + k, mask=start + k < K, other=0.0)
        acc += xs.to(tl.float32)[None, :] * w.to(tl.float32)
        w = coming
    total = tl.sum(acc, 1) + b
    if GATED:
        gate, up = tl.split(tl.reshape(total, [BN // 2, 2]))
        total, n = silu_times(gate, up), tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    tl.store(y + n, total.to(y.dtype.element_ty), mask=n < out)


def few_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None,
    gated: bool = False,
) -> torch.Tensor:  # fmt: skip
    """x [T, in/R], 16-bit floats -> [T, out/R]."""
    (rows, width), out = x.shape, len(weight)
    y = torch.empty(rows, out // 2 if gated else out, dtype=dtype or x.dtype, device=x.device)
    block_m = min(max(next_power_of_2(rows), 16), ROWS)
    block_n, block_k, warps = (128, 64, 8) if out >= WIDE and block_m == ROWS else (ROWS, 128, 4)
    grid = cdiv(out, block_n), cdiv(rows, block_m)
    tiles, turns, processors = grid[0] * grid[1], cdiv(width, block_k), num_processors(x.device)
    share = cdiv(turns, max(min(processors // tiles, turns // 4, 8), 1))  # turns of a program
    room = shared_memory(x.device) // ((block_m + block_n) * block_k * x.element_size())
    stages = min(6 if tiles <= processors else 3, room)  # a processor runs one program, or several
    parts = cdiv(turns, share)
    part = torch.empty(parts, rows, out, dtype=torch.float32, device=x.device) if parts > 1 else y
    launch(
        _few_rows, (*grid, parts), x, weight, weight if bias is None else bias, y, part, counters(x.device), rows, y.shape[1],
        width, x.stride(0), share, BM=block_m, BN=block_n, BK=block_k, CUT=parts > 1, BIAS=bias is not None, GATED=gated,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


class Tile(NamedTuple):
    """What a program of `fixed_linear` computes: m rows of x by n rows of W, k columns a turn."""

    m: int
    n: int
    k: int
    x_first: bool  # the rows of x are those of the tensor core's first operand, of which it takes at least 16 or 64
    warps: int
    stages: int


ONE_TILE = Tile(64, 64, 64, False, 4, 3)
ONE_TILE_FLOAT32 = Tile(64, 64, 32, False, 4, 3)
TOGETHER = 2048  # rows of x whose tiles are computed side by side, while their tile of W is in the L2 cache


def fixed_tile(rows: int, out: int, processors: int) -> Tile:
    """The fastest of some that were tried on an H100: W of Qwen3-0.6B and Qwen2.5-7B, 1, 16, 64, 256 and 2048 rows of x."""
    if rows <= 16:
        return Tile(16, 16, 128, True, 4, 4) if out <= 2048 else Tile(16, 64, 128, False, 4, 4)
    if rows <= 64:
        return Tile(32 if rows <= 32 else 64, 32, 128, True, 4, 4)
    if cdiv(rows, 64) * cdiv(out, 64) <= 4 * processors:
        return Tile(64, 64, 64, False, 4, 4)
    if cdiv(rows, 128) * cdiv(out, 64) <= 8 * processors:
        return Tile(128, 64, 64, False, 4, 4)
    if 2 * cdiv(rows, 256) * cdiv(out, 128) >= 3 * processors:
        return Tile(256, 128, 64, False, 8, 3)
    return Tile(128, 128, 64, True, 8, 3)


def fixed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, one_tile: bool = False
) -> torch.Tensor:  # fmt: skip
    """x [T, in/R], any float -> [T, out/R].

    An output is one chain of sums over `in`, 16 columns after 16. On a tensor core its bits depend neither on the tile that it
    lies in nor on the instruction (mma or wgmma, on an H100), so T may choose the tile. one_tile: it may not; and it does not
    for float32, whose chain the compiler makes.
    """
    (rows, width), out, f32 = x.shape, len(weight), x.dtype == torch.float32
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    tile = ONE_TILE_FLOAT32 if f32 else ONE_TILE if one_tile else fixed_tile(rows, out, num_processors(x.device))
    launch(
        _fixed_rows, (cdiv(out, tile.n) * cdiv(rows, tile.m),), x, weight, weight if bias is None else bias, y, rows,
        out, width, x.stride(0), BM=tile.m, BN=tile.n, BK=tile.k, X_FIRST=tile.x_first, SIDE=max(TOGETHER // tile.m, 1),
        EVEN=width % tile.k == 0, F32=f32, BIAS=bias is not None, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=("rows",))
def _fixed_rows(
    x, weight, bias, y, rows, out, width, x_stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    X_FIRST: tl.constexpr, SIDE: tl.constexpr, EVEN: tl.constexpr, F32: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    program, down, across = tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(out, BN)
    above = program // (SIDE * across) * SIDE  # SIDE tiles of x, with the first tile of W, then with the second, ...
    side, inside = tl.minimum(down - above, SIDE), program % (SIDE * across)
    n, m = inside // side * BN + tl.arange(0, BN), (above + inside % side) * BM + tl.arange(0, BM)
    k, wide = tl.arange(0, BK), m.to(tl.int64)
    if X_FIRST:
        acc = tl.zeros([BM, BN], tl.float32)
        x_at, x_live = x + wide[:, None] * x_stride + k[None, :], (m < rows)[:, None]
        w_at, w_live = weight + n.to(tl.int64)[None, :] * width + k[:, None], (n < out)[None, :]
        y_at, live = y + wide[:, None] * out + n[None, :], (m < rows)[:, None] & (n < out)[None, :]
    else:
        acc = tl.zeros([BN, BM], tl.float32)
        x_at, x_live = x + wide[None, :] * x_stride + k[:, None], (m < rows)[None, :]
        w_at, w_live = weight + n.to(tl.int64)[:, None] * width + k[None, :], (n < out)[:, None]
        y_at, live = y + wide[None, :] * out + n[:, None], (m < rows)[None, :] & (n < out)[:, None]
    wait_for_previous(PDL)
    for first in range(0, width, BK):
        in_x, in_w = x_live, w_live
        if not EVEN:
            along = first + k < width
            in_x = x_live & (along[None, :] if X_FIRST else along[:, None])
            in_w = w_live & (along[:, None] if X_FIRST else along[None, :])
        xs, w = tl.load(x_at + first, mask=in_x, other=0.0), tl.load(w_at + first, mask=in_w, other=0.0)
        if X_FIRST:
            acc = tl.dot(xs, w, acc, input_precision="ieee" if F32 else "tf32")
        else:
            acc = tl.dot(w, xs, acc, input_precision="ieee" if F32 else "tf32")
    if BIAS:
        b = tl.load(bias + n, mask=n < out, other=0.0).to(tl.float32)
        acc += b[None, :] if X_FIRST else b[:, None]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=("rows", "share"))
def _few_rows(
    x, weight, bias, y, part, arrived, rows, out, width, x_stride, share, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, CUT: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    p, parts = tl.program_id(2), tl.num_programs(2)
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    start, stop = p * share * BK, tl.minimum((p + 1) * share * BK, width)
    row, whole = n, out  # of W, for column n of y; how many W has
    if GATED:  # in turn eight of gate and of up: a thread then has both of a column
        i, whole = tl.arange(0, BN), 2 * out
        n = tl.program_id(0) * (BN // 2) + i // 16 * 8 + i % 8
        row = n + i // 8 % 2 * out
    w_at = weight + row.to(tl.int64)[:, None] * width + k[None, :]
    x_at = x + m[None, :] * x_stride + k[:, None]
    wait_for_previous(PDL)
    acc = tl.zeros([BN, BM], tl.float32)
    for first in range(start, stop, BK):
        w = tl.load(w_at + first, mask=(n < out)[:, None] & (first + k < stop)[None, :], other=0.0)  # [BN, BK]
        xs = tl.load(x_at + first, mask=(m < rows)[None, :] & (first + k < stop)[:, None], other=0.0)  # [BK, BM]
        acc += tl.dot(w, xs)
    live = (n < out)[:, None] & (m < rows)[None, :]
    last = True
    if CUT:
        at = m[None, :] * whole + row[:, None]
        tl.store(part + p * rows * whole + at, acc, mask=live)
        tl.debug_barrier()  # all threads have stored before one says so
        counter = arrived + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
        if last:
            tl.store(counter, 0)
            acc = tl.zeros([BN, BM], tl.float32)
            for other in range(parts):
                acc += tl.load(part + other * rows * whole + at, mask=live, other=0.0, cache_modifier=".cg")
    if last:
        if BIAS:
            acc += tl.load(bias + row, mask=n < out, other=0.0).to(tl.float32)[:, None]
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(acc, [BN // 16, 2, 8, BM]), 0, 2, 3, 1))
            one = tl.reshape(silu_times(gate, up), [BN // 2, BM])
            column = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
            y_at, there = y + m[None, :] * out + column[:, None], (column < out)[:, None] & (m < rows)[None, :]
            tl.store(y_at, one.to(y.dtype.element_ty), mask=there)
        else:
            tl.store(y + m[None, :] * out + n[:, None], acc.to(y.dtype.element_ty), mask=live)
