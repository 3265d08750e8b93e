"""Tokens travel: counts first, then rows, and home again.

    python ch07_sglang_radix/experts/demo_4_dispatch.py
    torchrun --nproc_per_node=3 ch07_sglang_radix/experts/demo_4_dispatch.py

Each rank has a sentence of its own, and some of the 8 experts of the tiny mixture; the last rank has experts and no sentence.
In one process a round is played by hand for three ranks; under torchrun 2 to 4 real ranks send real rows
(common/layers/dispatch.py). Last, what such a round puts on the wire beside gathering all rows for everybody, and where that turns.
"""

import torch

from ch07_sglang_radix.experts.one_layer import input_of_layer
from common.distributed.cost_model import wire_bytes
from common.distributed.launch import run_main
from common.distributed.ledger import LedgerEntry
from common.layers.dispatch import Travelling, add_at_home, set_out, set_out_fixed
from common.layers.expert_placement import ExpertPlacement
from common.layers.moe import MoE
from common.models.weights import load_model
from common.parallel_state import TPGroup, all_gather_rows, initialize_tensor_parallel
from common.teaching.show import check, heading, table
from common.tiny_qwen.upcycle import MIXTURE_PATH

SENTENCES = ["What is a radix cache?", "什么是全归约？", "Define retraction, in a few words, please."]
BY_HAND = 3  # ranks


def main() -> None:
    tp = initialize_tensor_parallel(device="cpu")
    if tp.size > 4:
        raise ValueError(f"{tp.size} ranks for a demo of 2 to 4; use torchrun --nproc_per_node=4 or less")
    layer = load_model(MIXTURE_PATH, TPGroup())[0].model.layers[0].mlp
    sentences = [*SENTENCES[: max(tp.size, BY_HAND) - 1], None]  # the last rank has none
    if tp.size == 1:
        by_hand(layer, [rows_of(text, layer) for text in sentences])
        on_the_wire()
    else:
        among_ranks(layer, rows_of(sentences[tp.rank], layer), tp)


def rows_of(sentence: str | None, layer: MoE) -> torch.Tensor:
    return (
        layer.gate.weight.new_zeros(0, layer.gate.weight.shape[1])
        if sentence is None
        else input_of_layer(MIXTURE_PATH, sentence)
    )


@torch.inference_mode()
def by_hand(layer: MoE, rows: list[torch.Tensor]) -> None:
    heading(f"By hand: {', '.join(str(len(x)) for x in rows)} tokens on {len(rows)} ranks, which share 8 experts")
    ranks = [ExpertPlacement(1, 8, TPGroup(rank, len(rows))) for rank in range(len(rows))]
    routed = [layer.gate.route(x) for x in rows]
    chosen = [
        placement.locate(0, experts, rank)
        for rank, (placement, (_, experts)) in enumerate(zip(ranks, routed, strict=True))
    ]
    slots = ranks[0].slots
    counts = [torch.bincount(places.flatten(), minlength=slots * len(rows)).view(-1, slots) for places in chosen]
    owners = [" ".join(str(e) for e in placement.held(0) if e is not None) for placement in ranks]
    print("1. counts: a number for each slot of each rank; each rank sends a row of this table, and gets a column")
    table(
        ("from", *(f"to {rank} (experts {held})" for rank, held in enumerate(owners)), "rows in all"),
        [
            (source, *(" ".join(map(str, to)) for to in count.tolist()), int(count.sum()))
            for source, count in enumerate(counts)
        ],
    )
    print("2. rows: a copy for each choice, sorted by rank and slot; so nobody needs to say whom a row is for")
    orders = [places.flatten().argsort(stable=True) for places in chosen]
    sent = [x[order // 2].split(count.sum(1).tolist()) for x, order, count in zip(rows, orders, counts, strict=True)]
    came = [torch.cat([sent[source][rank] for source in range(len(rows))]) for rank in range(len(rows))]
    load = [int(sum(count[rank].sum() for count in counts)) for rank in range(len(rows))]
    table(("rank", "brings", "computes"), [(rank, int(counts[rank].sum()), load[rank]) for rank in range(len(rows))])
    check("the rank without tokens computes for the others", len(rows[-1]) == 0 and load[-1] > 0)
    print("3. home: the outputs the same way back, there weighted and added")
    outputs = []
    for rank, x in enumerate(came):
        of_slots = torch.cat(
            [torch.arange(slots).repeat_interleave(counts[source][rank]) for source in range(len(rows))]
        )
        outputs.append(of_experts(layer, x, of_slots, ranks[rank]))
    for source, x in enumerate(rows):
        starts = [sum(int(counts[s][rank].sum()) for s in range(source)) for rank in range(len(rows))]
        parts = [outputs[rank][start : start + int(counts[source][rank].sum())] for rank, start in enumerate(starts)]
        home = torch.empty(x.shape[0] * 2, x.shape[1]).index_copy_(0, orders[source], torch.cat(parts))
        y = add_at_home(home.view(len(x), 2, x.shape[1]), *routed[source])
        check(
            f"rank {source}: {len(x)} rows, as one rank alone computes them",
            torch.allclose(y, alone(layer, x), rtol=1e-4, atol=1e-4),
        )


@torch.inference_mode()
def among_ranks(layer: MoE, x: torch.Tensor, tp: TPGroup) -> None:
    placement = ExpertPlacement(1, 8, tp)
    most = int(max(all_gather_rows(torch.tensor([len(x)]), tp, "tokens")))  # COMM all-gather [1]: tokens of each rank
    weights, experts = layer.gate.route(x)
    places, nbytes_of_row = placement.locate(0, experts, tp.rank), x.shape[1] * x.element_size()
    away = int((places // placement.slots != tp.rank).sum())  # choices of this rank that another one computes
    padded = torch.nn.functional.pad(x, (0, 0, 0, most - len(x)))
    _, all_experts = layer.gate.route(padded)
    live = torch.arange(most) < len(x)
    for said, fixed in (("exact: as many rows as there are", False), ("fixed: room for as many as may come", True)):
        with tp.ledger.recording() as ledger:
            if fixed:
                there = set_out_fixed(
                    padded, placement.locate(0, all_experts, tp.rank), live, placement, tp, "layers.0"
                )
            else:
                there = set_out(x, places, placement, tp, "layers.0")
            y, computed = come_home(layer, there, placement)
            entries = list(ledger.entries)
        y = add_at_home(y[: len(x)], weights, experts)
        right = torch.tensor([int(torch.allclose(y, alone(layer, x), rtol=1e-4, atol=1e-4)), len(x), computed, away])
        all_right = all_gather_rows(right.unsqueeze(0), tp, "right")  # COMM all-gather [4]: is it right, and how much
        if tp.rank == 0:
            heading(f"{said}; rank 0 of {tp.size}")
            # ranks hand in unlike numbers of rows if exact, so what crosses is not to be seen in one rank's tensor
            travel = None if fixed else nbytes_of_row * int(all_right[:, 3].sum())
            table(("message", "shape", "bytes", "on the wire"), [
                (e.label, list(e.shape), e.bytes, crossing(e, travel)) for e in entries
            ])  # fmt: skip
            told = [(rank, *row) for rank, row in enumerate(all_right[:, 1:].tolist())]
            table(("rank", "tokens", "rows computed", "rows to others"), told)
            check("every rank's rows are those of one rank alone", bool(all_right[:, 0].all()))


def crossing(entry: LedgerEntry, travel: int | None) -> int:
    """Bytes of a message between all ranks; travel: of the rows, if each rank has another number of them."""
    if travel is None or entry.label.endswith("counts"):
        return wire_bytes(entry.op, entry.bytes, entry.ranks)
    return travel


def come_home(layer: MoE, there: Travelling, placement: ExpertPlacement) -> tuple[torch.Tensor, int]:
    """(the outputs of this rank's choices [T, k, D], rows that its experts computed)"""
    x, slots = there.received()
    return there.home(of_experts(layer, x, slots, placement)), int((slots >= 0).sum())


def of_experts(layer: MoE, x: torch.Tensor, slots: torch.Tensor, placement: ExpertPlacement) -> torch.Tensor:
    """x [n, D] for the slots [n] of this rank; its experts are slices of the whole layer's."""
    held = torch.tensor([e for e in placement.held(0) if e is not None])
    w13, w2 = layer.experts.w13[held], layer.experts.w2[held]
    return layer.runner.run(x, x.new_ones(len(x), 1), slots.unsqueeze(1), w13, w2)


def alone(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    return layer.runner.run(x, *layer.gate.route(x), layer.experts.w13, layer.experts.w2)


def on_the_wire() -> None:
    heading("On the wire, all ranks together, in rows of D numbers: M tokens a rank, k of E experts each")
    rows = []
    for said, ranks, tokens, k, experts in (
        ("here: prefill", 3, 100, 2, 8), ("here: decode", 3, 1, 2, 8), ("Qwen3-30B-A3B: prefill", 4, 2048, 8, 128),
        ("Qwen3-30B-A3B: decode", 4, 32, 8, 128), ("DeepSeek-V3: prefill", 32, 2048, 8, 256),
        ("DeepSeek-V3: decode", 32, 32, 8, 256),
    ):  # fmt: skip
        gathered = wire_bytes("all_gather", tokens, ranks) + wire_bytes("reduce_scatter", ranks * tokens, ranks)
        exact = 2 * wire_bytes("all_to_all", k * tokens, ranks)
        fixed = 2 * wire_bytes("all_to_all", ranks * -(-experts // ranks) * tokens, ranks)
        once = round(2 * (ranks - 1) * tokens * ranks * (1 - (1 - 1 / ranks) ** k))  # if every expert is as likely
        rows.append((said, ranks, tokens, k, experts, gathered, exact, once, fixed))
    table(("", "R", "M", "k", "E", "gather, scatter", "exact", "once a rank", "fixed"), rows)
    check(
        "exact is less than gathering if k is less than R", all((row[6] < row[5]) == (row[3] < row[1]) for row in rows)
    )


if __name__ == "__main__":
    run_main(main)
