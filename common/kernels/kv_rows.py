"""Rows of pages in kernels: read, encoded and stored as common/attention/kv_format.py has them.

BITS: of an integer code that has a scale a row, else 0. MOST: the largest code, 0 where the page holds the numbers themselves. A
kernel multiplies with codes, which 16-bit floats hold exactly, and scales what comes out: the scores [BM, BN] by the scales of K's
rows, the shares [BM, BN] by those of V's. So a scale costs one product for each column, and not one for each of its d numbers. The
scale of a layer (fp8; 1 for plain numbers) is folded into the scale of the scores and into the output.
"""

import torch
import triton
import triton.language as tl

from common.attention.kv_cache import LayerPages
from common.attention.kv_format import KVFormat

ROUND = tl.constexpr(1.5 * 2**23)  # x + ROUND - ROUND is x to the nearest integer, in float32


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


@triton.jit
def codes(
    cache, rows, there, ty: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr = 0,
    FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Rows [BN] -> [BN, BD] in dtype ty; those that are not `there` are not read."""
    width: tl.constexpr = WIDTH if WIDTH > 0 else D
    if BITS == 4:
        j = tl.arange(0, BD // 2)
        at = cache + (rows * (width // 2))[:, None] + (FIRST // 2 + j)[None, :]
        pairs = tl.load(at, mask=there[:, None] & (j < D // 2)[None, :], other=0).to(tl.int32)
        return tl.interleave((pairs & 15) - 8, (pairs >> 4) - 8).to(ty)
    else:
        i = tl.arange(0, BD)
        at = cache + (rows * width)[:, None] + (FIRST + i)[None, :]
        return tl.load(at, mask=there[:, None] & (i < D)[None, :], other=0.0).to(ty)


@triton.jit
def scale_of_rows(x, scales, rows, there, BITS: tl.constexpr):
    """x [BM, BN] times the scale of each of its columns' rows [BN]."""
    if BITS > 0:
        x *= tl.load(scales + rows, mask=there, other=0.0).to(tl.float32)[None, :]
    return x
