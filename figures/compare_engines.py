"""Both chapters' engines on the same requests, in turn in one process on one GPU.

make bench-gpu PART=engines        # or: python figures/compare_engines.py [Qwen2.5-0.5B]

Workloads A and C of ch07_sglang_radix/benchmarks/bench_gpu.py. A is that of ch06_tp_vllm/bench_throughput.py: 256 requests,
prompts and answers of 100 to 1024 tokens, temperature 0.6. C: 256 requests with 8 shared beginnings of 2,048 tokens, 128 of their
own and 128 new ones, greedy; cold, then warm with other ends. Each round runs chapter 6, then chapter 7; the median of five rounds
counts. Writes figures/engines.csv; KV waste and the times are chapter 6's own, of the round in the middle.
Rows of other models stay.
"""

import csv
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from ch06_tp_vllm.bench_throughput import serve, workload
from ch06_tp_vllm.llm_engine import LLMEngine
from ch07_sglang_radix import Engine
from ch07_sglang_radix.benchmarks.gpu_workloads import Workloads
from common.distributed.launch import run_main
from common.models.published_configs import shared_random_weights
from common.parallel_state import initialize_tensor_parallel
from common.teaching.report import FIGURES, write_csv
from common.teaching.transformers_peer import Request

MODELS = ("Qwen2.5-0.5B", "Qwen3-0.6B")
ROUNDS = 5
BLOCKS = 36_000  # of 16 tokens, for each of the two: they share the memory of one GPU


def main() -> None:
    if not torch.cuda.is_available():
        raise ValueError("compare_engines needs an NVIDIA GPU, and there is none")
    rows, path = [], FIGURES / "engines.csv"
    models = tuple(sys.argv[1:]) or MODELS
    for model in models:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows += pool.submit(compare, model).result()
    with path.open(newline="", encoding="utf-8") as file:
        others = [row for row in csv.DictReader(file) if row["model"] not in models]
    write_csv(others + rows, path)


def compare(model: str) -> list[dict]:
    """A row for each workload and engine."""
    folder = str(shared_random_weights(model, initialize_tensor_parallel(device="cuda")))
    six = LLMEngine(folder, device="cuda", num_gpu_blocks_override=BLOCKS)
    seven = Engine(folder, device="cuda", max_total_tokens=16 * BLOCKS)
    theirs, rows = Workloads(seven), []
    requests = workload(1.0, six.runner.config.vocab_size)
    ways: dict[str, tuple[Callable[[], dict], Callable[[], float]]] = {
        "A": (lambda: serve(six, requests, 0.6, quiet=True), lambda: theirs.a(len(requests))),
        "C cold": (lambda: shared(six, theirs, True), lambda: theirs.c(True)[0]),
        "C warm": (lambda: shared(six, theirs, False), lambda: theirs.c(False)[0]),
    }
    told: dict[str, tuple[list[dict], list[float]]] = {name: ([], []) for name in ways}
    for _ in range(ROUNDS):
        for name, (of_six, of_seven) in ways.items():
            sixes, sevens = told[name]
            sixes.append(of_six())
            sevens.append(of_seven())
            what = f"chapter 6 {sixes[-1]['tokens/s']:,.0f}  chapter 7 {sevens[-1]:,.0f} tokens/s"
            print(f"{model}  {name:6s}  {what}", flush=True)
    for name, (sixes, sevens) in told.items():
        middle = sorted(sixes, key=lambda row: row["tokens/s"])[ROUNDS // 2]
        empty = dict.fromkeys(middle, "")
        rows += [
            {"model": model, "workload": name, "engine": "chapter 6"} | middle,
            {"model": model, "workload": name, "engine": "chapter 7"}
            | empty
            | {"tokens/s": round(statistics.median(sevens), 1)},
        ]
    return rows


def shared(engine: LLMEngine, theirs: Workloads, fresh: bool) -> dict:
    """C by chapter 6: the blocks of an earlier round are there, or none."""
    return serve(engine, [Request(ids, 128) for ids in theirs.with_beginnings()], 0.0, quiet=True, forget=fresh)


if __name__ == "__main__":
    run_main(main)
