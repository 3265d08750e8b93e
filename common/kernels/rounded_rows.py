"""RMSNorm and SiLU for a product that rounds x (quantized_activations.py): what leaves them are codes and scales.

    add_rms_norm    x [T, D] (+ residual [T, D])   -> codes [T, D], and the new residual     moves (2 + 2) + (2 + 1) T D bytes
    silu_and_mul    x [T, 2F/R]                    -> codes [T, F/R]                         (4 + 1) T F/R

A launch of its own for rounding would read x again, and in a decode step it is beginning and end and nothing between them. A
program has a whole row of x in its registers, so the row's largest number is known before anything is written. x is rounded to the
model's dtype first and then to codes: the same bits as `round_rows` behind fused.py (of float32, a norm's sum of squares may be
added up in another order). keep: x is written, too.

vLLM finds both pairs in torch.compile's graph and puts such kernels in their place (RMSNormQuantFusionPass,
ActivationQuantFusionPass; compilation/passes/fusion/ as its sources stood in 2026). Here who makes x is told by who reads it
(common/quantization/rounded_rows.py).
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)

import torch
import triton
import triton.language as tl

from common.kernels.fused import normed, silu_times
from common.kernels.launch import cdiv, launch, let_next_start, next_power_of_2, wait_for_previous
from common.kernels.quantized_activations import GROUP, LARGEST, codes_of, scale_of
from common.quantization.rounded_rows import RoundedRows, Rounding

CHUNK = 4096  # columns of a row that a program reads at once: 8 a thread
PIECE = 1024  # columns of a program, where no scale is of more than GROUP


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, rounding: Rounding) -> RoundedRows:
    """x [T, D] -> its norm, as codes."""
    return _norm(x, None, weight, eps, rounding)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, rounding: Rounding
) -> tuple[RoundedRows, torch.Tensor]:
    """(norm(x + residual) as codes, x + residual [T, D]), in one pass."""
    return _norm(x, residual, weight, eps, rounding)


def _norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, rounding: Rounding):
    (rows, size), total = x.shape, x if residual is None else torch.empty_like(x)
    y = _empty(rows, size, x, rounding)
    block = max(next_power_of_2(size), GROUP if rounding.grouped else 1)
    launch(
        _norm_and_round, (rows,), x, x if residual is None else residual, x if y.x is None else y.x, total, y.codes, y.scales,
        weight, eps, rounding.given, LARGEST[rounding.dtype], x.stride(0), D=size, BD=block, ADD=residual is not None,
        KEEP=rounding.keep, GROUPED=rounding.grouped, STATIC=rounding.static, GROUP=GROUP, num_warps=min(max(block // 256, 1), 16),
    )  # fmt: skip
    return y, total


def silu_and_mul(x: torch.Tensor, rounding: Rounding) -> RoundedRows:
    """x [T, 2F/R] = (gate, up) -> silu(gate) * up [T, F/R], as codes."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = _empty(rows, width, x, rounding)
    block = min(max(next_power_of_2(width), GROUP), PIECE if rounding.grouped else CHUNK)
    chunks = cdiv(width, block)
    launch(
        _silu_and_round, (rows, chunks if rounding.grouped else 1), x, x if y.x is None else y.x, y.codes, y.scales, rounding.given,
        LARGEST[rounding.dtype], F=width, BLOCK=block, CHUNKS=1 if rounding.grouped else chunks, KEEP=rounding.keep,
        GROUPED=rounding.grouped, STATIC=rounding.static, GROUP=GROUP, num_warps=max(block // 256, 1),
    )  # fmt: skip
    return y


def _empty(rows: int, width: int, x: torch.Tensor, rounding: Rounding) -> RoundedRows:
    groups = cdiv(width, GROUP) if rounding.grouped else 1
    return RoundedRows(
        torch.empty(rows, width, dtype=rounding.dtype, device=x.device),
        torch.empty(rows, groups, dtype=torch.float32, device=x.device),
        x.dtype,
        torch.empty(rows, width, dtype=x.dtype, device=x.device) if rounding.keep else None,
    )


@triton.jit
def _norm_and_round(
    x, residual, y, total, q, scales, weight, eps, given, largest, x_stride, D: tl.constexpr, BD: tl.constexpr, ADD: tl.constexpr,
    KEEP: tl.constexpr, GROUPED: tl.constexpr, STATIC: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    value = normed(x, residual, total, weight, eps, x_stride, row, i, D, ADD, PDL).to(x.dtype.element_ty)
    if KEEP:
        tl.store(y + row * D + i, value, mask=i < D)
    wide = value.to(tl.float32)
    if GROUPED:
        _store_groups(wide, q, scales, row, 0, given, largest, D, BD, STATIC, GROUP)
    else:
        scale = given if STATIC else scale_of(tl.max(tl.abs(wide), 0), largest)
        tl.store(q + row * D + i, codes_of(wide, scale, largest, q.dtype.element_ty), mask=i < D)
        tl.store(scales + row, scale)


@triton.jit
def _silu_and_round(
    x, y, q, scales, given, largest, F: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, KEEP: tl.constexpr,
    GROUPED: tl.constexpr, STATIC: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    i = first + tl.arange(0, BLOCK)
    gates, ups = (), ()  # all of them on their way before the first is used
    for c in tl.static_range(CHUNKS):
        at = x + row * 2 * F + c * BLOCK + i
        gates = gates + (tl.load(at, mask=c * BLOCK + i < F, other=0.0),)
        ups = ups + (tl.load(at + F, mask=c * BLOCK + i < F, other=0.0),)
    values, top = (), tl.zeros([BLOCK], tl.float32)
    for c in tl.static_range(CHUNKS):
        value = silu_times(gates[c].to(tl.float32), ups[c].to(tl.float32)).to(x.dtype.element_ty)
        if KEEP:
            tl.store(y + row * F + c * BLOCK + i, value, mask=c * BLOCK + i < F)
        values = values + (value,)
        top = tl.maximum(top, tl.abs(value.to(tl.float32)))
    if GROUPED:
        _store_groups(values[0].to(tl.float32), q, scales, row, first, given, largest, F, BLOCK, STATIC, GROUP)
    else:
        scale = given if STATIC else scale_of(tl.max(top, 0), largest)
        for c in tl.static_range(CHUNKS):
            codes = codes_of(values[c].to(tl.float32), scale, largest, q.dtype.element_ty)
            tl.store(q + row * F + c * BLOCK + i, codes, mask=c * BLOCK + i < F)
        tl.store(scales + row, scale)


@triton.jit
def _store_groups(
    value, q, scales, row, first, given, largest, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STATIC: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """value [BLOCK] float32: columns from `first` on of a row of WIDTH, 0 behind its end; each GROUP of them has a scale."""
    g, i = first // GROUP + tl.arange(0, BLOCK // GROUP), first + tl.arange(0, BLOCK)
    groups = tl.reshape(value, [BLOCK // GROUP, GROUP])
    given = given + tl.zeros([BLOCK // GROUP], tl.float32)
    scale = given if STATIC else scale_of(tl.max(tl.abs(groups), 1), largest)
    codes = tl.reshape(codes_of(groups, scale[:, None], largest, q.dtype.element_ty), [BLOCK])
    tl.store(q + row * WIDTH + i, codes, mask=i < WIDTH)
    tl.store(scales + row * tl.cdiv(WIDTH, GROUP) + g, scale, mask=g * GROUP < WIDTH)
