"""y = x W^T for a handful of rows: what decode does with every weight matrix of the model.

One to four rows of x are read from cache, W [out/R, in/R] once from memory: out * in numbers, and two operations
for each. Memory bandwidth is the whole cost, and a GEMM library tuned for tiles of 64 rows and more leaves
some of it unused. Weights are never written, so their first tile is on its way before the previous kernel ends.
"""

import torch
import triton
import triton.language as tl

from common.kernels.launch import launch, let_next_start, wait_for_previous

MAX_ROWS = 4


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in/R], T <= MAX_ROWS -> [T, out/R]."""
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
