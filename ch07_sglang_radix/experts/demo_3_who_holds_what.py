"""Who holds what: some columns of every expert, or some experts whole, or some columns of some.

    python ch07_sglang_radix/experts/demo_3_who_holds_what.py

Four ranks are loaded one after the other in this process, from the tiny mixture: what each holds, and reads. Then layer 0 is
computed for a sentence by all four, each its part, and the parts are added up by hand. Last, two real ranks (it starts the
second one by itself) answer with columns and with experts: the same tokens, by the same messages.
"""

from collections.abc import Callable

import torch

from ch07_sglang_radix import Engine
from ch07_sglang_radix.experts.one_layer import input_of_layer
from common.distributed.cost_model import wire_bytes
from common.distributed.launch import run_main
from common.distributed.layout import Layout
from common.layers.heads import split_evenly
from common.layers.moe import MoE, MoEOptions
from common.models.weights import load_model
from common.parallel_state import TPGroup
from common.teaching.show import check, heading, mistake, table
from common.tiny_qwen.upcycle import MIXTURE_PATH

SENTENCE = "What is tensor parallelism, and what does each rank hold?"
WAYS = {"tp 4": 1, "tp 4, ep 2": 2, "tp 4, ep 4": 4, "tp 3, ep 3": 3}
NEW = 12  # tokens


def main() -> None:
    loaded = {way: [load(int(way[3]), ep, rank) for rank in range(int(way[3]))] for way, ep in WAYS.items()}
    what_each_holds(loaded)
    whole = load(1, 1, 0)[0]
    x = input_of_layer(MIXTURE_PATH, SENTENCE)
    a_layer_in_parts({way: [moe for moe, _ in ranks] for way, ranks in loaded.items()}, whole, x)
    messages()


def load(tp: int, ep: int, rank: int) -> tuple[MoE, int]:
    """(layer 0's experts of this rank, bytes that it read of the whole model). Nobody is there to talk to, and nobody talks."""
    layout, group = Layout(tp, ep=ep), TPGroup(rank, tp)
    place = layout.place(rank)
    options = MoEOptions(ep=TPGroup(place.ep, ep), moe_tp=TPGroup(place.moe_tp, layout.moe_tp))
    model, report = load_model(MIXTURE_PATH, group, moe=options)
    return model.model.layers[0].mlp, report.bytes_read


def what_each_holds(loaded: dict[str, list[tuple[MoE, int]]]) -> None:
    one = next(iter(loaded.values()))[0][0]
    heading(f"What a rank holds of a layer's {one.placement.num_experts} experts, of {one.experts.width} columns each")
    rows = []
    for way, ranks in loaded.items():
        for rank, (moe, read) in enumerate(ranks):
            placement, experts = moe.placement, moe.experts
            held = [expert for expert in placement.held(0) if expert is not None]
            _, ((_, first, n),) = split_evenly(experts.width, placement.moe_tp.rank, placement.moe_tp.size)
            nbytes = 4 * (experts.w13.numel() + experts.w2.numel())
            rows.append((way, rank, " ".join(map(str, held)), f"{first}..{first + n - 1}", nbytes, read))
    table(("ranks", "rank", "experts", "columns", "bytes of a layer", "bytes read, all layers"), rows)
    of = {way: {row[4] for row in rows if row[0] == way} for way in loaded}
    check("however 4 ranks cut the experts, each holds as many bytes", len(set.union(*list(of.values())[:3])) == 1)
    print("  8 experts on 3 ranks: shares of 2, 3 and 3, and the first rank has a slot that stays zero.")


def a_layer_in_parts(ways: dict[str, list[MoE]], whole: MoE, x: torch.Tensor) -> None:
    heading(f"Layer 0 for a sentence of {len(x)} tokens: what each rank computes")
    rows, right, errors = [], sum_of([whole], x), []
    for way, ranks in ways.items():
        for moe in ranks:
            moe.placement.load.zero_()
        errors.append(((sum_of(ranks, x) - right).abs().max() / right.abs().max()).item())
        counts = [int(moe.placement.load.sum()) for moe in ranks]
        width = ranks[0].experts.local
        rows.append(
            (
                way,
                " ".join(map(str, counts)),
                width,
                max(counts) * width,
                f"{max(counts) / (sum(counts) / len(counts)):.2f}",
            )
        )
    table(("ranks", "rows of each rank", "columns of a row", "most columns of a rank", "most / mean"), rows)
    check("the parts of all ranks sum up to the layer", max(errors) < 1e-5)
    ranks = ways["tp 4, ep 4"]
    wrong = sum_of(ranks, x, lambda local: local.clamp(min=0))
    mistake("a foreign expert is slot 0 of everybody, and not nobody's: the first token's output, four numbers",
            wrong[0, :4], right[0, :4])  # fmt: skip


@torch.inference_mode()
def sum_of(ranks: list[MoE], x: torch.Tensor, change: Callable = lambda local: local) -> torch.Tensor:
    """What the all-reduce would give."""
    total = torch.zeros_like(x)
    for moe in ranks:
        weights, experts = moe.gate.route(x)
        local = moe.placement.here(0, experts)
        moe.placement.note(0, local)
        total += moe.runner.run(x, weights, change(local), moe.experts.w13, moe.experts.w2)
    return total


def messages() -> None:
    heading(f"Two real ranks, {NEW} tokens: what rank 0 says")
    rows, answers = [], []
    for way, ep in (("tp 2", 1), ("tp 2, ep 2", 2)):
        with (
            Engine(str(MIXTURE_PATH), tp_size=2, ep_size=ep, device="cpu") as engine,
            engine.scheduler.tp.ledger.recording() as ledger,
        ):
            answer = engine.generate(SENTENCE, {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True})
            said, layers = ledger.summary(), engine.wrapper.config.num_layers
            answers.append(answer["output_ids"])
        rows.append(
            (
                way,
                said["all_reduce"]["calls"],
                said["all_reduce"]["bytes"],
                wire_bytes("all_reduce", said["all_reduce"]["bytes"], 2),
                said.get("all_to_all", {"calls": 0})["calls"],
            )
        )
    table(("ranks", "all-reduces", "bytes", "on the wire", "all-to-alls"), rows)
    check(
        f"1 + 2L all-reduces a step, of {NEW} steps, both times", {row[1] for row in rows} == {NEW * (1 + 2 * layers)}
    )
    check("the same tokens", answers[0] == answers[1])


if __name__ == "__main__":
    run_main(main)
