"""What top-k, top-p and min-p leave of a row: "every token above t, and the first `quota` tokens equal to t".

shortlist   one program a row: the draw of a row whose tokens are all among the best 128 parts of its vocabulary
narrow      one program a (row, chunk), several times, for the others: t is searched for among all floats in their
            order, and a turn leaves a sixteenth of them: 4 turns for bf16 logits, 8 for float32, for top-k and for top-p each
mass_above  one program a (row, chunk), for the same rows: t and quota; the mass above t, and how many tokens are equal to it

A part is 64 tokens, and `scan` has written the best of each. The best 128 of them hold the best 128 tokens: a token outside
has 128 parts before it, each with a token that is better or, if equal, has a lower id. So top-k up to 128 needs no other
token. Nor does top-p if what is above the last part's best is mass enough, nor min-p if that best is below its floor.
Whether it is so depends on the row alone, and so do all sums: a row's token has nothing to do with its company.
"""

import triton
import triton.language as tl

from common.kernels.draws import crossing, key, middle, truncates, uniform, value, weights
from common.kernels.launch import let_next_start, wait_for_previous


@triton.jit
def _lowest(HALF: tl.constexpr):
    """The key of -inf."""
    return key(tl.full([], -float("inf"), tl.float32), HALF)


@triton.jit
def _largest(order, weight, wanted, low, high):
    """The largest key at or above which order [N] has `wanted` of weight [N], or of tokens where that is an int: it
    is in [low, high)."""
    while low + 1 < high:
        m = middle(low, high)
        enough = tl.sum(tl.where(order >= m, weight, 0), 0) >= wanted
        low, high = tl.where(enough, m, low), tl.where(enough, high, m)
    return low


@triton.jit
def _best_parts(part_best, chosen, n, end, KEEP: tl.constexpr, PARTS: tl.constexpr, HALF: tl.constexpr):
    """part_best [n] -> in chosen [KEEP] the numbers of the best parts, in the order of the vocabulary; how many they
    are, and the best key of the worst of them."""
    p, parts = tl.arange(0, PARTS), tl.minimum(n, KEEP)
    order = key(tl.load(part_best + p, mask=p < n, other=-float("inf")), HALF)
    last = _largest(order, tl.full([PARTS], 1, tl.int32), parts, _lowest(HALF), end)
    tie = (order == last) & (p < n)
    free = parts - tl.sum((order > last).to(tl.int32), 0)
    taken = (order > last) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= free))
    tl.store(chosen + tl.cumsum(taken.to(tl.int32), 0) - 1, p, mask=taken)
    tl.debug_barrier()  # all threads have stored before one reads
    return parts, last


@triton.jit
def _needed(wanted, above, t, top, temperature, HALF: tl.constexpr):
    """Of the tokens equal to t, how many top-p keeps: the one that reaches `wanted` stays."""
    return tl.maximum(tl.ceil((wanted - above) / weights(value(t, HALF), top, temperature)).to(tl.int32), 1)


@triton.jit(do_not_specialize=("rows", "advanced"))
def shortlist(
    logits, columns, numbers, best, mass, part_best, chosen, quota, bounds, sums, tokens, rows, advanced, vocab, chunks, stride,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, KEEP: tl.constexpr,
    HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """part_best [rows, chunks * CHUNK / PART] -> tokens [2, rows] and a quota of 0, or where the search begins.

    chosen [rows, KEEP] is this program's own room. bounds and sums: see `narrow`; turn 0 of them.
    """
    let_next_start(PDL)
    wait_for_previous(PDL)
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    if truncates(columns, rows, row):
        temperature, top_k = tl.load(columns + row), tl.load(columns + rows + row).to(tl.int32)
        top_p, log_min_p = tl.load(columns + 2 * rows + row), tl.load(columns + 3 * rows + row)
        top_k = tl.where(top_k < vocab, top_k, 0)
        bests = tl.load(best + row * chunks + c, mask=c < chunks, other=-float("inf"))
        top, left_to_others = tl.max(bests, 0), 0
        if (top > -float("inf")) & (top < float("inf")):  # `pick` marks a row without a token
            n, lowest, end = chunks * (CHUNK // PART), _lowest(HALF), key(top, HALF) + 1
            parts, last = _best_parts(part_best + row * n, chosen + row * KEEP, n, end, KEEP, PARTS, HALF)
            i = tl.arange(0, KEEP * PART)
            at = tl.load(chosen + row * KEEP + i // PART, mask=i // PART < parts, other=n) * PART + i % PART
            x = tl.load(logits + row * stride + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
            order, weight = key(x, HALF), weights(x, top, temperature)
            whole = n <= KEEP
            t, left = tl.where(whole, lowest, last), vocab  # no token above t is missing here
            limited = whole | ((top_k > 0) & (top_k <= KEEP))
            if limited & (top_k > 0):
                one = tl.full([KEEP * PART], 1, tl.int32)
                t = _largest(order, one, top_k, tl.where(top_k <= parts, last, lowest), end)
                left = top_k - tl.sum((order > t).to(tl.int32), 0)
            above = tl.sum(tl.where(order > t, weight, 0.0), 0)
            equal = tl.where(t > lowest, left * weights(value(t, HALF), top, temperature), 0.0)
            masses = tl.load(mass + row * chunks + c, mask=c < chunks, other=0.0) * weights(bests, top, temperature)
            wanted = top_p * tl.where(limited, above + equal, tl.sum(tl.where(c < chunks, masses, 0.0), 0))
            inside = limited | ((top_k == 0) & (top_p < 1) & (above >= wanted))
            settled = inside | ((top_k == 0) & ((value(t, HALF) - top) / temperature < log_min_p))
            if settled:
                if inside & (top_p < 1):
                    worst = _largest(order, weight, wanted, tl.where(limited, t, t + 1), end)
                    above = tl.sum(tl.where(order > worst, weight, 0.0), 0)
                    needed = _needed(wanted, above, worst, top, temperature, HALF)
                    left = tl.where(worst == t, tl.minimum(left, needed), needed)
                    t = worst
                tie = order == t
                kept = (order > t) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= left))
                weight = tl.where(kept & ((x - top) / temperature >= log_min_p), weight, 0.0)
                running = tl.cumsum(weight, 0)
                u = uniform(tl.load(numbers + row), tl.load(numbers + rows + row) + advanced)
                place = crossing(weight, running, u * tl.max(running, 0), KEEP * PART)
                token = tl.sum(tl.where(i == place, at, 0), 0)
                tl.store(tokens + row, token)
                tl.store(tokens + rows + row, token)
            else:
                low, high = lowest, lowest + 1
                if top_k > 0:
                    low, high, above, wanted = lowest, end, 0.0, top_k.to(tl.float32)
                elif top_p < 1:
                    # all tokens below this float have a third of what top-p leaves out, at most
                    least = top - temperature * (tl.log(vocab / (1 - top_p)) + 1)
                    low = tl.minimum(tl.maximum(key(least - tl.abs(least) / 64, HALF), lowest), last)
                    high = last + 1
                _keep_bracket(bounds, sums, rows, row, 0, low, high, lowest, vocab, above, wanted)
                left_to_others = vocab
        tl.store(quota + row, left_to_others)


@triton.jit
def _width(low, high):
    """Of the sixteen parts that [low, high) is cut into, rounded up."""
    return ((high - low).to(tl.uint32, bitcast=True) + 15) // 16


@triton.jit
def _keep_bracket(bounds, sums, rows, row, turn, low, high, t, left, above, wanted):
    ints, floats = bounds + 4 * turn * rows + row, sums + 2 * turn * rows + row
    tl.store(ints, low)
    tl.store(ints + rows, high)
    tl.store(ints + 2 * rows, t)
    tl.store(ints + 3 * rows, left)
    tl.store(floats, above)
    tl.store(floats + rows, wanted)


@triton.jit
def _bracket(
    columns, bounds, sums, measures, rows, row, vocab, chunks, turn, mass_from, top, CHUNKS: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Where a row's search stands before a turn: low, high, t, left, above, wanted.

    The key looked for is in [low, high): what the tokens from `low` on measure is enough, and what those from `high` on
    do, `above`, is less than `wanted`. t and left are what top-k leaves, once the turn is mass_from.
    """
    ints, floats = bounds + 4 * turn * rows + row, sums + 2 * turn * rows + row
    low, high, t, left = tl.load(ints), tl.load(ints + rows), tl.load(ints + 2 * rows), tl.load(ints + 3 * rows)
    above, wanted = tl.load(floats), tl.load(floats + rows)
    top_k, top_p = tl.load(columns + rows + row).to(tl.int32), tl.load(columns + 2 * rows + row)
    has_k = (top_k > 0) & (top_k < vocab)
    if (turn > 0) & (((turn <= mass_from) & has_k) | ((turn > mass_from) & (top_p < 1))):
        c, j = tl.arange(0, CHUNKS), tl.arange(0, 16)
        at = (turn * rows + row) * chunks * 16 + c[:, None] * 16 + j[None, :]
        measured = tl.sum(tl.load(measures + at, mask=(c < chunks)[:, None] & (j >= 0)[None, :], other=0.0), 0)
        if has_k & (turn == mass_from + 1):
            equal = tl.where(t > _lowest(HALF), left * weights(value(t, HALF), top, tl.load(columns + row)), 0.0)
            wanted = top_p * (tl.sum(tl.where(j == 15, measured, 0.0), 0) + equal)
        width = _width(low, high).to(tl.int32)
        passed = tl.sum(((j < 15) & (measured >= wanted)).to(tl.int32), 0)
        end = low + (passed + 1) * width
        nearer = (passed < 15) & (end < high)
        above = tl.where(nearer, tl.sum(tl.where(j == passed, measured, 0.0), 0), above)
        high = tl.where(nearer, end, high)
        low += passed * width
    if has_k & (turn == mass_from):  # the k-th best token is found: from here on, of those that it leaves, the mass
        t, left = low, top_k - above.to(tl.int32)
        high, above = key(top, HALF) + 1, 0.0
    return low, high, t, left, above, wanted


@triton.jit(do_not_specialize=("rows", "turn", "mass_from"))
def narrow(
    logits, columns, quota, best, bounds, sums, measures, rows, vocab, chunks, stride, turn, mass_from,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One turn of the search. bounds [turns, 4, rows], sums [turns, 2, rows], measures [turns, rows, chunks, 16]."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    chunk, row, c = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, CHUNKS)
    if truncates(columns, rows, row) & (tl.load(quota + row) > 0):
        top = tl.max(tl.load(best + row * chunks + c, mask=c < chunks, other=-float("inf")), 0)
        low, high, t, left, above, wanted = _bracket(
            columns, bounds, sums, measures, rows, row, vocab, chunks, turn, mass_from, top, CHUNKS, HALF
        )
        if chunk == 0:
            _keep_bracket(bounds, sums, rows, row, turn + 1, low, high, t, left, above, wanted)
        i = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * stride + i, mask=i < vocab, other=-float("inf"))
        order, there = key(x, HALF), i < vocab
        weight = tl.where(there, 1.0, 0.0)
        if turn >= mass_from:
            weight = tl.where(there, weights(x.to(tl.float32), top, tl.load(columns + row)), 0.0)
        here = measures + (((turn + 1) * rows + row) * chunks + chunk) * 16
        width = _width(low, high).to(tl.int32)
        for j in tl.static_range(15):
            tl.store(here + j, tl.sum(tl.where(order >= low + (j + 1) * width, weight, 0.0), 0))
        tl.store(here + 15, tl.sum(tl.where(order > low, weight, 0.0), 0))


@triton.jit(do_not_specialize=("rows", "turn", "mass_from"))
def mass_above(
    logits, columns, limit, quota, best, bounds, sums, measures, mass, ties, rows, vocab, chunks, stride, turn, mass_from,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    chunk, row, c = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, CHUNKS)
    if truncates(columns, rows, row) & (tl.load(quota + row) > 0):
        top = tl.max(tl.load(best + row * chunks + c, mask=c < chunks, other=-float("inf")), 0)
        low, high, t, left, above, wanted = _bracket(
            columns, bounds, sums, measures, rows, row, vocab, chunks, turn, mass_from, top, CHUNKS, HALF
        )
        temperature, log_min_p = tl.load(columns + row), tl.load(columns + 3 * rows + row)
        if tl.load(columns + 2 * rows + row) < 1:
            needed = _needed(wanted, above, low, top, temperature, HALF)
            left = tl.where(low == t, tl.minimum(left, needed), needed)
            t = low
        if (value(t, HALF) - top) / temperature < log_min_p:  # all ties or none
            high = key(top, HALF)
            while t + 1 < high:
                m = middle(t, high)
                fails = (value(m, HALF) - top) / temperature < log_min_p
                t, high = tl.where(fails, m, t), tl.where(fails, high, m)
            t, left = high, vocab
        worst, here = value(t, HALF), row * chunks + chunk
        if chunk == 0:
            tl.store(limit + row, worst)
            tl.store(quota + row, left)  # not 0 before, and not 0 now
        i = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * stride + i, mask=i < vocab, other=-float("inf")).to(tl.float32)
        tl.store(ties + here, tl.sum((x == worst).to(tl.int32), 0))
        x = tl.where(x > worst, x, -float("inf"))
        tl.store(mass + here, tl.sum(weights(x, tl.maximum(tl.load(best + here), -1e30), temperature), 0))
