"""Parts of one attention become one (common/attention/merge.py); each number is read once and written once.

merge_into       two parts, in place
merge_answers    those of all ranks, as an all-gather has brought them; all_reduce.py has a kernel that brings them itself
"""

import torch
import triton
import triton.language as tl

from common.kernels.launch import cdiv, launch, let_next_start, next_power_of_2, wait_for_previous


def merge_into(o: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """o [n, H, d] and lse [n, H], float32, become attention over their keys and those of the part. Moves 2 o + part."""
    n, heads, d = o.shape
    launch(
        _merge_into, (n,), o, lse, part, part_lse, o.stride(0), o.stride(1), lse.stride(0), lse.stride(1), part.stride(0),
        part.stride(1), part_lse.stride(0), part_lse.stride(1), H=heads, D=d, BH=next_power_of_2(heads),
        BD=next_power_of_2(d), num_warps=4 if heads * d < 8192 else 8,
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


HEADS = 4  # of a program that merges answers
ALIGNED = 16  # words that o, and a rank's message, are filled up to: loads of four words, whatever the batch


class Answers:
    """What a rank has to say of a decode step, in one tensor of 32-bit words: o like q [B, H, d], then lse [B, H] float32."""

    def __init__(self, q: torch.Tensor):
        rows = q.shape[0] * q.shape[1]
        first = _aligned(cdiv(q.numel() * q.element_size(), 4))
        self.words = torch.empty(first + _aligned(rows), dtype=torch.int32, device=q.device)
        self.first = first  # word of lse
        self.o = self.words[:first].view(q.dtype)[: q.numel()].view(q.shape)
        self.lse = self.words[first:].view(torch.float32)[:rows].view(q.shape[:2])


def _aligned(words: int) -> int:
    return cdiv(words, ALIGNED) * ALIGNED


def merge_answers(parts: torch.Tensor, like: Answers) -> torch.Tensor:
    """parts [R * n] int32, the words of all ranks -> attention over the keys of all [B, H, d]; 0 where nobody has any."""
    (batch, heads, d), dtype, n = like.o.shape, like.o.dtype, len(like.words)
    o, size = torch.empty(like.o.shape, dtype=dtype, device=parts.device), len(parts) // n
    launch(
        _merge_answers, (cdiv(batch * heads, HEADS),), parts.view(dtype), parts[like.first :].view(torch.float32), o,
        batch * heads, n * 4 // dtype.itemsize, n, R=size, RP=next_power_of_2(size), D=d,
        BD=next_power_of_2(d), BH=HEADS,
    )  # fmt: skip
    return o


@triton.jit(do_not_specialize=("rows",))
def _merge_answers(
    parts, lse, o, rows, o_stride, lse_stride, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    r, h, i = tl.arange(0, RP), tl.program_id(0) * BH + tl.arange(0, BH), tl.arange(0, BD)
    known = (r < R)[:, None] & (h < rows)[None, :]  # [RP, BH]
    live = (h < rows)[:, None] & (i < D)[None, :]  # [BH, BD]
    at = h[:, None] * D + i[None, :]
    wait_for_previous(PDL)
    sums = tl.load(lse + r[:, None] * lse_stride + h[None, :], mask=known, other=-float("inf"))
    there = parts + r[:, None, None] * o_stride + at[None, :, :]
    values = tl.load(there, mask=known[:, :, None] & live[None, :, :], other=0.0).to(tl.float32)
    tl.store(o + at, tl.sum(values * shares(sums)[:, :, None], 0).to(o.dtype.element_ty), mask=live)


@triton.jit
def shares(lse):
    """Log-sum-exps of parts [parts, n] -> what each weighs; 0 for one without keys, and all of them where none has any."""
    best = tl.max(lse, 0)
    weights = tl.exp(lse - tl.where(best == -float("inf"), 0.0, best)[None, :])
    total = tl.sum(weights, 0)
    return weights / tl.where(total == 0, 1.0, total)[None, :]
