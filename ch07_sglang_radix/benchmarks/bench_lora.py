"""What adapters cost: decode steps with and without them, in turn, and on a GPU the kernels against their bytes.

    python -m ch07_sglang_radix.benchmarks.bench_lora                          CPU: Qwen2.5-0.5B, float32; 3 minutes
    python -m ch07_sglang_radix.benchmarks.bench_lora --device cuda            GPU: Qwen2.5-7B, bfloat16, CUDA graphs
    python -m ch07_sglang_radix.benchmarks.bench_lora --device cuda --part kernels

Weights and adapters are random: 8 adapters of rank 16 on all seven matrices of each layer, in 8 slots. A step is a decode step of
the executor, one token for each of 1, 8 and 64 sequences of 256 tokens:

    no slots    an executor without LoRA
    nobody      one with LoRA, in a step that nobody has an adapter in
    one         all sequences have the same adapter
    mixed       sequence i has adapter i % 8
    half        every second one has none, the others are mixed

All are timed one after the other in every round, on a warm process, and the best of the rounds counts. On a CPU that is one thread,
and its own seconds: what other processes take of the processor is not in them, what they take of its cache is. The goal on a GPU:
mixed at 64 sequences makes at least 85 % of the tokens of no slots. `kernels` times shrink and expand of each matrix, captured into
a graph, against the bytes that they must move at the bandwidth of a large copy, and W's product beside them.

Writes figures/lora_steps_<device>.csv and figures/lora_kernels.csv.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.distributed.launch import run_main
from common.executor import Executor
from common.kernels.timing import copy_bandwidth, timed
from common.layers.adapter_rows import AdapterBlocks
from common.layers.communicator import LayerCommunicator
from common.layers.linear import LinearBase, multiply
from common.layers.lora import LoRASlots, Thin, give_slots
from common.models.config import ModelConfig
from common.models.decoder import DecoderLayer
from common.models.lora_manager import LoRAOptions
from common.models.published_configs import published_shape, shared_random_weights
from common.parallel_state import TPGroup
from common.teaching.report import FIGURES, write_csv
from common.teaching.show import table

ADAPTERS, RANK, PAGE, CONTEXT = 8, 16, 16, 256
MODELS = {"cpu": "Qwen2.5-0.5B", "cuda": "Qwen2.5-7B"}
COPIES = 8  # of a layer, in turn: W is not in the cache


def slots_of(batch: int) -> dict[str, np.ndarray | None]:
    mixed = np.arange(batch) % ADAPTERS + 1
    return {
        "nobody": None,
        "one": np.ones_like(mixed),
        "mixed": mixed,
        "half": np.where(np.arange(batch) % 2, 0, mixed),
    }


def fill(slots: LoRASlots) -> None:
    """Random adapters in all slots, small enough that nothing overflows."""
    for slot in range(1, ADAPTERS + 1):
        thins = {
            part: Thin(0.01 * torch.randn(RANK, slots.a.shape[2]), 0.01 * torch.randn(size, RANK), 1.0)
            for part, size in enumerate(slots.sizes)
        }
        slots.put(slot, thins)


def make(folder: str | Path, device: str, batch: int, lora: LoRAOptions | None) -> Executor:
    executor = Executor(
        str(folder), device, PAGE, max_total_tokens=batch * (CONTEXT + PAGE), max_running_requests=batch, lora=lora
    )
    pages = CONTEXT // PAGE + 1
    executor.table.set_pages([(row, 0, range(row * pages, (row + 1) * pages)) for row in range(batch)])
    for slots in executor.lora.slots if executor.lora else ():
        fill(slots)
    return executor


def steps(model: str, device: str, batches: list[int], rounds: int) -> list[dict]:
    tp = TPGroup(device=torch.device(device))
    folder, most = model if Path(model).is_dir() else shared_random_weights(model, tp), max(batches)
    plain, adapted = make(folder, device, most, None), make(folder, device, most, LoRAOptions(ADAPTERS, RANK))
    rows = []
    for batch in batches:
        numbers, positions = np.arange(batch), np.full(batch, CONTEXT)
        calls: dict[str, Callable[[], object]] = {"no slots": lambda: plain.decode(numbers, positions)}  # noqa: B023
        for name, slots in slots_of(batch).items():
            calls[name] = lambda slots=slots: adapted.decode(numbers, positions, adapters=slots)  # noqa: B023
        best = {name: min(times) for name, times in timed_in_turn(calls, rounds, device).items()}
        for name, seconds in best.items():
            rows.append({
                "model": model, "sequences": batch, "adapters": name, "ms": round(1e3 * seconds, 3),
                "tokens_per_s": round(batch / seconds, 1), "share_of_no_slots": round(best["no slots"] / seconds, 3),
            })  # fmt: skip
    return rows


def timed_in_turn(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call in each round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.perf_counter if device == "cuda" else time.thread_time
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            began = clock()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_:
                times[name].append(clock() - began)
    return times


def kernels(model: str, batches: list[int]) -> list[dict]:
    """Each linear layer of a decoder layer: microseconds of W's product and of shrink and expand, mixed."""
    config, bandwidth, device = published_shape(model), copy_bandwidth(), torch.device("cuda")
    torch.set_default_dtype(torch.bfloat16)
    layers, rows = [linear_layers(config, device) for _ in range(COPIES)], []
    for name in layers[0]:
        alike = [layer[name] for layer in layers]
        for linear in alike:
            give_slots({name: (linear, 0)}, ADAPTERS, RANK)
            fill(linear.lora)
        for batch in batches:
            slots = slots_of(batch)["mixed"]
            blocks, present = AdapterBlocks.of(slots, device), len(set(slots.tolist()))
            out, width = alike[0].weight.shape
            x, y = torch.randn(batch, width, device=device), torch.zeros(batch, out, device=device)
            ranks = RANK * len(alike[0].lora.sizes)
            moved = 2 * (present * (ranks * width + RANK * out) + batch * (width + 2 * out))
            base = timed([lambda linear=linear: multiply(x, linear.weight) for linear in alike])  # noqa: B023
            added = timed([lambda linear=linear: blocks.add(y, x, linear.lora) for linear in alike])  # noqa: B023
            rows.append({
                "model": model, "layer": name, "sequences": batch, "W_us": round(base, 2), "adapters_us": round(added, 2),
                "floor_us": round(moved / bandwidth * 1e6, 2), "share_of_bandwidth": round(moved / bandwidth * 1e6 / added, 3),
            })  # fmt: skip
    return rows


def linear_layers(config: ModelConfig, device: torch.device) -> dict[str, LinearBase]:
    """Those of one decoder layer by name, with zeros in W: a product takes as long whatever is in it."""
    with device:
        layer = DecoderLayer(config, LayerCommunicator(TPGroup(device=device)), 0)
    return {module.name.rpartition(".")[2]: module for module in layer.modules() if isinstance(module, LinearBase)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=MODELS, default="cpu")
    parser.add_argument("--part", choices=("steps", "kernels"), default="steps")
    parser.add_argument("--model", help="a published name (published_configs.py), or for steps a folder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    if min(args.batches) < 1 or args.rounds < 1:
        raise ValueError(f"batches={args.batches} and rounds={args.rounds} must be at least 1")
    if (args.device == "cuda" or args.part == "kernels") and not torch.cuda.is_available():
        raise ValueError("--device cuda and --part kernels need an NVIDIA GPU, and there is none; use --device cpu")
    if args.device == "cpu":
        torch.set_num_threads(1)
    model = args.model or MODELS["cuda" if args.part == "kernels" else args.device]
    if args.part == "kernels":
        rows, path = kernels(model, args.batches), args.out / "lora_kernels.csv"
    else:
        rows, path = steps(model, args.device, args.batches, args.rounds), args.out / f"lora_steps_{args.device}.csv"
    table(list(rows[0]), [list(row.values()) for row in rows])
    write_csv(rows, path)


if __name__ == "__main__":
    run_main(main)
