"""The sum of one message over the GPUs of a host, by size: the four ways that there are.

    torchrun --standalone --nproc_per_node=2 -m common.kernels.bench_all_reduce                 # or 4

    push       ours, in one kernel and one trip (all_reduce.py), up to 1 MB out of a rank
    one-shot   PyTorch's: every rank reads all buffers
    two-shot   PyTorch's: every rank adds up its part of all buffers, then all fetch the parts
    NCCL       its own choice, by the library

bfloat16; CALLS messages of a way one after the other in a CUDA graph, the ways' graphs replayed in turn, the median of ten
replays. Both of PyTorch's work in a buffer that all ranks see; what copies a message there and back is not counted. Adds to
figures/all_reduce_gpu.csv; rows of as many GPUs are replaced.
"""

import csv
from pathlib import Path

import torch
import torch.distributed as dist

from common.distributed.collectives import TPGroup
from common.distributed.launch import run_main
from common.distributed.symmetric_memory import MAX_BYTES, ONE_SHOT_BYTES
from common.kernels.timing import timed_in_turn
from common.parallel_state import initialize_tensor_parallel
from common.teaching.report import FIGURES, write_csv
from common.teaching.show import table

SIZES = (1 << 10, 7 << 10, 8 << 10, 56 << 10, 1 << 16, 1 << 18, 448 << 10, 1 << 20, MAX_BYTES)
CALLS = 20
WAYS = ("push", "one-shot", "two-shot", "NCCL")


@torch.inference_mode()
def measure(tp: TPGroup) -> list[dict[str, object]]:
    """A row a size; all ranks do the same, and rank 0's clock counts."""
    import torch.distributed._symmetric_memory as symm_mem  # noqa: PLC0415, not in every build of torch

    group, rows = tp.device_group.group_name, []
    shared = symm_mem.empty(MAX_BYTES // 2, dtype=torch.bfloat16, device=tp.device).zero_()
    symm_mem.rendezvous(shared, tp.device_group)
    for size in SIZES:
        x, seen = torch.zeros(size // 2, dtype=torch.bfloat16, device=tp.device), shared[: size // 2]
        ways = {
            "push": lambda x=x: tp.fast_all_reduce(x),
            "one-shot": lambda seen=seen: torch.ops.symm_mem.one_shot_all_reduce(seen, "sum", group),
            "two-shot": lambda seen=seen: torch.ops.symm_mem.two_shot_all_reduce_(seen, "sum", group),
            "NCCL": lambda x=x: dist.all_reduce(x, group=tp.device_group),  # COMM all-reduce [n]: how long it takes
        }
        if size > ONE_SHOT_BYTES // (tp.size - 1):
            del ways["push"]  # that would be two-shot, and copies
        times = dict(zip(ways, timed_in_turn([[way] * CALLS for way in ways.values()], alike=True), strict=True))
        rows.append(
            {"gpus": tp.size, "bytes": size} | {way: round(times[way], 2) if way in times else "" for way in WAYS}
        )
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        raise ValueError("bench_all_reduce needs NVIDIA GPUs, and there are none; measure_links.py measures CPU ranks")
    tp = initialize_tensor_parallel(device="cuda")
    if tp.fast_all_reduce is None:
        raise ValueError(f"{tp.size} rank(s) that share no memory: torchrun --nproc_per_node=2 or 4, GPUs of one host")
    rows, path = measure(tp), Path(FIGURES / "all_reduce_gpu.csv")
    if tp.rank > 0:
        return
    print(f"us a message over {tp.size} GPUs")
    table(("bytes", *WAYS), [[row[key] for key in ("bytes", *WAYS)] for row in rows])
    old = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
    write_csv([row for row in old if int(row["gpus"]) != tp.size] + rows, path)


if __name__ == "__main__":
    run_main(main)
