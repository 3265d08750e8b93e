"""Who takes part in a benchmark on a CPU, and how they take turns.

A contender answers a list of requests (common/teaching/transformers_peer.py) and returns the seconds it took.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingConfig

from ch07_sglang_radix import Engine
from common.teaching.transformers_peer import NEVER, Request

OURS = "this engine"
Contender = Callable[[list[Request]], float]


def load_peer(folder: str, dtype: torch.dtype) -> torch.nn.Module:
    """The same checkpoint in transformers; no end-of-text id is set."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config = GenerationConfig(do_sample=False)
    return model


def engine_runner(engine: Engine) -> Contender:
    """This engine; its tree is empty at the start."""

    def run(requests: list[Request]) -> float:
        if engine.scheduler.tp.rank == 0:  # the others have no tree
            engine.scheduler.tree.evict(engine.scheduler.tree.evictable_size)
        params = [{"max_new_tokens": r.new_tokens, "ignore_eos": True} for r in requests]
        start = time.perf_counter()
        results = engine.generate(input_ids=[r.ids for r in requests], sampling_params=params)
        seconds = time.perf_counter() - start
        assert [len(r["output_ids"]) for r in results] == [r.new_tokens for r in requests]
        return seconds

    return run


def generate_batch_runner(model: torch.nn.Module) -> Contender:
    """transformers' own continuous batching; its set-up (pool allocation) is not timed."""

    def run(requests: list[Request]) -> float:
        config = GenerationConfig(do_sample=False, pad_token_id=NEVER, eos_token_id=None, max_new_tokens=256)
        pool = ContinuousBatchingConfig(max_memory_percent=0.1)
        with model.continuous_batching_context_manager(config, continuous_batching_config=pool) as manager:
            start = time.perf_counter()
            for r in requests:
                manager.add_request(r.ids, max_new_tokens=r.new_tokens)
            lengths = []
            while len(lengths) < len(requests):
                if not manager.is_running():
                    raise RuntimeError("transformers' generation thread has ended early")
                result = manager.get_result(timeout=1)
                if result and result.is_finished():
                    lengths.append(len(result.generated_tokens))
            seconds = time.perf_counter() - start
        assert sorted(lengths) == sorted(r.new_tokens for r in requests)
        return seconds

    return run


def in_turn(contenders: Mapping[str, Contender], requests: list[Request], rounds: int, bar: tqdm) -> list[dict]:
    """A row for each contender; in every round each has its turn. Seconds are the median of the rounds."""
    times: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in range(rounds):
        for who, run in contenders.items():
            bar.set_postfix_str(who)
            times[who].append(run(requests))
            bar.update()
    tokens = sum(r.new_tokens for r in requests)
    ours = statistics.median(times[OURS])
    rows = []
    for who, all_seconds in times.items():
        seconds = statistics.median(all_seconds)
        rows.append({
            "contender": who,
            "seconds": round(seconds, 3),
            "fastest": round(min(all_seconds), 3),
            "slowest": round(max(all_seconds), 3),
            "tokens_per_second": round(tokens / seconds, 1 if tokens < 100 * seconds else None),
            "engine_is_faster_by": round(seconds / ours, 2),
            "rounds": rounds,
            "new_tokens": tokens,
            "prompt_tokens": sum(len(r.ids) for r in requests),
        })  # fmt: skip
    return rows


def circumstances(cores: str) -> dict[str, str]:
    """With what, on what and when: the last columns of a row."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{os.cpu_count()} x {platform.machine()}, {cores}",
        "date": date.today().isoformat(),
    }
