"""All-reduce of a small message in one kernel and one trip over NVLink.

    push   one program a BLOCK of 32-bit words (two bfloat16 or one float32): writes its words into every other
           rank's inbox, waits until theirs are in its own, adds up in the order of the ranks

A word travels with the number of its round in one 64-bit store, which arrives whole or not at all: who finds the number
has the word, so there is no flag, no fence and no second trip to say that all is there. That doubles
the bytes, 2 (R - 1) n out of each rank for a message of n, and halves the latency (NCCL's "LL" protocol).

An inbox has two sides, for odd and even rounds. Nobody can be two rounds ahead, since each round needs everybody's
words; so the side that is written is never one that somebody still reads, and the ranks need not meet twice.
"""

import torch
import triton
import triton.language as tl

from common.kernels.launch import launch, let_next_start, wait_for_previous

BLOCK = 512


def push(x: torch.Tensor, inboxes: torch.Tensor, rounds: torch.Tensor, rank: int, size: int, room: int) -> torch.Tensor:
    """x of any shape, contiguous, 4n bytes -> the sum over ranks.

    inboxes [R] int64: where each rank's inbox [2, R, room] int64 begins; rounds [room / BLOCK] int32 of this rank.
    """
    y = torch.empty_like(x)
    words = x.numel() * x.element_size() // 4
    launch(
        _push, (triton.cdiv(words, BLOCK),), x.view(-1).view(torch.int32), y.view(-1).view(torch.int32), inboxes, rounds,
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
            low += (word << 16).to(tl.float32, bitcast=True)
            high += (word & -65536).to(tl.float32, bitcast=True)
        else:
            low += word.to(tl.float32, bitcast=True)
    if HALF:
        low_bits = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high_bits = high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
        tl.store(y + i, low_bits | high_bits, mask=live)
    else:
        tl.store(y + i, low.to(tl.int32, bitcast=True), mask=live)
    tl.store(rounds + b, number)
