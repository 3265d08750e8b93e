"""Shapes of real models on a CPU: this engine against transformers' generate, and against what memory allows.

    python -m ch07_sglang_radix.benchmarks.bench_cpu_real                      # SmolLM2-135M
    python -m ch07_sglang_radix.benchmarks.bench_cpu_real --model Qwen2.5-0.5B
    python -m ch07_sglang_radix.benchmarks.bench_cpu_real --batch 8 --rounds 1 --threads 1 --ranks --dtype float32 --out x.csv
    python -m ch07_sglang_radix.benchmarks.bench_cpu_real --readme             # measures nothing: README.md's table from the CSV

The weights are random and made on the spot, in the temporary directory. Batch B is B requests of 32 prompt tokens and 64
new ones; mixed is 32 requests, prompts and answers of 16 to 256 tokens at random. Greedy, end-of-text ignored. `generate` takes
a batch at once, the mixed requests in batches of 8 in order of arrival, padded on the left. A round times both in turn; the
median of the rounds counts. The radix cache is empty at the start of each run.

Each is measured in float32, and in bfloat16 if the CPU has instructions for it; with one thread, with all cores, and on two
ranks of one thread each (then generate has two threads). The bundled model fits into the cache and says little about all
this. What memory allows: a decode step of one request reads every matrix once, so it cannot take less than their bytes
over the bandwidth, which is measured by adding up a large tensor with the same threads.

Rows of the CSV that are measured again are replaced, all others stay.
"""

import argparse
import csv
import os
import random
import re
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tqdm import tqdm

from ch07_sglang_radix import Engine
from ch07_sglang_radix.benchmarks.contenders import (
    OURS,
    Contender,
    circumstances,
    engine_runner,
    in_turn,
    load_peer,
)
from common.distributed.launch import run_main
from common.layers.cpu_linear import choose_forms, computes_in
from common.models.published_configs import CONFIGS, shared_random_weights
from common.parallel_state import TPGroup
from common.teaching.report import FIGURES, output_file
from common.teaching.transformers_peer import Request, generate_runner

PEER = "transformers generate"
OUT = FIGURES / "bench_cpu_real.csv"
README = Path(__file__).parents[2] / "README.md"
BATCHES = ("1", "8", "32", "mixed")
KEY = ("model", "dtype", "cores", "batch", "contender")  # of a row


def main() -> None:
    args = parse_args()
    if args.readme:
        write_readme(args.out)
        return
    transformers.utils.logging.set_verbosity_error()
    folder = str(shared_random_weights(args.model, TPGroup()))
    cores = [(threads, 1) for threads in args.threads] + [(1, ranks) for ranks in args.ranks]
    with tqdm(total=len(args.dtype) * len(cores) * len(args.batch) * args.rounds * 2, unit="run") as bar:
        for dtype in args.dtype:
            peer = load_peer(folder, getattr(torch, dtype))
            for threads, ranks in cores:
                rows = measure(args, folder, dtype, threads, ranks, peer, bar)
                write_rows(args.out, rows)
                for row in rows:
                    bar.write(said(row))
    print(f"written to {os.path.relpath(args.out)}")


def parse_args() -> argparse.Namespace:
    all_cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="SmolLM2-135M")
    parser.add_argument("--batch", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument(
        "--threads", nargs="*", type=int, default=sorted({1, all_cores}), help="default: 1, and all cores"
    )
    parser.add_argument("--ranks", nargs="*", type=int, default=[2] if all_cores > 1 else [], help="default: 2")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--readme", action="store_true", help="put the table of --out into README.md")
    args = parser.parse_args()
    if args.rounds < 1 or min(args.threads, default=1) < 1 or min(args.ranks, default=2) < 2:
        raise ValueError(
            f"rounds={args.rounds} and threads={args.threads} must be at least 1, ranks={args.ranks} at least 2"
        )
    for dtype in args.dtype:
        if not computes_in(getattr(torch, dtype)):
            print(f"{dtype} is left out: this CPU has no instructions for it")
            args.dtype = [other for other in args.dtype if other != dtype]
    return args


# --- measuring


def measure(args, folder: str, dtype: str, threads: int, ranks: int, peer: torch.nn.Module, bar: tqdm) -> list[dict]:
    """Both contenders in one dtype, with so many threads or on so many ranks: a row each for every batch."""
    cores = f"{ranks} ranks" if ranks > 1 else f"{threads} thread{'s' * (threads > 1)}"
    engine = Engine(folder, device="cpu", dtype=dtype, tp_size=ranks)
    if threads > 1:  # an engine takes one thread
        torch.set_num_threads(threads)
        engine.wrapper.linear_forms = choose_forms(engine.wrapper.model)
    for choice in engine.wrapper.linear_forms:
        bar.write(f"{args.model}, {dtype}, {cores}: {choice}")
    matrices = ranks * sum(len(c.names) * c.shape[0] * c.shape[1] for c in engine.wrapper.linear_forms)
    megabytes, bandwidth = matrices * getattr(torch, dtype).itemsize / 1e6, gigabytes_per_second(threads * ranks)
    ours, rows = engine_runner(engine), []
    for batch in args.batch:
        bar.set_description(f"{args.model} {dtype} {cores} batch {batch}")
        requests = requests_of(batch)
        generate = generate_runner(peer, 8 if batch == "mixed" else len(requests))
        ours(requests[:8])  # warm up
        contenders = {OURS: with_threads(threads, ours), PEER: with_threads(threads * ranks, generate)}
        for row in in_turn(contenders, requests, args.rounds, bar):
            key = {"model": args.model, "dtype": dtype, "cores": cores, "batch": batch}
            floor = {
                "matrices_mb": round(megabytes, 1),
                "gb_per_second": round(bandwidth, 1),
                "memory_allows": round(1000 * bandwidth / megabytes, 1) if batch == "1" else "",
            }
            rows.append(key | row | floor | circumstances(cores))
    engine.shutdown()
    return rows


def requests_of(batch: str) -> list[Request]:
    rng = random.Random(0)

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, 40_000) for _ in range(n)]

    if batch == "mixed":
        return [Request(ids(rng.randint(16, 256)), rng.randint(16, 256)) for _ in range(32)]
    return [Request(ids(32), 64) for _ in range(int(batch))]


def with_threads(threads: int, run: Contender) -> Contender:
    def wrapped(requests: list[Request]) -> float:
        torch.set_num_threads(threads)
        return run(requests)

    return wrapped


def gigabytes_per_second(threads: int) -> float:
    """What so many threads read from memory: 256 MiB are added up, the best of five times."""
    numbers, best = torch.ones(64 << 20), float("inf")
    torch.set_num_threads(threads)
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return numbers.nbytes / best / 1e9


# --- the CSV, and the table made of it


def read_rows(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Add the rows to a CSV; a row that is there already is replaced where it stands."""
    found = {tuple(row[k] for k in KEY): row for row in (read_rows(path) if path.exists() else [])}
    found |= {tuple(row[k] for k in KEY): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with output_file(path) as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(found.values())


def said(row: dict) -> str:
    faster = f"{row['engine_is_faster_by']:>6.2f} x" if row["contender"] != OURS else ""
    where = f"{row['model']} {row['dtype']} {row['cores']} batch {row['batch']}"
    return f"{where:<46}{row['contender']:<24}{row['seconds']:8.2f} s {row['tokens_per_second']:8.1f} tok/s {faster}"


def readme_table(rows: list[dict]) -> str:
    """A line for each model, dtype and number of cores: tokens a second, and how many times generate's they are."""
    lines = [
        "| model | dtype | cores | 1 request (memory allows) | 8 | 32 | 32 mixed |",
        "|---|---|---|---|---|---|---|",
    ]
    for where in dict.fromkeys(tuple(row[k] for k in KEY[:3]) for row in rows):
        cells = []
        for batch in BATCHES:
            here = {row["contender"]: row for row in rows if tuple(row[k] for k in KEY[:4]) == (*where, batch)}
            if not here:
                cells.append("")
                continue
            ours, peer = here[OURS], here[PEER]
            allows = f" ({float(ours['memory_allows']):,.0f})" if batch == "1" else ""
            cells.append(f"{float(ours['tokens_per_second']):,.0f}{allows}, {float(peer['engine_is_faster_by']):.1f}x")
        lines.append(f"| {' | '.join((*where, *cells))} |")
    return "\n".join(lines)


def write_readme(path: Path) -> None:
    text = README.read_text(encoding="utf-8")
    block = f"<!-- bench_cpu_real -->\n\n{readme_table(read_rows(path))}\n\n<!-- /bench_cpu_real -->"
    text, found = re.subn(r"<!-- bench_cpu_real -->.*?<!-- /bench_cpu_real -->", block, text, flags=re.DOTALL)
    if not found:
        raise ValueError(f"{README} has no <!-- bench_cpu_real --> block to put the table into")
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
