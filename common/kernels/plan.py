"""The plan of a decode step from two numbers a sequence, in one kernel and so inside a captured graph.

    rows, positions [B] -> input_ids, positions, slot_mapping, context_lens [B], page_table [B, pages]

Copies the page ids of each context, S/P of them a sequence, and nothing behind. Where pages are spread over ranks
(common/attention/context_table.py) it keeps this rank's: which they are says their number, so that nobody has to tell.
"""

import torch
import triton
import triton.language as tl

from common.kernels.launch import launch, let_next_start, wait_for_previous

BLOCK = 128  # page ids in one go
SPREAD_BLOCK = 1024  # where they are counted as well, and one go has to wait for the one before


def plan_decode(rows, positions, page_table, last_token, pages: int, page_size: int):
    """All int64 on the device -> (input_ids, positions, slot_mapping [B], page_table [B, pages], context_lens [B]).

    A row -1 is padding: token 0, position 0, slot -1, a context of one, on page 0.
    """
    batch = len(rows)
    ids, places, slots, context = torch.empty(4, batch, dtype=torch.int64, device=rows.device)
    table = torch.empty(batch, pages, dtype=torch.int64, device=rows.device)
    launch(
        _plan_decode, (batch,), rows, positions, page_table, last_token, ids, places, slots, table, context,
        page_table.stride(0), pages, P=page_size, BLOCK=BLOCK,
    )  # fmt: skip
    return ids, places, slots, table, context


@triton.jit
def _plan_decode(
    rows, positions, page_table, last_token, ids, places, slots, table, context, table_stride, pages,
    P: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    b = tl.program_id(0).to(tl.int64)
    row, position = tl.load(rows + b), tl.load(positions + b)
    if row < 0:
        tl.store(ids + b, tl.zeros([], tl.int64))
        tl.store(places + b, tl.zeros([], tl.int64))
        tl.store(slots + b, tl.full([], -1, tl.int64))
        tl.store(context + b, tl.full([], 1, tl.int64))
        tl.store(table + b * pages, tl.zeros([], tl.int64))  # some kernels read a page for that one
    else:
        source = page_table + row * table_stride
        tl.store(ids + b, tl.load(last_token + row))
        tl.store(places + b, position)
        tl.store(slots + b, tl.load(source + position // P) * P + position % P)
        tl.store(context + b, position + 1)
        used = position // P + 1
        for first in range(0, used, BLOCK):
            i = first + tl.arange(0, BLOCK)
            tl.store(table + b * pages + i, tl.load(source + i, mask=i < used), mask=i < used)


def plan_spread_decode(rows, positions, page_table, last_token, pages: int, page_size: int, rank: int, ranks: int):
    """As `plan_decode`, for page g on rank g % ranks as its page g // ranks: the slot (-1: another rank's) and the pages of this
    rank, in order, and context_lens [B]: tokens of each sequence on them, the new one included if it is stored here; maybe 0.

    A row -1 is padding: token 0, position 0, slot -1, no context.
    """
    batch = len(rows)
    ids, places, slots, context = torch.empty(4, batch, dtype=torch.int64, device=rows.device)
    table = torch.empty(batch, pages, dtype=torch.int64, device=rows.device)
    launch(
        _plan_spread_decode, (batch,), rows, positions, page_table, last_token, ids, places, slots, table, context,
        page_table.stride(0), pages, P=page_size, RANK=rank, R=ranks, BLOCK=SPREAD_BLOCK, num_warps=8,
    )  # fmt: skip
    return ids, places, slots, table, context


@triton.jit
def _plan_spread_decode(
    rows, positions, page_table, last_token, ids, places, slots, table, context, table_stride, pages,
    P: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    b = tl.program_id(0).to(tl.int64)
    row, position = tl.load(rows + b), tl.load(positions + b)
    if row < 0:
        tl.store(ids + b, tl.zeros([], tl.int64))
        tl.store(places + b, tl.zeros([], tl.int64))
        tl.store(slots + b, tl.full([], -1, tl.int64))
        tl.store(context + b, tl.zeros([], tl.int64))
    else:
        source = page_table + row * table_stride
        tl.store(ids + b, tl.load(last_token + row))
        tl.store(places + b, position)
        last = tl.load(source + position // P)
        mine = last % R == RANK
        tl.store(slots + b, tl.where(mine, last // R * P + position % P, -1))
        used = position // P + 1
        count = tl.zeros([], tl.int32)
        for first in range(0, used, BLOCK):
            i = first + tl.arange(0, BLOCK)
            page = tl.load(source + i, mask=i < used, other=0)
            here = ((i < used) & (page % R == RANK)).to(tl.int32)
            tl.store(table + b * pages + count + tl.cumsum(here, 0) - 1, page // R, mask=here > 0)
            count += tl.sum(here, 0)
        behind = tl.where(mine, P - 1 - position % P, 0)  # empty slots of the last page
        tl.store(context + b, count.to(tl.int64) * P - behind)
