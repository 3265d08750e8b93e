"""Two parts of one attention into one (common/attention/merge.py), in place: each number is read once and written once."""

import torch
import triton
import triton.language as tl

from common.kernels.launch import launch, let_next_start, wait_for_previous


def merge_into(o: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """o [n, H, d] and lse [n, H], float32, become attention over their keys and those of the part. Moves 2 o + part."""
    n, heads, d = o.shape
    launch(
        _merge_into, (n,), o, lse, part, part_lse, o.stride(0), o.stride(1), lse.stride(0), lse.stride(1), part.stride(0),
        part.stride(1), part_lse.stride(0), part_lse.stride(1), H=heads, D=d, BH=triton.next_power_of_2(heads),
        BD=triton.next_power_of_2(d), num_warps=4 if heads * d < 8192 else 8,
    )  # fmt: skip


@triton.jit
def _merge_into(
    o, lse, part, part_lse, o_row, o_head, lse_row, lse_head, part_row, part_head, other_row, other_head, H: tl.constexpr,
    D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    row, h, i = tl.program_id(0).to(tl.int64), tl.arange(0, BH), tl.arange(0, BD)
    live = (h < H)[:, None] & (i < D)[None, :]
    wait_for_previous(PDL)
    a = tl.load(lse + row * lse_row + h * lse_head, mask=h < H, other=0.0)
    b = tl.load(part_lse + row * other_row + h * other_head, mask=h < H, other=0.0).to(tl.float32)
    best = tl.maximum(a, b)
    best = tl.where(best == -float("inf"), 0.0, best)
    wa, wb = tl.exp(a - best), tl.exp(b - best)
    total = wa + wb
    share = tl.where(total == 0, 1.0, total)
    o_at = o + row * o_row + h[:, None] * o_head + i[None, :]
    mine = tl.load(o_at, mask=live, other=0.0)
    theirs = tl.load(part + row * part_row + h[:, None] * part_head + i[None, :], mask=live, other=0.0).to(tl.float32)
    mine = tl.where(
        (wa == 0)[:, None], 0.0, mine * (wa / share)[:, None]
    )  # what stands in an empty part, counts for nothing
    theirs = tl.where((wb == 0)[:, None], 0.0, theirs * (wb / share)[:, None])
    tl.store(o_at, mine + theirs, mask=live)
    tl.store(lse + row * lse_row + h * lse_head, tl.log(total) + best, mask=h < H)
