"""y = x W^T where W is codes and scales: read as they are, widened on the way to the tensor cores; x keeps its dtype.

Decode is bytes: W is read once for up to ROWS rows of x, and a weight is 1 byte or half a byte instead of 2. The rest
follows `few_rows` of linear.py: W is the left factor (its rows fill the wide side of a tensor core's tile), and where W has few
rows it is cut along `in` too; the last program of a tile to end adds up the parts.

    for each turn of columns that shares a scale:    acc += scale * ((q - zero) x)

q - zero is an integer of at most 9 bits, or a float8: exact in bfloat16 and float16, so no weight is rounded, and the sums are
float32. Widening 4 bits is a matter of bits: 0x4300 | q is the bfloat16 128 + q, 0x6400 | q the float16 1024 + q, two of them in
one instruction. 128 and the zero point are subtracted again; where each group has a zero of its own, after the product, times the
sum of x, which the tensor cores find with a matrix of ones.

Bytes: out * in * bits / 8, the scales and zeros (quantized_layout.py), and x once for each BN rows of W, from cache. More than
`MANY` rows of x are multiplied by the library, and W is dequantised before, which reads it once more and writes it as numbers.
One row has a kernel of its own, without tensor cores: quantized_row.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from common.kernels import quantized_row
from common.kernels.launch import (
    INTERPRETED,
    cdiv,
    counters,
    launch,
    let_next_start,
    next_power_of_2,
    num_processors,
    wait_for_previous,
)
from common.kernels.quantized_layout import ROWS, PackedCodes

MANY = 128  # rows of x, from which on the library multiplies by dequantised weights
PART_BYTES = 12 << 20  # of parts of y, at most
NO_PART = 1 << 16  # tiles that `counters` has room for


@dataclass(frozen=True)
class Tiling:
    """rows: of x a program; out: rows of W a program; parts: programs that share a row of W; stages: turns on their way."""

    rows: int
    out: int
    parts: int
    warps: int
    stages: int


def tiling(rows: int, packed: PackedCodes, processors: int) -> Tiling:
    """Measured on an H100 (bench_quantized.py --part tune): small programs, many at a time, with few turns on their way each."""
    block_m = min(max(next_power_of_2(rows), 16), ROWS)
    tiles = cdiv(packed.out, ROWS) * cdiv(rows, block_m)
    parts = parts_of(tiles, cdiv(packed.width, packed.turn), rows * packed.out, processors)
    return Tiling(block_m, ROWS, parts, 4, 3)


def parts_of(tiles: int, turns: int, numbers: int, processors: int) -> int:
    """How many programs share each of `tiles` of y, which has `numbers`: until eight a processor have work, of four turns at least.
    A part writes 4 bytes a number and reads them, into and from the L2 cache."""
    return max(min(cdiv(8 * processors, tiles), turns // 4, PART_BYTES // (8 * numbers), 8), 1)


def linear(
    x: torch.Tensor, packed: PackedCodes, bias: torch.Tensor | None = None, plan: Tiling | None = None
) -> torch.Tensor:
    """x [T, in] -> x W^T (+ bias) [T, out], of x's dtype; in a CUDA graph too."""
    x = packed.ordered(x)
    if plan is None and quantized_row.takes(x, packed):
        return quantized_row.one_row(x, packed, bias)
    if len(x) > MANY and plan is None:
        return F.linear(x, dequantise(packed, x.dtype), bias)
    return few_rows(x, packed, bias, plan)


def few_rows(
    x: torch.Tensor, packed: PackedCodes, bias: torch.Tensor | None = None, plan: Tiling | None = None
) -> torch.Tensor:
    """x [T, width], its columns in the order of the codes."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, out = len(x), packed.out
    plan = plan or tiling(rows, packed, num_processors(x.device))
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    grid = cdiv(out, plan.out), cdiv(rows, plan.rows)
    turns = cdiv(packed.width, packed.turn)
    share = cdiv(turns, plan.parts if grid[0] * grid[1] <= NO_PART else 1)  # turns of a program
    parts = cdiv(turns, share)
    part = torch.empty(parts, rows, out, dtype=torch.float32, device=x.device) if parts > 1 else y
    launch(
        _few_rows, (*grid, parts), x, packed.q, packed.scale, packed.scale if packed.zero is None else packed.zero,
        x if bias is None else bias, y, part, counters(x.device), rows, out, packed.width, x.stride(0), share,
        cdiv(out, packed.share), *_strides(packed), BM=plan.rows, BN=plan.out, TURN=packed.turn, GROUP=packed.group,
        SHARE=packed.share, BITS=packed.bits, OFFSET=packed.offset, ZERO=packed.zero is not None, E2M1=packed.e2m1,
        CUT=parts > 1, BIAS=bias is not None, INTERPRETED=INTERPRETED, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return y


def dequantise(packed: PackedCodes, dtype: torch.dtype) -> torch.Tensor:
    """-> W [out, width], its columns in the order of the codes; float32 arithmetic, rounded to dtype once."""
    turns = cdiv(packed.width, packed.turn)
    w = torch.empty(packed.out, packed.width, dtype=dtype, device=packed.q.device)
    launch(
        _dequantise, (cdiv(packed.out, ROWS), turns), packed.q, packed.scale,
        packed.scale if packed.zero is None else packed.zero, w, packed.out, packed.width,
        cdiv(packed.out, packed.share), *_strides(packed), BN=ROWS, TURN=packed.turn, GROUP=packed.group,
        SHARE=packed.share, BITS=packed.bits, OFFSET=packed.offset, ZERO=packed.zero is not None, E2M1=packed.e2m1,
    )  # fmt: skip
    return w


def _strides(packed: PackedCodes) -> tuple[int, int, int]:
    """Of a tile of rows, a row in it, a turn."""
    if packed.bits == 4:
        return packed.q.stride(0), packed.turn // 2, packed.q.stride(1)
    return ROWS * packed.width, packed.width, packed.turn


@triton.jit
def _number(code, E2M1: tl.constexpr):
    """What a code counts as, before its zero point: itself, or twice the E2M1 number."""
    if E2M1:
        bits = code.to(tl.uint32)
        magnitude = ((0xC8643210 >> ((bits & 7) * 4)) & 15).to(tl.int32)
        number = tl.where((bits & 8) != 0, -magnitude, magnitude)
    else:
        number = code
    return number


@triton.jit
def _widened(
    code, zero, OFFSET: tl.constexpr, ZERO: tl.constexpr, BITS: tl.constexpr, E2M1: tl.constexpr, dtype: tl.constexpr
):
    """code [BN, n], zero [BN, 1] -> code - zero as a float of dtype."""
    value = (_number(code, E2M1) if BITS == 4 else code).to(dtype)
    if ZERO:
        value = value - zero.to(dtype)
    elif OFFSET != 0:
        value = value - tl.full([1, 1], OFFSET, tl.float32).to(dtype)
    return value


# four bytes in a register -> the low (or, shifted, the high) half q of each below the bits of 128.0 or 1024.0
LOW_BF16 = tl.constexpr(
    "{ .reg .b32 t; and.b32 t, $2, 0x0F0F0F0F; prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342; }"
)
LOW_F16 = tl.constexpr(
    "{ .reg .b32 t; and.b32 t, $2, 0x0F0F0F0F; prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342; }"
)
HIGH_BF16 = tl.constexpr(
    "{ .reg .b32 t; shr.u32 t, $2, 4; and.b32 t, t, 0x0F0F0F0F; prmt.b32 $0, t, 0x43434343, 0x4140; "
    "prmt.b32 $1, t, 0x43434343, 0x4342; }"
)
HIGH_F16 = tl.constexpr(
    "{ .reg .b32 t; shr.u32 t, $2, 4; and.b32 t, t, 0x0F0F0F0F; prmt.b32 $0, t, 0x64646464, 0x4140; "
    "prmt.b32 $1, t, 0x64646464, 0x4342; }"
)


@triton.jit
def _above(code, HIGH: tl.constexpr, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """code [BN, n], two a byte -> 128 + q as bfloat16, or 1024 + q as float16."""
    if INTERPRETED:
        q = (code >> 4) if HIGH else (code & 15)
        ones: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        value = (q.to(tl.int16) | ones).to(dtype, bitcast=True)
    elif dtype == tl.bfloat16:
        value = tl.inline_asm_elementwise(
            HIGH_BF16 if HIGH else LOW_BF16, "=r,=r,r", [code], tl.bfloat16, is_pure=True, pack=4
        )
    else:
        value = tl.inline_asm_elementwise(
            HIGH_F16 if HIGH else LOW_F16, "=r,=r,r", [code], tl.float16, is_pure=True, pack=4
        )
    return value


@triton.jit(do_not_specialize=("rows", "share"))
def _few_rows(
    x, q, scale, zero, bias, y, part, arrived, rows, out, width, x_stride, share, scale_stride, tile_stride, row_stride,
    turn_stride, BM: tl.constexpr, BN: tl.constexpr, TURN: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    BITS: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, E2M1: tl.constexpr, CUT: tl.constexpr, BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    HALF: tl.constexpr = TURN * BITS // 8  # columns of a run of bytes: a turn, or the first half of one
    dtype: tl.constexpr = x.dtype.element_ty
    BY_BITS: tl.constexpr = BITS == 4 and not E2M1 and dtype != tl.float32
    ABOVE: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    p, parts = tl.program_id(2), tl.num_programs(2)
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, HALF)
    turns = tl.cdiv(width, TURN)
    first, last = p * share, tl.minimum((p + 1) * share, turns)
    row = (n // 64).to(tl.int64) * tile_stride + (n % 64) * row_stride
    q_at = q + row[:, None] + k[None, :]
    x_at = x + m[None, :] * x_stride + k[:, None]
    scale_at, zero_at, live_n = scale + n // SHARE, zero + n, n < out
    g = (first * TURN // GROUP).to(tl.int64) if GROUP else first.to(tl.int64) * 0
    s = tl.load(scale_at + g * scale_stride, mask=live_n, other=0.0)
    z = tl.load(zero_at + g * scale_stride, mask=live_n, other=0) if ZERO else tl.zeros([BN], tl.int8)
    wait_for_previous(PDL)
    ones = tl.full([BN, HALF], 1.0, dtype)
    above = tl.full([1, 1], ABOVE + OFFSET, tl.float32).to(dtype)
    acc = tl.zeros([BN, BM], tl.float32)
    for turn in range(first, last):
        column = turn * TURN
        if BITS == 4:
            code = tl.load(q_at + turn * turn_stride)  # [BN, TURN/2]: a tile has no end
            low = tl.load(x_at + column, mask=(m < rows)[None, :] & (column + k < width)[:, None], other=0.0)
            high = tl.load(
                x_at + column + HALF, mask=(m < rows)[None, :] & (column + HALF + k < width)[:, None], other=0.0
            )
        else:
            code = tl.load(q_at + column, mask=live_n[:, None] & (column + k < width)[None, :], other=0.0)
            low = tl.load(x_at + column, mask=(m < rows)[None, :] & (column + k < width)[:, None], other=0.0)
        if GROUP:  # of the next turn, on their way while this one is multiplied
            g = (tl.minimum(turn + 1, turns - 1) * TURN // GROUP).to(tl.int64)
            coming = tl.load(scale_at + g * scale_stride, mask=live_n, other=0.0)
            coming_zero = tl.load(zero_at + g * scale_stride, mask=live_n, other=0) if ZERO else z
        if BY_BITS and ZERO:  # (ABOVE + q) x, less (ABOVE + zero) times the sum of x, which is one more product
            part_sum = tl.dot(_above(code, False, dtype, INTERPRETED), low)
            part_sum = tl.dot(_above(code, True, dtype, INTERPRETED), high, part_sum)
            sum_x = tl.dot(ones, high, tl.dot(ones, low))
            part_sum -= (z.to(tl.float32) + ABOVE)[:, None] * sum_x
        elif BY_BITS:
            part_sum = tl.dot(_above(code, False, dtype, INTERPRETED) - above, low)
            part_sum = tl.dot(_above(code, True, dtype, INTERPRETED) - above, high, part_sum)
        elif BITS == 4:
            low_w = _widened(code & 15, z[:, None], OFFSET, ZERO, BITS, E2M1, dtype)
            high_w = _widened(code >> 4, z[:, None], OFFSET, ZERO, BITS, E2M1, dtype)
            part_sum = tl.dot(high_w, high, tl.dot(low_w, low, input_precision="ieee"), input_precision="ieee")
        else:
            part_sum = tl.dot(_widened(code, z[:, None], OFFSET, ZERO, BITS, E2M1, dtype), low, input_precision="ieee")
        if GROUP:
            acc += s.to(tl.float32)[:, None] * part_sum
            s, z = coming, coming_zero
        else:
            acc += part_sum
    if not GROUP:
        acc *= s.to(tl.float32)[:, None]
    live = live_n[:, None] & (m < rows)[None, :]
    at = m[None, :].to(tl.int64) * out + n[:, None]
    ends = True
    if CUT:
        tl.store(part + p * rows * out + at, acc, mask=live)
        tl.debug_barrier()  # all threads have stored before one says so
        counter = arrived + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        ends = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
        if ends:
            tl.store(counter, 0)
            acc = tl.zeros([BN, BM], tl.float32)
            for other in range(parts):
                acc += tl.load(part + other * rows * out + at, mask=live, other=0.0, cache_modifier=".cg")
    if ends:
        if BIAS:
            acc += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)[:, None]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=live)


@triton.jit
def _dequantise(
    q, scale, zero, w, out, width, scale_stride, tile_stride, row_stride, turn_stride, BN: tl.constexpr, TURN: tl.constexpr,
    GROUP: tl.constexpr, SHARE: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, E2M1: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    HALF: tl.constexpr = TURN * BITS // 8
    n, turn, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1), tl.arange(0, HALF)
    column, live_n = turn * TURN, n < out
    g = column // GROUP if GROUP else 0
    s = tl.load(scale + g * scale_stride + n // SHARE, mask=live_n, other=0.0).to(tl.float32)[:, None]
    z = tl.load(zero + g * scale_stride + n, mask=live_n, other=0)[:, None] if ZERO else tl.zeros([BN, 1], tl.int8)
    row = (n // 64).to(tl.int64) * tile_stride + (n % 64) * row_stride
    at = w + n.to(tl.int64)[:, None] * width + (column + k)[None, :]
    live = live_n[:, None] & (column + k < width)[None, :]
    wait_for_previous(PDL)  # w may be memory that is still read
    if BITS == 4:
        code = tl.load(q + row[:, None] + turn * turn_stride + k[None, :])
        low = _widened(code & 15, z, OFFSET, ZERO, BITS, E2M1, tl.float32) * s
        high = _widened(code >> 4, z, OFFSET, ZERO, BITS, E2M1, tl.float32) * s
        tl.store(at, low.to(w.dtype.element_ty), mask=live)
        live = live_n[:, None] & (column + HALF + k < width)[None, :]
        tl.store(at + HALF, high.to(w.dtype.element_ty), mask=live)
    else:
        code = tl.load(q + row[:, None] + column + k[None, :], mask=live, other=0.0)
        tl.store(at, (_widened(code, z, OFFSET, ZERO, BITS, E2M1, tl.float32) * s).to(w.dtype.element_ty), mask=live)
