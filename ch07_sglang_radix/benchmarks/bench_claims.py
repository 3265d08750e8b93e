"""What is said of prefix caching and batching, measured one by one: true here, or not?

    python -m ch07_sglang_radix.benchmarks.bench_claims        # the bundled model on a CPU, about 4 minutes

The claims are those that one reads about SGLang. Each is put to an experiment that could have come out otherwise: it is
tried where it should hold and where it should not. A speed is the median of several rounds, in which all contenders take
turns, with the lowest and highest beside it. Three rows come from measurements that other commands of this chapter have
left in figures/, with their machine and date. Writes figures/claims.csv, and prints the lines of the README's table.
"""

import csv
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.parallel_state import initialize_tensor_parallel
from common.sampling.params import SamplingParams
from common.teaching.report import FIGURES, write_csv

ROUNDS = 5
POOL, SMALL_POOL = 16_384, 1_600
TOGETHER = 32  # requests that run at most
MEASURED = ("device", "torch", "date")


class Wrappers(NamedTuple):
    page_16: TPRadixAttentionModelWrapper
    page_1: TPRadixAttentionModelWrapper
    small: TPRadixAttentionModelWrapper  # holds half of the documents


def main() -> None:
    tp = initialize_tensor_parallel(device="cpu")

    def wrapper(page_size: int, tokens: int) -> TPRadixAttentionModelWrapper:
        sizes = {"max_total_tokens": tokens, "max_running_requests": TOGETHER}
        return TPRadixAttentionModelWrapper(None, "cpu", page_size, tp=tp, **sizes)

    wrappers = Wrappers(page_16=wrapper(16, POOL), page_1=wrapper(1, POOL), small=wrapper(16, SMALL_POOL))
    claims = (
        latency_of_a_hit, document_questions, conversation, overhead_of_a_miss, continuous_batching, chunked_prefill,
        overlap, trace, control_plane,
    )  # fmt: skip
    rows = []
    for claim in tqdm(claims, desc="claims", disable=None):
        said, how, measured, true, *elsewhere = claim(wrappers)
        row = {"claim": said, "experiment": how, "measured": measured, "true here": true}
        rows.append(row | ({key: elsewhere[0][key] for key in MEASURED} if elsewhere else {}))
    write_csv(rows, FIGURES / "claims.csv")
    for row in rows:
        print("| " + " | ".join(list(row.values())[:4]) + " |")


def words(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(count)]


def serve(scheduler: TPScheduler, prompts: Sequence[list[int]], new_tokens: int | Sequence[int]) -> tuple[float, list]:
    """Seconds, and the outputs."""
    lengths = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    began, ids = time.perf_counter(), []
    for prompt, length in zip(prompts, lengths, strict=True):
        params = SamplingParams(max_new_tokens=length, ignore_eos=True)
        ids.append(scheduler.add_request(input_ids=prompt, sampling_params=params))
    results = scheduler.process_requests()
    return time.perf_counter() - began, [results[i] for i in ids]


def spread(values: Sequence[float], unit: str = "", digits: int = 0) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def verdict(*held: bool) -> str:
    """Did it hold wherever it was tried?"""
    return "yes" if all(held) else "in part" if any(held) else "no"


def latency_of_a_hit(wrappers: Wrappers):
    """Time to the first token of 1024 tokens of which a part was served before, against one of which nothing was."""
    lower = {part: [] for part in (256, 512, 960)}
    for i, (part, saved) in itertools.product(range(ROUNDS), lower.items()):
        scheduler = TPScheduler(wrappers.page_16, chunked_prefill_size=-1)
        shared = words(part, i)
        miss = serve(scheduler, [shared + words(1024 - part, 100 + i)], 1)[0]
        hit = serve(scheduler, [shared + words(1024 - part, 200 + i)], 1)[0]
        saved.append(100 * (1 - hit / miss))
    said = "; ".join(f"{part}: {spread(saved, '%')} lower" for part, saved in lower.items())
    how = "first token, 256, 512 or 960 of 1024 tokens cached"
    return "a hit lowers latency by 50-90%", how, said, verdict(*(statistics.median(v) >= 50 for v in lower.values()))


def document_questions(wrappers: Wrappers):
    """Eight questions of 30 tokens on each of four documents of 600, mixed; in a pool for all, and in one for two."""
    rates = {}
    for name, wrapper, policy in (
        ("all fit", wrappers.page_16, "fcfs"), ("two fit, fcfs", wrappers.small, "fcfs"), ("two fit, lpm", wrappers.small, "lpm"),
    ):  # fmt: skip
        scheduler, documents = TPScheduler(wrapper, schedule_policy=policy), [words(600, i) for i in range(4)]
        serve(scheduler, documents, 1)  # each was read once
        prompts = [documents[i % 4] + words(30, 10 + i) for i in range(32)]
        outputs = serve(scheduler, prompts, 8)[1]
        rates[name] = 100 * sum(o.cached_tokens for o in outputs) / sum(o.prompt_tokens for o in outputs)
    said = "; ".join(f"{name}: {rate:.0f}%" for name, rate in rates.items())
    how = "4 documents of 600 tokens, read once, then 32 questions of 30, mixed"
    return "document questions hit >80% after the first", how, said, verdict(*(rate > 80 for rate in rates.values()))


def conversation(wrappers: Wrappers):
    """Twelve turns: each prompt is all that was said before, the answer included, and new tokens."""
    rates = {}
    for (name, wrapper), (asked, answered) in itertools.product(
        (("pages of 16", wrappers.page_16), ("of 1", wrappers.page_1)), ((20, 24), (8, 60), (60, 24))
    ):
        scheduler, said, cached, prompts = TPScheduler(wrapper), words(asked, 2), 0, 0
        for turn in range(12):
            output = serve(scheduler, [said], answered)[1][0]
            if turn:
                cached, prompts = cached + output.cached_tokens, prompts + output.prompt_tokens
            said = said + output.output_ids + words(asked, 30 + turn)
        rates.setdefault(name, []).append(100 * cached / prompts)
    said = "; ".join(f"{name}: {', '.join(f'{rate:.1f}%' for rate in some)}" for name, some in rates.items())
    how = "12 turns of 20 + 24, 8 + 60, 60 + 24 tokens, from the second on"
    return "conversations hit >90%", how, said, verdict(*(rate > 90 for some in rates.values() for rate in some))


def overhead_of_a_miss(wrappers: Wrappers):
    """From bench_prefix: what the tree adds to a step when nothing matches."""
    rows = [row for row in _csv("bench_prefix.csv") if row["overhead %"] and row["cache"] == "on"]
    costs = [float(row["overhead %"]) for row in rows]
    said = f"{min(costs):.2f} to {max(costs):.2f}% of a step"
    return "a miss costs <5%", "prompts that share nothing (bench_prefix.csv)", said, verdict(max(costs) < 5), rows[0]


def continuous_batching(wrappers: Wrappers):
    """The same 64 requests one by one, in batches that run to their longest answer, and continuously; at most 32 at once.

    Equal requests show what batching brings by itself: there a static batch is as good.
    """
    rng, gains = random.Random(0), {}
    shapes = {
        "mixed": [(rng.randint(16, 256), rng.randint(8, 256)) for _ in range(64)],
        "equal": [(64, 64)] * 64,
    }
    for name, shape in shapes.items():
        prompts, lengths = [words(n, i) for i, (n, _) in enumerate(shape)], [m for _, m in shape]
        over_static, over_single = gains.setdefault(name, ([], []))
        for _ in range(3):
            static = single = 0.0
            for i in range(0, len(prompts), TOGETHER):
                batch = slice(i, i + TOGETHER)
                longest = [max(lengths[batch])] * TOGETHER  # nobody leaves before the last one has ended
                static += serve(TPScheduler(wrappers.page_16, disable_radix_cache=True), prompts[batch], longest)[0]
            continuous = serve(TPScheduler(wrappers.page_16, disable_radix_cache=True), prompts, lengths)[0]
            for prompt, length in list(zip(prompts, lengths, strict=True))[::8]:
                single += 8 * serve(TPScheduler(wrappers.page_16, disable_radix_cache=True), [prompt], length)[0]
            over_static.append(static / continuous)
            over_single.append(single / continuous)
    said = "; ".join(
        f"{name}: {spread(over_static, 'x', 1)} a static batch, {spread(over_single, 'x', 1)} one by one"
        for name, (over_static, over_single) in gains.items()
    )
    how = f"64 requests, {TOGETHER} at once, of 16-256 + 8-256 tokens or all of 64 + 64"
    return (
        "continuous batching brings 3-5x",
        how,
        said,
        verdict(*(statistics.median(g[0]) >= 3 for g in gains.values())),
    )


def chunked_prefill(wrappers: Wrappers):
    """The longest time between two tokens of requests that run while a prompt of 2000 tokens comes in, and its own wait."""
    longest, first = {-1: [], 128: []}, {-1: [], 128: []}
    for i, chunk in itertools.product(range(ROUNDS), longest):
        scheduler = TPScheduler(wrappers.page_16, chunked_prefill_size=chunk, disable_radix_cache=True)
        params = SamplingParams(max_new_tokens=60, ignore_eos=True)
        for j in range(4):
            scheduler.add_request(input_ids=words(16, 400 + j), sampling_params=params)
        times: list[float] = []
        came, sizes = [0.0], [0]

        def watch(step: int, scheduler=scheduler, times=times, sizes=sizes, came=came, i=i) -> bool:
            tokens = sum(len(req.output_ids) for req in scheduler.running if len(req.prompt_ids) == 16)
            if tokens > sizes[0]:
                sizes[0] = tokens
                times.append(time.perf_counter())
            if step == 10:
                scheduler.add_request(input_ids=words(2000, 500 + i), max_new_tokens=1)
                came[0] = time.perf_counter()
            elif came[0] > 0 and 4 in scheduler.results:
                came[0] -= time.perf_counter()  # from now on negative: minus what it has waited
            return step < 10

        scheduler.process_requests(watch)
        longest[chunk].append(1e3 * max(later - earlier for earlier, later in itertools.pairwise(times)))
        first[chunk].append(-1e3 * came[0])
    said = (
        f"{spread(longest[-1])} ms without, {spread(longest[128])} ms in chunks; "
        f"the long prompt waits {spread(first[-1])} and {spread(first[128])} ms"
    )
    how = "longest time between tokens while 2000 tokens come in, chunks of 128"
    held = statistics.median(longest[128]) < 0.5 * statistics.median(longest[-1])
    return "chunked prefill keeps time between tokens short", how, said, verdict(held)


def overlap(wrappers: Wrappers):
    """From bench_gpu: a decode step of 64 requests with and without."""
    gains, rows = {}, []
    for path in sorted(FIGURES.glob("bench_gpu_[ls]*.csv")):
        for row in _csv(path.name):
            if row["metric"] == "us per decode step":
                rows.append(row)
                gains.setdefault((row["model"], row["ranks"]), {})[row["workload"]] = float(row["value"])
    lower = [100 * (1 - g["64 running overlap"] / g["64 running no overlap"]) for g in gains.values()]
    how = f"64 running requests, 0.5B to 7B, {rows[0]['device'].removeprefix('NVIDIA ')} (bench_gpu_*.csv)"
    said = f"{min(lower):.0f}-{max(lower):.0f}% shorter steps"
    return "overlap hides the scheduler", how, said, verdict(min(lower) > 0), rows[0]


def trace(wrappers: Wrappers):
    """The time spent in the trace's own functions, of a run of 16 requests that is traced."""
    costs = [_trace_cost(wrappers.page_16) for _ in range(ROUNDS)]
    said = f"{spread(costs, '%', 2)} of the time"
    return (
        "a trace costs <2%",
        "16 requests of 64 + 64 tokens, a line a step",
        said,
        verdict(statistics.median(costs) < 2),
    )


def _trace_cost(wrapper: TPRadixAttentionModelWrapper) -> float:
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
        for name in ("begin", "task", "queued"):
            setattr(scheduler.trace, name, timed(getattr(scheduler.trace, name)))
        scheduler.after_step = [timed(call) for call in scheduler.after_step]
        seconds, _ = serve(scheduler, [words(64, 600 + i) for i in range(16)], 64)
        scheduler.trace.close()
    return 100 * spent[0] / seconds


def control_plane(wrappers: Wrappers):
    """From bench_control_plane, on two CPU ranks and on two GPUs: what deciding and telling takes as the context grows."""
    parts, devices = {}, []
    for name in ("control_plane.csv", "control_plane_gpu.csv"):
        rows = [row for row in _csv(name) if row["control plane"] == "rank0" and row["running"] == "8"]
        parts[name] = {int(row["context"]): float(row["control %"]) for row in rows}
        devices.append(f"{rows[0]['model']} on {rows[0]['device'].removeprefix('NVIDIA ')}")
    said = "; ".join(
        f"{device}: {', '.join(f'{part:.2f}%' for part in found.values())}"
        for device, found in zip(devices, parts.values(), strict=True)
    )
    contexts = dict.fromkeys(context for found in parts.values() for context in found)
    how = f"8 running, context {', '.join(f'{context:,}' for context in contexts)} ({', '.join(parts)})"
    claim = "telling the ranks takes <1% of a step, whatever the context"
    return claim, how, said, verdict(*(part < 1 for found in parts.values() for part in found.values())), rows[0]


def _csv(name: str) -> list[dict[str, str]]:
    with (FIGURES / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    run_main(main)
