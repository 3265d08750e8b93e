"""What lies between the projections of latent attention (common/layers/mla.py) and its pages, in one launch; in plain PyTorch it
is a dozen a layer.

    absorb   q [B, H/R, dn + r], row [B, c + r]   -> queries [B, H/R, c + r], and the rows lie in their pages     decode
    turn     q [T, H/R, dn + r], row [T, c + r]   -> both turned, the latents normed                              all other steps

With a Turning of latent rows (LatentTurning of common/layers/mla.py), q and row are what the projections gave: the last r numbers
of each are turned here, and the c before are normed in row. Without one they are so already.

`absorb` reads Wk of kv_b once for every TOKENS tokens, 2 H dn c bytes of bf16: 2 MB for 16 heads of DeepSeek's sizes. Nobody writes
it, so each program has its share on the way before the kernel in front of it has ended. Both compute in float32 and round once.
"""

import torch
import triton
import triton.language as tl

from common.attention.kv_cache import LayerPages
from common.attention.kv_format import KVFormat
from common.kernels.kv_rows import encoded, kept_of, put, row_bits, scale_of
from common.kernels.launch import cdiv, launch, let_next_start, next_power_of_2, wait_for_previous

COLUMNS = 64  # of c a program of `absorb`
TOKENS = 64  # a program of it at most
HEADS = 8  # a program of `turn`


def absorb(
    q: torch.Tensor, row: torch.Tensor, kv_b: torch.Tensor, pages: LayerPages, form: KVFormat, slots: torch.Tensor, turning=None
) -> torch.Tensor:  # fmt: skip
    """q [B, H/R, dn + r], row [B, c + r] of one new token a sequence, kv_b [H/R, dn + dv, c] -> absorbed queries [B, H/R, c + r].

    Stores the rows at `slots` (-1: nowhere), as the pages keep them.
    """
    (tokens, heads, key), c = q.shape, kv_b.shape[2]
    r = row.shape[1] - c
    out = torch.empty(tokens, heads, c + r, dtype=q.dtype, device=q.device)
    block = min(max(next_power_of_2(tokens), 16), TOKENS)
    programs = tokens + cdiv(tokens, block) * heads * cdiv(c, COLUMNS)
    launch(
        _absorb, (programs,), q, row, kv_b, out, pages.k, kept_of(pages, form)[2], slots, *_how(turning, q, row), tokens,
        q.stride(0), q.stride(1), row.stride(0), kv_b.stride(0), pages.k_scale, MOST=form.most, BITS=row_bits(form), H=heads,
        N=key - r, C=c, R=r, BH=next_power_of_2(heads), BM=block, BN=_block(key - r), BW=COLUMNS, BC=_block(c),
        BR=_block(r), F32=q.dtype == torch.float32, TURN=bool(turning), INTERLEAVED=bool(turning and turning.interleaved),
    )  # fmt: skip
    return out


def _how(turning, q, row) -> tuple:
    """cos, sin, weight of the norm, epsilon; without a turning pointers that are not read."""
    return (*turning.rotary, turning.norm.weight, turning.norm.eps) if turning else (q, q, row, 0.0)


def _block(size: int) -> int:
    return max(16, next_power_of_2(size))


@triton.jit
def turned(x, cos, sin, j, live, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Features j of the r numbers at x, after turning, float32. Of interleaved pairs the evens come first, then the odds."""
    if INTERLEAVED:
        second = j >= R // 2
        pair = 2 * tl.where(second, j - R // 2, j)
        here, other = tl.where(second, pair + 1, pair), tl.where(second, pair, pair + 1)
    else:
        here, other = j, (j + R // 2) % R
    a = tl.load(x + here, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x + other, mask=live, other=0.0).to(tl.float32)
    crossed = b * tl.load(sin + j, mask=live, other=0.0).to(tl.float32)
    return tl.fma(a, tl.load(cos + j, mask=live, other=0.0).to(tl.float32), crossed)  # as addcmul in apply_rotary


@triton.jit
def normed(x, weight, eps, C: tl.constexpr):
    """x [BC], zero behind C, and weight [BC] in float32 -> RMSNorm, float32."""
    value = x.to(tl.float32)
    return value * tl.rsqrt(tl.sum(value * value, 0) / C + eps) * weight


@triton.jit(do_not_specialize=("tokens",))
def _absorb(
    q, row, kv_b, out, pages, scales, slots, cos, sin, weight, eps, tokens, q_stride, head_stride, row_stride, kv_stride,
    page_scale, MOST: tl.constexpr, BITS: tl.constexpr, H: tl.constexpr, N: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    F32: tl.constexpr, TURN: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    program = tl.program_id(0)
    if program < tokens:  # what has a position, and the latent: a token a program
        t, i, j = program.to(tl.int64), tl.arange(0, BC), tl.arange(0, BR)
        if TURN:
            w = tl.load(weight + i, mask=i < C, other=0.0).to(tl.float32)
        wait_for_previous(PDL)
        slot, own_row = tl.load(slots + t), row + t * row_stride
        h = tl.arange(0, BH)[:, None]
        live, head = (h < H) & (j < R)[None, :], q + t * q_stride + h * head_stride + N
        q_r = tl.load(head + j[None, :], mask=live, other=0.0)
        if TURN:
            q_r = turned(head, cos + t * R, sin + t * R, j[None, :], live, R, INTERLEAVED).to(q_r.dtype)
        tl.store(out + (t * H + h) * (C + R) + C + j[None, :], q_r, mask=live)
        if slot >= 0:
            new = tl.load(own_row + i, mask=i < C, other=0.0)
            new_r = tl.load(own_row + C + j, mask=j < R, other=0.0)
            if TURN:
                new = normed(new, w, eps, C).to(new.dtype)
                new_r = turned(own_row + C, cos + t * R, sin + t * R, j, j < R, R, INTERLEAVED).to(new_r.dtype)
            own = page_scale
            if BITS > 0:  # one scale for both parts of the row
                own = scale_of(
                    tl.maximum(tl.max(tl.abs(new.to(tl.float32)), 0), tl.max(tl.abs(new_r.to(tl.float32)), 0)), MOST
                )
            put(pages, scales, slot, encoded(new, own, pages, MOST, BITS), own, C, BC, BITS, C + R)
            put(pages, scales, slot, encoded(new_r, own, pages, MOST, BITS), own, R, BR, BITS, C + R, C)
    if program >= tokens:  # q Wk: some tokens, a head, some columns a program
        tiles: tl.constexpr = (C + BW - 1) // BW
        task = program - tokens
        h, c, d = task // tiles % H, task % tiles * BW + tl.arange(0, BW), tl.arange(0, BN)
        w_at = kv_b + h.to(tl.int64) * kv_stride + d[:, None] * C + c[None, :]
        w = tl.load(w_at, mask=(d < N)[:, None] & (c < C)[None, :], other=0.0)
        t = (task // (tiles * H) * BM + tl.arange(0, BM))[:, None].to(tl.int64)
        wait_for_previous(PDL)
        x = tl.load(q + t * q_stride + h * head_stride + d[None, :], mask=(t < tokens) & (d < N)[None, :], other=0.0)
        y = tl.dot(x, w, input_precision="ieee" if F32 else "tf32")
        at = out + (t * H + h) * (C + R) + c[None, :]
        tl.store(at, y.to(out.dtype.element_ty), mask=(t < tokens) & (c < C)[None, :])


def turn(q: torch.Tensor, row: torch.Tensor, turning) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H/R, dn + r], row [T, c + r] as the projections gave them -> both turned, the latents normed."""
    (tokens, heads, key), c = q.shape, len(turning.norm.weight)
    q_out, row_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, row))
    r = row.shape[1] - c
    launch(
        _turn, (tokens, cdiv(heads, HEADS) + 1), q, row, q_out, row_out, *_how(turning, q, row), q.stride(0), q.stride(1),
        row.stride(0), H=heads, N=key - r, C=c, R=r, BH=HEADS, BK=_block(key), BC=_block(c), BR=_block(r),
        INTERLEAVED=turning.interleaved,
    )  # fmt: skip
    return q_out, row_out


@triton.jit
def _turn(
    q, row, q_out, row_out, cos, sin, weight, eps, q_stride, head_stride, row_stride, H: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    t, block, k = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BR)
    cos_at, sin_at = cos + t * R, sin + t * R
    if block < tl.cdiv(H, BH):  # some heads
        h, i, j = (block * BH + tl.arange(0, BH))[:, None], tl.arange(0, BK)[None, :], k[None, :]
        head, to = q + t * q_stride + h * head_stride, q_out + (t * H + h) * (N + R)
        plain, live = (h < H) & (i < N), (h < H) & (j < R)
        tl.store(to + i, tl.load(head + i, mask=plain, other=0.0), mask=plain)
        y = turned(head + N, cos_at, sin_at, j, live, R, INTERLEAVED)
        tl.store(to + N + j, y.to(q_out.dtype.element_ty), mask=live)
    if block == tl.cdiv(H, BH):  # the row
        c, own, place = tl.arange(0, BC), row + t * row_stride, row_out + t * (C + R)
        w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
        latent = normed(tl.load(own + c, mask=c < C, other=0.0), w, eps, C)
        tl.store(place + c, latent.to(row_out.dtype.element_ty), mask=c < C)
        key = turned(own + C, cos_at, sin_at, k, k < R, R, INTERLEAVED)
        tl.store(place + C + k, key.to(row_out.dtype.element_ty), mask=k < R)
