"""Experts change ranks between two steps: their weights go where a new placement has them.

Every rank knows the old placement and the new one, so all of them work out the same list of moves, and nobody asks for
anything. An expert that a rank holds already is copied from there. Otherwise one of those that have it sends it, once, to
the rank of the same columns: the ep group. One layer at a time, so that beside the weights there is room for one layer's
slots twice at most.

SGLang 0.5.23: srt/eplb/expert_location_updater.py, with a message for each expert.
"""

import torch

from common.distributed.collectives import TPGroup, all_to_all
from common.layers.expert_placement import ExpertPlacement


def deliveries(old: list[list[int | None]], new: list[list[int | None]]) -> list[list[list[int]]]:
    """held experts of each rank, before and after -> [from][to], ascending: the experts that one rank sends to another.

    Those that have an expert take turns.

    >>> deliveries([[0, 1], [2, 3]], [[0, 2], [2, 1]])
    [[[], [1]], [[2], []]]
    """
    sent: list[list[list[int]]] = [[[] for _ in new] for _ in old]
    turns: dict[int, int] = {}
    for to, wanted in enumerate(new):
        for expert in sorted({one for one in wanted if one is not None} - set(old[to])):
            having = [rank for rank, held in enumerate(old) if expert in held]
            turn = turns[expert] = turns.get(expert, -1) + 1
            sent[having[turn % len(having)]][to].append(expert)
    return sent


def move_layer(w13: torch.Tensor, w2: torch.Tensor, placement: ExpertPlacement, layer: int, new: torch.Tensor) -> None:
    """w13 [S, 2F', D] and w2 [S, D, F'] of a layer, in place: what `placement` says now -> the placement new [P]."""
    ep: TPGroup = placement.ep
    old = [placement.held(layer, rank) for rank in range(ep.size)]
    coming = [placement.held_by(new, rank) for rank in range(ep.size)]
    if old == coming:
        return
    sent, mine = deliveries(old, coming), old[ep.rank]
    flat = lambda slot: torch.cat((w13[slot].flatten(), w2[slot].flatten()))  # noqa: E731
    out = [flat(mine.index(expert)) for to in sent[ep.rank] for expert in to]
    x = torch.stack(out) if out else w13.new_zeros(0, w13[0].numel() + w2[0].numel())
    send, receive = [len(to) for to in sent[ep.rank]], [len(by[ep.rank]) for by in sent]
    came = all_to_all(x, ep, f"layers.{layer}.experts", send, receive)  # COMM all-to-all [n, 3F'D]: experts that move
    weights = dict(zip([expert for by in sent for expert in by[ep.rank]], came, strict=True))
    changed = [slot for slot, expert in enumerate(coming[ep.rank]) if expert is not None and expert != mine[slot]]
    for expert in {coming[ep.rank][slot] for slot in changed} - weights.keys():
        weights[expert] = flat(mine.index(expert))  # a copy: its slot may be written before it is read
    for slot in changed:
        gate_up, down = weights[coming[ep.rank][slot]].split((w13[slot].numel(), w2[slot].numel()))
        w13[slot].copy_(gate_up.view_as(w13[slot]))
        w2[slot].copy_(down.view_as(w2[slot]))
