"""Two halves of a step, computed in turn: while the sums of one travel, the other is computed.

    plain          A and B   sum   A and B   sum   ...        nothing is computed while a sum travels
    overlapped     A   B   A   B   A   ...                    a layer of one half needs that half's sum alone
                       sum A   sum B   sum A

Each half is a generator that stops (`yield`) wherever it has begun a sum, and `forward_in_halves` lets them run in turn; SGLang
0.5.23 has the same in srt/batch_overlap/two_batch_overlap.py, for mixtures of experts, where the messages are all-to-alls
(`YieldOperation` between operations). What it costs: every product has half as many rows, so the weights are read twice.

A half may begin within a sequence: its later tokens attend to the earlier ones, whose K and V the first half has written by
then, layer by layer, because it runs first. For the same reason a sequence may share pages with one before it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from common.models.decoder import Decoder
from common.parallel_state import start_all_reduce


class Ragged(NamedTuple):
    """What SequenceTable.prefill takes."""

    tokens: np.ndarray  # [T]
    rows: np.ndarray  # [B]
    cached: np.ndarray  # [B]
    new: np.ndarray  # [B]


def halves_of(step: Ragged) -> tuple[Ragged, Ragged]:
    """The first T/2 tokens, and the rest; a sequence that is cut through is in both, and cached so far in the second."""
    tokens, rows, cached, new = step
    middle, ends = len(tokens) // 2, np.cumsum(new)
    cut = int(np.searchsorted(ends, middle, side="right"))  # the sequence that holds token `middle`
    taken = middle - int(ends[cut] - new[cut])  # of its tokens, by the first half
    front = slice(0, cut + (taken > 0))
    first_new, last_cached, last_new = new[front].copy(), cached[cut:].copy(), new[cut:].copy()
    if taken:
        first_new[-1] = taken
    last_cached[0] += taken
    last_new[0] -= taken
    return Ragged(tokens[:middle], rows[front], cached[front], first_new), Ragged(
        tokens[middle:], rows[cut:], last_cached, last_new
    )


class Half(NamedTuple):
    """What a decoder takes."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: object


def forward_in_halves(decoder: Decoder, *halves: Half) -> torch.Tensor:
    """The same hidden [T, D] as the decoder's `forward` of both as one step. It must be one that defers its sums."""
    running = {i: _forward(decoder, half) for i, half in enumerate(halves)}
    hidden: dict[int, torch.Tensor] = {}
    while running:
        for i in list(running):
            try:
                next(running[i])
            except StopIteration as end:
                hidden[i] = end.value
                del running[i]
    return torch.cat([hidden[i] for i in range(len(halves))])


def _forward(decoder: Decoder, half: Half) -> Iterator[None]:
    """As Decoder.forward and DecoderLayer.forward, but for the sums."""
    x, residual, arrived = decoder.embed_tokens(half.input_ids), None, None  # [T/2, D]
    rotary, tp = decoder.rotary(half.positions, x.dtype), decoder.communicator.tp
    for layer in decoder.layers:
        if residual is None:
            x, residual = layer.input_layernorm(x), x
        else:
            x, residual = layer.input_layernorm.add(arrived(), residual)
        x = layer.self_attn(x, rotary, half.attention)
        arrived = start_all_reduce(x, tp, f"{layer.name}.o_proj")  # COMM all-reduce [T/2, D]: beside the other half
        yield
        x, residual = layer.post_attention_layernorm.add(arrived(), residual)
        x = layer.mlp(x)
        arrived = start_all_reduce(x, tp, f"{layer.name}.down_proj")  # COMM all-reduce [T/2, D]: beside the other half
        yield
    return decoder.norm.add(arrived(), residual)[0]
