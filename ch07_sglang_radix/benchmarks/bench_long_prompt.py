"""How long the first token of a long prompt takes: one GPU, layers cut (tp), tokens spread (cp), a pipeline of chunks (pp).

    torchrun --nproc_per_node=1 -m ch07_sglang_radix.benchmarks.bench_long_prompt
    torchrun --nproc_per_node=2 -m ch07_sglang_radix.benchmarks.bench_long_prompt                 tp=2
    torchrun --nproc_per_node=2 -m ch07_sglang_radix.benchmarks.bench_long_prompt --cp-size 2     cp=2
    torchrun --nproc_per_node=2 -m ch07_sglang_radix.benchmarks.bench_long_prompt --pp-size 2 --chunk 8192 4096 2048 \
        --enable-dynamic-chunking                                                                 pp=2, chunks alike and dynamic

Qwen2.5-7B as published, random bfloat16 weights, one request of --tokens tokens in chunks of --chunk (-1: at once), one token
out; another prompt each time, so that nothing is cached. The best of --runs, in seconds, behind one that is not counted.
Prints a line, and appends it to figures/bench_long_prompt.csv.
"""

import argparse
import csv
import random
import time
from pathlib import Path

import torch

from ch07_sglang_radix.engine import Engine
from common.distributed.launch import run_main
from common.models.published_configs import shared_random_weights
from common.parallel_state import ParallelState
from common.teaching.report import FIGURES, output_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2.5-7B", help="one of common/models/published_configs.py")
    parser.add_argument("--tokens", type=int, default=32_767, help="of the prompt; the model has positions for 32,768")
    parser.add_argument(
        "--chunk", type=int, nargs="+", default=[-1, 8192], help="chunked_prefill_size, one after another"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cp-size", type=int, default=1)
    parser.add_argument("--pp-size", type=int, default=1)
    parser.add_argument(
        "--enable-dynamic-chunking",
        action="store_true",
        help="each chunk twice: all of one length, then all of one time",
    )
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise ValueError("bench_long_prompt needs an NVIDIA GPU, and there is none")
    parallel = ParallelState.initialize(None, args.pp_size, context_parallel_size=args.cp_size, device="cuda")
    folder = shared_random_weights(args.model, parallel.world)
    ways = [(chunk, dynamic) for chunk in args.chunk for dynamic in (False, True)[: 1 + args.enable_dynamic_chunking]]
    for chunk, dynamic in ways:
        with Engine(
            str(folder),
            device="cuda",
            cp_size=args.cp_size,
            pp_size=args.pp_size,
            chunked_prefill_size=chunk,
            max_running_requests=8,
            enable_dynamic_chunking=dynamic,
        ) as engine:
            tp = engine.scheduler.tp
            draw = random.Random(0)
            seconds = [first_token(engine, draw, args.tokens) for _ in range(args.runs + 1)][1:]
            if parallel.world.rank > 0:
                continue
            name = torch.cuda.get_device_name(tp.device)
            row = {
                "gpu": name, "model": args.model, "tp": tp.size, "cp": args.cp_size, "pp": args.pp_size,
                "tokens": args.tokens, "chunk": chunk, "dynamic": dynamic,
                "best_s": round(min(seconds), 4), "worst_s": round(max(seconds), 4),
                "pool_tokens": engine.scheduler.pool.size,
                "pool_bytes_a_rank": engine.wrapper.kv_cache.kv.nbytes,
            }  # fmt: skip
            print(row, flush=True)
            _append(row, args.out / "bench_long_prompt.csv")


def first_token(engine: Engine, draw: random.Random, tokens: int) -> float:
    ids = [draw.randrange(10_000) for _ in range(tokens)]
    began = time.perf_counter()
    engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 1, "ignore_eos": True})
    return time.perf_counter() - began


def _append(row: dict, path: Path) -> None:
    before = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
    with output_file(path) as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows([*before, row])


if __name__ == "__main__":
    run_main(main)
