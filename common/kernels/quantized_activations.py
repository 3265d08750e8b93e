"""y = x W^T where x is rounded too: FP8 times FP8 or INT8 times INT8, which tensor cores do at twice the speed of 16 bits.

    round_rows    x -> codes, and a scale for each row or for each 128 columns of a row; or by a scale that is given. A norm and
                  a gate do so with the rows that they make (rounded_rows.py)
    few_rows      up to 64 rows of x a program: bytes are the cost, as in linear.py
    many_rows     128 x 128 numbers of y a program: products are the cost

    y[t, o] = sum over groups g of    x_scale[t, g] * w_scale[o, g] * (sum of x[t, i] w[o, i] over the columns i of g)

One group is a scale for a row of x and one for a row of W; they are then multiplied once, at the end. With groups of 128 columns
(DeepSeek-V3's blocks of 128 x 128) each group's products are summed apart and scaled, in float32. That is also more exact:
Hopper's FP8 tensor cores keep some 14 bits of a running sum (DeepSeek-V3, section 3.3.2).

Bytes: out * in and its scales, x once in 16 bits and written and read in 8 bits. For a few rows that is faster than x as it is
(quantized_linear.py), rounding included: widening each byte of W costs more than a launch. One row of 16-bit floats stays as it is:
quantized_row.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

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
from common.kernels.quantized_linear import parts_of

GROUP = 128  # columns that share a scale, if not all
CHUNK = 4096  # columns that `round_rows` looks at in one go
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
TILE, FEW = 64, 128  # rows of x a program, and rows up to which W's bytes are the cost
LEAST, LONG = 2048, 8192  # columns of W: with fewer than LEAST nothing was tuned, more than LONG are long rows
WIDE = 8000  # rows of W
BESIDE = 4096  # bytes of shared memory for other things than turns


def round_rows(
    x: torch.Tensor, dtype: torch.dtype, grouped: bool = False, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in] -> (codes [T, in] of dtype, float8_e4m3fn or int8; scales float32 [T, ceil(in/128)], or [T, 1] if not grouped).

    scale: of all of x, if it is known (static); what it makes larger than the largest code becomes the largest.
    """
    rows, width = x.shape
    groups = cdiv(width, GROUP) if grouped else 1
    q = torch.empty(rows, width, dtype=dtype, device=x.device)
    scales = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    block = GROUP if grouped else min(next_power_of_2(width), CHUNK)
    launch(
        _round_rows, (rows, groups), x, q, scales, width, x.stride(0), 0.0 if scale is None else scale, LARGEST[dtype],
        GROUPED=grouped, STATIC=scale is not None, BLOCK=block, num_warps=1 if grouped else 8,
    )  # fmt: skip
    return q, scales


@triton.jit
def _round_rows(
    x, q, scales, width, x_stride, given, largest, GROUPED: tl.constexpr, STATIC: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    t, g, k = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    first = g * BLOCK if GROUPED else 0
    last = tl.minimum(first + BLOCK, width) if GROUPED else width
    wait_for_previous(PDL)
    if STATIC:
        scale = given + tl.zeros([], tl.float32)
    else:
        largest_here = tl.zeros([BLOCK], tl.float32)
        for start in range(first, last, BLOCK):
            xs = tl.load(x + t * x_stride + start + k, mask=start + k < last, other=0.0).to(tl.float32)
            largest_here = tl.maximum(largest_here, tl.abs(xs))
        top = tl.max(largest_here, 0)
        scale = scale_of(top, largest)
    for start in range(first, last, BLOCK):
        xs = tl.load(x + t * x_stride + start + k, mask=start + k < last, other=0.0).to(tl.float32)
        value = codes_of(xs, scale, largest, q.dtype.element_ty)
        tl.store(q + t * width + start + k, value, mask=start + k < last)
    tl.store(scales + t * tl.num_programs(1) + g, scale)


@triton.jit
def scale_of(top, largest):
    """Of numbers of which the largest is `top`: it becomes the largest code."""
    return tl.where(top > 0, top / largest, 1.0)


@triton.jit
def codes_of(xs, scale, largest, dtype: tl.constexpr):
    """xs, float32 -> the same as codes, float8_e4m3fn or int8."""
    value = tl.minimum(tl.maximum(xs / scale, -largest), largest)
    if dtype == tl.int8:
        value = (value + 12582912.0) - 12582912.0  # 1.5 * 2^23: a float32 of that size is an integer, rounded to even
    return value.to(dtype)


def multiply(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    share: int,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, in], w [out, in], codes of one type; x_scale [T, G], w_scale [G, ceil(out / share)], float32 -> [T, out] of dtype."""
    return (few_rows if len(x) <= FEW else many_rows)(x, x_scale, w, w_scale, share, dtype, bias)


class Plan(NamedTuple):
    """out: rows of W a program; turn: columns between two waits, GROUP where scales are of groups; parts: programs that share a row
    of W; stages: turns on their way."""

    out: int
    turn: int
    parts: int
    warps: int
    stages: int


def plan_of(rows: int, out: int, width: int, grouped: bool, device: torch.device) -> Plan:
    """Close to the fastest that `bench_quantized --part tune-rounded` tried on an H200: Qwen2.5-7B's matrices, 16, 32 and 64 rows.

    gate_up is enough work for the chip without being cut along `in`. q, k, v, o and down are not, and are cut into few parts: their
    sums are written and read, and can be nearly as many bytes as W. With one scale a row they have many turns on their way, in all
    the shared memory that a processor has, so only where each has one program and most have one (down, 64 rows: 34.4 -> 29.8 us).
    Grouped, each number has two sums, and registers are what a tile is small for. What lies between those was not tuned: parts_of.
    """
    block_m, processors = _rows_of_a_program(rows), num_processors(device)
    full, tiles = block_m == TILE, cdiv(out, 64) * cdiv(rows, block_m)
    if tiles >= 2 * processors:
        if grouped:
            return Plan(64, GROUP, 1, 8, 3) if full else Plan(128, GROUP, 1, 4, 3)
        return Plan(128, GROUP, 1, 4, 3) if full else Plan(64, 2 * GROUP, 1, 4, 3)
    if width >= LEAST and out < WIDE and 4 * tiles >= processors:
        if grouped and (full or width <= LONG):
            return Plan(64, GROUP, cdiv(3 * processors, 2 * tiles), 4, 3)
        parts = cdiv(processors, 2 * tiles) if width <= LONG else processors // tiles
        busy = tiles * parts <= processors and (width <= LONG or 4 * tiles * parts >= 3 * processors)
        if not grouped and busy and (64 + block_m) * 2 * GROUP * 6 <= shared_memory(device) - BESIDE:
            return Plan(64, 2 * GROUP, parts, 4, 6)
    block_n, warps, stages = (128, 8, 4) if out >= WIDE and full and not grouped else (64, 4, 3)
    tiles = cdiv(out, block_n) * cdiv(rows, block_m)
    return Plan(block_n, GROUP, parts_of(tiles, cdiv(width, GROUP), rows * out, processors), warps, stages)


def _rows_of_a_program(rows: int) -> int:
    return min(max(next_power_of_2(rows), 16), TILE)


def few_rows(
    x, x_scale, w, w_scale, share: int, dtype: torch.dtype, bias=None, plan: Plan | None = None
) -> torch.Tensor:
    """As multiply; W is the left factor, and cut along `in` if it has few rows."""
    (rows, width), out = x.shape, len(w)
    y = torch.empty(rows, out, dtype=dtype, device=x.device)
    grouped = x_scale.shape[1] > 1 or len(w_scale) > 1
    block_m, plan = _rows_of_a_program(rows), plan or plan_of(rows, out, width, grouped, x.device)
    grid = cdiv(out, plan.out), cdiv(rows, block_m)
    turns = cdiv(width, plan.turn)
    turns_each = cdiv(turns, plan.parts)
    parts = cdiv(turns, turns_each)
    part = torch.empty(parts, rows, out, dtype=torch.float32, device=x.device) if parts > 1 else y
    launch(
        _few_rows, (*grid, parts), x, x_scale, w, w_scale, x if bias is None else bias, y, part, counters(x.device), rows, out,
        width, x_scale.shape[1], w_scale.shape[1], turns_each, BM=block_m, BN=plan.out, BK=plan.turn, SHARE=share,
        GROUPED=grouped, X_GROUPED=x_scale.shape[1] > 1, CUT=parts > 1, BIAS=bias is not None,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=("rows", "turns_each"))
def _few_rows(
    x, x_scale, w, w_scale, bias, y, part, arrived, rows, out, width, x_groups, scale_stride, turns_each, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, SHARE: tl.constexpr, GROUPED: tl.constexpr, X_GROUPED: tl.constexpr, CUT: tl.constexpr,
    BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    sums: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    p, parts = tl.program_id(2), tl.num_programs(2)
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    first, last = p * turns_each, tl.minimum((p + 1) * turns_each, tl.cdiv(width, BK))
    live_n, live_m = n < out, m < rows
    w_at = w + n.to(tl.int64)[:, None] * width + k[None, :]
    x_at = x + m[None, :] * width + k[:, None]
    ws_at, xs_at = w_scale + n // SHARE, x_scale + m * x_groups
    ws = tl.load(ws_at + first * scale_stride if GROUPED else ws_at, mask=live_n, other=0.0)
    wait_for_previous(PDL)
    xs = tl.load(xs_at + first if X_GROUPED else xs_at, mask=live_m, other=0.0)
    acc = tl.zeros([BN, BM], tl.float32 if GROUPED else sums)
    for turn in range(first, last):
        column = turn * BK
        ww = tl.load(w_at + column, mask=live_n[:, None] & (column + k < width)[None, :], other=0.0)
        xx = tl.load(x_at + column, mask=live_m[None, :] & (column + k < width)[:, None], other=0.0)
        if GROUPED:
            following = tl.minimum(turn + 1, last - 1)
            coming_w = tl.load(ws_at + following * scale_stride, mask=live_n, other=0.0)
            coming_x = tl.load(xs_at + following, mask=live_m, other=0.0) if X_GROUPED else xs
            acc += tl.dot(ww, xx, out_dtype=sums).to(tl.float32) * (ws[:, None] * xs[None, :])
            ws, xs = coming_w, coming_x
        else:
            acc = tl.dot(ww, xx, acc, out_dtype=sums)
    result = acc if GROUPED else acc.to(tl.float32) * (ws[:, None] * xs[None, :])
    live = live_n[:, None] & live_m[None, :]
    at = m[None, :].to(tl.int64) * out + n[:, None]
    ends = True
    if CUT:
        tl.store(part + p * rows * out + at, result, mask=live)
        tl.debug_barrier()  # all threads have stored before one says so
        counter = arrived + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        ends = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
        if ends:
            tl.store(counter, 0)
            result = tl.zeros([BN, BM], tl.float32)
            for other in range(parts):
                result += tl.load(part + other * rows * out + at, mask=live, other=0.0, cache_modifier=".cg")
    if ends:
        if BIAS:
            result += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)[:, None]
        tl.store(y + at, result.to(y.dtype.element_ty), mask=live)


def many_rows(x, x_scale, w, w_scale, share: int, dtype: torch.dtype, bias=None) -> torch.Tensor:
    """As multiply; tiles of y that read the same rows of W follow each other, so that W comes from the L2 cache."""
    (rows, width), out = x.shape, len(w)
    y = torch.empty(rows, out, dtype=dtype, device=x.device)
    grouped = x_scale.shape[1] > 1 or len(w_scale) > 1
    block_m, warps, stages = (
        (64, 4, 3) if grouped else (128, 8, 4)
    )  # grouped: two sums of each number, one of them of a group
    launch(
        _many_rows, (cdiv(rows, block_m) * cdiv(out, 128),), x, x_scale, w, w_scale, x if bias is None else bias, y,
        rows, out, width, x_scale.shape[1], w_scale.shape[1], BM=block_m, BN=128, BK=GROUP, SHARE=share, BESIDE=8,
        GROUPED=grouped, X_GROUPED=x_scale.shape[1] > 1, BIAS=bias is not None, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=("rows",))
def _many_rows(
    x, x_scale, w, w_scale, bias, y, rows, out, width, x_groups, scale_stride, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SHARE: tl.constexpr, BESIDE: tl.constexpr, GROUPED: tl.constexpr, X_GROUPED: tl.constexpr,
    BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    sums: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    down, across = tl.cdiv(rows, BM), tl.cdiv(out, BN)
    band = tl.program_id(0) // (BESIDE * across)  # of BESIDE tiles along the rows
    tall = tl.minimum(down - band * BESIDE, BESIDE)
    inside = tl.program_id(0) % (BESIDE * across)
    m = (band * BESIDE + inside % tall) * BM + tl.arange(0, BM)
    n = (inside // tall) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    live_m, live_n = m < rows, n < out
    x_at = x + m.to(tl.int64)[:, None] * width + k[None, :]
    w_at = w + n.to(tl.int64)[None, :] * width + k[:, None]
    ws_at, xs_at = w_scale + n // SHARE, x_scale + m.to(tl.int64) * x_groups
    ws = tl.load(ws_at, mask=live_n, other=0.0)
    wait_for_previous(PDL)
    xs = tl.load(xs_at, mask=live_m, other=0.0)
    turns = tl.cdiv(width, BK)
    acc = tl.zeros([BM, BN], tl.float32 if GROUPED else sums)
    for turn in range(0, turns):
        column = turn * BK
        xx = tl.load(x_at + column, mask=live_m[:, None] & (column + k < width)[None, :], other=0.0)
        ww = tl.load(w_at + column, mask=live_n[None, :] & (column + k < width)[:, None], other=0.0)
        if GROUPED:
            following = tl.minimum(turn + 1, turns - 1)
            coming_w = tl.load(ws_at + following * scale_stride, mask=live_n, other=0.0)
            coming_x = tl.load(xs_at + following, mask=live_m, other=0.0) if X_GROUPED else xs
            acc += tl.dot(xx, ww, out_dtype=sums).to(tl.float32) * (xs[:, None] * ws[None, :])
            ws, xs = coming_w, coming_x
        else:
            acc = tl.dot(xx, ww, acc, out_dtype=sums)
    result = acc if GROUPED else acc.to(tl.float32) * (xs[:, None] * ws[None, :])
    if BIAS:
        result += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * out + n[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=live_m[:, None] & live_n[None, :])
