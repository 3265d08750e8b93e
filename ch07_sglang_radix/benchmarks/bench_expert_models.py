"""Whole models with experts on a GPU, with random weights, against the bytes of a step.

    python -m ch07_sglang_radix.benchmarks.bench_expert_models --model Qwen3-30B-A3B              61 GB of weights: an H200
    python -m ch07_sglang_radix.benchmarks.bench_expert_models --model Qwen3-30B-A3B --layers 24  reduced, and named so in the CSV
    python -m ch07_sglang_radix.benchmarks.bench_expert_models --model DeepSeek-V2-Lite
    torchrun --nproc_per_node=2 -m ch07_sglang_radix.benchmarks.bench_expert_models [--ep-size 2]
    python -m ch07_sglang_radix.benchmarks.bench_expert_models --tiny --model FOLDER              any device: does it run?

D, A64 and 32k are the workloads of bench_gpu.py. `MB read` are the bytes of this rank's weights that a step of one row reads:
all but the embedding, and of a layer's experts k. Its floor is that over the bandwidth of a large copy. Writes
figures/expert_models[_tpR][_epR].csv, the rows of other models that stand there kept.
"""

import argparse
import csv
import time
from pathlib import Path

import torch

from ch07_sglang_radix.benchmarks.gpu_workloads import LONG, LONG_CHUNKS, Workloads
from ch07_sglang_radix.engine import Engine
from common.distributed.launch import run_main
from common.executor import Executor
from common.models.published_configs import shared_random_weights
from common.parallel_state import ParallelState
from common.teaching.report import FIGURES, write_csv


def measure(model: str, layers: int | None, ep_size: int, device: str, tiny: bool) -> list[dict]:
    """D, A64 and the first token of a 32,000-token prompt. tiny: few and short requests, to see that it runs."""
    parallel = ParallelState.initialize(None, expert_parallel_size=ep_size, device=device)
    changes = {"num_hidden_layers": layers} if layers else {}
    folder = model if Path(model).exists() else str(shared_random_weights(model, parallel.world, **changes))
    began = time.perf_counter()
    run = Engine(folder, device=device, ep_size=ep_size)
    rows, ranks = [], parallel.world.size
    named = Path(model).name + (f", {layers} layers" if layers else "")

    def note(workload: str, metric: str, value: float) -> None:
        if parallel.world.rank == 0:
            rows.append({
                "model": named, "ranks": ranks, "ep": ep_size, "workload": workload, "metric": metric, "value": round(value, 4)
            })  # fmt: skip
            print(f"{named:28s} {ranks} ranks ep {ep_size}  {workload:24s} {metric:20s} {value:12.3f}", flush=True)

    note("start", "seconds to ready", time.perf_counter() - began)
    note("step of one row", "MB read", step_bytes(run.wrapper) / 1e6)
    work = Workloads(run, 500 if tiny else 10_000)
    if tiny:
        work.lengths = [4] * len(work.lengths)
        work.prompts = [prompt[:8] for prompt in work.prompts]
    work.d(4 if tiny else 32)
    note("D", "ms per token", min(work.d(4 if tiny else 512) for _ in range(2)))
    for i in (1, 2):
        note("A64", f"tokens/s run {i}", work.a(4 if tiny else 64))
    for chunk in LONG_CHUNKS:
        length = 32 if tiny else LONG
        note(f"32k in chunks of {chunk}", "s to first token", min(work.first_token(length, chunk) for _ in range(2)))
    return rows


def step_bytes(executor: Executor) -> float:
    """Bytes of this rank's weights that a step of one token reads: of a layer's experts k, of the embedding one row.

    With experts dealt out over ranks a rank has as many of the k as there are by chance; counted is the average.
    """
    mixture, experts, others = executor.config.mixture, 0.0, 0
    for name, p in executor.model.named_parameters():
        if name.endswith(("experts.w13", "experts.w2")):
            experts += p.nbytes * mixture.router.top_k / mixture.num_experts
        elif "embed_tokens" not in name or executor.config.tie_word_embeddings:
            others += p.nbytes
    return experts + others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-30B-A3B", help="a published name (published_configs.py), or a folder")
    parser.add_argument("--layers", type=int, help="a config with so many layers, and named so")
    parser.add_argument("--ep-size", type=int, default=1, help="ranks that experts are dealt out over")
    parser.add_argument("--tiny", action="store_true", help="few short requests on any device, to see that it runs")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.tiny:
        raise ValueError("bench_expert_models needs an NVIDIA GPU, and there is none; --tiny tries it on a CPU")
    rows = measure(args.model, args.layers, args.ep_size, "cuda" if on_gpu else "cpu", args.tiny)
    if rows:  # rank 0
        sizes = (("tp", rows[0]["ranks"]), ("ep", args.ep_size))
        path = args.out / f"expert_models{''.join(f'_{kind}{n}' for kind, n in sizes if n > 1)}.csv"
        write_csv(_others(path, rows[0]["model"]) + rows, path)


def _others(path: Path, model: str) -> list[dict]:
    """The rows of a file that are about other models, with where and when they were measured."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["model"] != model]


if __name__ == "__main__":
    run_main(main)
