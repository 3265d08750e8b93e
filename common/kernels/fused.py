"""The small layers as one kernel each: they move few bytes, so what counts is the number of launches.

    rms_norm       x [T, D] (+ residual [T, D])            -> norm, and the new residual   reads 2, writes 2 T D
    silu_and_mul   x [T, 2F/R]                              -> [T, F/R]                     reads 2, writes 1 T F/R
    rotary         x [T, H, d], cos and sin [T, 1, d]       -> [T, H, d]                    reads 1, writes 1 T H d

All compute in float32 and round once, at the end.
"""

import torch
import triton
import triton.language as tl


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D] -> the same shape; rows may lie apart (a head inside a larger tensor)."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    size = x.shape[-1]
    _rms_norm[(len(rows),)](
        rows, rows, y, y, weight, eps, rows.stride(0), D=size, BD=triton.next_power_of_2(size), ADD=False
    )
    return y.view(x.shape)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
    """(norm(x + residual), x + residual), both [T, D], in one pass."""
    y, total, size = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    _rms_norm[(len(x),)](
        x, residual, y, total, weight, eps, x.stride(0), D=size, BD=triton.next_power_of_2(size), ADD=True
    )
    return y, total


@triton.jit
def _rms_norm(x, residual, y, total, weight, eps, x_stride, D: tl.constexpr, BD: tl.constexpr, ADD: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    live = i < D
    value = tl.load(x + row * x_stride + i, mask=live, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * D + i, mask=live, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)  # the residual is kept in the model's dtype, as in plain PyTorch
        tl.store(total + row * D + i, rounded, mask=live)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    out = value * scale * tl.load(weight + i, mask=live, other=0.0).to(tl.float32)
    tl.store(y + row * D + i, out.to(y.dtype.element_ty), mask=live)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2F/R] = (gate, up) -> silu(gate) * up [T, F/R]."""
    tokens, width = x.shape[0], x.shape[1] // 2
    y = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    _silu_and_mul[(tokens, triton.cdiv(width, 1024))](x, y, F=width, BLOCK=1024)
    return y


@triton.jit
def _silu_and_mul(x, y, F: tl.constexpr, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < F
    gate = tl.load(x + row * 2 * F + i, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + i, mask=live, other=0.0).to(tl.float32)
    tl.store(y + row * F + i, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=live)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, d] turned; cos and sin [T, 1, d] as RotaryEmbedding gives them, the sign already in sin."""
    tokens, heads, d = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(heads), triton.next_power_of_2(d)
    _rotary[(tokens,)](x, cos, sin, y, x.stride(0), H=heads, D=d, BH=block[0], BD=block[1])
    return y


@triton.jit
def _rotary(x, cos, sin, y, x_stride, H: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    h, i = tl.arange(0, BH)[:, None], tl.arange(0, BD)[None, :]
    live = (h < H) & (i < D)
    here = tl.load(x + t * x_stride + h * D + i, mask=live, other=0.0).to(tl.float32)
    other = tl.load(x + t * x_stride + h * D + (i + D // 2) % D, mask=live, other=0.0).to(tl.float32)
    c = tl.load(cos + t * D + i, mask=i < D, other=0.0).to(tl.float32)
    s = tl.load(sin + t * D + i, mask=i < D, other=0.0).to(tl.float32)
    tl.store(y + (t * H + h) * D + i, (here * c + other * s).to(y.dtype.element_ty), mask=live)
