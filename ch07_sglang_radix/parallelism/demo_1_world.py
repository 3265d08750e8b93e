"""Who is in which group: the world as a table, drawn before anything runs, and then held against ranks that do.

    python ch07_sglang_radix/parallelism/demo_1_world.py
    python ch07_sglang_radix/parallelism/demo_1_world.py --csv figures/world.csv
    torchrun --nproc_per_node=4 ch07_sglang_radix/parallelism/demo_1_world.py

Eight ranks as 2 replicas of 2 stages of 2 tensor-parallel ranks; the cuts inside a stage; where the ranks go on two hosts; and
what does not multiply. Under torchrun the ranks of tp2 x pp2 make their groups, and each group adds up its members' numbers.
"""

import os

import torch

from common.distributed.launch import run_main
from common.distributed.layout import GROUPS, Layout, get_rank_mapping
from common.parallel_state import ParallelState, all_gather, all_reduce
from common.teaching.report import csv_option, write_csv
from common.teaching.show import check, heading, table


def main() -> None:
    csv, rank = csv_option(__doc__), int(os.environ.get("RANK", "0"))
    if rank == 0:
        rows = replicas_stages_ranks()
        inside_a_stage()
        on_two_hosts()
        what_does_not_multiply()
        if csv:
            write_csv(rows, csv, measured=False)
    if os.environ.get("WORLD_SIZE") == "4":
        real_groups()
    elif rank == 0:
        print("\nthe same with real ranks: torchrun --nproc_per_node=4 ch07_sglang_radix/parallelism/demo_1_world.py")


def replicas_stages_ranks() -> list[dict[str, int | str]]:
    """A row a rank: its place, and its groups."""
    layout = Layout.of(tp=2, pp=2, dp=2)
    heading(f"{layout}: 8 ranks, rank = (dp * pp_size + pp) * tp_size + tp")
    kinds = ("tp", "pp", "dp", "replica")
    rows = [
        {"rank": p.rank, "replica": p.dp, "stage": p.pp, "tp": p.tp}
        | {f"{kind} group": said(layout.group_of(kind, p.rank)) for kind in kinds}
        for p in map(layout.place, range(layout.world))
    ]
    table(list(rows[0]), [list(row.values()) for row in rows])
    check("tp ranks are neighbours: they talk 2 times a layer", layout.group_of("tp", 4) == [4, 5])
    check("the same place in the next stage is tp_size further: once a step", layout.group_of("pp", 4) == [4, 6])
    check("rank 0 of a replica is its one will", [group[0] for group in layout.groups("replica")] == [0, 4])
    return rows


def inside_a_stage() -> None:
    layout = Layout.of(tp=4, attn_dp=2, ep=4)
    heading(f"{layout}: attention and experts are cut inside tp, so the world stays 4")
    kinds = ("tp", "attn_dp", "attn_tp", "ep")
    table(("kind", "groups", "its members share"), [(kind, layout.groups(kind), MEANS[kind]) for kind in kinds])
    check("4 ranks, not 4 x 2 x 4", layout.world == 4)


MEANS = {
    "tp": "each layer's MLP, cut in 4",
    "attn_dp": "one share of the heads, for different requests",
    "attn_tp": "the requests, for different heads",
    "ep": "the experts, each has a quarter of them",
}


def on_two_hosts() -> None:
    heading("tp4 x pp2 on hosts of 4 devices: a stage stays inside, a pipeline goes across")
    mapped = get_rank_mapping(4, 2, 1, node_size=4)
    rows = [
        (node, said([one.place.rank for one in mapped if one.node == node]),
         said(sorted({one.place.pp for one in mapped if one.node == node})))
        for node in sorted({one.node for one in mapped})
    ]  # fmt: skip
    table(("host", "ranks", "stages"), rows)
    check(
        "no tp group straddles two hosts",
        all(len({mapped[r].node for r in g}) == 1 for g in ([0, 1, 2, 3], [4, 5, 6, 7])),
    )


def what_does_not_multiply() -> None:
    heading("What does not multiply to the world")
    for asked in ({"tp": 2, "pp": 2, "world": 6}, {"tp": 4, "attn_dp": 3}):
        try:
            Layout.of(**asked)
        except ValueError as error:
            print(f"  {error}")
        else:
            check(f"{asked} is refused", False)


def real_groups() -> None:
    state = ParallelState.initialize(2, 2, device="cpu")
    if state.world.rank == 0:
        heading(f"{state.layout}, four processes: each group adds up 2^rank of its members")
    mine = torch.tensor([2.0**state.world.rank])
    sums = []
    for kind in ("tp", "pp", "replica"):
        group = getattr(state, kind)
        sums.append(all_reduce(mine.clone(), group, kind))  # COMM all-reduce [1]: who is in this group?
    everyone = all_gather(torch.cat(sums), state.world, "sums")  # COMM all-gather [3]: to show them in one table
    if state.world.rank == 0:
        rows = []
        for rank, values in enumerate(everyone):
            groups = [state.layout.group_of(kind, rank) for kind in ("tp", "pp", "replica")]
            rows.append((rank, *(f"{said(g)}: {int(v)}" for g, v in zip(groups, values.tolist(), strict=True))))
        table(("rank", "tp group", "pp group", "replica"), rows)
        formula = [
            [sum(2**r for r in state.layout.group_of(kind, rank)) for kind in ("tp", "pp", "replica")]
            for rank in range(4)
        ]
        check("every sum is the one of the table's members", [v.tolist() for v in everyone] == formula)
        check(f"{len(GROUPS)} kinds of group; those of one member send nothing", state.dp.size == state.cp.size == 1)


def said(ranks: list[int]) -> str:
    return " ".join(map(str, ranks))


if __name__ == "__main__":
    run_main(main)
