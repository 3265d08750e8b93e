"""What deterministic inference costs on a CPU: the same work with enable_deterministic_inference and without, in turn.

    python -m ch07_sglang_radix.benchmarks.bench_deterministic

SmolLM2-135M's shape, random weights, float32, one thread. Seconds are of processor time, as a wall clock on a busy machine
tells of the others too; each is the median of its rounds, with the least and the most. The usual engine multiplies by matrices
in the form that it has measured to be fast (common/layers/cpu_linear.py), the other one by row-major ones. Writes
figures/deterministic.csv.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ch07_sglang_radix.engine import Engine
from common.distributed.launch import run_main
from common.models.published_configs import save_random_weights
from common.teaching.report import FIGURES, write_csv

MODEL = "SmolLM2-135M"
WORK = {  # requests at once, tokens in, tokens out
    "one request, decode": (1, 2, 9),
    "eight requests, decode": (8, 2, 9),
    "a prompt of 512": (1, 512, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(save_random_weights(MODEL, Path(folder)))
        engines = {on: engine(path, on) for on in (False, True)}
        for work, (count, new, out) in WORK.items():
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for seed in range(args.rounds + 1):
                for on, one in engines.items():
                    spent = measure(one, seed, count, new, out)
                    if seed:  # the first round warms up
                        seconds[on].append(spent)
            tokens = count * (new if out == 1 else out - 1)
            for on, times in seconds.items():
                middle, least, most = (1e3 * f(times) / tokens for f in (statistics.median, min, max))
                rows.append(
                    {"model": MODEL, "work": work, "deterministic": on, "ms_per_token": round(middle, 3), "least": round(least, 3),
                     "most": round(most, 3)}
                )  # fmt: skip
                print(
                    f"{work:26s} {'on' if on else 'off':3s} {middle:8.2f} ({least:.2f} to {most:.2f}) ms a token",
                    flush=True,
                )
    write_csv(rows, args.out / "deterministic.csv")


def engine(path: str, on: bool) -> Engine:
    return Engine(
        path, device="cpu", dtype="float32", skip_tokenizer_init=True, max_total_tokens=4096, disable_radix_cache=True,
        enable_deterministic_inference=on,
    )  # fmt: skip


def measure(one: Engine, seed: int, count: int, new: int, out: int) -> float:
    """Processor seconds of the steps behind the first token; of a single token, those of its prompt."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(10_000) for _ in range(new)] for _ in range(count)]
    began = time.process_time()
    one.generate(input_ids=prompts, sampling_params={"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True})
    first = time.process_time() - began
    if out == 1:
        return first
    began = time.process_time()
    one.generate(input_ids=prompts, sampling_params={"max_new_tokens": out, "temperature": 0.0, "ignore_eos": True})
    return time.process_time() - began - first


if __name__ == "__main__":
    run_main(main)
