"""The plan of a decode step from two numbers a sequence, in one kernel and so inside a captured graph.

    rows, positions [B] -> input_ids, positions, slot_mapping, context_lens [B], page_table [B, pages]

Copies the page ids of each context, S/P of them a sequence, and nothing behind.
"""

import torch
import triton
import triton.language as tl

from common.kernels.launch import launch, let_next_start, wait_for_previous

BLOCK = 128  # page ids in one go


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
