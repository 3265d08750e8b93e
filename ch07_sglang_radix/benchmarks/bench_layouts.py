"""One model under every layout of the GPUs that there are, on the same ranks one after the other; and what the planner says.

    torchrun --nproc_per_node=4 -m ch07_sglang_radix.benchmarks.bench_layouts                             Qwen2.5-7B
    torchrun --nproc_per_node=4 -m ch07_sglang_radix.benchmarks.bench_layouts --model Qwen2.5-32B --layouts tp4 "tp2 x pp2"
    torchrun --nproc_per_node=4 -m ch07_sglang_radix.benchmarks.bench_layouts --model Qwen3-30B-A3B --layouts tp4 "tp4, ep4"
    torchrun --nproc_per_node=4 -m ch07_sglang_radix.benchmarks.bench_layouts --check                     float32: equal tokens?
    python -m ch07_sglang_radix.benchmarks.bench_layouts --plan figures/bench_layouts.csv          no GPU: the planner's winners

D, A64, C and 32k are the workloads of bench_gpu.py; A64 has the same 64 requests for each replica. --check serves the bundled
model, and its mixture of experts, in float32 under every layout: replicas of one rank each are what the others are compared with.
--workloads D 32k: these alone. --tiny: few short requests on any device, of all but C.

Adds to figures/bench_layouts.csv; rows of the same model, layout and workload on such a device are replaced.
"""

import argparse
import csv
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ch07_sglang_radix.benchmarks.gpu_workloads import LONG, Workloads
from ch07_sglang_radix.engine import Engine
from common.distributed.launch import run_main
from common.distributed.layout import Layout
from common.distributed.machines import GPUS, Machine
from common.models.published_configs import model_shape, published_shape, shared_random_weights
from common.parallel_state import ParallelState, get_parallel_state
from common.planner.bounds import Bound, bound
from common.planner.choice import room_of
from common.planner.plan import Load, Way
from common.teaching.report import FIGURES, this_device, write_csv
from common.teaching.show import check, table
from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.upcycle import MIXTURE_PATH

OPTIONS: dict[int, dict[str, dict[str, int]]] = {  # ranks -> layout -> Engine's arguments; tp is what is left of the ranks
    2: {
        "tp2": {}, "pp2": {"pp_size": 2}, "dp2": {"dp_size": 2}, "tp2, cp2": {"cp_size": 2}, "tp2, ep2": {"ep_size": 2},
        "tp2, attn-dp2, ep2": {"attn_dp_size": 2, "ep_size": 2},
    },
    4: {
        "tp4": {}, "tp2 x pp2": {"pp_size": 2}, "tp2 x dp2": {"dp_size": 2}, "dp4": {"dp_size": 4}, "tp4, cp4": {"cp_size": 4},
        "tp4, ep4": {"ep_size": 4}, "tp4, attn-dp4, ep4": {"attn_dp_size": 4, "ep_size": 4},
    },
}  # fmt: skip
WORKLOADS = ("D", "A64", "C", "32k")
PROMPTS = [[100 * (i + 1) + 7 * j for j in range(n)] for i, n in enumerate((20, 12, 28, 12, 60))]
CHUNK = 8192


@dataclass(frozen=True)
class Row:
    """What is compared: a workload's metric, the load that it is for the planner, and whether more is better."""

    workload: str
    metric: str
    context: int
    batch: int  # of one replica
    more: bool


ROWS = (
    Row("D", "ms per token", 640, 1, False), Row("A64", "tokens/s", 1120, 64, True), Row("C warm", "tokens/s", 2304, 256, True),
    Row("32k", "s to first token", LONG, 1, False),
)  # fmt: skip


def measure(
    model: str, layers: int | None, layout: str, folder: str, tiny: bool, workloads: Sequence[str]
) -> list[dict]:
    """The rows of one layout, on rank 0; the other ranks do their part, and get none."""
    ranks, began = int(os.environ["WORLD_SIZE"]), time.perf_counter()
    device = "cpu" if tiny else "cuda"
    with Engine(folder, device=device, chunked_prefill_size=CHUNK, **OPTIONS[ranks][layout]) as engine:
        rank, dp, rows = get_parallel_state().world.rank, OPTIONS[ranks][layout].get("dp_size", 1), []
        named = model + (f", {layers} layers" if layers else "")

        def note(workload: str, metric: str, value: float) -> None:
            if rank == 0:
                rows.append({
                    "model": named, "gpus": ranks, "layout": layout, "workload": workload, "metric": metric,
                    "value": round(value, 4),
                })  # fmt: skip
                print(f"{named:24s} {layout:20s} {workload:8s} {metric:18s} {value:12.3f}", flush=True)

        note("start", "seconds to ready", time.perf_counter() - began)
        work = Workloads(engine, 500 if tiny else 10_000)
        if tiny:
            work.prompts, work.lengths = [p[:8] for p in work.prompts], [4] * 256
            work.shared = [p[:16] for p in work.shared]
        short, count = (4, 4) if tiny else (512, 64)
        if "D" in workloads:
            work.d(min(32, short))
            note("D", "ms per token", min(work.d(short) for _ in range(2)))
        if "A64" in workloads:
            note("A64", "tokens/s", max(work.a(count, dp) for _ in range(2)))
        if "C" in workloads:
            work.c(fresh=True)
            note("C warm", "tokens/s", work.c(fresh=False)[0])
        if "32k" in workloads:
            note("32k", "s to first token", min(work.first_token(32 if tiny else LONG, CHUNK) for _ in range(2)))
    return rows


def same_tokens() -> None:
    """The bundled model, of layouts with experts its mixture, float32, greedy: every layout's tokens are those of single ranks."""
    ranks = int(os.environ["WORLD_SIZE"])
    device, alone = "cuda" if torch.cuda.is_available() else "cpu", f"dp{ranks}"
    params = {"max_new_tokens": 32, "temperature": 0.0, "ignore_eos": True}
    dense = {name: options for name, options in OPTIONS[ranks].items() if "ep_size" not in options}
    experts = {
        name: options
        for name, options in OPTIONS[ranks].items()
        if "ep_size" in options or name in (alone, f"tp{ranks}")
    }
    for folder, layouts in ((TINY_QWEN_PATH, dense), (MIXTURE_PATH, experts)):
        found = {}
        for name, options in layouts.items():
            with Engine(
                str(folder), device=device, dtype="float32", page_size=4, max_total_tokens=2048, **options
            ) as engine:
                found[name] = [one["output_ids"] for one in engine.generate(input_ids=PROMPTS, sampling_params=params)]
                rank = get_parallel_state().world.rank
        if rank == 0:
            for name, tokens in found.items():
                where = f"{folder.name}, float32 on {ranks} ranks of {device}, {name}"
                check(f"{where}: the tokens of one rank", tokens == found[alone])


def planned(path: Path) -> None:
    """Of each model, machine and workload in the file: the layout that was best, and the planner's of the same ones.

    Several that are equally good for the planner, with the best among them, are a tie: it names no winner."""
    with path.open(newline="", encoding="utf-8") as file:
        measured = list(csv.DictReader(file))
    shown = []
    for key in dict.fromkeys(_group(one) for one in measured):
        for row in ROWS:
            values = {
                one["layout"]: float(one["value"])
                for one in measured
                if (_group(one), one["workload"]) == (key, row.workload)
            }
            if len(values) > 1:
                model, gpus, gpu = key
                best = _best(values, row.more)
                said = _best({layout: _planned(model, layout, row, gpu) for layout in values}, row.more)
                same = "yes" if said <= best else "tie" if said & best else "no"
                shown.append((model, f"{gpus} {gpu}", row.workload, *_told(best, values), *_told(said, values), same))
    table(("model", "GPUs", "workload", "best", "measured", "the planner's", "measured", "the same"), shown)
    right, ties = (sum(same == word for *_, same in shown) for word in ("yes", "tie"))
    print(f"\nThe planner names the winner in {right} of {len(shown)} rows, {ties} {'tie' if ties == 1 else 'ties'}")


def _group(row: dict[str, str]) -> tuple[str, int, str]:
    """(model, GPUs, their kind): layouts that were measured on the same are compared. Raises ValueError for an unknown kind."""
    if not (found := [name for name in GPUS if name in row["device"]]):
        raise ValueError(f"device={row['device']!r} is unknown to the planner; it knows {', '.join(GPUS)}")
    return row["model"], int(row["gpus"]), max(found, key=len)  # L40S is no L4


def _best(values: dict[str, float], more: bool) -> set[str]:
    """All that are as good as the best."""
    first = (max if more else min)(values.values())
    return {layout for layout, value in values.items() if value == first}


def _told(layouts: set[str], values: dict[str, float]) -> tuple[str, str]:
    """(names, what was measured of them), in an order that is not the file's."""
    names = sorted(layouts)
    return " or ".join(names), " or ".join(f"{values[name]:,.2f}" for name in names)


def _planned(model: str, layout: str, row: Row, gpu: str) -> float:
    least = bound_of(model, layout, row, gpu)
    if row.workload == "32k":
        return least.first_token_s
    return least.tokens_per_s if row.more else least.seconds


def bound_of(model: str, layout: str, row: Row, gpu: str) -> Bound:
    """The planner's, of what a row of the file has measured."""
    name, _, reduced = model.partition(", ")
    config = published_shape(name, num_hidden_layers=int(reduced.split()[0])) if reduced else model_shape(name)
    sizes = {part.rstrip("0123456789"): int(part.lstrip("abcdefghijklmnopqrstuvwxyz-")) for part in
             layout.replace(" x ", ", ").split(", ")}  # fmt: skip
    names = {"attn-dp": "attn_dp"}
    shape = Layout(**{names.get(kind, kind): size for kind, size in sizes.items()})
    load = Load(row.context, row.batch * (shape.dp if row.workload == "A64" else 1), chunk=CHUNK)
    machine = Machine.of_gpus(gpu)
    return bound(config, Way(shape), load, machine, room_of(machine, shape.world, None, 0.9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2.5-7B", help="a published one (published_configs.py)")
    parser.add_argument("--layers", type=int, help="a config with so many layers, and named so")
    parser.add_argument("--layouts", nargs="+", help="default: all without experts")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--check", action="store_true", help="compare tokens, measure nothing")
    parser.add_argument("--tiny", action="store_true", help="few short requests of the bundled model, on a CPU")
    parser.add_argument("--plan", type=Path, metavar="CSV", help="what the planner says of what was measured")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    if args.plan:
        return planned(args.plan)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks not in OPTIONS:
        raise ValueError(f"{ranks} process(es): torchrun --nproc_per_node=2 or 4 -m {__spec__.name}")
    if args.check:
        return same_tokens()
    layouts = args.layouts or [name for name, options in OPTIONS[ranks].items() if "ep_size" not in options]
    if unknown := sorted({*layouts} - {*OPTIONS[ranks]}):
        raise ValueError(f"--layouts {unknown[0]}: on {ranks} ranks there are {', '.join(OPTIONS[ranks])}")
    if not torch.cuda.is_available() and not args.tiny:
        raise ValueError("bench_layouts needs NVIDIA GPUs, and there are none; --tiny tries it on a CPU")
    workloads = [name for name in args.workloads if name != "C" or not args.tiny]
    if not workloads:
        raise ValueError("--workloads C with --tiny: its shared beginnings are long; use D, A64 or 32k")
    folder = str(TINY_QWEN_PATH)
    if not args.tiny:
        changes = {"num_hidden_layers": args.layers} if args.layers else {}
        folder = str(shared_random_weights(args.model, ParallelState.initialize(None, device="cuda").world, **changes))
    path = args.out / "bench_layouts.csv"
    for layout in layouts:
        if rows := measure(args.model, args.layers, layout, folder, args.tiny, workloads):  # rank 0
            write_csv(_others(path, rows) + rows, path)


def _others(path: Path, new: list[dict]) -> list[dict]:
    """The rows of a file that are of other models, layouts, workloads or devices, with where and when they were measured."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        kinds = [(*(row[key] for key in ("model", "layout", "workload")), this_device()) for row in new]
        names = ("model", "layout", "workload", "device")
        return [row for row in csv.DictReader(file) if tuple(row[name] for name in names) not in kinds]


if __name__ == "__main__":
    run_main(main)
