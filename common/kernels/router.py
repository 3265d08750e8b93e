"""A router's choice in one launch (common/layers/router.py has the rules): scores, groups, top-k, weights of a token in registers.

One program a token: reads E logits, writes k weights and k numbers. In plain PyTorch it is five launches, and eleven with groups;
a decode step has one choice a layer, and each launch is a microsecond or two.
"""

import torch
import triton
import triton.language as tl

from common.kernels.launch import launch, let_next_start, next_power_of_2, room, wait_for_previous


def choose(
    logits: torch.Tensor, rule, bias: torch.Tensor | None, dtype: torch.dtype, live: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E], rule a RouterRule, bias [E] float32 -> weights [T, k] of `dtype`, experts [T, k] int64, best first.

    Of equal scores the lowest number is chosen first. live [T] bool: rows that are padding choose nobody, expert -1.
    """
    tokens, num_experts = logits.shape
    weights = torch.empty(tokens, rule.top_k, dtype=dtype, device=logits.device)
    experts = room(tokens, rule.top_k, dtype=torch.int64, device=logits.device)
    launch(
        _choose, (tokens,), logits, logits if bias is None else bias, logits if live is None else live, weights, experts,
        logits.stride(0), rule.scaling, E=num_experts, EB=next_power_of_2(num_experts), K=rule.top_k,
        KP=next_power_of_2(rule.top_k), GROUPS=rule.groups, CHOSEN=rule.chosen_groups, TWO=rule.group_score == "two_best",
        SIGMOID=rule.scores == "sigmoid",
        NORMALISE=rule.normalise, BIAS=bias is not None, LIVE=live is not None, num_warps=1 if num_experts <= 128 else 2,
    )  # fmt: skip
    return weights, experts


@triton.jit
def _first_best(values, E: tl.constexpr):
    """Where the largest is, of equal ones the first; a place that exists even if all are NaN."""
    return tl.minimum(tl.argmax(values, 0, tie_break_left=True), E - 1)


@triton.jit
def _choose(
    logits, bias, live, weights, experts, stride, scaling, E: tl.constexpr, EB: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, GROUPS: tl.constexpr, CHOSEN: tl.constexpr, TWO: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    BIAS: tl.constexpr, LIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    t, i, j = tl.program_id(0).to(tl.int64), tl.arange(0, EB), tl.arange(0, KP)
    extra = tl.load(bias + i, mask=i < E, other=0.0) if BIAS else tl.zeros([EB], tl.float32)
    wait_for_previous(PDL)
    x = tl.load(logits + t * stride + i, mask=i < E, other=-float("inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.sigmoid(x)
    else:
        scores = tl.exp(x - tl.max(x, 0))
        scores /= tl.sum(scores, 0)
    choosing = tl.where(i < E, scores + extra, -float("inf"))  # a bias chooses, and never weighs
    if CHOSEN < GROUPS:
        group = i // (E // GROUPS)
        ranks = tl.full([EB], -float("inf"), tl.float32)  # of the group that an expert lies in
        for g in tl.static_range(GROUPS):
            inside = tl.where(group == g, choosing, -float("inf"))
            rank = tl.max(inside, 0)
            if TWO:
                rank += tl.max(tl.where(i == _first_best(inside, E), -float("inf"), inside), 0)
            ranks = tl.where(group == g, rank, ranks)
        allowed = i < 0
        for _ in tl.static_range(CHOSEN):
            best = _first_best(ranks, E) // (E // GROUPS)
            allowed = allowed | (group == best)
            ranks = tl.where(group == best, -float("inf"), ranks)
        choosing = tl.where(allowed, choosing, -float("inf"))
    chosen, weight = tl.zeros([KP], tl.int32), tl.zeros([KP], tl.float32)
    for turn in tl.static_range(K):
        best = _first_best(choosing, E)
        chosen = tl.where(j == turn, best, chosen)
        weight = tl.where(j == turn, tl.sum(tl.where(i == best, scores, 0.0), 0), weight)
        choosing = tl.where(i == best, -float("inf"), choosing)
    if NORMALISE:
        # sigmoids may all be 0, the best of a softmax never is
        weight /= tl.sum(weight, 0) + (1e-20 if SIGMOID else 0.0)
    weight *= scaling
    if LIVE:
        chosen = tl.where(tl.load(live + t) != 0, chosen, -1)
    tl.store(weights + t * K + j, weight.to(weights.dtype.element_ty), mask=j < K)
    tl.store(experts + t * K + j, chosen.to(tl.int64), mask=j < K)
