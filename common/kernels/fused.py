"""The small layers as one kernel each: they move few bytes, so what counts is the number of launches.

    rms_norm       x [T, D] (+ residual [T, D])          -> norm, and the new residual    moves (2 + 2) T D numbers
    silu_and_mul   x [T, 2F/R]                           -> [T, F/R]                      (2 + 1) T F/R
    angles         positions [T]                         -> cos, sin [T, 1, d]            (1 + 2) T d
    turn           q [T, Hq/R, d], k [T, Hkv/R, d]       -> both, normed and turned       2 T (Hq + Hkv)/R d
    embed          ids [T]                               -> this rank's rows [T, D]       (1 + 1) T D

All compute in float32 and round once, at the end.
"""

import torch
import triton
import triton.language as tl

from common.kernels.launch import cdiv, launch, let_next_start, next_power_of_2, wait_for_previous


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D] -> the same shape."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    launch(
        _rms_norm, (len(rows),), rows, rows, y, y, weight, eps, rows.stride(0), D=size, BD=next_power_of_2(size),
        ADD=False, num_warps=_warps(size),
    )  # fmt: skip
    return y.view(x.shape)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
    """(norm(x + residual), x + residual), both [T, D], in one pass."""
    y, total, size = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    launch(
        _rms_norm, (len(x),), x, residual, y, total, weight, eps, x.stride(0), D=size, BD=next_power_of_2(size),
        ADD=True, num_warps=_warps(size),
    )  # fmt: skip
    return y, total


def _warps(size: int) -> int:
    return min(max(next_power_of_2(size) // 256, 1), 16)


@triton.jit
def _rms_norm(
    x, residual, y, total, weight, eps, x_stride,
    D: tl.constexpr, BD: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    value = normed(x, residual, total, weight, eps, x_stride, row, i, D, ADD, PDL)
    tl.store(y + row * D + i, value.to(y.dtype.element_ty), mask=i < D)


@triton.jit
def normed(
    x, residual, total, weight, eps, x_stride, row, i, D: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Columns i of a row's norm, float32, 0 behind its end; the weight is on its way before this waits for x."""
    live = i < D
    w = tl.load(weight + i, mask=live, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    value = tl.load(x + row * x_stride + i, mask=live, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * D + i, mask=live, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)  # the residual is kept in the model's dtype, as in plain PyTorch
        tl.store(total + row * D + i, rounded, mask=live)
        value = rounded.to(tl.float32)
    return value * tl.rsqrt(tl.sum(value * value, 0) / D + eps) * w


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2F/R] = (gate, up) -> silu(gate) * up [T, F/R]."""
    tokens, width = x.shape[0], x.shape[1] // 2
    y = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    launch(_silu_and_mul, (tokens, cdiv(width, 1024)), x, y, F=width, BLOCK=1024)
    return y


@triton.jit
def _silu_and_mul(x, y, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    let_next_start(PDL)
    wait_for_previous(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < F
    gate = tl.load(x + row * 2 * F + i, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + i, mask=live, other=0.0).to(tl.float32)
    tl.store(y + row * F + i, silu_times(gate, up).to(y.dtype.element_ty), mask=live)


@triton.jit
def silu_times(gate, up):
    """Of float32, here and behind the products that put out no gate and up (linear.py, quantized_row.py)."""
    return gate * tl.sigmoid(gate) * up


def angles(positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype):
    """positions [T]; cos, sin [max_position, d/2] float32 -> cos, sin [T, 1, d] as RotaryEmbedding gives them."""
    half = cos.shape[1]
    c, s = (torch.empty(len(positions), 1, 2 * half, dtype=dtype, device=cos.device) for _ in range(2))
    launch(_angles, (len(positions),), positions, cos, sin, c, s, HALF=half, BH=next_power_of_2(half))
    return c, s


@triton.jit
def _angles(positions, cos, sin, c, s, HALF: tl.constexpr, BH: tl.constexpr, PDL: tl.constexpr):
    let_next_start(PDL)
    wait_for_previous(PDL)
    t, i = tl.program_id(0).to(tl.int64), tl.arange(0, BH)
    at = tl.load(positions + t) * HALF + i
    x = tl.load(cos + at, mask=i < HALF).to(c.dtype.element_ty)
    y = tl.load(sin + at, mask=i < HALF)
    first = t * 2 * HALF + i
    tl.store(c + first, x, mask=i < HALF)
    tl.store(c + first + HALF, x, mask=i < HALF)
    tl.store(s + first, (-y).to(s.dtype.element_ty), mask=i < HALF)
    tl.store(s + first + HALF, y.to(s.dtype.element_ty), mask=i < HALF)


def turn(q, k, cos, sin, q_weight=None, k_weight=None, eps: float = 0.0):
    """q [T, Hq/R, d], k [T, Hkv/R, d] -> both, each head RMS-normed if it has weights [d], then turned.

    q and k may be views into the fused projection: tokens lie `stride(0)` apart, heads side by side.
    """
    tokens, d = len(q), q.shape[2]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    heads = q.shape[1] + k.shape[1]
    block_h = min(next_power_of_2(heads), 16)
    launch(
        _turn, (tokens, cdiv(heads, block_h)), q, k, cos, sin, q if q_weight is None else q_weight,
        k if k_weight is None else k_weight, q_out, k_out, eps, q.stride(0), k.stride(0), HQ=q.shape[1], HKV=k.shape[1],
        D=d, BH=block_h, BD=next_power_of_2(d), NORM=q_weight is not None,
    )  # fmt: skip
    return q_out, k_out


@triton.jit
def _turn(
    q, k, cos, sin, q_weight, k_weight, q_out, k_out, eps, q_stride, k_stride, HQ: tl.constexpr, HKV: tl.constexpr,
    D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    t = tl.program_id(0).to(tl.int64)
    h, i = (tl.program_id(1) * BH + tl.arange(0, BH))[:, None], tl.arange(0, BD)
    is_q, live = h < HQ, (h < HQ + HKV) & (i < D)[None, :]
    heads = tl.where(is_q, q + t * q_stride + h * D, k + t * k_stride + (h - HQ) * D)  # where each begins
    out = turned(heads, tl.where(is_q, q_weight, k_weight), cos + t * D, sin + t * D, i, live, eps, D, NORM)
    to = tl.where(is_q, q_out + (t * HQ + h) * D, k_out + (t * HKV + h - HQ) * D)
    tl.store(to + i[None, :], out.to(q_out.dtype.element_ty), mask=live)


@triton.jit
def turned(heads, weights, cos, sin, i, live, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Pointers to heads [H, 1] and to their norms' weights, to cos and sin [d] -> the heads turned [H, BD], float32."""
    j = (i + D // 2) % D  # the feature that i is turned with
    here = tl.load(heads + i[None, :], mask=live, other=0.0).to(tl.float32)
    other = tl.load(heads + j[None, :], mask=live, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(here * here, 1) / D + eps)[:, None]
        here *= scale * tl.load(weights + i[None, :], mask=live, other=0.0).to(tl.float32)
        other *= scale * tl.load(weights + j[None, :], mask=live, other=0.0).to(tl.float32)
    c = tl.load(cos + i, mask=i < D, other=0.0).to(tl.float32)
    s = tl.load(sin + i, mask=i < D, other=0.0).to(tl.float32)
    return here * c[None, :] + other * s[None, :]


def embed(ids: torch.Tensor, weight: torch.Tensor, first: int) -> torch.Tensor:
    """ids [T]; weight [V/R, D], the rows first .. first + V/R - 1 -> [T, D], zeros where the row is another rank's."""
    x = torch.empty(len(ids), weight.shape[1], dtype=weight.dtype, device=weight.device)
    grid = len(ids), cdiv(weight.shape[1], 1024)
    launch(_embed, grid, ids, weight, x, first, len(weight), D=weight.shape[1], BLOCK=1024)
    return x


@triton.jit
def _embed(ids, weight, x, first, rows, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    let_next_start(PDL)
    wait_for_previous(PDL)
    t, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + t) - first
    mine = (row >= 0) & (row < rows)
    tl.store(x + t * D + i, tl.load(weight + row * D + i, mask=mine & (i < D), other=0.0), mask=i < D)
