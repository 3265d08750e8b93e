"""Both chapters' engines on the same requests, in turn in one process on one GPU.

make bench-gpu PART=engines        # or: python figures/compare_engines.py

Workload A of ch07_sglang_radix/benchmarks/bench_gpu.py, which is that of ch06_tp_vllm/bench_throughput.py: 256 requests, prompts
and answers of 100 to 1024 tokens, temperature 0.6. Each round runs chapter 6, then chapter 7; the median of five rounds counts.
Writes figures/engines.csv; KV waste and the times are chapter 6's own, of the round in the middle.
"""

import multiprocessing
import statistics
import sys
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

MODELS = ("Qwen2.5-0.5B", "Qwen3-0.6B")
ROUNDS = 5
BLOCKS = 36_000  # of 16 tokens, for each of the two: they share the memory of one GPU


def main() -> None:
    if not torch.cuda.is_available():
        raise ValueError("compare_engines needs an NVIDIA GPU, and there is none")
    rows = []
    for model in MODELS:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows += pool.submit(compare, model).result()
    write_csv(rows, FIGURES / "engines.csv")


def compare(model: str) -> list[dict]:
    """A row for each engine."""
    folder = str(shared_random_weights(model, initialize_tensor_parallel(device="cuda")))
    six = LLMEngine(folder, device="cuda", num_gpu_blocks_override=BLOCKS)
    seven = Engine(folder, device="cuda", max_total_tokens=16 * BLOCKS)
    requests, theirs = workload(1.0, six.runner.config.vocab_size), Workloads(seven)
    sixes, sevens = [], []
    for _ in range(ROUNDS):
        sixes.append(serve(six, requests, 0.6, quiet=True))
        sevens.append(theirs.a(len(requests)))
        print(f"{model}  chapter 6 {sixes[-1]['tokens/s']:,.0f}  chapter 7 {sevens[-1]:,.0f} tokens/s", flush=True)
    middle = sorted(sixes, key=lambda row: row["tokens/s"])[ROUNDS // 2]
    empty = dict.fromkeys(middle, "")
    return [
        {"model": model, "engine": "chapter 6"} | middle,
        {"model": model, "engine": "chapter 7"} | empty | {"tokens/s": round(statistics.median(sevens), 1)},
    ]


if __name__ == "__main__":
    run_main(main)
