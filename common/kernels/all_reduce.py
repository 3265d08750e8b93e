"""All-reduce of a small message in one kernel and one trip over NVLink; and an all-gather whose parts become one at once.

    push            one program a BLOCK of 32-bit words (two bfloat16 or one float32): writes its words into every other
                    rank's inbox, waits until theirs are in its own, adds up in the order of the ranks
    push_add_norm   one program a row: the same, and then the residual is added and the row normed, before anything is written
    push_merge      one program a few heads: the same with what each rank's attention says of its keys; they are not added up but
                    merged by their log-sum-exps (merge.py)

A word travels with the number of its round in one 64-bit store, which arrives whole or not at all: who finds the number
has the word, so there is no flag, no fence and no second trip to say that all is there. That doubles
the bytes, 2 (R - 1) n out of each rank for a message of n, and halves the latency (NCCL's "LL" protocol).

An inbox has two sides, for odd and even rounds. Nobody can be two rounds ahead, since each round needs everybody's
words; so the side that is written is never one that somebody still reads, and the ranks need not meet twice.
"""

import torch
import triton
import triton.language as tl

from common.kernels.launch import cdiv, launch, let_next_start, next_power_of_2, wait_for_previous
from common.kernels.merge import HEADS, Answers, shares

BLOCK = 512


def push(x: torch.Tensor, inboxes: torch.Tensor, rounds: torch.Tensor, rank: int, size: int, room: int) -> torch.Tensor:
    """x of any shape, contiguous, 4n bytes -> the sum over ranks.

    inboxes [R] int64: where each rank's inbox [2, R, room] int64 begins; rounds [room / BLOCK] int32 of this rank.
    """
    y = torch.empty_like(x)
    words = x.numel() * x.element_size() // 4
    launch(
        _push, (cdiv(words, BLOCK),), x.view(-1).view(torch.int32), y.view(-1).view(torch.int32), inboxes, rounds,
        words, RANK=rank, R=size, ROOM=room, HALF=x.dtype == torch.bfloat16, BLOCK=BLOCK,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=("words",))
def _push(
    x, y, inboxes, rounds, words, RANK: tl.constexpr, R: tl.constexpr, ROOM: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    b = tl.program_id(0)
    i = b * BLOCK + tl.arange(0, BLOCK)
    live = i < words
    wait_for_previous(PDL)
    number = tl.load(rounds + b) + 1
    low, high = _exchanged(x, i, live, number, inboxes, RANK, R, ROOM, HALF, BLOCK)
    if HALF:
        tl.store(y + i, _packed(low.to(tl.bfloat16), high.to(tl.bfloat16)), mask=live)
    else:
        tl.store(y + i, low.to(tl.int32, bitcast=True), mask=live)
    tl.store(rounds + b, number)


@triton.jit
def _exchanged(
    x, i, live, number, inboxes, RANK: tl.constexpr, R: tl.constexpr, ROOM: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of words i of x over all ranks, float32: of the lower and the upper halves, or of the words (then high is 0)."""
    side = (number & 1) * R
    mine = tl.load(x + i, mask=live, other=0)
    letter = (mine.to(tl.int64) << 32) | (number.to(tl.int64) & 0xFFFFFFFF)
    for r in tl.static_range(R):
        if r != RANK:
            there = tl.load(inboxes + r).to(tl.pointer_type(tl.int64))
            tl.store(there + (side + RANK) * ROOM + i, letter, mask=live)
    inbox = tl.load(inboxes + RANK).to(tl.pointer_type(tl.int64))
    low, high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for r in tl.static_range(R):
        word = mine
        if r != RANK:
            at = inbox + (side + r) * ROOM + i
            letter = tl.load(at, mask=live, other=0, volatile=True)
            while tl.max(((letter.to(tl.int32) != number) & live).to(tl.int32), 0) > 0:
                letter = tl.load(at, mask=live, other=0, volatile=True)
            word = (letter >> 32).to(tl.int32)
        if HALF:
            a, b = _halves(word)
            low += a
            high += b
        else:
            low += word.to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _packed(low, high):
    """Two bfloat16 -> one word."""
    low_bits = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low_bits | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _halves(word):
    """One word -> two bfloat16, as float32."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


def push_add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, inboxes: torch.Tensor, rounds: torch.Tensor,
    rank: int, size: int, room: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [T, D] partial on each rank, residual [T, D] -> (norm(sum + residual), sum + residual), both [T, D].

    inboxes, room: as in `push`, but of its own, and for one D: rounds [most rows] int32 are counted row by row.
    """
    y, total = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[1] * x.element_size() // 4
    block = next_power_of_2(width)
    words = [one.view(torch.int32) for one in (x, residual, weight, y, total)]
    launch(
        _push_add_norm, (len(x),), *words, eps, inboxes, rounds, RANK=rank, R=size, ROOM=room, D=x.shape[1], W=width,
        HALF=x.dtype == torch.bfloat16, BLOCK=block, num_warps=min(max(block // 128, 1), 16),
    )  # fmt: skip
    return y, total


@triton.jit
def _push_add_norm(
    x, residual, weight, y, total, eps, inboxes, rounds, RANK: tl.constexpr, R: tl.constexpr, ROOM: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    live = j < W
    w = tl.load(weight + j, mask=live, other=0)
    wait_for_previous(PDL)
    i = row * W + j
    number = tl.load(rounds + row) + 1
    before = tl.load(residual + i, mask=live, other=0)
    low, high = _exchanged(x, i, live, number, inboxes, RANK, R, ROOM, HALF, BLOCK)
    if HALF:  # rounded where a sum of its own, and an addition of its own, would be
        a, b = _halves(before)
        new_low = (low.to(tl.bfloat16).to(tl.float32) + a).to(tl.bfloat16)
        new_high = (high.to(tl.bfloat16).to(tl.float32) + b).to(tl.bfloat16)
        tl.store(total + i, _packed(new_low, new_high), mask=live)
        low, high = new_low.to(tl.float32), new_high.to(tl.float32)
        scale = tl.rsqrt(tl.sum(low * low + high * high, 0) / D + eps)
        a, b = _halves(w)
        tl.store(y + i, _packed((low * scale * a).to(tl.bfloat16), (high * scale * b).to(tl.bfloat16)), mask=live)
    else:
        low += before.to(tl.float32, bitcast=True)
        tl.store(total + i, low.to(tl.int32, bitcast=True), mask=live)
        scale = tl.rsqrt(tl.sum(low * low, 0) / D + eps)
        tl.store(y + i, (low * scale * w.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True), mask=live)
    tl.store(rounds + row, number)


def letters(answers: Answers) -> int:
    """Room that `push_merge` needs in an inbox for one rank's."""
    batch, heads, d = answers.o.shape
    return cdiv(batch * heads, HEADS) * HEADS * (d * answers.o.element_size() // 4 + 1)


def push_merge(
    answers: Answers, inboxes: torch.Tensor, rounds: torch.Tensor, rank: int, size: int, room: int
) -> torch.Tensor:
    """answers of this rank, bfloat16 or float32 -> attention over the keys of all ranks [B, H, d]; 0 where nobody has any.

    inboxes, room: as in `push`, but of its own, and for heads of one size: rounds [most B H / HEADS] int32 are counted by program.
    room is a multiple of 16, so that two letters are one store and one load, each half of which is whole (as in NCCL's LL).
    """
    o, mine = torch.empty(answers.o.shape, dtype=answers.o.dtype, device=answers.o.device), answers.words
    width, rows = o.shape[2] * o.element_size() // 4, answers.lse.numel()
    launch(
        _push_merge, (cdiv(rows, HEADS),), mine, mine[answers.first :], o.view(-1).view(torch.int32), inboxes, rounds, rows,
        RANK=rank, R=size, RP=next_power_of_2(size), ROOM=room, W=width, BW=next_power_of_2(width), BH=HEADS,
        HALF=o.dtype == torch.bfloat16,
    )  # fmt: skip
    return o


@triton.jit(do_not_specialize=("rows",))
def _push_merge(
    answers, lse, o, inboxes, rounds, rows, RANK: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, ROOM: tl.constexpr,
    W: tl.constexpr, BW: tl.constexpr, BH: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    b, r, i, j = tl.program_id(0), tl.arange(0, RP), tl.arange(0, BH), tl.arange(0, BW)
    known = b * BH + i < rows  # [BH]
    live = known[:, None] & (j < W)[None, :]  # [BH, BW]
    at = (b * BH + i)[:, None] * W + j[None, :]
    place = (
        b * (BH * (W + 1)) + i[:, None] * W + j[None, :]
    )  # in an inbox: the words of o, and behind them those of lse
    behind = b * (BH * (W + 1)) + BH * W + i
    wait_for_previous(PDL)
    number = tl.load(rounds + b) + 1
    mine = tl.load(answers + at, mask=live, other=0)
    my_sums = tl.load(lse + b * BH + i, mask=known, other=0)
    side, stamp = (number & 1) * R, number.to(tl.int64) & 0xFFFFFFFF
    for other in tl.static_range(R):
        if other != RANK:
            there = tl.multiple_of(tl.load(inboxes + other).to(tl.pointer_type(tl.int64)), 16) + (side + RANK) * ROOM
            tl.store(there + place, (mine.to(tl.int64) << 32) | stamp, mask=live)
            tl.store(there + behind, (my_sums.to(tl.int64) << 32) | stamp, mask=known)
    inbox = tl.multiple_of(tl.load(inboxes + RANK).to(tl.pointer_type(tl.int64)), 16) + side * ROOM
    others = (r < R) & (r != RANK)
    awaited = others[:, None] & known[None, :]  # [RP, BH]
    all_awaited = others[:, None, None] & live[None, :, :]  # [RP, BH, BW]
    sums_at, words_at = inbox + r[:, None] * ROOM + behind[None, :], inbox + r[:, None, None] * ROOM + place[None, :, :]
    words = tl.load(words_at, mask=all_awaited, other=0, volatile=True)  # of all ranks at once: one wait, not R - 1
    sums = tl.load(sums_at, mask=awaited, other=0, volatile=True)
    while tl.max(((words.to(tl.int32) != number) & all_awaited).to(tl.int32)) > 0:
        words = tl.load(words_at, mask=all_awaited, other=0, volatile=True)
    while tl.max(((sums.to(tl.int32) != number) & awaited).to(tl.int32)) > 0:
        sums = tl.load(sums_at, mask=awaited, other=0, volatile=True)
    here = (r == RANK)[:, None]
    told = tl.where(here, my_sums[None, :], (sums >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    share = shares(tl.where((r < R)[:, None], told, -float("inf")))[:, :, None]
    word = tl.where(here[:, :, None], mine[None, :, :], (words >> 32).to(tl.int32))
    if HALF:
        low, high = _halves(word)
        low, high = tl.sum(low * share, 0), tl.sum(high * share, 0)
        tl.store(o + at, _packed(low.to(tl.bfloat16), high.to(tl.bfloat16)), mask=live)
    else:
        whole = tl.sum(word.to(tl.float32, bitcast=True) * share, 0)
        tl.store(o + at, whole.to(tl.int32, bitcast=True), mask=live)
    tl.store(rounds + b, number)
