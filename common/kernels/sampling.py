"""Sampling without sorting: logits [B, V] -> tokens [B], and the same with the rows marked that have none.

    scan        one program a (row, chunk of the vocabulary): its best token, its mass of exp(x / temperature)
    pick        one program a row: the best of all chunks, or the chunk and then the token where the running
                mass crosses u * total

and between the two, only if some row has top-k, top-p or min-p, what truncation.py does for these rows: `shortlist`
draws their tokens itself, and what it cannot is limited before `pick`. A plain draw reads the logits once from
memory, 2 B V bytes for bf16.

The draw is inverse-CDF in the order of the vocabulary, with the same random numbers as on a CPU. A row goes the same
way in any batch.

To `scan` a NaN is +inf, so the best value of a row says whether it has a next token: not if it is an infinity.
"""

import torch
import triton
import triton.language as tl

from common.kernels.draws import crossing, truncates, uniform, weights
from common.kernels.launch import cdiv, launch, let_next_start, next_power_of_2, wait_for_previous
from common.kernels.truncation import mass_above, narrow, shortlist

CHUNK = 2048  # tokens a program of `scan` looks at
PART = 64  # tokens that `shortlist` takes or leaves together
KEEP = 128  # parts that it takes
SHORTLIST_WARPS, NARROW_WARPS = 8, 4


def sample(logits: torch.Tensor, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [B, V] of any float dtype, `batch` a SamplingBatch -> tokens, drawn [B] int64. Waits for nothing.

    Of a row without a token, tokens has 0 and drawn has NOT_FINITE or ALL_FORBIDDEN (common/sampling/sampler.py).
    """
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    device, chunks, stride = logits.device, cdiv(vocab, CHUNK), logits.stride(0)
    tokens = torch.empty(2, rows, dtype=torch.int64, device=device)
    best = torch.empty(rows, chunks, dtype=torch.float32, device=device)
    best_at = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    mass, ties = torch.empty_like(best), torch.empty_like(best_at)
    columns, numbers, part_best, limit, quota = best, tokens, best, best, best_at  # not read, unless
    if not batch.all_greedy:
        columns, numbers = batch.columns(device), batch.numbers(device)
    if batch.truncated:
        part_best = torch.empty(rows, chunks * (CHUNK // PART), dtype=torch.float32, device=device)
    launch(
        _scan, (chunks, rows), logits, columns, best, best_at, mass, part_best, rows, vocab, chunks, stride,
        CHUNK=CHUNK, PART=PART, GREEDY=batch.all_greedy,
    )  # fmt: skip
    if batch.truncated:
        limit, quota = _truncate(logits, batch, columns, numbers, best, mass, ties, part_best, tokens)
    launch(
        _pick, (rows,), logits, columns, numbers, limit, quota, best, best_at, mass, ties, tokens, rows, batch.advanced,
        vocab, chunks, stride, CHUNKS=next_power_of_2(chunks), CHUNK=CHUNK, GREEDY=batch.all_greedy,
    )  # fmt: skip
    return tokens[0], tokens[1]


def _truncate(
    logits, batch, columns, numbers, best, mass, ties, part_best, tokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """limit [B] float32 and quota [B] int32 of the rows with top-k, top-p or min-p; mass and ties of what they leave.

    A quota of 0: `tokens` has the row's token already.
    """
    (rows, vocab), chunks, device = logits.shape, best.shape[1], logits.device
    half, padded, stride = logits.dtype == torch.bfloat16, next_power_of_2(chunks), logits.stride(0)
    # which searches there may be: for the k-th best token, for the one where the mass reaches top-p
    turns_each = 4 if half else 8  # 16 ** 4 keys, and 16 ** 8
    mass_from = turns_each * (batch.largest_top_k > KEEP)
    turns = mass_from + turns_each * (batch.widest_top_p > KEEP)
    limit = torch.empty(rows, dtype=torch.float32, device=device)
    quota = torch.empty(rows, dtype=torch.int32, device=device)
    chosen = torch.empty(rows, KEEP, dtype=torch.int32, device=device)
    bounds = torch.empty(turns + 1, 4, rows, dtype=torch.int32, device=device)
    sums = torch.empty(turns + 1, 2, rows, dtype=torch.float32, device=device)
    launch(
        shortlist, (rows,), logits, columns, numbers, best, mass, part_best, chosen, quota, bounds, sums, tokens, rows,
        batch.advanced, vocab, chunks, stride, CHUNKS=padded, CHUNK=CHUNK, PART=PART, PARTS=padded * (CHUNK // PART),
        KEEP=KEEP, HALF=half, num_warps=SHORTLIST_WARPS,
    )  # fmt: skip
    if batch.most_kept > KEEP and part_best.shape[1] > KEEP:
        measures = torch.empty(turns + 1, rows, chunks, 16, dtype=torch.float32, device=device)
        how = dict(CHUNKS=padded, CHUNK=CHUNK, HALF=half, num_warps=NARROW_WARPS)
        search = (bounds, sums, measures)
        for turn in range(turns):
            launch(
                narrow, (chunks, rows), logits, columns, quota, best, *search, rows, vocab, chunks, stride, turn,
                mass_from, **how,
            )  # fmt: skip
        launch(
            mass_above, (chunks, rows), logits, columns, limit, quota, best, *search, mass, ties, rows, vocab, chunks,
            stride, turns, mass_from, **how,
        )  # fmt: skip
    return limit, quota


@triton.jit(do_not_specialize=("rows",))
def _scan(
    logits, columns, best, best_at, mass, part_best, rows, vocab, chunks, stride,
    CHUNK: tl.constexpr, PART: tl.constexpr, GREEDY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + i, mask=i < vocab, other=-float("inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)  # noqa: PLR0124, only a NaN differs from itself
    top, at = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    here = row * chunks + chunk
    tl.store(best + here, top)
    tl.store(best_at + here, chunk * CHUNK + at)
    if not GREEDY:
        temperature = tl.load(columns + row)
        if temperature > 0:
            # relative to the chunk's own best; pick brings the chunks to one scale
            tl.store(mass + here, tl.sum(weights(x, tl.maximum(top, -1e30), temperature), 0))
            if truncates(columns, rows, row):
                parts = tl.max(tl.reshape(x, (CHUNK // PART, PART)), 1)
                tl.store(part_best + here * (CHUNK // PART) + tl.arange(0, CHUNK // PART), parts)


@triton.jit(do_not_specialize=("rows", "advanced"))
def _pick(
    logits, columns, numbers, limit, quota, best, best_at, mass, ties, tokens, rows, advanced, vocab, chunks, stride,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, GREEDY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    bests = tl.load(best + row * chunks + c, mask=c < chunks, other=-float("inf"))
    top, winner = tl.max(bests, 0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(best_at + row * chunks + winner).to(tl.int64)
    bad = (top == float("inf")) | (top == -float("inf"))
    t, left = tl.full([], -float("inf"), tl.float32), tl.full([], 1, tl.int32)
    if not GREEDY:
        temperature = tl.load(columns + row)
        limited = truncates(columns, rows, row) & (bad == 0)
        t = tl.load(limit + row, mask=limited, other=-float("inf"))
        left = tl.load(quota + row, mask=limited, other=1)  # 0: the token is drawn already
        if (temperature > 0) & (left > 0):
            masses = tl.load(mass + row * chunks + c, mask=c < chunks, other=0.0)
            masses = tl.where(c < chunks, masses * weights(bests, top, temperature), 0.0)
            counts = tl.load(ties + row * chunks + c, mask=c < chunks, other=0)
            counts = tl.where(t > -float("inf"), counts, 0)  # else nobody has counted
            before = tl.cumsum(counts, 0) - counts
            kept = tl.minimum(tl.maximum(left - before, 0), counts)
            masses += kept.to(tl.float32) * weights(t, top, temperature)
            running = tl.cumsum(masses, 0)
            u = uniform(tl.load(numbers + row), tl.load(numbers + rows + row) + advanced)
            target = u * tl.max(running, 0)
            # the first chunk whose running mass exceeds the target, and what lies before it
            chunk = crossing(masses, running, target, CHUNKS)
            past = tl.sum(tl.where(c < chunk, masses, 0.0), 0)
            i = tl.arange(0, CHUNK)
            at = chunk * CHUNK + i
            x = tl.load(logits + row * stride + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
            tie = x == t
            number = tl.cumsum(tie.to(tl.int32), 0) + tl.sum(tl.where(c < chunk, counts, 0), 0)  # from 1
            mine = (at < vocab) & ((x > t) | (tie & (number <= left)))
            inside = tl.where(mine, weights(x, top, temperature), 0.0)
            token = (chunk * CHUNK + crossing(inside, tl.cumsum(inside, 0), target - past, CHUNK)).to(tl.int64)
    if left > 0:
        tl.store(tokens + row, tl.where(bad, 0, token))
        tl.store(tokens + rows + row, tl.where(top == float("inf"), -1, tl.where(bad, -2, token)))
