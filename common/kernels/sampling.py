"""Sampling without sorting: logits [B, V] -> tokens [B], and the same with the rows marked that have none.

    scan        one program a (row, chunk of the vocabulary): its best token, its mass of exp(x / temperature)
    pick        one program a row: the best of all chunks, or the chunk and then the token where the running
                mass crosses u * total
    threshold   only if some row has top-k, top-p or min-p: the value of the worst token it keeps

What top-k, top-p and min-p leave is "every token above t, and the first `quota` tokens equal to t". t is found by
halving, twice a pass, the range of floats in their order: 8 passes over a row for bf16 logits, 16 for float32, all but
the first from the L2 cache. A plain draw reads the logits once from memory, 2 B V bytes for bf16.

The draw is inverse-CDF in the order of the vocabulary, with the same random numbers as on a CPU.

To `scan` a NaN is +inf, so the best value of a row says whether it has a next token: not if it is an infinity.
"""

import torch
import triton
import triton.language as tl

from common.kernels.launch import launch, let_next_start, wait_for_previous

CHUNK = 2048  # tokens a program of `scan` looks at
BLOCK = 32_768  # and one of `threshold` in one go


def sample(logits: torch.Tensor, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [B, V] of any float dtype, `batch` a SamplingBatch -> tokens, drawn [B] int64. Waits for nothing.

    Of a row without a token, tokens has 0 and drawn has NOT_FINITE or ALL_FORBIDDEN (common/sampling/sampler.py).
    """
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    device, chunks = logits.device, triton.cdiv(vocab, CHUNK)
    tokens = torch.empty(2, rows, dtype=torch.int64, device=device)
    best = torch.empty(rows, chunks, dtype=torch.float32, device=device)
    best_at = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    mass, ties = torch.empty_like(best), torch.empty_like(best_at)
    if batch.all_greedy:
        columns, numbers, limit, quota = best, tokens, best, best_at  # not read
    else:
        columns, numbers = batch.columns(device), batch.numbers(device)
        limit, quota = best, best_at
        if batch.truncated:
            limit = torch.empty(rows, dtype=torch.float32, device=device)
            quota = torch.empty(rows, dtype=torch.int32, device=device)
            launch(
                _threshold, (rows,), logits, columns, limit, quota, rows, vocab, logits.stride(0),
                HALF=logits.dtype == torch.bfloat16, BLOCK=BLOCK, num_warps=32,
            )  # fmt: skip
    how = dict(CHUNK=CHUNK, GREEDY=batch.all_greedy, TRUNCATED=batch.truncated)
    launch(
        _scan, (chunks, rows), logits, columns, limit, best, best_at, mass, ties, vocab, chunks, logits.stride(0), **how
    )
    launch(
        _pick, (rows,), logits, columns, numbers, limit, quota, best, best_at, mass, ties, tokens, rows, batch.advanced,
        vocab, chunks, logits.stride(0), CHUNKS=triton.next_power_of_2(chunks), **how,
    )  # fmt: skip
    return tokens[0], tokens[1]


@triton.jit
def _weights(x, top, temperature):
    """exp((x - top) / temperature), in one definition for all passes: they must add up the same numbers."""
    return tl.exp((x - top) / temperature)


@triton.jit
def _scan(
    logits, columns, limit, best, best_at, mass, ties, vocab, chunks, stride,
    CHUNK: tl.constexpr, GREEDY: tl.constexpr, TRUNCATED: tl.constexpr, PDL: tl.constexpr,
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
            if TRUNCATED:
                t = tl.load(limit + row)
                tl.store(ties + here, tl.sum((x == t).to(tl.int32), 0))
                x = tl.where(x > t, x, -float("inf"))
            # relative to the chunk's own best; pick brings the chunks to one scale
            tl.store(mass + here, tl.sum(_weights(x, tl.maximum(top, -1e30), temperature), 0))


@triton.jit
def _uniform(seed, n):
    """The n-th number in [0, 1) of a seed: `uniform` of common/sampling/batch.py."""
    x = seed.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15 + (n + 1).to(tl.uint64, bitcast=True) * 0xD1342543DE82EF95
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 40).to(tl.int32).to(tl.float32) / (1 << 24)


@triton.jit(do_not_specialize=("rows", "advanced"))
def _pick(
    logits, columns, numbers, limit, quota, best, best_at, mass, ties, tokens, rows, advanced, vocab, chunks, stride,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, GREEDY: tl.constexpr, TRUNCATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    bests = tl.load(best + row * chunks + c, mask=c < chunks, other=-float("inf"))
    top, winner = tl.max(bests, 0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(best_at + row * chunks + winner).to(tl.int64)
    if not GREEDY:
        temperature = tl.load(columns + row)
        if temperature > 0:
            masses = tl.load(mass + row * chunks + c, mask=c < chunks, other=0.0)
            masses = tl.where(c < chunks, masses * _weights(bests, top, temperature), 0.0)
            if TRUNCATED:
                t, left = tl.load(limit + row), tl.load(quota + row)
                tie_weight = _weights(t, top, temperature)
                counts = tl.load(ties + row * chunks + c, mask=c < chunks, other=0)
                before = tl.cumsum(counts, 0) - counts
                kept = tl.minimum(tl.maximum(left - before, 0), counts)
                masses += kept.to(tl.float32) * tie_weight
            running = tl.cumsum(masses, 0)
            total = tl.max(running, 0)
            target = _uniform(tl.load(numbers + row), tl.load(numbers + rows + row) + advanced) * total
            # the first chunk whose running mass exceeds the target, and what lies before it
            chunk = tl.min(tl.where((running > target) & (masses > 0), c, CHUNKS), 0)
            chunk = tl.where(chunk < CHUNKS, chunk, tl.max(tl.where(masses > 0, c, 0), 0))
            past = tl.sum(tl.where(c < chunk, masses, 0.0), 0)
            i = tl.arange(0, CHUNK)
            at = chunk * CHUNK + i
            x = tl.load(logits + row * stride + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
            weights = tl.where(at < vocab, _weights(x, top, temperature), 0.0)
            if TRUNCATED:
                tie = x == t
                number = tl.cumsum(tie.to(tl.int32), 0) + tl.sum(tl.where(c < chunk, counts, 0), 0)  # from 1
                weights = tl.where((x > t) | (tie & (number <= left)), weights, 0.0)
            inside = tl.cumsum(weights, 0)
            crossed = (inside > target - past) & (weights > 0)
            first = tl.min(tl.where(crossed, i, CHUNK), 0)
            # rounding may leave the target behind the last token: then it is the last one that can be drawn
            last = tl.max(tl.where(weights > 0, i, 0), 0)
            token = (chunk * CHUNK + tl.where(first < CHUNK, first, last)).to(tl.int64)
    bad = (top == float("inf")) | (top == -float("inf"))
    tl.store(tokens + row, tl.where(bad, 0, token))
    tl.store(tokens + rows + row, tl.where(top == float("inf"), -1, tl.where(bad, -2, token)))


@triton.jit
def _key(x, HALF: tl.constexpr):
    """Floats -> int32 in the same order; a bf16 value in 16 bits, -0 as 0."""
    x = x.to(tl.float32) + 0.0
    bits = x.to(tl.int32, bitcast=True)
    if HALF:
        bits = bits >> 16
    return tl.where(bits < 0, bits ^ (0x7FFF if HALF else 0x7FFFFFFF), bits)


@triton.jit
def _value(key, HALF: tl.constexpr):
    bits = tl.where(key < 0, key ^ (0x7FFF if HALF else 0x7FFFFFFF), key)
    if HALF:
        bits = bits << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _measure(row, vocab, a, b, c, top, temperature, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """For three keys: how many tokens are at or above each, and the mass of those above each."""
    count_a, count_b, count_c = 0, 0, 0
    mass_a, mass_b, mass_c = 0.0, 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = i < vocab
        x = tl.load(row + i, mask=there, other=-float("inf")).to(tl.float32)
        key, weight = _key(x, HALF), _weights(x, top, temperature)
        count_a += tl.sum(((key >= a) & there).to(tl.int32), 0)
        count_b += tl.sum(((key >= b) & there).to(tl.int32), 0)
        count_c += tl.sum(((key >= c) & there).to(tl.int32), 0)
        mass_a += tl.sum(tl.where(key > a, weight, 0.0), 0)
        mass_b += tl.sum(tl.where(key > b, weight, 0.0), 0)
        mass_c += tl.sum(tl.where(key > c, weight, 0.0), 0)
    return count_a, count_b, count_c, mass_a, mass_b, mass_c


@triton.jit
def _middle(low, high):
    """Halfway between two int32, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit(do_not_specialize=("rows",))
def _threshold(
    logits, columns, limit, quota, rows, vocab, stride, HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride
    temperature = tl.load(columns + r)
    top_k = tl.load(columns + rows + r).to(tl.int32)
    top_p, log_min_p = tl.load(columns + 2 * rows + r), tl.load(columns + 3 * rows + r)
    if temperature > 0:
        best = tl.full([BLOCK], -float("inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            i = start + tl.arange(0, BLOCK)
            best = tl.maximum(best, tl.load(row + i, mask=i < vocab, other=-float("inf")).to(tl.float32))
        top = tl.max(best, 0)
        lowest = _key(tl.full([], -float("inf"), tl.float32), HALF)
        t, left = lowest, vocab
        if top_k > 0 and top_k < vocab:
            low, high = lowest, _key(top, HALF) + 1  # count(low) >= k > count(high)
            while low + 1 < high:
                b = _middle(low, high)
                a, c = _middle(low, b), _middle(b, high)
                n_a, n_b, n_c, m_a, m_b, m_c = _measure(row, vocab, a, b, c, top, temperature, HALF, BLOCK)
                low_before = low
                low = tl.where(n_c >= top_k, c, tl.where(n_b >= top_k, b, tl.where(n_a >= top_k, a, low_before)))
                high = tl.where(n_c >= top_k, high, tl.where(n_b >= top_k, c, tl.where(n_a >= top_k, b, a)))
                # with nothing between low and b, a is low itself, and counts as at least top_k
            t = low
            n_a, n_b, n_c, m_a, m_b, m_c = _measure(row, vocab, t + 1, t + 1, t + 1, top, temperature, HALF, BLOCK)
            left = top_k - n_a
        if top_p < 1:
            n_a, n_b, n_c, above, m_b, m_c = _measure(row, vocab, t, t, t, top, temperature, HALF, BLOCK)
            equal = tl.minimum(left, vocab).to(tl.float32) * _weights(_value(t, HALF), top, temperature)
            wanted = top_p * (above + tl.where(t > lowest, equal, 0.0))
            low, high = t - 1, _key(top, HALF)  # mass above `high` < wanted, and of `low` not
            while low + 1 < high:
                b = _middle(low, high)
                a, c = _middle(low, b), _middle(b, high)
                n_a, n_b, n_c, m_a, m_b, m_c = _measure(row, vocab, a, b, c, top, temperature, HALF, BLOCK)
                high_before = high
                # a may be low itself, whose mass is not below `wanted`
                high = tl.where(
                    (m_a < wanted) & (a > low), a, tl.where(m_b < wanted, b, tl.where(m_c < wanted, c, high_before))
                )
                low = tl.where((m_a < wanted) & (a > low), low, tl.where(m_b < wanted, a, tl.where(m_c < wanted, b, c)))
            n_a, n_b, n_c, mass, m_b, m_c = _measure(row, vocab, high, high, high, top, temperature, HALF, BLOCK)
            needed = tl.ceil((wanted - mass) / _weights(_value(high, HALF), top, temperature)).to(tl.int32)
            left = tl.where(high == t, tl.minimum(left, needed), needed)
            left = tl.maximum(left, 1)
            t = high
        # min-p keeps x with (x - top) / temperature >= log(min_p): all ties or none
        floor = top + log_min_p * temperature
        worst = _value(t, HALF)
        if worst < floor:
            smallest = tl.full([BLOCK], float("inf"), tl.float32)
            for start in range(0, vocab, BLOCK):
                i = start + tl.arange(0, BLOCK)
                x = tl.load(row + i, mask=i < vocab, other=-float("inf")).to(tl.float32)
                smallest = tl.minimum(smallest, tl.where((x - top) / temperature >= log_min_p, x, float("inf")))
            worst = tl.min(smallest, 0)
            left = vocab
        tl.store(limit + r, worst)
        tl.store(quota + r, left)
