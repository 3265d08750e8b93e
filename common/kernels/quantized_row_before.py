"""y = x W^T for one row of x and W in codes: products on the ordinary cores, for decode of one request.

On tensor cores (quantized_linear.py) a row of x costs as much as 16 do, and each code passes through shared memory on its way to
them. Here a thread takes some bytes of W straight into its registers, widens them to float32 by bits, multiplies and adds:

    4 bits   byte b in the third place of 0x43000000 is the float32 128 + b: both halves of four bytes in 11 instructions
    INT8     byte b + 128 in the last place of 0x4B000000 is the float32 2^23 + 128 + b; the subtraction is exact
    FP8      as the hardware converts it

128 and the zero point come off after a turn's sum, times the sum of x. A program has R x N rows of W and T turns at a time. What
the next T need, x and scales included, is on its way while these are multiplied: with W alone on its way a matrix of 36 MB took
34 us, and so it takes 21 (H100). Sums are float32.

Bytes: out * in * bits / 8, the scales and zeros (quantized_layout.py); x from cache, once a program. What keeps 4 bits from their
floor is instructions: a weight takes almost 5, and in the time in which it comes from memory a processor has 5 to give. The twin in
plain PyTorch is `multiply_plain` (quantized_layout.py).
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from common.kernels.fused import silu_times
from common.kernels.launch import INTERPRETED, launch, let_next_start, wait_for_previous
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
    """Among the fastest of 26 for Qwen2.5-7B's matrices on an H100; `bench_quantized --part tune` tries more."""
    if packed.bits == 4:
        return Work(4, 4, 4, 4) if packed.out >= WIDE else Work(4, 16, 2, 8)
    return Work(2, 4, 4, 4) if packed.out >= WIDE else Work(2, 16, 2, 4)


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
        _one_row, (triton.cdiv(out, plan.deep * plan.beside),), x.view(torch.int64), packed.q.view(torch.int32), packed.scale,
        packed.scale if packed.zero is None else packed.zero, x if bias is None else bias, y, y.shape[1], packed.width,
        triton.cdiv(out, packed.share), *_strides(packed), DTYPE=TRITON[x.dtype], R=plan.deep, T=plan.turns * TURN // packed.turn,
        N=plan.beside, TURN=packed.turn, GROUP=packed.group, SHARE=packed.share, BITS=packed.bits,
        FP8=packed.q.dtype == torch.float8_e4m3fn, OFFSET=packed.offset, ZERO=packed.zero is not None, BIAS=bias is not None,
        GATED=gated, INTERPRETED=INTERPRETED, num_warps=plan.warps,
    )  # fmt: skip
    return y


def _strides(packed: PackedCodes) -> tuple[int, int, int]:
    """int32 from a tile of rows to the next, from a row in it, from a turn."""
    if packed.bits == 4:
        return packed.q.stride(0) // 4, packed.turn // 8, packed.q.stride(1) // 4
    return ROWS * packed.width // 4, packed.width // 4, packed.turn // 4


# four bytes in a register -> 128 + the low half of each, and 128 + the high half, as float32
HALVES = tl.constexpr(
    "{ .reg .b32 l, h; and.b32 l, $8, 0x0F0F0F0F; shr.u32 h, $8, 4; and.b32 h, h, 0x0F0F0F0F; "
    "prmt.b32 $0, l, 0x43000000, 0x7054; prmt.b32 $1, l, 0x43000000, 0x7154; "
    "prmt.b32 $2, l, 0x43000000, 0x7254; prmt.b32 $3, l, 0x43000000, 0x7354; "
    "prmt.b32 $4, h, 0x43000000, 0x7054; prmt.b32 $5, h, 0x43000000, 0x7154; "
    "prmt.b32 $6, h, 0x43000000, 0x7254; prmt.b32 $7, h, 0x43000000, 0x7354; }"
)
# four int8 -> 2^23 + 128 + each
ABOVE_INT8 = tl.constexpr(
    "{ .reg .b32 t; xor.b32 t, $4, 0x80808080; prmt.b32 $0, t, 0x4B000000, 0x7650; prmt.b32 $1, t, 0x4B000000, 0x7651; "
    "prmt.b32 $2, t, 0x4B000000, 0x7652; prmt.b32 $3, t, 0x4B000000, 0x7653; }"
)
# four float8_e4m3fn -> each
FROM_FP8 = tl.constexpr(
    "{ .reg .b16 a, b, c, d; .reg .b32 s, t; mov.b32 {a, b}, $4; cvt.rn.f16x2.e4m3x2 s, a; cvt.rn.f16x2.e4m3x2 t, b; "
    "mov.b32 {a, b}, s; mov.b32 {c, d}, t; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d; }"
)


@triton.jit
def _byte(four, i: tl.constexpr, FP8: tl.constexpr):
    """Without a GPU: byte i of an int32 as a float32."""
    byte = (four >> (8 * i)) & 255
    return byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32) if FP8 else byte.to(tl.int8).to(tl.float32)


@triton.jit
def _whole(four, FP8: tl.constexpr, INTERPRETED: tl.constexpr):
    """int32, four codes of 8 bits -> four float32."""
    if INTERPRETED:
        a, b, c, d = _byte(four, 0, FP8), _byte(four, 1, FP8), _byte(four, 2, FP8), _byte(four, 3, FP8)
    elif FP8:
        a, b, c, d = tl.inline_asm_elementwise(
            FROM_FP8, "=r,=r,=r,=r,r", [four], (tl.float32,) * 4, is_pure=True, pack=1
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            ABOVE_INT8, "=r,=r,=r,=r,r", [four], (tl.float32,) * 4, is_pure=True, pack=1
        )
        a, b, c, d = a - 8388736.0, b - 8388736.0, c - 8388736.0, d - 8388736.0
    return a, b, c, d


@triton.jit
def _halves(four, INTERPRETED: tl.constexpr):
    """int32, eight codes of 4 bits -> 128 + the low halves of its bytes, 128 + the high ones: float32."""
    if INTERPRETED:
        low, high = four & 0x0F0F0F0F, (four >> 4) & 0x0F0F0F0F
        a, b, c, d = _byte(low, 0, False), _byte(low, 1, False), _byte(low, 2, False), _byte(low, 3, False)
        e, f, g, h = _byte(high, 0, False), _byte(high, 1, False), _byte(high, 2, False), _byte(high, 3, False)
        a, b, c, d, e, f, g, h = a + 128, b + 128, c + 128, d + 128, e + 128, f + 128, g + 128, h + 128
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            HALVES, "=r,=r,=r,=r,=r,=r,=r,=r,r", [four], (tl.float32,) * 8, is_pure=True, pack=1
        )
    return a, b, c, d, e, f, g, h


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
def _one_row(
    x, q, scale, zero, bias, y, out, width, scale_stride, tile_stride, row_stride, turn_stride, DTYPE: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr, TURN: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    BITS: tl.constexpr, FP8: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    FOURS: tl.constexpr = TURN * BITS // 32  # int32 of a row's turn
    ABOVE: tl.constexpr = 128 if BITS == 4 else 0
    PAIR: tl.constexpr = 2 if GATED else 1  # rows of W for a column of y: gate's, then up's, `out` rows behind it
    n, t, k = tl.program_id(0) * (R // PAIR * N) + tl.arange(0, N), tl.arange(0, T), tl.arange(0, FOURS)
    turns, any_row = tl.cdiv(width, TURN), 0 * n[None, :, None]
    # the address of x has the shape of that of W: so both are laid out alike over the threads, and nothing is exchanged
    x_at = x + t[:, None, None] * (TURN // 4) + any_row + k[None, None, :]
    column = t[:, None, None] * TURN + 4 * k[None, None, :] + any_row  # [T, N, FOURS]
    q_at, of_row, code, s, z, acc = (), (), (), (), (), ()
    for r in tl.static_range(R):
        # behind the last row it is read again, and not stored
        m = tl.minimum(n + r // PAIR * N, out - 1) + r % PAIR * out
        row = (m // 64).to(tl.int64) * tile_stride + (m % 64) * row_stride
        there = q + t[:, None, None] * turn_stride + row[None, :, None] + k[None, None, :]
        q_at, code = q_at + (there,), code + (tl.load(there, mask=column < width, other=0),)
        of_row = of_row + ((m // SHARE)[None, :],)
        at = of_row[r] + (t * TURN // GROUP if GROUP else t * 0)[:, None] * scale_stride
        s = s + ((tl.load(scale + at, mask=(t < turns)[:, None], other=0.0) if GROUP else 0),)
        z = z + ((tl.load(zero + at, mask=(t < turns)[:, None], other=0) if ZERO else 0),)
        acc = acc + (tl.zeros([T, N], tl.float32),)
    wait_for_previous(PDL)
    low = tl.load(x_at, mask=column < width, other=0)
    high = tl.load(x_at + TURN // 8, mask=column + TURN // 2 < width, other=0) if BITS == 4 else 0
    for first in tl.range(0, turns, T):
        turn, ahead = first + T + t, (first + T) * TURN + column
        code_ahead, s_ahead, z_ahead, sums = (), (), (), ()
        for r in tl.static_range(R):
            code_ahead = code_ahead + (tl.load(q_at[r] + (first + T) * turn_stride, mask=ahead < width, other=0),)
            at = of_row[r] + (turn * TURN // GROUP if GROUP else t * 0)[:, None] * scale_stride
            s_ahead = s_ahead + ((tl.load(scale + at, mask=(turn < turns)[:, None], other=0.0) if GROUP else 0),)
            z_ahead = z_ahead + ((tl.load(zero + at, mask=(turn < turns)[:, None], other=0) if ZERO else 0),)
        x_there = x_at + (first + T) * (TURN // 4)
        low_ahead = tl.load(x_there, mask=ahead < width, other=0)
        high_ahead = tl.load(x_there + TURN // 8, mask=ahead + TURN // 2 < width, other=0) if BITS == 4 else 0
        x0, x1, x2, x3 = _four_of(low, DTYPE)
        if BITS == 4:
            x4, x5, x6, x7 = _four_of(high, DTYPE)
            sum_x = tl.sum(x0 + x1 + x2 + x3 + (x4 + x5 + x6 + x7), 2)
        elif ZERO or OFFSET != 0:
            sum_x = tl.sum(x0 + x1 + x2 + x3, 2)
        for r in tl.static_range(R):
            if BITS == 4:
                a, b, c, d, e, f, g, h = _halves(code[r], INTERPRETED)
                part = tl.sum(a * x0 + b * x1 + c * x2 + d * x3 + e * x4 + f * x5 + g * x6 + h * x7, 2)
            else:
                a, b, c, d = _whole(code[r], FP8, INTERPRETED)
                part = tl.sum(a * x0 + b * x1 + c * x2 + d * x3, 2)
            if ZERO:
                part -= (z[r].to(tl.float32) + ABOVE) * sum_x
            elif OFFSET + ABOVE != 0:
                part -= (OFFSET + ABOVE) * sum_x
            sums = sums + (acc[r] + (s[r].to(tl.float32) * part if GROUP else part),)
        acc, code, s, z, low, high = sums, code_ahead, s_ahead, z_ahead, low_ahead, high_ahead
    for r in tl.static_range(R):
        total, j = tl.sum(acc[r], 0), n + r // PAIR * N
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
