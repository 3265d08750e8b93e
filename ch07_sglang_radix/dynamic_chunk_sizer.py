"""Chunks of a long prompt that take equally long, instead of being equally long: for pipelines.

A chunk's tokens see all tokens before them, so of chunks of one length the last takes longest. While a stage computes it the
others have nothing else to do, and of two equal stages one waits for half of it. With `enable_dynamic_chunking` each chunk takes
as long as the first:

    seconds(n tokens behind L)  =  token n  +  pair (n L + n^2 / 2)      weights; queries times keys
    next chunk after L tokens   =  the n with seconds(n, L) = seconds(base, 0)

`token` and `pair` are measured at the start, by two prefills of zeros. SGLang 0.5.23
(srt/managers/scheduler_components/dynamic_chunk_sizer.py) solves the same equation with coefficients fitted to 128 prefills of
up to 1.25 chunks; it goes three quarters of the way only (SGLANG_DYNAMIC_CHUNKING_SMOOTH_FACTOR), and like here not below a
quarter of the base.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper

LEAST = 0.25  # of the base: shorter ones would read the weights for too few tokens
TILE = 64  # tokens; kernels fill tiles of so many
PREFIX = 8  # chunks that the second measurement has before it
ROUNDS = 2


@dataclass(frozen=True)
class PrefillTime:
    """What prompt tokens cost, in any unit of time: each by itself, and each pair of a query and a key that it sees."""

    token: float
    pair: float

    def seconds(self, tokens: float, prefix: float) -> float:
        return self.token * tokens + self.pair * (tokens * prefix + tokens**2 / 2)

    @classmethod
    def fit(cls, tokens: int, prefix: int, alone: float, behind: float) -> "PrefillTime":
        """From two measurements: `tokens` without anything before them, and behind `prefix` others."""
        pair = max((behind - alone) / (tokens * prefix), 0.0)
        return cls(max(alone / tokens - pair * tokens / 2, 0.0), pair)


def next_chunk(cost: PrefillTime, base: int, prefix: int, page_size: int) -> int:
    """Tokens behind `prefix` others that take as long as `base` tokens at the beginning: whole pages, in tiles, at most `base`.

    pair / 2 n^2 + (token + pair prefix) n = seconds(base, 0), solved for n.
    """
    same, each = cost.seconds(base, 0), cost.token + cost.pair * prefix
    # the root in the form that stays exact when pair is nothing
    n = 2 * same / (each + math.sqrt(each**2 + 2 * cost.pair * same)) if same > 0 else base
    step = -(-TILE // page_size) * page_size
    return min(max(int(max(n, LEAST * base)) // step * step, step), base)


def measure(wrapper: TPRadixAttentionModelWrapper, base: int) -> PrefillTime:
    """All ranks call it, before there are requests: the time of this rank, which with equal stages is everybody's."""
    tokens = max(min(base, wrapper.max_context // 2), 1)
    prefix = max(min(PREFIX * tokens, wrapper.max_context - tokens), 1)
    _seconds(wrapper, tokens, 0)  # what is done on first use
    alone = min(_seconds(wrapper, tokens, 0) for _ in range(ROUNDS))
    behind = min(_seconds(wrapper, tokens, prefix) for _ in range(ROUNDS))
    return PrefillTime.fit(tokens, prefix, alone, behind)


def _seconds(wrapper: TPRadixAttentionModelWrapper, tokens: int, prefix: int) -> float:
    """Of a prefill that emits nothing, in a row whose pages are all page 0."""
    one = np.ones(1, dtype=np.int64)
    began = time.perf_counter()
    wrapper.ragged(np.zeros(tokens, dtype=np.int64), 0 * one, prefix * one, tokens * one, 0 * one)
    if wrapper.tp.device.type == "cuda":
        torch.cuda.synchronize(wrapper.tp.device)
    took = time.perf_counter() - began
    wrapper.links.flush()
    return took
