"""y = x W^T for few rows: what decode does with every weight matrix of the model.

    one_row    a few rows of W a program, products on the ordinary cores
    few_rows   up to 64 rows of x and 64 or 128 of W a program, on the tensor cores; a W with few rows is cut along
               `in` too, and the last program of a tile to end adds up the parts
    fixed_linear   any rows, always in the same tiles and turns, never cut along `in`: the bits of a row do not depend on
               how many there are (common/layers/batch_invariant.py)

The rows of x are read from cache, W [out/R, in/R] once from memory: out * in numbers, and two operations a row for
each. Up to some 64 rows memory bandwidth is the whole cost, and a GEMM library tuned for more rows leaves some of
it unused; for a small matrix the cost is the launch, and these kernels start before the previous one has ended.
Weights are never written, so `one_row` has its first tile on the way by then. In `few_rows` that broke the
pipeline of its loop and cost more than it brought, and so did asking the L2 cache for the first tiles.
"""

import torch
import triton
import triton.language as tl

from common.kernels.launch import counters, launch, let_next_start, num_processors, shared_memory, wait_for_previous

ROWS = 64  # of x a program at most, and of W where W is small
WIDE = 8000  # rows of a W that keeps the whole chip busy without being cut along `in`


def wanted(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Is one of these kernels faster than the library, x [T, in/R], weight [out/R, in/R]? Measured on an H200."""
    (rows, width), out = x.shape, len(weight)
    if rows <= 1:
        return rows == 1
    if x.dtype == torch.float32:
        return False
    if rows <= ROWS // 2:
        return True
    if rows <= ROWS:
        return out > 3000 or width < 3000  # few and long rows of W: the library cuts them up better
    return rows * out * width <= 1 << 29


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [T, in/R] -> [T, out/R] of `dtype`, x's by default; 16-bit floats, or a single row of any float. Sums are float32."""
    if len(x) == 1 and (weight.numel() <= 1 << 24 or x.dtype == torch.float32):
        return one_row(x, weight, bias, dtype)
    return few_rows(x, weight, bias, dtype)


def one_row(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [1, in/R] -> [1, out/R]."""
    out, width = weight.shape
    y = torch.empty(1, out, dtype=dtype or x.dtype, device=x.device)
    block_n, block_k, warps = _blocks(out, width)
    launch(
        _one_row, (triton.cdiv(out, block_n),), x, weight, weight if bias is None else bias, y, out, K=width, BN=block_n,
        BK=block_k, BIAS=bias is not None, num_warps=warps,
    )  # fmt: skip
    return y


def _blocks(out: int, width: int) -> tuple[int, int, int]:
    """Rows of W a program, columns a turn, warps; measured on an H200, see bench_kernels.py."""
    if width <= 1024:
        return 4, 1024, 2 if out < WIDE else 4
    return (1, 1024, 4) if out <= 1024 else (4, 512, 4)


@triton.jit
def _one_row(
    x, weight, bias, y, out, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr
):
    let_next_start(PDL)
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    w_at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    w = tl.load(w_at, mask=(n < out)[:, None] & (k < K)[None, :], other=0.0)
    b = tl.load(bias + n, mask=n < out, other=0.0).to(tl.float32) if BIAS else tl.zeros([BN], tl.float32)
    wait_for_previous(PDL)
    acc = tl.zeros([BN, BK], tl.float32)
    for start in tl.range(0, K, BK, loop_unroll_factor=4):
        following = start + BK + k
        coming = tl.load(w_at + start + BK, mask=(n < out)[:, None] & (following < K)[None, :], other=0.0)
        xs = tl.load(x + start + k, mask=start + k < K, other=0.0)
        acc += xs.to(tl.float32)[None, :] * w.to(tl.float32)
        w = coming
    tl.store(y + n, (tl.sum(acc, 1) + b).to(y.dtype.element_ty), mask=n < out)


def few_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [T, in/R], 16-bit floats -> [T, out/R]."""
    (rows, width), out = x.shape, len(weight)
    y = torch.empty(rows, out, dtype=dtype or x.dtype, device=x.device)
    block_m = min(max(triton.next_power_of_2(rows), 16), ROWS)
    block_n, block_k, warps = (128, 64, 8) if out >= WIDE and block_m == ROWS else (ROWS, 128, 4)
    grid = triton.cdiv(out, block_n), triton.cdiv(rows, block_m)
    tiles, turns, processors = grid[0] * grid[1], triton.cdiv(width, block_k), num_processors(x.device)
    share = triton.cdiv(turns, max(min(processors // tiles, turns // 4, 8), 1))  # turns of a program
    room = shared_memory(x.device) // ((block_m + block_n) * block_k * x.element_size())
    stages = min(6 if tiles <= processors else 3, room)  # a processor runs one program, or several
    parts = triton.cdiv(turns, share)
    part = torch.empty(parts, rows, out, dtype=torch.float32, device=x.device) if parts > 1 else y
    launch(
        _few_rows, (*grid, parts), x, weight, weight if bias is None else bias, y, part, counters(x.device), rows, out, width,
        x.stride(0), share, BM=block_m, BN=block_n, BK=block_k, CUT=parts > 1, F32=False, BIAS=bias is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def fixed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in/R], any float -> [T, out/R]; what is chosen is chosen by weight and dtype, never by T.

    The tiles were not tuned on a GPU yet.
    """
    (rows, width), out, f32 = x.shape, len(weight), x.dtype == torch.float32
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    block_k = 32 if f32 else 64
    launch(
        _few_rows, (triton.cdiv(out, ROWS), triton.cdiv(rows, ROWS), 1), x, weight, weight if bias is None else bias, y, y,
        counters(x.device), rows, out, width, x.stride(0), triton.cdiv(width, block_k), BM=ROWS, BN=ROWS, BK=block_k, CUT=False,
        F32=f32, BIAS=bias is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=("rows", "share"))
def _few_rows(
    x, weight, bias, y, part, arrived, rows, out, width, x_stride, share, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, CUT: tl.constexpr, F32: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    p, parts = tl.program_id(2), tl.num_programs(2)
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    start, stop = p * share * BK, tl.minimum((p + 1) * share * BK, width)
    w_at = weight + n.to(tl.int64)[:, None] * width + k[None, :]
    wide = m.to(tl.int64)[None, :]  # fixed_linear has any number of rows
    x_at = x + wide * x_stride + k[:, None]
    wait_for_previous(PDL)
    acc = tl.zeros([BN, BM], tl.float32)
    for first in range(start, stop, BK):
        w = tl.load(w_at + first, mask=(n < out)[:, None] & (first + k < stop)[None, :], other=0.0)  # [BN, BK]
        xs = tl.load(x_at + first, mask=(m < rows)[None, :] & (first + k < stop)[:, None], other=0.0)  # [BK, BM]
        acc += tl.dot(w, xs, input_precision="ieee" if F32 else "tf32")
    live = (n < out)[:, None] & (m < rows)[None, :]
    at = wide * out + n[:, None]
    last = True
    if CUT:
        tl.store(part + p * rows * out + at, acc, mask=live)
        tl.debug_barrier()  # all threads have stored before one says so
        counter = arrived + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
        if last:
            tl.store(counter, 0)
            acc = tl.zeros([BN, BM], tl.float32)
            for other in range(parts):
                acc += tl.load(part + other * rows * out + at, mask=live, other=0.0, cache_modifier=".cg")
    if last:
        if BIAS:
            acc += tl.load(bias + n, mask=n < out, other=0.0).to(tl.float32)[:, None]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=live)
