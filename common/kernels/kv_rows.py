"""Rows of pages in kernels: read, encoded and stored as common/attention/kv_format.py has them.

BITS: of an integer code that has a scale a row, else 0. MOST: the largest code, 0 where the page holds the numbers themselves. A
kernel multiplies with codes, which 16-bit floats hold exactly, and scales what comes out: the scores [BM, BN] by the scales of K's
rows, the shares [BM, BN] by those of V's. So a scale costs one product for each column, and not one for each of its d numbers. The
scale of a layer (fp8; 1 for plain numbers) is folded into the scale of the scores and into the output.

Rows are read as planes: one [BN, BD] with all numbers, or (fp8 beside 16-bit queries) two [BN, BD/2], the even ones and the odd.
What multiplies comes in the same planes (`queries`), and so does what adds up (`nothing`, `added`) until it is put together
(`whole`). A tensor core wants two tokens of one column in a register, and shared memory hands out pairs of bytes, which are two
columns of a token. So a register gets two tokens of two columns, and one instruction takes the even column out of it, another the
odd one. For one plane of bytes each number was a load of its own.
"""

import torch
import triton
import triton.language as tl

from common.attention.kv_cache import LayerPages
from common.attention.kv_format import KVFormat
from common.kernels.launch import INTERPRETED

ROUND = tl.constexpr(1.5 * 2**23)  # x + ROUND - ROUND is x to the nearest integer, in float32
IN_PYTHON = tl.constexpr(INTERPRETED)
# two int16, two codes each -> the first of each, the second of each, as float16
TWO_E4M3 = tl.constexpr(
    "{ .reg .b32 a, b; .reg .b16 l, h; prmt.b32 a, $2, 0, 0x4420; prmt.b32 b, $2, 0, 0x4431; mov.b32 {l, h}, a; "
    "cvt.rn.f16x2.e4m3x2 $0, l; mov.b32 {l, h}, b; cvt.rn.f16x2.e4m3x2 $1, l; }"
)
TWO_E5M2 = tl.constexpr("prmt.b32 $0, $2, 0, 0x2404; prmt.b32 $1, $2, 0, 0x3414;")  # the upper byte of a float16


def row_bits(form: KVFormat) -> int:
    """Of codes that have a scale a row; 0 where there are none, or one scale for all."""
    return (4 if form.width(2) == 1 else 8) if form.row_scales else 0


def kept_of(pages: LayerPages, form: KVFormat) -> tuple[torch.Tensor, ...]:
    """k, v and the scales of their rows; where there are none a pointer that is not read."""
    return (pages.k, pages.v, *((pages.k_scales, pages.v_scales) if form.row_scales else (pages.k, pages.v)))


@triton.jit
def scale_of(most, MOST: tl.constexpr):
    """The scale of a row whose largest number is `most`, as float16 holds it."""
    return tl.minimum(tl.div_rn(most, MOST), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def encoded(x, scale, cache, MOST: tl.constexpr, BITS: tl.constexpr):
    """Numbers of a row -> their codes as `cache` will hold them, in float32. scale: of the row, or of the layer."""
    x = x.to(tl.float32)
    if BITS > 0:
        code = tl.div_rn(x, tl.where(scale > 0, scale, 1.0))
        code = tl.minimum(tl.maximum((code + ROUND) - ROUND, -MOST), MOST)
    elif MOST > 0:
        code = tl.minimum(tl.maximum(tl.div_rn(x, scale), -MOST), MOST)
        power = (code.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # the largest in it
        # e4m3: 3 bits behind the leading one, down to 2^-6; e5m2: 2, down to 2^-14
        step = tl.maximum(power, 2.0**-6) * 2.0**-3 if MOST == 448.0 else tl.maximum(power, 2.0**-14) * 2.0**-2
        code = ((code / step + ROUND) - ROUND) * step  # the interpreter's own cast does not round to the nearest
    else:
        code = x.to(cache.dtype.element_ty).to(tl.float32)
    return code


@triton.jit
def encoded_row(x, scale, cache, MOST: tl.constexpr, BITS: tl.constexpr):
    """A row [BD] -> its codes, and its own scale, or that of the layer."""
    own = scale
    if BITS > 0:
        own = scale_of(tl.max(tl.abs(x.to(tl.float32)), 0), MOST)
    return encoded(x, own, cache, MOST, BITS), own


# A row may be longer than the D numbers in question (WIDTH), which then begin at FIRST: of latent rows, the latent and the key


@triton.jit
def put(
    cache, scales, row, code, own, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr = 0,
    FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Store what `encoded` gave, and the scale, in row `row`."""
    width: tl.constexpr = WIDTH if WIDTH > 0 else D
    if BITS > 0:
        tl.store(scales + row, own.to(tl.float16))
    if BITS == 4:
        j = tl.arange(0, BD // 2)
        low, high = tl.split(tl.reshape((code + 8.0).to(tl.int32), [BD // 2, 2]))
        tl.store(cache + row * (width // 2) + FIRST // 2 + j, (low | (high << 4)).to(tl.uint8), mask=j < D // 2)
    else:
        i = tl.arange(0, BD)
        tl.store(cache + row * width + FIRST + i, code.to(cache.dtype.element_ty), mask=i < D)


@triton.constexpr_function
def in_float16(dtype, cache):
    """Are codes of `cache` multiplied as float16, for queries of this dtype? fp8 is, for 16 bits."""
    return dtype.primitive_bitwidth == 16 and cache.dtype.element_ty.is_fp8()


@triton.constexpr_function
def in_pairs(q, cache, D, BD, WIDTH=0):
    """Are rows of `cache` two planes for queries of q's dtype? D numbers of each, of WIDTH if it is longer."""
    return in_float16(q.dtype.element_ty, cache) and D % 2 == 0 and WIDTH % 2 == 0 and BD >= 32


@triton.constexpr_function
def head_start(q, cache):
    """How far below a row's largest score so far, in powers of two, its exponentials have their reference.

    Shares of values are exp2(score - reference), and beside fp8 float16, which ends at 2^16 and whose last bit is 2^-24. With the
    largest share at 2^14 another one counts down to 2^-38 of it. It has to: where one token, a sink, takes nearly everything and
    its value is near zero, the others' small shares are the answer.
    """
    return 14.0 if in_float16(q.dtype.element_ty, cache) else 0.0


@triton.jit
def queries(qs, scale, cache, PAIRS: tl.constexpr):
    """[BM, BD] and the scale of their scores -> planes, and a scale, which may be one a row, [BM, 1].

    Beside fp8 they are float16, which has all numbers of e4m3 and e5m2, and bfloat16 queries as well once their row is divided by a
    power of two: all but those below 2^-28 of the row's largest. A GPU widens two 8-bit floats to float16 in one instruction; for
    bfloat16 each needs one more, of which a processor does 16 a cycle. For shares see `head_start`.
    """
    if qs.dtype == tl.bfloat16 and in_float16(qs.dtype, cache):
        power = _power(_largest(qs))
        qs, scale = (qs.to(tl.float32) / power).to(tl.float16), scale * power
    return planes(qs, PAIRS), scale


@triton.jit
def both_queries(qs, more, scale, cache, PAIRS: tl.constexpr):
    """The same for rows in two pieces, [BM, BD] and [BM, BE], whose scores are added up."""
    if qs.dtype == tl.bfloat16 and in_float16(qs.dtype, cache):
        power = _power(tl.maximum(_largest(qs), _largest(more)))
        qs, more = (qs.to(tl.float32) / power).to(tl.float16), (more.to(tl.float32) / power).to(tl.float16)
        scale *= power
    return planes(qs, PAIRS), planes(more, PAIRS), scale


@triton.jit
def _largest(qs):
    return tl.max(tl.abs(qs.to(tl.float32)), 1, keep_dims=True)


@triton.jit
def _power(most):
    """The power of two that brings `most` to between 2^14 and 2^15; float16 ends at 2^16."""
    power = (most.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(power, 2.0**-100) * 2.0**-14


@triton.jit
def planes(x, PAIRS: tl.constexpr):
    """[BM, BD] -> its even columns and its odd ones, or all."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])) if PAIRS else (x,)


@triton.jit
def whole(x, PAIRS: tl.constexpr):
    """Planes -> [BM, BD]."""
    return tl.interleave(x[0], x[1]) if PAIRS else x[0]


@triton.jit
def codes(
    cache, rows, there, ty: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr, PAIRS: tl.constexpr,
    WIDTH: tl.constexpr = 0, FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Rows [BN] -> planes in dtype ty; those that are not `there` are not read."""
    width: tl.constexpr = WIDTH if WIDTH > 0 else D
    if PAIRS:
        j = tl.arange(0, BD // 2)
        at = cache.to(tl.pointer_type(tl.int16)) + (rows * (width // 2))[:, None] + (FIRST // 2 + j)[None, :]
        return _widened(tl.load(at, mask=there[:, None] & (j < D // 2)[None, :], other=0), cache)
    elif BITS == 4:
        j = tl.arange(0, BD // 2)
        at = cache + (rows * (width // 2))[:, None] + (FIRST // 2 + j)[None, :]
        pairs = tl.load(at, mask=there[:, None] & (j < D // 2)[None, :], other=0).to(tl.int32)
        return (tl.interleave((pairs & 15) - 8, (pairs >> 4) - 8).to(ty),)
    else:
        i = tl.arange(0, BD)
        at = cache + (rows * width)[:, None] + (FIRST + i)[None, :]
        return (tl.load(at, mask=there[:, None] & (i < D)[None, :], other=0.0).to(ty),)


@triton.jit
def _widened(pairs, cache):
    """int16, two codes of `cache` each -> (the first ones, the second ones), float16."""
    ty: tl.constexpr = cache.dtype.element_ty
    if IN_PYTHON:
        low, high = (pairs & 255).to(tl.uint8), ((pairs >> 8) & 255).to(tl.uint8)
        return low.to(ty, bitcast=True).to(tl.float16), high.to(ty, bitcast=True).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            TWO_E4M3 if ty == tl.float8e4nv else TWO_E5M2,
            "=r,=r,r",
            [pairs],
            (tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def scored(qs, ks, F32: tl.constexpr, PAIRS: tl.constexpr, before=None):
    """Queries times keys [BM, BN], of all planes; and what was `before`."""
    scores = tl.dot(qs[0], tl.trans(ks[0]), before, input_precision="ieee" if F32 else "tf32")
    return tl.dot(qs[1], tl.trans(ks[1]), scores) if PAIRS else scores


@triton.jit
def nothing(BM: tl.constexpr, BD: tl.constexpr, PAIRS: tl.constexpr):
    """Planes of zeros, [BM, BD] or halves of it."""
    if PAIRS:
        return tl.zeros([BM, BD // 2], tl.float32), tl.zeros([BM, BD // 2], tl.float32)
    else:
        return (tl.zeros([BM, BD], tl.float32),)


@triton.jit
def added(acc, old, p, vs, F32: tl.constexpr, PAIRS: tl.constexpr):
    """acc times `old` [BM], and on top p [BM, BN] times values, in all planes."""
    p, old = p.to(vs[0].dtype), old[:, None]
    first = acc[0] * old + tl.dot(p, vs[0], input_precision="ieee" if F32 else "tf32")
    return (first, acc[1] * old + tl.dot(p, vs[1])) if PAIRS else (first,)


@triton.jit
def scale_of_rows(x, scales, rows, there, BITS: tl.constexpr):
    """x [BM, BN] times the scale of each of its columns' rows [BN]."""
    if BITS > 0:
        x *= tl.load(scales + rows, mask=there, other=0.0).to(tl.float32)[None, :]
    return x
