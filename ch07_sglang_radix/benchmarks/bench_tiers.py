"""What an evicted prefix costs: the first token of a long prompt that is computed, or comes from the device, the host, a disk.

    python -m ch07_sglang_radix.benchmarks.bench_tiers                    CPU: Qwen2.5-0.5B, float32, 1,024 tokens; 4 minutes
    python -m ch07_sglang_radix.benchmarks.bench_tiers --device cuda      GPU: Qwen2.5-7B, bfloat16, 16,384 tokens; 2 minutes

Weights and prompts are random. The pool holds one prompt and a little more: each new one evicts the last. In every round a
prompt is

    computed    asked for the first time; its pages go to the host, and from there to files
    device      asked again at once
    host        asked again after another prompt has taken its pages
    disk        asked again when device and host have been flushed, and all files are written

and the time is that of the whole call for one token, in which a last page that is not cached is computed; before each the threads
that write files have come to rest. The files are in a folder in --dir (by default the temporary directory), and on most machines
still lie in the operating system's memory when they are read: then this measures files, checksums and the way through both tiers,
and not a disk. The goal on a GPU: host at most 0.2 and disk at most 0.5 of computed.

Writes figures/tiers_<device>.csv.
"""

import argparse
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ch07_sglang_radix import Engine
from common.distributed.launch import run_main
from common.models.published_configs import shared_random_weights
from common.parallel_state import TPGroup
from common.teaching.report import FIGURES, write_csv
from common.teaching.show import table

MODELS = {"cpu": ("Qwen2.5-0.5B", 1024), "cuda": ("Qwen2.5-7B", 16384)}
PAGE, VOCABULARY = 16, 150_000
WAYS = ("computed", "device", "host", "disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where the pages' files go, in a folder that is removed at the end")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs an NVIDIA GPU, and there is none; use --device cpu")
    name, tokens = MODELS[args.device]
    folder = shared_random_weights(name, TPGroup(device=torch.device(args.device)))
    rows = measure(str(folder), args.device, tokens, args.rounds, args.dir)
    for row in rows:
        row["model"] = name
    table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    write_csv(rows, args.out / f"tiers_{args.device}.csv")


def measure(
    model: str, device: str, tokens: int, rounds: int, where: Path | None = None, vocabulary: int = VOCABULARY
) -> list[dict[str, Any]]:
    """A row for each way; the median of the rounds, the first one not counted."""
    files = tempfile.mkdtemp(prefix="tiers-", dir=where)
    engine = Engine(
        model, device=device, page_size=PAGE, max_total_tokens=tokens + 4 * PAGE, skip_tokenizer_init=True, random_seed=0,
        enable_hierarchical_cache=True, hicache_ratio=3, hicache_storage_backend="file", hicache_storage_dir=files,
        hicache_storage_prefetch_policy="wait_complete", hicache_storage_quota=100,
    )  # fmt: skip
    try:
        return _rows(engine, tokens, rounds, vocabulary)
    finally:
        engine.shutdown()
        shutil.rmtree(files, ignore_errors=True)


def _rows(engine: Engine, tokens: int, rounds: int, vocabulary: int) -> list[dict[str, Any]]:
    draw, seconds = random.Random(0), {way: [] for way in WAYS}
    tiers = engine.scheduler.tiers

    def at_rest(prompt: list[int]) -> tuple[float, int, dict[str, int]]:
        while tiers.controller.storage.backlog:
            time.sleep(0.01)
        return ask(engine, prompt)

    for _ in range(rounds + 1):
        prompt, other = ([draw.randrange(vocabulary) for _ in range(tokens)] for _ in range(2))
        found = {"computed": at_rest(prompt), "device": at_rest(prompt)}
        at_rest(other)
        found["host"] = at_rest(prompt)
        engine.flush_cache()
        found["disk"] = at_rest(prompt)
        for way, (took, cached, below) in found.items():
            expected = 0 if way == "computed" else tokens - PAGE
            if (
                cached < expected
                or (way == "host" and not below.get("host"))
                or (way == "disk" and not below.get("storage"))
            ):
                raise ValueError(f"{way}: {cached} tokens were cached, {below}; {expected} should have come from there")
            seconds[way].append(took)
    medians = {way: statistics.median(all_of_it[1:]) for way, all_of_it in seconds.items()}
    size = tiers.controller.pool.page_bytes * tokens // PAGE
    return [
        {
            "first token from": way, "tokens": tokens, "MB": round(size / 1e6, 1), "ms": round(medians[way] * 1e3, 1),
            "of computed": round(medians[way] / medians["computed"], 3),
            "lowest ms": round(min(seconds[way][1:]) * 1e3, 1), "highest ms": round(max(seconds[way][1:]) * 1e3, 1),
        }
        for way in WAYS
    ]  # fmt: skip


def ask(engine: Engine, prompt: list[int]) -> tuple[float, int, dict[str, int]]:
    """(seconds to its first token, cached tokens, from which lower tier)"""
    began = time.perf_counter()
    meta = engine.generate(input_ids=prompt, sampling_params={"max_new_tokens": 1, "ignore_eos": True})["meta_info"]
    return time.perf_counter() - began, meta["cached_tokens"], meta.get("cached_tokens_details", {})


if __name__ == "__main__":
    run_main(main)
