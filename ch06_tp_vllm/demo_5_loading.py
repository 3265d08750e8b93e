"""Loading: read everything and throw most of it away, or read this rank's slices and nothing else.

    python ch06_tp_vllm/demo_5_loading.py                                 # the bundled model, seconds
    python ch06_tp_vllm/demo_5_loading.py --published Qwen2.5-0.5B        # random weights of that shape: a minute, 1 GB
                                                                          # of disk; writes figures/loading.csv

Each rank is a process of its own that loads its part of R, first in the old way, then in the new, and reports what it read
and how much memory it took at most beyond what it had before ("MB peak": pages of the file that the system has mapped count
too, and they are most of the difference to "MB kept"). The old way holds one whole tensor at a time; a simpler one would
hold the whole model.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from common.launch import run_main
from common.parallel_state import TPGroup
from common.published_configs import CONFIGS, save_random_weights
from common.report import FIGURES, write_csv
from common.show import check, heading, table
from common.tiny_qwen import TINY_QWEN_PATH
from common.weights import load_model, load_then_shard

WAYS = {"load, then shard": load_then_shard, "read the shard": load_model}
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--published", choices=CONFIGS, help="a published shape with random weights, instead of the bundled model"
    )
    args = parser.parse_args()
    if args.published is None:
        show(measure(TINY_QWEN_PATH, "the bundled model"))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(save_random_weights(args.published, Path(folder) / args.published), args.published)
    show(rows)
    write_csv(rows, FIGURES / "loading.csv")


def measure(folder: Path, name: str) -> list[dict]:
    rows = []
    for size in (1, 2, 4):
        for way in WAYS:
            # rank 0 stands for all: each reads and keeps as much
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                rows.append(
                    {"model": name, "R": size, "way": way} | pool.submit(_load, str(folder), size, way).result()
                )
    return rows


def _load(folder: str, size: int, way: str) -> dict:
    """In a fresh process: load rank 0 of `size`, and say what it took."""
    torch.set_num_threads(1)
    dtype = torch.float32 if Path(folder) == TINY_QWEN_PATH else torch.bfloat16
    before = _peak_bytes()
    model, report = WAYS[way](folder, TPGroup(0, size), dtype)
    peak = _peak_bytes() - before
    kept = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    return {
        "MB read": round(report.bytes_read / MB, 3), "MB kept": round(kept / MB, 3),
        "MB largest piece": round(report.peak_tensor_bytes / MB, 3), "MB peak": round(peak / MB, 1),
    }  # fmt: skip


def _peak_bytes() -> int:
    """The most memory this process ever had. (getrusage would count that of the process it was started from.)"""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def show(rows: list[dict]) -> None:
    heading(f"What one rank of R reads and holds: {rows[0]['model']}")
    table(list(rows[0])[1:], [list(row.values())[1:] for row in rows])
    read = {(row["R"], row["way"]): row["MB read"] for row in rows}
    check(
        "the old way reads the whole checkpoint on every rank", read[4, "load, then shard"] == read[1, "read the shard"]
    )
    check("the new way reads about 1/R of it", read[4, "read the shard"] < 0.3 * read[1, "read the shard"])


if __name__ == "__main__":
    run_main(main)
