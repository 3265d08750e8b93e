"""What is said of prefix caching and batching, measured one by one: true here, or not?

    python -m ch07_sglang_radix.benchmarks.bench_claims        # the bundled model on a CPU, about a minute

The claims are those that one reads about SGLang. Each is put to the smallest experiment that can deny it; two come from
measurements that other commands of this chapter have left in figures/. Writes figures/claims.csv.
"""

import csv
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.parallel_state import initialize_tensor_parallel
from common.sampling.params import SamplingParams
from common.teaching.report import FIGURES, write_csv

ROUNDS = 5


def main() -> None:
    initialize_tensor_parallel(device="cpu")
    wrapper = TPRadixAttentionModelWrapper(device="cpu", max_total_tokens=16_384)
    claims = (
        latency_of_a_hit,
        document_questions,
        conversation,
        overhead_of_a_miss,
        continuous_batching,
        chunked_prefill,
        overlap,
        trace,
    )
    rows = []
    for claim in tqdm(claims, desc="claims", disable=None):
        said, how, measured, true = claim(wrapper)
        rows.append({"claim": said, "experiment": how, "measured": measured, "true here": "yes" if true else "no"})
    for row in rows:
        print("  ".join(row.values()))
    write_csv(rows, FIGURES / "claims.csv")


def words(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(count)]


def serve(scheduler: TPScheduler, prompts: Sequence[list[int]], new_tokens: int) -> tuple[float, list]:
    """Seconds, and the outputs."""
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    began = time.perf_counter()
    ids = [scheduler.add_request(input_ids=prompt, sampling_params=params) for prompt in prompts]
    results = scheduler.process_requests()
    return time.perf_counter() - began, [results[i] for i in ids]


def latency_of_a_hit(wrapper):
    """Time to the first token of 1024 tokens whose first 960 were served before, against one of which nothing was."""
    hit, miss = [], []
    for i in range(ROUNDS):
        scheduler = TPScheduler(wrapper, chunked_prefill_size=-1)
        shared = words(960, i)
        miss.append(serve(scheduler, [shared + words(64, 100 + i)], 1)[0])
        hit.append(serve(scheduler, [shared + words(64, 200 + i)], 1)[0])
    lower = 100 * (1 - statistics.median(hit) / statistics.median(miss))
    return (
        "a hit lowers latency by 50-90%",
        "first token, 960 of 1024 tokens cached",
        f"{lower:.0f}% lower",
        lower >= 50,
    )


def document_questions(wrapper):
    """One document of 600 tokens, eight questions of 30, one after the other."""
    scheduler, document = TPScheduler(wrapper), words(600, 1)
    outputs = [serve(scheduler, [document + words(30, 10 + i)], 8)[1][0] for i in range(8)]
    first, later = outputs[0].cached_tokens, outputs[1:]
    rate = 100 * sum(o.cached_tokens for o in later) / sum(o.prompt_tokens for o in later)
    said = f"{first} tokens, then {rate:.0f}%"
    return "document questions hit >80% after the first", "600 + 30 tokens, 8 questions", said, rate > 80


def conversation(wrapper):
    """Twelve turns: each prompt is all that was said before, the answer included, and 20 new tokens."""
    scheduler, said, cached, prompts = TPScheduler(wrapper), words(20, 2), 0, 0
    for turn in range(12):
        output = serve(scheduler, [said], 24)[1][0]
        if turn:
            cached, prompts = cached + output.cached_tokens, prompts + output.prompt_tokens
        said = said + output.output_ids + words(20, 30 + turn)
    rate = 100 * cached / prompts
    return "conversations hit >90%", "12 turns, 20 tokens in, 24 out, from the second on", f"{rate:.1f}%", rate > 90


def overhead_of_a_miss(wrapper):
    """From bench_prefix: what the tree adds to a step when nothing matches."""
    rows = [row for row in _csv("bench_prefix.csv") if row["overhead %"] and row["cache"] == "on"]
    worst = max(float(row["overhead %"]) for row in rows)
    return "a miss costs <5%", "prompts that share nothing (bench_prefix.csv)", f"{worst:.2f}% of a step", worst < 5


def continuous_batching(wrapper):
    """32 requests one by one, and all at once."""
    prompts = [words(32, 300 + i) for i in range(32)]
    single = TPScheduler(wrapper, disable_radix_cache=True)
    one_by_one = sum(serve(single, [prompt], 32)[0] for prompt in prompts)
    together = min(serve(TPScheduler(wrapper, disable_radix_cache=True), prompts, 32)[0] for _ in range(2))
    gain = one_by_one / together
    said = "continuous batching brings 3-5x"
    return said, "32 requests of 32 + 32 tokens, one by one or together", f"{gain:.1f}x", gain >= 3


def chunked_prefill(wrapper):
    """The longest time between two tokens of requests that run while a prompt of 2000 tokens comes in."""
    longest = {}
    for chunk in (-1, 128):
        gaps = []
        for i in range(ROUNDS):
            scheduler = TPScheduler(wrapper, chunked_prefill_size=chunk, disable_radix_cache=True)
            params = SamplingParams(max_new_tokens=60, ignore_eos=True)
            for j in range(4):
                scheduler.add_request(input_ids=words(16, 400 + j), sampling_params=params)
            times: list[float] = []
            sizes = [0]

            def watch(step: int, scheduler=scheduler, times=times, sizes=sizes, i=i) -> bool:
                tokens = sum(len(req.output_ids) for req in scheduler.running if len(req.prompt_ids) == 16)
                if tokens > sizes[0]:
                    sizes[0] = tokens
                    times.append(time.perf_counter())
                if step == 10:
                    scheduler.add_request(input_ids=words(2000, 500 + i), max_new_tokens=1)
                return step < 10

            scheduler.process_requests(watch)
            gaps.append(max(later - earlier for earlier, later in itertools.pairwise(times)))
        longest[chunk] = 1e3 * statistics.median(gaps)
    said = f"{longest[-1]:.0f} ms -> {longest[128]:.0f} ms"
    how = "longest time between tokens while 2000 tokens come in, chunks of 128"
    return "chunked prefill keeps time between tokens short", how, said, longest[128] < 0.5 * longest[-1]


def overlap(wrapper):
    """From bench_gpu: a decode step of 64 requests with and without, on an H200."""
    gains = {}
    for path in sorted(FIGURES.glob("bench_gpu_*.csv")):
        for row in _csv(path.name):
            if row["metric"] == "us per decode step":
                gains.setdefault((row["model"], row["ranks"]), {})[row["workload"]] = float(row["value"])
    lower = [100 * (1 - g["64 running overlap"] / g["64 running no overlap"]) for g in gains.values()]
    said = f"{min(lower):.0f}-{max(lower):.0f}% shorter steps"
    return (
        "overlap hides the scheduler",
        "64 running requests, 0.5B to 7B, H200 (bench_gpu_*.csv)",
        said,
        min(lower) > 0,
    )


def trace(wrapper):
    """The time spent in the trace's own functions, of a run of 16 requests that is traced."""
    spent = [0.0]

    def timed(function):
        def call(*args):
            began = time.perf_counter()
            result = function(*args)
            spent[0] += time.perf_counter() - began
            return result

        return call

    with tempfile.TemporaryDirectory() as folder:
        scheduler = TPScheduler(wrapper, trace=Path(folder) / "steps.jsonl")
        for name in ("begin", "task", "queued", "end"):
            setattr(scheduler.trace, name, timed(getattr(scheduler.trace, name)))
        seconds, _ = serve(scheduler, [words(64, 600 + i) for i in range(16)], 64)
        scheduler.trace.close()
    cost = 100 * spent[0] / seconds
    return "a trace costs <2%", "16 requests of 64 + 64 tokens, a line a step", f"{cost:.2f}% of the time", cost < 2


def _csv(name: str) -> list[dict[str, str]]:
    with (FIGURES / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    run_main(main)
