"""y = x W^T for a handful of rows: what decode does with every weight matrix of the model.

    linear   1 to 4 rows: a few rows of W a program, products on the ordinary cores
    skinny   5 to 32 rows: 64 rows of W a program, on the tensor cores; a W with few rows is cut along `in` too, and the
             last program of a tile to end adds up the parts

The rows of x are read from cache, W [out/R, in/R] once from memory: out * in numbers, and two operations a row for
each. Memory bandwidth is the whole cost, and a GEMM library tuned for tiles of 64 rows and more leaves
some of it unused. Weights are never written, so `linear` has its first tile on the way before the previous kernel ends;
in `skinny` that broke the pipeline of its loop and cost more than it brought.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from common.kernels.launch import launch, let_next_start, wait_for_previous

MAX_ROWS = 4
MAX_SKINNY_ROWS = 32
TILE, DEPTH = 64, 128  # rows of W and columns a turn of a `skinny` program
PROGRAMS = 160  # of it, where a W has fewer tiles


def wanted(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Is one of these kernels faster than the library? Measured on an H200."""
    out, width = weight.shape
    if len(x) <= MAX_ROWS:
        return True
    return len(x) <= MAX_SKINNY_ROWS and x.dtype != torch.float32 and (out >= 8000 or (width >= 3072 and out < 4096))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in/R], T <= MAX_SKINNY_ROWS -> [T, out/R]."""
    if len(x) > MAX_ROWS:
        return skinny(x, weight, bias)
    rows, width = x.shape
    y = torch.empty(rows, len(weight), dtype=x.dtype, device=x.device)
    block_n, block_k, warps = _blocks(len(weight), width)
    block_n = max(block_n // triton.next_power_of_2(rows), 1)
    launch(
        _linear, (triton.cdiv(len(weight), block_n),), x, weight, weight if bias is None else bias, y, rows,
        len(weight), x.stride(0), BM=triton.next_power_of_2(rows), K=width, BN=block_n, BK=block_k, BIAS=bias is not None,
        num_warps=warps,
    )  # fmt: skip
    return y


def _blocks(out: int, width: int) -> tuple[int, int, int]:
    """Rows of W a program, columns a turn, warps; measured for one row of x on an H200, see bench_kernels.py."""
    if width <= 1024:
        return (4, 1024, 2) if out < 8000 else (4, 1024, 4) if out < 100_000 else (8, 1024, 4)
    if out <= 1024:
        return 1, 1024, 4
    if width > 8192:
        return 8, 512, 2
    return (4, 512, 4) if out < 10_000 else (2, 512, 2)


@triton.jit(do_not_specialize=("rows",))
def _linear(
    x, weight, bias, y, rows, out, x_stride, BM: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    m, n, k = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    w_at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    w = tl.load(w_at, mask=(n < out)[:, None] & (k < K)[None, :], other=0.0)
    b = tl.load(bias + n, mask=n < out, other=0.0).to(tl.float32) if BIAS else tl.zeros([BN], tl.float32)
    wait_for_previous(PDL)
    acc = tl.zeros([BM, BN, BK], tl.float32)
    for start in tl.range(0, K, BK, loop_unroll_factor=4):
        following = start + BK + k
        coming = tl.load(w_at + start + BK, mask=(n < out)[:, None] & (following < K)[None, :], other=0.0)
        live = (m < rows)[:, None] & (start + k < K)[None, :]
        xs = tl.load(x + m[:, None] * x_stride + start + k[None, :], mask=live, other=0.0)  # [BM, BK]
        acc += xs.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :]
        w = coming
    total = tl.sum(acc, 2) + b[None, :]
    live = (m < rows)[:, None] & (n < out)[None, :]
    tl.store(y + m[:, None] * out + n[None, :], total.to(y.dtype.element_ty), mask=live)


@cache
def _arrived(device: torch.device) -> torch.Tensor:
    """How many parts of each tile are there; zero between two launches."""
    with torch.inference_mode(False):
        return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def skinny(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in/R], T <= MAX_SKINNY_ROWS, 16-bit floats -> [T, out/R]."""
    (rows, width), out = x.shape, len(weight)
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    tiles, turns = triton.cdiv(out, TILE), triton.cdiv(width, DEPTH)
    share = triton.cdiv(turns, min(max(round(PROGRAMS / tiles), 1), 8, turns))  # turns of a program
    parts = triton.cdiv(turns, share)
    part = torch.empty(parts, rows, out, dtype=torch.float32, device=x.device) if parts > 1 else y
    launch(
        _skinny, (tiles, parts), x, weight, weight if bias is None else bias, y, part, _arrived(x.device), rows, out, width,
        x.stride(0), parts, share, BM=max(triton.next_power_of_2(rows), 16), BN=TILE, BK=DEPTH, CUT=parts > 1,
        BIAS=bias is not None, num_stages=4 if parts > 1 else 3,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=("rows", "parts", "share"))
def _skinny(
    x, weight, bias, y, part, arrived, rows, out, width, x_stride, parts, share, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, CUT: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    tile, p = tl.program_id(0), tl.program_id(1)
    m, n, k = tl.arange(0, BM), tile * BN + tl.arange(0, BN), tl.arange(0, BK)
    start, stop = p * share * BK, tl.minimum((p + 1) * share * BK, width)
    w_at = weight + n.to(tl.int64)[:, None] * width + k[None, :]
    x_at = x + m[None, :] * x_stride + k[:, None]
    wait_for_previous(PDL)
    acc = tl.zeros([BN, BM], tl.float32)
    for first in range(start, stop, BK):
        w = tl.load(w_at + first, mask=(n < out)[:, None] & (first + k < stop)[None, :], other=0.0)  # [BN, BK]
        xs = tl.load(x_at + first, mask=(m < rows)[None, :] & (first + k < stop)[:, None], other=0.0)  # [BK, BM]
        acc += tl.dot(w, xs)
    live = (n < out)[:, None] & (m < rows)[None, :]
    at = m[None, :] * out + n[:, None]
    last = True
    if CUT:
        tl.store(part + p * rows * out + at, acc, mask=live)
        tl.debug_barrier()  # all threads have stored before one says so
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == parts - 1
        if last:
            tl.store(arrived + tile, 0)
            acc = tl.zeros([BN, BM], tl.float32)
            for other in range(parts):
                acc += tl.load(part + other * rows * out + at, mask=live, other=0.0, cache_modifier=".cg")
    if last:
        if BIAS:
            acc += tl.load(bias + n, mask=n < out, other=0.0).to(tl.float32)[:, None]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=live)
