"""From the beginning of a process to its first answers: what a user waits for after typing a command.

    python -m ch07_sglang_radix.benchmarks.bench_start                               Qwen2.5-0.5B's shape on a GPU, or --device cpu
    python -m ch07_sglang_radix.benchmarks.bench_start --bundled --device cpu        the bundled model

Each run is a process of its own; the first one finds no compiled kernel (TRITON_CACHE_DIR is an empty folder), the others find
those of the first. Seconds are counted from the call that starts the process: the interpreter, imports, weights, kernels, graphs;
those of the executor's laps are named in common/start_times.py. The first request and the second have 128 other tokens, one token
is asked for. Writes figures/bench_start_<device>.csv.

An installed package has its modules' bytecode beside them. Where torch's is missing (a folder that nobody may write, or
PYTHONDONTWRITEBYTECODE) each process compiles a thousand files anew: bytecode is then kept for the runs elsewhere, and one more run
without tells what that costs.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common.distributed.launch import run_main
from common.models.published_configs import shared_random_weights
from common.parallel_state import initialize_tensor_parallel
from common.start_times import has_bytecode
from common.teaching.report import FIGURES, write_csv
from common.tiny_qwen import TINY_QWEN_PATH

RUNS = 4
PROGRAM = """
import json, sys, time
began, folder, device = float(sys.argv[1]), sys.argv[2], sys.argv[3]
from ch07_sglang_radix import Engine
imported = time.time()
engine = Engine(folder, device=device)
ready = time.time()
times = []
for first in (1, 301):
    start = time.perf_counter()
    engine.generate(input_ids=list(range(first, first + 128)), sampling_params={"max_new_tokens": 1, "ignore_eos": True})
    times.append(1e3 * (time.perf_counter() - start))
laps = engine.wrapper.start_seconds
print(json.dumps({"s to the import's end": imported - began, "s to ready": ready - began,
                  "first request ms": times[0], "second request ms": times[1],
                  "s before the executor and after it": ready - imported - sum(laps.values())}
                 | {f"s {what}": seconds for what, seconds in laps.items()}))
"""


def measure(folder: str, device: str, runs: int) -> list[dict[str, object]]:
    missing = not has_bytecode(torch.__file__)
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as bytecode, tempfile.TemporaryDirectory() as cache:
        plain = os.environ | {"TRITON_CACHE_DIR": cache}
        usual = plain
        if missing:
            usual = kept | {"TRITON_CACHE_DIR": cache, "PYTHONPYCACHEPREFIX": bytecode}
            subprocess.run([sys.executable, "-c", "from ch07_sglang_radix import Engine"], env=usual, check=True)
            if found := importlib.util.find_spec("triton"):  # much of it is imported where a kernel is compiled
                folder_of = str(Path(found.origin).parent)
                subprocess.run([sys.executable, "-m", "compileall", "-q", folder_of], env=usual, check=False)
        rows = []
        for run in range(1, runs + 1):
            rows.append(_one_start(folder, device, usual, run, "kept for this" if missing else "there"))
        if missing:
            rows.append(_one_start(folder, device, plain, runs + 1, "none"))
    return rows


def _one_start(folder: str, device: str, environment: dict[str, str], run: int, bytecode: str) -> dict[str, object]:
    command = [sys.executable, "-c", PROGRAM, str(time.time()), folder, device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the engine did not start: {done.stderr.strip().splitlines()[-1]}")
    told = json.loads(done.stdout.splitlines()[-1])
    row = {"model": Path(folder).name, "run": run, "kernels": "empty" if run == 1 else "there", "bytecode": bytecode}
    row |= {name: round(value, 3) for name, value in told.items()}
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bundled", action="store_true", help="the bundled model, not Qwen2.5-0.5B's shape")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    if args.runs < 1:
        raise ValueError(f"runs={args.runs} must be at least 1")
    tp = initialize_tensor_parallel(device=args.device)
    folder = TINY_QWEN_PATH if args.bundled else shared_random_weights("Qwen2.5-0.5B", tp)
    write_csv(measure(str(folder), args.device, args.runs), args.out / f"bench_start_{args.device}.csv")


if __name__ == "__main__":
    run_main(main)
