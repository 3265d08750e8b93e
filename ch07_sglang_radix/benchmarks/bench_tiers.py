"""What an evicted prefix costs: the first token of a long prompt that is computed, or comes from the device, the host, a disk; and
what it costs others, who write their answers meanwhile.

    python -m ch07_sglang_radix.benchmarks.bench_tiers                    CPU: Qwen2.5-0.5B, float32, 1,024 tokens; 4 minutes
    python -m ch07_sglang_radix.benchmarks.bench_tiers --device cuda      GPU: Qwen2.5-7B, bfloat16, 16,384 tokens; 2 minutes
    ... --part alone                                                      that alone: what the minutes above are of
    ... --part beside                                                     the others' part; CPU, --rounds 1: 3.5 minutes

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

Beside others: 8 requests write tokens, one a step each. A step's time is from the end of the last one to its own, and only steps
that do nothing else count, in which

    nobody         comes
    from host      the long prompt has been queued, and its pages are copied from the host: until its own first step
    from files     the same, after a flush: they are read from files first, and then copied
    to files       a new prompt has just been computed: until its pages have been copied to the host and written to files

Writes figures/tiers_<device>.csv and figures/tiers_beside_<device>.csv.
"""

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ch07_sglang_radix import Engine
from ch07_sglang_radix.quantization.hicache import HiCache
from ch07_sglang_radix.scheduler import TPScheduler
from common.distributed.launch import run_main
from common.models.published_configs import shared_random_weights
from common.parallel_state import TPGroup
from common.sampling.params import SamplingParams
from common.teaching.report import FIGURES, write_csv
from common.teaching.show import table

MODELS = {"cpu": ("Qwen2.5-0.5B", 1024), "cuda": ("Qwen2.5-7B", 16384)}
PAGE, VOCABULARY = 16, 150_000
WAYS = ("computed", "device", "host", "disk")
BESIDE = ("nobody", "from host", "from files", "to files")
RUNNING, STARTED = 8, 4 * PAGE  # who writes meanwhile, and after how many tokens
WARM_UP, STEPS = 16, 32  # steps before any is timed, all having begun; and those that are timed with nobody beside
MOST = 2048  # tokens of an answer; whoever loads for longer is timed as far as that


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--part", choices=("alone", "beside"), help="one part only; without it both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where the pages' files go, in a folder that is removed at the end")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs an NVIDIA GPU, and there is none; use --device cpu")
    name, tokens = MODELS[args.device]
    folder = shared_random_weights(name, TPGroup(device=torch.device(args.device)))
    parts = {"alone": ("tiers", measure), "beside": ("tiers_beside", measure_beside)}
    for file, part in parts.values() if args.part is None else (parts[args.part],):
        rows = part(str(folder), args.device, tokens, args.rounds, args.dir)
        for row in rows:
            row["model"] = name
        table(tuple(rows[0]), [tuple(row.values()) for row in rows])
        write_csv(rows, args.out / f"{file}_{args.device}.csv")


def measure(
    model: str, device: str, tokens: int, rounds: int, where: Path | None = None, vocabulary: int = VOCABULARY
) -> list[dict[str, Any]]:
    """A row for each way; the median of the rounds, the first one not counted."""
    with _engine(model, device, tokens + 4 * PAGE, where) as engine:
        return _rows(engine, tokens, rounds, vocabulary)


@contextmanager
def _engine(model: str, device: str, room: int, where: Path | None) -> Iterator[Engine]:
    files = tempfile.mkdtemp(prefix="tiers-", dir=where)
    engine = Engine(
        model, device=device, page_size=PAGE, max_total_tokens=room, skip_tokenizer_init=True, random_seed=0,
        enable_hierarchical_cache=True, hicache_ratio=3, hicache_storage_backend="file", hicache_storage_dir=files,
        hicache_storage_prefetch_policy="wait_complete", hicache_storage_quota=100,
    )  # fmt: skip
    try:
        yield engine
    finally:
        engine.shutdown()
        shutil.rmtree(files, ignore_errors=True)


def _rows(engine: Engine, tokens: int, rounds: int, vocabulary: int) -> list[dict[str, Any]]:
    draw, seconds = random.Random(0), {way: [] for way in WAYS}
    tiers = engine.scheduler.tiers

    def at_rest(prompt: list[int]) -> tuple[float, int, dict[str, int]]:
        _come_to_rest(tiers)
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


# --- beside others


@dataclass
class Case:
    """Seconds of each step of the others, and of all that went on beside them, in each round."""

    steps: list[float] = field(default_factory=list)
    lasted: list[float] = field(default_factory=list)

    def row(self, alone: float) -> dict[str, Any]:
        """No times of a step if there was none: a CPU has made its copy before the next one begins."""
        there = self.steps or [float("nan")]
        median, ms = statistics.median(there), lambda seconds: round(seconds * 1e3, 2) if self.steps else ""
        return {
            "lasts ms": round(statistics.median(self.lasted) * 1e3, 1), "steps": len(self.steps), "ms a step": ms(median),
            "of nobody": round(median / alone, 2) if self.steps else "", "mean ms": ms(statistics.mean(there)),
            "longest ms": ms(max(there)),
        }  # fmt: skip


def measure_beside(
    model: str, device: str, tokens: int, rounds: int, where: Path | None = None, vocabulary: int = VOCABULARY,
    most: int = MOST,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each case; the steps of all rounds, but for the first one's."""
    draw = random.Random(0)

    def a_prompt(length: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(length)]

    with _engine(model, device, tokens + 4 * PAGE + RUNNING * (STARTED + most), where) as engine:
        for number in range(rounds + 1):
            if number < 2:
                cases = {case: Case() for case in BESIDE}
            for case, found in cases.items():
                _beside(engine, case, a_prompt(tokens), [a_prompt(STARTED) for _ in range(RUNNING)], most, found)
        size = engine.scheduler.tiers.controller.pool.page_bytes * tokens // PAGE
    alone = statistics.median(cases["nobody"].steps)
    same = {"tokens": tokens, "MB": round(size / 1e6, 1)}
    return [{"beside": case} | same | found.row(alone) for case, found in cases.items()]


def _beside(engine: Engine, case: str, prompt: list[int], others: list[list[int]], most: int, found: Case) -> None:
    scheduler, tiers = engine.scheduler, engine.scheduler.tiers
    if case.startswith("from"):
        ask(engine, prompt)
        _come_to_rest(tiers)
        if case == "from host":
            scheduler.tree.evict(scheduler.pool.size)
        else:
            engine.flush_cache()
    for one in others:
        _queue(scheduler, one, most)
    for _ in range(2 * RUNNING + WARM_UP):  # between two prompts there may be a step of those who write
        scheduler.step()
    _come_to_rest(tiers)
    if case == "nobody":
        _time(scheduler, iter([True] * (STEPS - 1) + [False]).__next__, found)
    else:
        _queue(scheduler, prompt, 2)
        mine = scheduler.waiting[-1]
        if case == "to files":
            while not mine.finish_reason:
                scheduler.step()
            pool, storage = tiers.controller.pool, tiers.controller.storage
            _time(scheduler, lambda: pool.done() < pool.newest or storage.backlog > 0, found)
        else:
            _time(scheduler, lambda: mine in scheduler.waiting, found)
            tier = "host" if case == "from host" else "storage"
            if mine.cached_below.get(tier, 0) < len(prompt) - PAGE:
                raise ValueError(f"{case}: of {len(prompt)} tokens {mine.cached_below} came from there")
    scheduler.drop_all()


def _queue(scheduler: TPScheduler, ids: list[int], tokens: int) -> None:
    scheduler.add_request(input_ids=ids, sampling_params=SamplingParams(max_new_tokens=tokens, ignore_eos=True))


def _come_to_rest(tiers: HiCache) -> None:
    while tiers.controller.storage.backlog:
        time.sleep(0.01)


def _time(scheduler: TPScheduler, goes_on: Callable[[], bool], found: Case) -> None:
    """Step until it has ended, and at least once."""
    began = last = time.perf_counter()
    while True:
        counts = dict(scheduler.steps)
        scheduler.step()
        now = time.perf_counter()
        if scheduler.steps["decode"] > counts["decode"] and scheduler.steps["prefill"] == counts["prefill"]:
            found.steps.append(now - last)
        last = now
        if not goes_on():
            found.lasted.append(now - began)
            return


if __name__ == "__main__":
    run_main(main)
