"""Two half-batches that hide each other's all-reduces, against one batch; and on GPUs the sum, residual and norm in one kernel.

    torchrun --nproc_per_node=2 -m common.distributed.bench_two_batch --device cuda     # Qwen2.5-7B
    torchrun --nproc_per_node=2 -m common.distributed.bench_two_batch --device cpu --model SmolLM2-135M

Steps without a CUDA graph, on random weights of the model's shape: a prefill of one prompt, and a decode step of a batch, each
as a whole and in halves, in turn, on the same ranks; the median of the rounds, and the ends. Then, on GPUs, a chain of as many
sums and norms as a decode step has, in a CUDA graph: by two kernels each, and by one. Rows are added to figures/two_batch.csv.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.distributed.launch import run_main
from common.executor import Executor
from common.layers.norm import RMSNorm
from common.models.published_configs import CONFIGS, published_config, shared_random_weights
from common.parallel_state import TPGroup, all_reduce, all_reduce_add_norm, initialize_tensor_parallel
from common.teaching.report import FIGURES, write_csv
from common.teaching.show import heading, table

PAGE = 16
CONTEXT = 256  # tokens of a decoding sequence
STEPS = {"cuda": {"prefill": (512, 2048, 8192), "decode": (8, 64, 256)}, "cpu": {"prefill": (256,), "decode": (8,)}}
FUSED_ROWS = (1, 8, 64, 128)
MODEL = {"cuda": "Qwen2.5-7B", "cpu": "SmolLM2-135M"}


def main() -> None:
    args = parse_args()
    tp = initialize_tensor_parallel(device=args.device)
    if tp.size == 1:
        raise ValueError("one rank sends nothing: torchrun --nproc_per_node=2 -m common.distributed.bench_two_batch")
    kind = tp.device.type
    model = args.model or MODEL[kind]
    with torch.inference_mode():
        rows = in_halves(tp, model, STEPS[kind], args.rounds)
        rows += fused(tp, model, args.rounds) if kind == "cuda" and tp.fast_all_reduce else []
    if tp.rank > 0:
        return
    heading(f"{model} on {tp.size} ranks")
    table(
        ("step", "way", "ms", "lowest", "highest"),
        [(r["step"], r["way"], r["ms"], r["lowest"], r["highest"]) for r in rows],
    )
    old = list(csv.DictReader(args.out.open(encoding="utf-8"))) if args.out.exists() else []
    write_csv([*old, *rows], args.out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", choices=CONFIGS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=FIGURES / "two_batch.csv")
    args = parser.parse_args()
    if args.rounds < 1:
        raise ValueError(f"rounds={args.rounds} must be at least 1")
    return args


def in_halves(tp: TPGroup, model: str, steps: dict[str, tuple[int, ...]], rounds: int) -> list[dict]:
    tokens = max(*steps["prefill"], max(steps["decode"]) * (CONTEXT + PAGE))
    executor = Executor(
        str(shared_random_weights(model, tp)), tp.device.type, PAGE, max_total_tokens=tokens + PAGE, tp=tp,
        max_running_requests=max(steps["decode"]), disable_cuda_graph=True, skip_tokenizer_init=True,
        enable_two_batch_overlap=True,
    )  # fmt: skip

    def run(step: Callable[[], object], overlap: bool) -> float:
        executor.two_batch_overlap = overlap
        return seconds(step, tp)

    rows = []
    for name, sizes in steps.items():
        for size in sizes:
            step = partial({"prefill": prefill, "decode": decode}[name], executor, size)
            ways = {way: partial(run, step, overlap) for way, overlap in (("whole", False), ("two halves", True))}
            what = f"{name} of {size:,} tokens" if name == "prefill" else f"{name} of {size} sequences"
            rows += [{"model": model, "ranks": tp.size, "step": what} | row for row in in_turn(ways, rounds)]
    return rows


def prefill(executor: Executor, tokens: int) -> None:
    executor.table.set_pages([(0, 0, range(-(-tokens // PAGE)))])
    one = np.ones(1, dtype=np.int64)
    executor.ragged(np.arange(tokens) % 1000, 0 * one, 0 * one, tokens * one, one)


def decode(executor: Executor, batch: int) -> None:
    rows, each = np.arange(batch), (CONTEXT + PAGE) // PAGE
    executor.table.set_pages([(row, 0, range(row * each, (row + 1) * each)) for row in rows])
    executor.decode(rows, np.full(batch, CONTEXT))


def fused(tp: TPGroup, model: str, rounds: int) -> list[dict]:
    """The sums and norms of a decode step, without all that lies between."""
    config = published_config(model)
    width, times = config.hidden_size, 2 * config.num_hidden_layers
    norm, rows = RMSNorm(width, 1e-6).to(tp.device, torch.bfloat16), []
    norm.weight.data.fill_(1.0)

    def apart(x: torch.Tensor, residual: torch.Tensor):
        return norm.add(all_reduce(x, tp, "bench"), residual)  # COMM all-reduce [T, D]: how long it takes

    def together(x: torch.Tensor, residual: torch.Tensor):
        return all_reduce_add_norm(x, residual, norm, tp, "bench")  # COMM all-reduce [T, D]: how long it takes

    for n in FUSED_ROWS:
        ways = {}
        for way, both in (("sum, then norm", apart), ("one kernel", together)):
            x, residual = (torch.randn(n, width, device=tp.device, dtype=torch.bfloat16) for _ in range(2))
            ways[way] = partial(seconds, captured(both, x, residual, times).replay, tp)
        step = f"{times} sums and norms [{n}, {width}]"
        rows += [{"model": model, "ranks": tp.size, "step": step} | row for row in in_turn(ways, rounds)]
    return rows


def captured(both: Callable, x: torch.Tensor, residual: torch.Tensor, times: int) -> torch.cuda.CUDAGraph:
    both(x, residual)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            x, _ = both(x, residual)
    return graph


def seconds(step: Callable[[], object], tp: TPGroup) -> float:
    """Of one step, the mean of three behind one another; all ranks begin together."""
    all_reduce(torch.zeros(1), tp, "ready")  # COMM all-reduce [1]: start together
    began = time.perf_counter()
    for _ in range(3):
        step()
    if tp.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / 3


def in_turn(ways: dict[str, Callable[[], float]], rounds: int) -> list[dict]:
    for run in ways.values():
        run()  # warm up
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            spent[way].append(1e3 * run())
    return [
        {"way": way, "ms": round(statistics.median(ms), 3), "lowest": round(min(ms), 3), "highest": round(max(ms), 3)}
        for way, ms in spent.items()
    ]


if __name__ == "__main__":
    run_main(main)
