"""Hot experts: who computes how many rows, before experts have moved and afterwards.

    python ch07_sglang_radix/experts/demo_5_hot_experts.py
    torchrun --nproc_per_node=4 ch07_sglang_radix/experts/demo_5_hot_experts.py

First on paper, the published example step by step. Then many clients ask the bundled mixture the same question, as happens on
the day when everybody has read about it: its router likes some experts more than others, and rows are counted where they are
computed. In one process four ranks are only counted; under torchrun, or with --ranks N, they are real: the clients ask three
times, and in the middle of the second time experts change ranks.
"""

import argparse
import os
from pathlib import Path

import numpy as np

from ch07_sglang_radix import Engine
from ch07_sglang_radix.experts.eplb import balancedness, pack, place, rank_loads, replicate
from common.distributed.launch import run_main
from common.teaching.report import write_csv
from common.teaching.show import check, heading, table
from common.tiny_qwen.upcycle import MIXTURE_PATH

LOAD = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]  # of the original
QUESTION, CLIENTS, NEW = "What is a radix cache?", 8, 24
RANKS = 4  # that are only counted
EVERY = 40  # steps; a round has 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, help="real ranks; by default as many as torchrun started, or 1: on paper")
    parser.add_argument("--csv", type=Path, help="write what the ranks that are only counted would have to compute")
    args = parser.parse_args()
    ranks = args.ranks or int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("RANK", "0")) == 0:
        the_published_example()
    if ranks == 1:
        told = counted_in_one_process()
        if args.csv:
            write_csv(told, args.csv, measured=False)
    else:
        on_real_ranks(ranks)


def the_published_example() -> None:
    heading("On paper: 12 experts in 4 groups, 16 slots on 8 GPUs of 2 nodes, as published")
    groups = [sum(LOAD[3 * group : 3 * group + 3]) for group in range(4)]
    print(f"  rows of each expert                          {LOAD}")
    print(f"  1  of each group {groups}, to nodes      {pack(groups, [2, 2])}")
    experts = [e for group in pack(groups, [2, 2])[0] for e in range(3 * group, 3 * group + 3)]
    replicas = replicate([LOAD[e] for e in experts], 8)
    print(f"  2  node 0 has the experts {experts}, in 8 slots {[experts[one] for one in replicas]}")
    rooms, trivial = [2] * 8, [[slot % 12, (slot + 1) % 12] for slot in range(0, 16, 2)]
    placements = {
        "by number, copies of the first": trivial,
        "3  hierarchical: groups stay on a node": place(LOAD, rooms, groups=4, nodes=2),
        "   global: anywhere": place(LOAD, rooms),
    }
    rows = []
    for name, held in placements.items():
        loads = rank_loads(LOAD, held)
        rows.append((name, " ".join(f"{load:.0f}" for load in loads), f"{balancedness(loads):.2f}"))
    table(("placement", "rows of GPU 0 .. 7", "mean / max"), rows)
    check("the slots are the original's", [e for held in list(placements.values())[1] for e in held]
          == [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1])  # fmt: skip


def ask(engine: Engine) -> list[list[int]]:
    """The same from all clients at once. Nothing is remembered, so that every round feeds the same rows in."""
    ids = engine.wrapper.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    params = {"max_new_tokens": NEW, "ignore_eos": True}
    return [answer["output_ids"] for answer in engine.generate(input_ids=[ids] * CLIENTS, sampling_params=params)]


def counted_in_one_process() -> list[dict]:
    """The rows of every rank, by layer, copies and placement."""
    heading(f"{CLIENTS} clients ask {QUESTION!r}: rows of every expert, counted in one process")
    with Engine(MIXTURE_PATH, tp_size=1, device="cpu", disable_radix_cache=True) as engine:
        ask(engine)
        load = engine.wrapper.expert_load().tolist()
    table(("layer", "rows of expert 0 .. 7"), [(i, " ".join(f"{n:5,}" for n in layer)) for i, layer in enumerate(load)])
    heading(f"What each of {RANKS} ranks would have to compute of it")
    rows, told = [], []
    for copies in (0, RANKS):
        room = (len(load[0]) + copies) // RANKS
        slots = [slot % len(load[0]) for slot in range(room * RANKS)]
        by_number = [slots[first : first + room] for first in range(0, len(slots), room)]
        for layer, of in enumerate(load):
            placed = place(of, [room] * RANKS)
            plain, better = rank_loads(of, by_number), rank_loads(of, placed)
            rows.append((copies, layer, *shown(plain), *shown(better), str(placed)))
            told += [
                {"copies": copies, "layer": layer, "placement": name, "rank": rank, "rows": round(load)}
                for name, loads in (("by number", plain), ("by load", better))
                for rank, load in enumerate(loads)
            ]
    table(("copies", "layer", "by number", "mean / max", "placed", "mean / max", "experts of each rank"), rows)
    even = lambda column, copies: sum(float(row[column]) for row in rows if row[0] == copies) / len(load)  # noqa: E731
    check("placed by load is better than by number, and better still with copies",
          even(3, 0) < even(5, 0) < even(5, RANKS))  # fmt: skip
    return told


def shown(loads: list[float]) -> tuple[str, str]:
    """Rows of each rank, and how even they are."""
    return " ".join(f"{load:5,.0f}" for load in loads), f"{balancedness(loads):.2f}"


def on_real_ranks(ranks: int) -> None:
    answers, infos = [], []
    with Engine(
        MIXTURE_PATH, tp_size=ranks, ep_size=ranks, device="cpu", disable_radix_cache=True, check=True,
        enable_eplb=True, eplb_rebalance_num_iterations=EVERY, ep_num_redundant_experts=ranks,
        expert_balancedness_report_mode="prometheus",
    ) as engine:  # fmt: skip
        for _ in range(3):
            answers.append(ask(engine))
            infos.append(engine.get_server_info().get("experts"))
        placement = engine.wrapper.placement
        held = [
            [placement.held(layer, rank) for rank in range(ranks)]
            for layer in range(len(placement.physical_to_logical))
        ]
        if engine.scheduler.replica.rank > 0:
            return
        steps = engine.scheduler.step_number
    heading(
        f"{CLIENTS} clients ask {QUESTION!r}, three times, on {ranks} ranks; after step {EVERY} of {steps} experts move"
    )
    one, two, three = (np.array(info["rows_of_ranks"]) for info in infos)
    rows = []
    for layer, (before, after) in enumerate(zip(one.tolist(), (three - two).tolist(), strict=True)):
        rows.append((layer, *shown(before), *shown(after), str(held[layer])))
    table(("layer", "rows of each rank", "mean / max", "afterwards", "mean / max", "experts of each rank"), rows)
    moved = [info["moved"] for info in infos]
    print(
        f"  {moved[1]} slots of {sum(map(len, placement.physical_to_logical))} have got another expert, in the second round"
    )
    check("they moved once, in the middle of the second round", moved[0] == 0 < moved[1] == moved[2])
    even = lambda column: sum(float(row[column]) for row in rows)  # noqa: E731
    check("afterwards the ranks have more alike to do", even(4) > even(2))
    check("the answers of the three rounds are the same tokens", answers[0] == answers[1] == answers[2])


if __name__ == "__main__":
    run_main(main)
