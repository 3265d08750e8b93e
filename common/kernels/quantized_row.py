"""y = x W^T for one row of x and W in codes: products on the ordinary cores, for decode of one request.

On tensor cores (quantized_linear.py) a row of x costs as much as 16 do, and each code passes through shared memory on its way to
them. Here a thread takes some bytes of W straight into its registers and multiplies there:

    4 bits, INT8    x as 16-bit integers, which an instruction multiplies by two codes at once: IDP.2A, exact in 32 bits
    FP8             widened as the hardware converts it, times x as float32

The x of a block, the 8 numbers that meet an int32 of 4-bit codes (4 for INT8), become multiples of a power of two, the least of
which 2^15 exceed the largest of them. So each is off by 1/32768 of the largest of its block at most, and by nothing unless it is
128 times smaller (bfloat16; float16: 16 times). bfloat16 itself has rounded each number, the largest too, by up to 1/512, float16
by 1/4096. An infinite number or NaN makes the power infinite, and y not finite. It is 2^-127 at least: a bfloat16 below 2^-112
loses digits.

Zero points come off after a thread's sum, times the sum of the same integers. A program has R x N rows of W and T turns at a time.
What the next T need, x and scales included, is on its way while these are multiplied. Sums over blocks are float32.

Bytes: out * in * bits / 8, the scales and zeros (quantized_layout.py); x from cache, once a program. A weight takes 2.1
instructions of the loop in 4 bits where a program has 8 rows, 2.8 with 4, 3.0 with zeros; 2.8 in INT8, 3.6 to 4.2 in FP8 (sm_90a,
NOTES.md). The twin in plain PyTorch is `multiply_plain` (quantized_layout.py).
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from common.kernels.fused import silu_times
from common.kernels.launch import INTERPRETED, cdiv, launch, let_next_start, wait_for_previous
from common.kernels.quantized_layout import ROWS, TURN, PackedCodes

WIDE = 8000  # rows of a W that keeps the whole chip busy with few turns at a time
TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Work(NamedTuple):
    """deep x beside: rows of W of a program, `beside` of which its threads read at once; turns at once, of 128 columns each;
    warps. A thread reads turns * beside * bits / (2 * warps) bytes of W at once, `deep` times."""

    deep: int
    turns: int
    beside: int
    warps: int


def takes(x: torch.Tensor, packed: PackedCodes) -> bool:
    """x [T, width]: one row of 16-bit floats, and codes that can be read four numbers at a time?"""
    return len(x) == 1 and x.dtype in TRITON and packed.width % 4 == 0 and not packed.e2m1


def work(packed: PackedCodes) -> Work:
    """Among the fastest that `bench_quantized --part tune` tried for Qwen2.5-7B's matrices on an H200."""
    if packed.bits == 4:
        wide, few = Work(8 if packed.zero is None else 4, 4, 4, 2), Work(4, 32, 1, 4)
    else:
        wide, few = Work(2, 4, 4, 4) if packed.q.dtype == torch.float8_e4m3fn else Work(4, 4, 2, 2), Work(2, 16, 2, 4)
    plan = wide if packed.out >= WIDE else few
    while plan.warps > 1 and plan.turns // 2 * TURN >= packed.width:  # half the warps would have nothing
        plan = plan._replace(turns=plan.turns // 2, warps=plan.warps // 2)
    return plan


def one_row(
    x: torch.Tensor,
    packed: PackedCodes,
    bias: torch.Tensor | None = None,
    plan: Work | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """x [1, width], its columns in the order of the codes -> x W^T (+ bias) [1, out], of x's dtype.

    gated: W is the rows of gate [F, width], then those of up -> silu(gate) * up [1, F]. A thread has both: `deep` is even.
    """
    x, out = x.contiguous(), packed.out
    if x.storage_offset() % 4:  # four numbers are read at a time
        x = x.clone()
    y = torch.empty(1, out // 2 if gated else out, dtype=x.dtype, device=x.device)
    plan = plan or work(packed)
    launch(
        _one_row, (cdiv(out, plan.deep * plan.beside),), x.view(torch.int64), packed.q.view(torch.int32), packed.scale,
        packed.scale if packed.zero is None else packed.zero, x if bias is None else bias, y, y.shape[1], packed.width,
        cdiv(out, packed.share), *_strides(packed), DTYPE=TRITON[x.dtype], R=plan.deep,
        T=plan.turns * TURN // packed.turn, N=plan.beside, TURN=packed.turn, GROUP=packed.group, SHARE=packed.share,
        BITS=packed.bits, FP8=packed.q.dtype == torch.float8_e4m3fn, OFFSET=packed.offset, ZERO=packed.zero is not None,
        BIAS=bias is not None, GATED=gated, WHOLE=packed.width % packed.turn == 0,
        NEAR=near(plan, packed, gated), SIDE=side_by_side(plan, packed.bits, packed.turn), INTERPRETED=INTERPRETED,
        num_warps=plan.warps,
    )  # fmt: skip
    return y


def side_by_side(plan: Work, bits: int, turn: int) -> int:
    """int32 of a row's turn that a thread has: 16 bytes at most, and no more than its share."""
    return max(1, min(4, plan.turns * TURN * plan.beside * bits // (1024 * plan.warps), turn * bits // 32))


def near(plan: Work, packed: PackedCodes, gated: bool) -> bool:
    """Are the rows of each program whole, in one tile, and share a scale all or none?"""
    rows = plan.deep * plan.beside // (2 if gated else 1)
    whole = packed.out % (2 * ROWS if gated else rows) == 0
    return whole and ROWS % rows == 0 and packed.share % rows in (0, 1)


def _strides(packed: PackedCodes) -> tuple[int, int, int]:
    """int32 from a tile of rows to the next, from a row in it, from a turn."""
    if packed.bits == 4:
        return packed.q.stride(0) // 4, packed.turn // 8, packed.q.stride(1) // 4
    return ROWS * packed.width // 4, packed.width // 4, packed.turn // 4


# eight codes of 4 bits, eight int16, two in a register -> the sum of their products
DOT_4 = tl.constexpr(
    "{ .reg .b32 l, h; .reg .s32 d; and.b32 l, $1, 0x0F0F0F0F; shr.u32 h, $1, 4; and.b32 h, h, 0x0F0F0F0F; "
    "dp2a.lo.s32.u32 d, $3, l, $2; dp2a.hi.s32.u32 d, $4, l, d; "
    "dp2a.lo.s32.u32 d, $5, h, d; dp2a.hi.s32.u32 $0, $6, h, d; }"
)
# four int8, four int16, two in a register -> the sum of their products
DOT_8 = tl.constexpr("{ .reg .s32 d; dp2a.lo.s32.s32 d, $3, $1, $2; dp2a.hi.s32.s32 $0, $4, $1, d; }")
# two float32 whose last 16 bits are an int16 each -> both in a register
TWO_INT16 = tl.constexpr("prmt.b32 $0, $1, $2, 0x5410;")
# four float8_e4m3fn -> each
FROM_FP8 = tl.constexpr(
    "{ .reg .b16 a, b, c, d; .reg .b32 s, t; mov.b32 {a, b}, $4; cvt.rn.f16x2.e4m3x2 s, a; cvt.rn.f16x2.e4m3x2 t, b; "
    "mov.b32 {a, b}, s; mov.b32 {c, d}, t; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d; }"
)


@triton.jit
def _byte(four, i: tl.constexpr):
    """Without a GPU: byte i of an int32, an int8, as an int32."""
    return (four << (24 - 8 * i)) >> 24


@triton.jit
def _products(pair, a, b):
    """Without a GPU: two int16 in an int32, times a and b."""
    return ((pair << 16) >> 16) * a + (pair >> 16) * b


@triton.jit
def _dot(codes, d, p, q, r, s, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """An int32 of codes, and x's integers in four int32 (BITS 4) or the first two -> d and
    the sum of their products, int32."""
    if INTERPRETED:
        low, high = (codes & 0x0F0F0F0F, (codes >> 4) & 0x0F0F0F0F) if BITS == 4 else (codes, codes)
        d += _products(p, _byte(low, 0), _byte(low, 1)) + _products(q, _byte(low, 2), _byte(low, 3))
        if BITS == 4:
            d += _products(r, _byte(high, 0), _byte(high, 1)) + _products(s, _byte(high, 2), _byte(high, 3))
    elif BITS == 4:
        d = tl.inline_asm_elementwise(DOT_4, "=r,r,r,r,r,r,r", [codes, d, p, q, r, s], tl.int32, is_pure=True, pack=1)
    else:
        d = tl.inline_asm_elementwise(DOT_8, "=r,r,r,r,r", [codes, d, p, q], tl.int32, is_pure=True, pack=1)
    return d


@triton.jit
def _pair(a, b, per_unit, INTERPRETED: tl.constexpr):
    """a, b: float32 -> a * per_unit, b * per_unit rounded to int16, in an int32. Beside 1.5 * 2^23 no fraction has room."""
    a, b = a * per_unit + 12582912.0, b * per_unit + 12582912.0
    a, b = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
    if INTERPRETED:
        pair = (a & 65535) | (b << 16)
    else:
        pair = tl.inline_asm_elementwise(TWO_INT16, "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    return pair


@triton.jit
def _unit(most):
    """most: the largest magnitude of a block, float32 -> (the power of two that x's integers count in, one over it).
    2^E <= most < 2^(E + 1) -> 2^(E - 14), infinite for infinite and NaN."""
    power = tl.maximum(most.to(tl.int32, bitcast=True) & 0x7F800000, 14 << 23)  # 2^E as float32; E is -113 at least
    per_unit = (127 << 23) - power + (141 << 23)  # 2^(14 - E)
    return power.to(tl.float32, bitcast=True) * 0.00006103515625, per_unit.to(tl.float32, bitcast=True)


@triton.jit
def _more(a, b):
    """The larger one; NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _fp8(four, i: tl.constexpr):
    """Without a GPU: byte i of an int32, a float8, as a float32."""
    return ((four >> (8 * i)) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def _four_fp8(four, INTERPRETED: tl.constexpr):
    """int32, four float8_e4m3fn -> four float32."""
    if INTERPRETED:
        a, b, c, d = _fp8(four, 0), _fp8(four, 1), _fp8(four, 2), _fp8(four, 3)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            FROM_FP8, "=r,=r,=r,=r,r", [four], (tl.float32,) * 4, is_pure=True, pack=1
        )
    return a, b, c, d


@triton.jit
def _two_of(pair, dtype: tl.constexpr):
    """int32, two 16-bit floats -> two float32. A bfloat16 is the upper half of one."""
    if dtype == tl.bfloat16:
        a, b = (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        a, b = pair.to(tl.int16).to(dtype, bitcast=True), (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
        a, b = a.to(tl.float32), b.to(tl.float32)
    return a, b


@triton.jit
def _four_of(four, dtype: tl.constexpr):
    """int64, four 16-bit floats -> four float32."""
    a, b = _two_of(four.to(tl.int32), dtype)
    c, d = _two_of((four >> 32).to(tl.int32), dtype)
    return a, b, c, d


@triton.jit
def _of_thread(x, ROW: tl.constexpr):
    """[a, b, c] -> [a, b, c / ROW]: sums of ROW that lie side by side, in one thread."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // ROW, ROW]), 3) if ROW > 1 else x


@triton.jit
def _numbers(at, turn, column, turns, width, WHOLE: tl.constexpr):
    """What lies at `at`, zeros behind the last column. WHOLE: a turn is there as a whole or not; a mask for each number would make
    each a load of its own, instead of 16 bytes."""
    return tl.load(at, mask=(turn < turns)[:, :, None] if WHOLE else column < width, other=0)


@triton.jit
def _of_row(
    q_at, s_at, z_at, q_on, s_on, first, tt, column, turns, width, turn_stride, scale_stride, TURN: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(codes, scales, zeros) of a row's turns, `first` and those behind it. q_on, s_on: how far the row is from the addresses."""
    there = (first + tt) < turns
    code = _numbers(q_at + first * turn_stride + q_on, first + tt, first * TURN + column, turns, width, WHOLE)
    on = first * TURN // GROUP * scale_stride if GROUP else 0
    s = tl.load(s_at + on + s_on, mask=there, other=0.0) if GROUP else 0
    z = tl.load(z_at + on + s_on, mask=there, other=0) if ZERO else 0
    return code, s, z


@triton.jit
def _one_row(
    x, q, scale, zero, bias, y, out, width, scale_stride, tile_stride, row_stride, turn_stride, DTYPE: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr, TURN: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    BITS: tl.constexpr, FP8: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr, WHOLE: tl.constexpr, NEAR: tl.constexpr, SIDE: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    FOURS: tl.constexpr = TURN * BITS // 32  # int32 of a row's turn
    PAIR: tl.constexpr = 2 if GATED else 1  # rows of W for a column of y: gate's, then up's, `out` rows behind it
    TURNS_FIRST: tl.constexpr = BITS != 4  # which are side by side in memory: turns of a row, or rows of a turn
    n, t, k = tl.program_id(0) * (R // PAIR * N) + tl.arange(0, N), tl.arange(0, T), tl.arange(0, FOURS)
    # NEAR: rows lie at fixed distances from the first, and an address takes no register of its own
    STEP: tl.constexpr = PAIR if NEAR else R
    q_step = N * TURN // 8 if BITS == 4 else N * row_stride
    S_STEP: tl.constexpr = N if SHARE == 1 else 0
    turns = tl.cdiv(width, TURN)
    tt = t[:, None] + 0 * n[None, :] if TURNS_FIRST else t[None, :] + 0 * n[:, None]  # [T, N] or [N, T]
    # the address of x has the shape of that of W: so both are laid out alike over the threads, and nothing is exchanged
    x_at = x + tt[:, :, None] * (TURN // 4) + k[None, None, :]
    column = tt[:, :, None] * TURN + 4 * k[None, None, :]
    q_at, s_at, z_at, acc, here = (), (), (), (), ()
    for r in tl.static_range(PAIR if NEAR else R):
        # behind the last row it is read again, and not stored
        m = tl.minimum(n + r // PAIR * N, out - 1) + r % PAIR * out
        row = (m // 64).to(tl.int64) * tile_stride + (m % 64) * row_stride
        row = row[None, :] if TURNS_FIRST else row[:, None]
        q_at = q_at + (q + (tt * turn_stride + row)[:, :, None] + k[None, None, :],)
        at = m // SHARE
        at = (at[None, :] if TURNS_FIRST else at[:, None]) + (tt * TURN // GROUP if GROUP else tt * 0) * scale_stride
        s_at, z_at = s_at + (scale + at,), z_at + (zero + at,)
    for r in tl.static_range(R):
        acc = acc + (tl.zeros([tt.shape[0], tt.shape[1], FOURS // SIDE], tl.float32),)
        here = here + (_of_row(
            q_at[r % STEP], s_at[r % STEP], z_at[r % STEP], r // STEP * q_step, r // STEP * S_STEP, 0, tt, column, turns,
            width, turn_stride, scale_stride, TURN, GROUP, ZERO, WHOLE or BITS == 4,
        ),)  # fmt: skip
    wait_for_previous(PDL)
    low = _numbers(x_at, tt, column, turns, width, WHOLE)
    high = _numbers(x_at + TURN // 8, tt, column + TURN // 2, turns, width, WHOLE) if BITS == 4 else 0
    for first in tl.range(0, turns, T):
        turn, ahead = first + T + tt, (first + T) * TURN + column
        behind, sums = (), ()
        for r in tl.static_range(R):
            behind = behind + (_of_row(
                q_at[r % STEP], s_at[r % STEP], z_at[r % STEP], r // STEP * q_step, r // STEP * S_STEP, first + T, tt,
                column, turns, width, turn_stride, scale_stride, TURN, GROUP, ZERO, WHOLE or BITS == 4,
            ),)  # fmt: skip
        x_there = x_at + (first + T) * (TURN // 4)
        low_ahead = _numbers(x_there, turn, ahead, turns, width, WHOLE)
        high_ahead = _numbers(x_there + TURN // 8, turn, ahead + TURN // 2, turns, width, WHOLE) if BITS == 4 else 0
        x0, x1, x2, x3 = _four_of(low, DTYPE)
        if not FP8:
            most = _more(_more(tl.abs(x0), tl.abs(x1)), _more(tl.abs(x2), tl.abs(x3)))
            if BITS == 4:
                x4, x5, x6, x7 = _four_of(high, DTYPE)
                most = _more(most, _more(_more(tl.abs(x4), tl.abs(x5)), _more(tl.abs(x6), tl.abs(x7))))
            unit, per_unit = _unit(most)
            a, b = _pair(x0, x1, per_unit, INTERPRETED), _pair(x2, x3, per_unit, INTERPRETED)
            c = _pair(x4, x5, per_unit, INTERPRETED) if BITS == 4 else 0
            d = _pair(x6, x7, per_unit, INTERPRETED) if BITS == 4 else 0
            start = tl.zeros(most.shape, tl.int32)
            if ZERO or OFFSET != 0:
                ones = tl.full(most.shape, 0x11111111 if BITS == 4 else 0x01010101, tl.int32)
                ints = _dot(ones, start, a, b, c, d, BITS, INTERPRETED)
                if ZERO:
                    sum_x = _of_thread(ints.to(tl.float32) * unit, SIDE)
                else:
                    start = -OFFSET * ints
        elif ZERO or OFFSET != 0:
            sum_x = _of_thread(x0 + x1 + x2 + x3, SIDE)
        for r in tl.static_range(R):
            code, s, z = here[r]
            if FP8:
                a, b, c, d = _four_fp8(code, INTERPRETED)
                part = _of_thread(a * x0 + b * x1 + c * x2 + d * x3, SIDE)
            else:
                part = _of_thread(_dot(code, start, a, b, c, d, BITS, INTERPRETED).to(tl.float32) * unit, SIDE)
            if ZERO:
                part -= z.to(tl.int32).to(tl.float32)[:, :, None] * sum_x
            elif FP8 and OFFSET != 0:
                part -= OFFSET * sum_x
            sums = sums + (acc[r] + (s.to(tl.float32)[:, :, None] * part if GROUP else part),)
        acc, here, low, high = sums, behind, low_ahead, high_ahead
    for r in tl.static_range(R):
        total, j = tl.sum(tl.sum(acc[r], 2), 0 if TURNS_FIRST else 1), n + r // PAIR * N
        m = j + r % PAIR * out
        if not GROUP:
            total *= tl.load(scale + m // SHARE, mask=j < out, other=0.0).to(tl.float32)
        if BIAS:
            total += tl.load(bias + m, mask=j < out, other=0.0).to(tl.float32)
        if GATED and r % 2 == 0:
            gate = total
        else:
            total = silu_times(gate, total) if GATED else total
            tl.store(y + j, total.to(y.dtype.element_ty), mask=j < out)
