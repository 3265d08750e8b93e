"""One rank, one thread, float32: this engine against transformers on the bundled model.

    python ch07_sglang_radix/benchmarks/bench_cpu.py            # about 7 minutes; writes figures/bench_cpu.csv

Three workloads, the same requests for everyone, greedy, end-of-text ignored so that each answer has exactly
the length its request asks for:

    a  8 requests alike: 32 prompt tokens, 64 new
    b  64 requests, prompt and answer lengths 16..256 at random
    c  64 requests of 512 prompt tokens, the first 384 the same for all, 128 new

`generate` gets them in batches of 8 in order of arrival, padded on the left, each batch run to its longest
answer. `generate_batch` is transformers' own continuous batching; its set-up (pool allocation) is not timed.
Nor is ours. A round times all contenders one after the other on an idle, warm process; the radix cache starts
each run empty. Printed and written is the median of the rounds, in wanted new tokens a second.
"""

import argparse
import csv
import logging
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tqdm import tqdm

from ch07_sglang_radix import Engine
from ch07_sglang_radix.benchmarks.contenders import (
    OURS,
    circumstances,
    engine_runner,
    generate_batch_runner,
    in_turn,
    load_peer,
)
from common.distributed.launch import run_main
from common.teaching.report import output_file
from common.teaching.transformers_peer import Request, generate_runner
from common.tiny_qwen import TINY_QWEN_PATH

OUT = Path(__file__).parents[2] / "figures" / "bench_cpu.csv"


def workloads(vocab_size: int) -> dict[str, list[Request]]:
    rng = random.Random(0)

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(n)]

    shared = ids(384)
    return {
        "a": [Request(ids(32), 64) for _ in range(8)],
        "b": [Request(ids(rng.randint(16, 256)), rng.randint(16, 256)) for _ in range(64)],
        "c": [Request(shared + ids(128), 128) for _ in range(64)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", default="abc")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.rounds < 1 or not set(args.workloads) <= set("abc"):
        raise ValueError(
            f"rounds={args.rounds} must be at least 1 and workloads={args.workloads!r} of the letters a, b, c"
        )
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it asks for packages we do not need
    model = load_peer(TINY_QWEN_PATH, torch.float32)
    contenders = {
        OURS: engine_runner(Engine(page_size=16, device="cpu", dtype="float32")),
        "transformers generate": generate_runner(model),
        "transformers generate_batch": generate_batch_runner(model),
    }
    tasks = {name: w for name, w in workloads(model.config.vocab_size).items() if name in args.workloads}
    for run in contenders.values():
        run([Request([5, 6, 7], 4)])  # warm up
    rows, facts = [], circumstances("1 thread")
    with tqdm(total=len(tasks) * args.rounds * len(contenders), unit="run") as bar:
        for name, requests in tasks.items():
            bar.set_description(name)
            rows += [{"workload": name} | row | facts for row in in_turn(contenders, requests, args.rounds, bar)]
    args.out.parent.mkdir(exist_ok=True)
    with output_file(args.out) as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for r in rows:
        faster = f"{r['engine_is_faster_by']:>6.2f} x" if r["contender"] != OURS else ""
        print(
            f"{r['workload']}  {r['contender']:<28}{r['seconds']:8.2f} s {r['tokens_per_second']:8.0f} tok/s {faster}"
        )
    print(f"written to {os.path.relpath(args.out)}")


if __name__ == "__main__":
    run_main(main)
