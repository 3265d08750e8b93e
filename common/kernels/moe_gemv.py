"""A mixture for one token, or up to TOKENS: each of its k experts is a matrix times a vector, two launches (more: moe.py).

    _gate_up   one program a (pair, `rows` of F): a row of x times gate and up of the pair's expert, SwiGLU, times the
               router's weight
    _down      one program a (token, `rows` of D): the rows of w2 of all k experts times what `_gate_up` left, one sum

A pair is token * k + choice. Through the tensor cores one token fills one row of the 16 that they take at least; here products run
on the ordinary cores, a program is small and has all its loads on their way at once, and enough programs share a processor to hide
how long they take: what is left is 3 F D numbers of each expert that was chosen. h [k, F] is written once and read from the L2
cache; the k rows of D columns that are added up never leave a program. Pairs of several tokens go through W side by side, so that
an expert that two of them chose comes from memory once.

The expert that all tokens visit, where a model has one as wide as m of the others, goes along: its columns are m experts more,
with matrices of their own, and a token has k + m slots. By itself it takes three launches (gate and up, SwiGLU, down) for the
same bytes. One token of DeepSeek-V2-Lite: 6 + 2 slots of 1408, 138 MB, 46 us at 3.0 TB/s.

What waits for what. Which rows of the shared expert are read, no router says. So its programs are the first of `_gate_up`, and
have a turn of gate and up on its way while the router's launches run. `_down` reads nothing of `_gate_up`'s but h, and rows of
w2 are most of what it reads. So it asks for them before it waits, while the last programs of `_gate_up` run (launch.py). Which
rows, it knows from the router, whose kernel has ended by then: `_gate_up` lets it start only after its own wait. The experts
are read past the L1 cache, which may hold those of a layer before.

Sums are float32 in a fixed order, without atomics: two runs are equal bit for bit. A number of y is summed over the slots of a
column first (k choices, and the shared expert's m), then over turns of columns, then over the columns of a turn. h is rounded
once to x's dtype, after the router's weight or the shared expert's factor; the sum once, with the shared expert in it, which by
itself would be rounded before it is added. A pair with expert -1 adds nothing, and of its weights none is read.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from common.kernels.launch import cdiv, launch, let_next_start, next_power_of_2, wait_for_previous

TOKENS = 4  # more of them share so many experts that moe.py, which reads each once, is as fast
# tokens with which the shared expert goes along. Each reads it, and only the first from memory: four win 0.5 to 4 %, three 6
ALONG = 3
SLOTS = 8  # of a token, with it: 16 made it slower (DeepSeek-V3's 8 + 1: 287 us a layer by itself, 303 along)


class Gemv(NamedTuple):
    """rows of W a program (`_gate_up`: of gate, and as many of up), columns a turn (`_down`: of each of the k experts), warps."""

    rows: int
    columns: int
    warps: int


class Gemvs(NamedTuple):
    gate_up: Gemv
    down: Gemv


def gemvs_for(hidden: int, intermediate: int, slots: int, itemsize: int = 2) -> Gemvs:
    """Among the fastest of some 60 that were tried on an H100 at sizes of Qwen3-30B-A3B and DeepSeek-V2-Lite: 2 KiB of a row of
    gate and up a turn, 4 KiB of a row of w2 of all slots."""
    columns, of_each = 2048 // itemsize, 4096 // (itemsize * next_power_of_2(slots))
    return Gemvs(
        Gemv(2, min(next_power_of_2(hidden), columns), 2),
        Gemv(16, min(next_power_of_2(intermediate), max(of_each, 16)), 8),
    )


def goes_along(tokens: int, top: int, w2: torch.Tensor, shared_w13: torch.Tensor, shared_w2: torch.Tensor) -> bool:
    """Whether `run` takes the shared expert's [2S, D] and [D, S] beside `top` experts a token of w2 [E, D, F]: few tokens, S = m F,
    few slots, and rows in order (on a CPU a linear layer may keep its matrix in another form)."""
    in_rows = all(w.layout == torch.strided and w.is_contiguous() for w in (shared_w13, shared_w2))
    more, rest = divmod(shared_w2.shape[1], w2.shape[2])
    return tokens <= ALONG and in_rows and rest == 0 and top + more <= SLOTS


def run(
    x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor,
    added: torch.Tensor | None = None, shared=None, gemvs: Gemvs | None = None,
) -> torch.Tensor:  # fmt: skip
    """x [T, D], weights [T, k] and experts [T, k] contiguous (-1: not here), w13 [E, 2F, D], w2 [E, D, F] -> [T, D].

    added [T, D]: what comes to the sum last, before it is rounded. shared: SharedMatrices (common/layers/moe_runner.py) of an
    expert that goes along.
    """
    (tokens, hidden), top, intermediate = x.shape, experts.shape[1], w2.shape[2]
    more, factor = (shared.w2.shape[1] // intermediate, shared.factor) if shared else (0, None)
    gate_up, down = gemvs or gemvs_for(hidden, intermediate, top + more, x.element_size())
    h = torch.empty(tokens * (top + more), intermediate, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    sizes = dict(TOP=top, SHARED=more, D=hidden, F=intermediate)
    launch(
        _gate_up, (tokens, (top + more) * cdiv(intermediate, gate_up.rows)), x, w13, shared.w13 if shared else w13, h,
        weights, weights if factor is None else factor, experts, x.stride(0), **sizes, FACTOR=factor is not None,
        BN=gate_up.rows, BK=gate_up.columns, num_warps=gate_up.warps,
    )  # fmt: skip
    launch(
        _down, (tokens, cdiv(hidden, down.rows)), h, w2, shared.w2 if shared else w2, out, experts,
        out if added is None else added, **sizes, SLOTS=next_power_of_2(top + more), BN=down.rows, BK=down.columns,
        ADDED=added is not None, num_warps=down.warps,
    )  # fmt: skip
    return out


@triton.jit
def _gate_up(
    x, w13, shared, h, weights, factor, experts, x_stride, TOP: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, FACTOR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (F + BN - 1) // BN
    t, program = tl.program_id(0).to(tl.int64), tl.program_id(1) - SHARED * blocks
    routed = program >= 0
    slot, block = program % TOP, program // TOP
    k = tl.arange(0, BK)
    if SHARED:
        own = tl.program_id(1)
        slot, block = tl.where(routed, slot, TOP + own % SHARED), tl.where(routed, block, own // SHARED)
        n = block * BN + tl.arange(0, BN)
        shared_at = shared + ((slot - TOP) * F + n).to(tl.int64)[:, None] * D + k[None, :]
        seen = (program < 0) & (n < F)[:, None] & (k < D)[None, :]
        g = tl.load(shared_at, mask=seen, other=0.0, eviction_policy="evict_first")
        u = tl.load(shared_at + SHARED * F * D, mask=seen, other=0.0, eviction_policy="evict_first")
    wait_for_previous(PDL)
    let_next_start(PDL)  # `_down` may then read the experts before it waits
    e = tl.load(experts + t * TOP + slot, mask=routed, other=0).to(tl.int64)
    if e >= 0:
        n = block * BN + tl.arange(0, BN)
        x_at = x + t * x_stride + k
        w_at, to_up = w13 + (e * 2 * F + n)[:, None] * D + k[None, :], F * D
        if SHARED:
            w_at, to_up = tl.where(routed, w_at, shared_at), tl.where(routed, F * D, SHARED * F * D)
        gate, up = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BK], tl.float32)
        for first in tl.static_range(0, D, BK):
            seen = (n < F)[:, None] & (first + k < D)[None, :]
            if SHARED and first == 0:  # the shared expert's are here
                g = tl.load(w_at, mask=seen & routed, other=g, eviction_policy="evict_first")
                u = tl.load(w_at + to_up, mask=seen & routed, other=u, eviction_policy="evict_first")
            else:
                g = tl.load(w_at + first, mask=seen, other=0.0, eviction_policy="evict_first")
                u = tl.load(w_at + to_up + first, mask=seen, other=0.0, eviction_policy="evict_first")
            xs = tl.load(x_at + first, mask=first + k < D, other=0.0).to(tl.float32)
            gate += xs[None, :] * g.to(tl.float32)
            up += xs[None, :] * u.to(tl.float32)
        gate, up = tl.sum(gate, 1), tl.sum(up, 1)
        weight = tl.load(weights + t * TOP + slot, mask=routed, other=1.0).to(tl.float32)
        if FACTOR:
            weight = tl.where(routed, weight, tl.load(factor + t).to(tl.float32))
        act = gate * tl.sigmoid(gate) * up * weight
        tl.store(h + (t * (TOP + SHARED) + slot) * F + n, act.to(h.dtype.element_ty), mask=n < F)


@triton.jit
def _down(
    h, w2, shared, out, experts, added, TOP: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    SLOTS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    t = tl.program_id(0).to(tl.int64)
    n, j, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, SLOTS), tl.arange(0, BK)
    e = tl.load(experts + t * TOP + j, mask=j < TOP, other=-1, cache_modifier=".cg")
    rows, filled = w2 + (e[None, :] * D + n[:, None]) * F, e >= 0  # [BN, SLOTS]
    if SHARED:
        own = shared + n.to(tl.int64)[:, None] * (SHARED * F) + (j - TOP)[None, :] * F
        rows, filled = tl.where((j < TOP)[None, :], rows, own), filled | ((j >= TOP) & (j < TOP + SHARED))
    w_at = rows[:, :, None] + k[None, None, :]  # [BN, SLOTS, BK]
    h_at = h + (t * (TOP + SHARED) + j)[:, None] * F + k[None, :]
    live = ((n < D)[:, None] & filled[None, :])[:, :, None]
    w = tl.load(w_at, mask=live & (k < F)[None, None, :], other=0.0, eviction_policy="evict_first")
    wait_for_previous(PDL)
    acc = tl.zeros([BN, BK], tl.float32)
    for first in tl.static_range(0, F, BK):
        hs = tl.load(h_at + first, mask=filled[:, None] & (first + k < F)[None, :], other=0.0)
        acc += tl.sum(hs.to(tl.float32)[None, :, :] * w.to(tl.float32), 1)
        if first + BK < F:
            there = live & (first + BK + k < F)[None, None, :]
            w = tl.load(w_at + first + BK, mask=there, other=0.0, eviction_policy="evict_first")
    total = tl.sum(acc, 1)
    if ADDED:
        total += tl.load(added + t * D + n, mask=n < D, other=0.0).to(tl.float32)
    tl.store(out + t * D + n, total.to(out.dtype.element_ty), mask=n < D)
