"""Continuous batching as a timeline, drawn from the engine's trace, against static batching of the same requests.

    python ch06_tp_vllm/demo_8_scheduler.py
    python ch06_tp_vllm/demo_8_scheduler.py --csv figures/batching.csv

Eight requests on the bundled model, four rows, a budget of 24 tokens a step. Each column is a step:

    P  tokens of a prompt        d  one token of an answer        .  waits        x  preempted
    -  a token that nobody asked for: the request has ended, its batch has not

Static batching is run on the same engine: four prompts, padded to the longest, in one step, then decode steps until the
longest answer ends; only then the next four.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from ch06_tp_vllm import LLMEngine, SamplingParams
from common.launch import run_main
from common.report import csv_option, write_csv
from common.show import check, heading, table

ROWS, BUDGET = 4, 24
REQUESTS = [
    (0, 18, 9),
    (0, 6, 14),
    (0, 40, 5),
    (2, 5, 20),
    (3, 12, 4),
    (3, 9, 11),
    (8, 30, 6),
    (12, 4, 8),
]  # arrives, in, out

Feed = Callable[[LLMEngine, int], bool]  # gives the engine what comes at a step; False if nothing comes later
Marks = list[dict[int, str]]  # by step: what a request did, as one of the letters


def main() -> None:
    csv = csv_option(__doc__)
    heading("Static batching: four at a time, each batch until its longest answer ends")
    lines, _ = traced(batch_by_batch(), max_num_batched_tokens=1024)
    static, static_work = marks(lines), work(lines)
    timeline(static)
    heading("Continuous batching: requests join and leave at every step")
    lines, answers = traced(as_they_come, max_num_batched_tokens=BUDGET)
    free, free_work = marks(lines), work(lines)
    timeline(free)
    heading("The same with a pool of 9 blocks: the newest is preempted, and computes again what is lost")
    lines, tight_answers = traced(as_they_come, max_num_batched_tokens=BUDGET, num_gpu_blocks_override=9)
    tight, tight_work = marks(lines), work(lines)
    timeline(tight)
    heading("What was computed, and what was needed")
    needed = sum(length for _, length, _ in REQUESTS), sum(out - 1 for _, _, out in REQUESTS)
    rows = [
        ("static", len(static), *static_work),
        ("continuous", len(free), *free_work),
        ("continuous, 9 blocks", len(tight), *tight_work),
    ]
    table(("", "steps", "tokens of prompts", "tokens of answers"), rows)
    print(f"  needed: {needed[0]} and {needed[1]}; the first token of an answer comes out of its prompt's step")
    check("all requests ended", len(answers) == len(REQUESTS))
    check("with the same tokens in both pools", answers == tight_answers)
    check("continuous batching computes what is needed and nothing else", free_work == needed)
    check("it needs fewer steps than static batching", len(free) < len(static))
    check("the small pool did preempt", any(line["preempted"] for line in lines))
    if csv:
        named = {"static": static, "continuous": free, "continuous, 9 blocks": tight}
        rows = [
            {"batching": name, "step": at, "request": i, "arrives": REQUESTS[i][0], "does": letter}
            for name, steps in named.items()
            for at, step in enumerate(steps)
            for i, letter in step.items()
        ]
        write_csv(rows, csv, measured=False)


def as_they_come(engine: LLMEngine, step: int) -> bool:
    for i, (arrives, length, out) in enumerate(REQUESTS):
        if arrives == step:
            add(engine, i, length, out)
    return any(arrives > step for arrives, _, _ in REQUESTS)


def batch_by_batch() -> Feed:
    batches = [range(first, first + ROWS) for first in range(0, len(REQUESTS), ROWS)]

    def feed(engine: LLMEngine, step: int) -> bool:
        if batches and not engine.has_unfinished_requests() and all(REQUESTS[i][0] <= step for i in batches[0]):
            batch = batches.pop(0)
            for i in batch:
                add(engine, i, max(REQUESTS[j][1] for j in batch), max(REQUESTS[j][2] for j in batch))
        return bool(batches)

    return feed


def add(engine: LLMEngine, i: int, length: int, out: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
    engine.add_request(str(i), [100 + i] * length, params)


def traced(feed: Feed, **options) -> tuple[list[dict], dict[str, list[int]]]:
    """The engine's trace, a line a step (an empty one where it had nothing to do), and the answers."""
    answers, ran = {}, []
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "steps.jsonl"
        engine = LLMEngine(
            device="cpu", block_size=8, max_num_seqs=ROWS, enable_prefix_caching=False, check=True, trace=trace, **options
        )  # fmt: skip
        more = True
        while more or engine.has_unfinished_requests():
            more = feed(engine, len(ran))
            ran.append(engine.has_unfinished_requests())
            for output in engine.step():
                if output.finished:
                    answers[output.request_id] = output.outputs[0].token_ids
        engine.trace.close()
        lines = map(json.loads, trace.read_text(encoding="utf-8").splitlines())
        return [next(lines) if did else {"scheduled": [], "preempted": []} for did in ran], answers


def marks(lines: list[dict]) -> Marks:
    """The letters of the timeline."""
    steps: Marks = []
    count = dict.fromkeys(range(len(REQUESTS)), 0)  # tokens of the answer so far, the first of them by the prompt's end
    last = {_number(name): at for at, line in enumerate(lines) for name, *_ in line["scheduled"]}
    begun: set[int] = set()
    for at, line in enumerate(lines):
        ran = {_number(name): kind for name, _, _, kind in line["scheduled"]}
        letters = {}
        for i, (arrives, _, out) in enumerate(REQUESTS):
            if i in ran:
                count[i] += ran[i] == "decode"
                letters[i] = "P" if ran[i] == "prefill" else "d" if count[i] < out else "-"
                begun.add(i)
            elif arrives <= at < last[i]:
                letters[i] = "x" if i in begun else "."
        steps.append(letters)
    return steps


def _number(name: str) -> int:
    return int(name.partition("/")[0])


def work(lines: list[dict]) -> tuple[int, int]:
    """Tokens computed: of prompts (and of what had to be computed again), and of answers."""
    tokens = {"prefill": 0, "decode": 0}
    for line in lines:
        for _, _, new, kind in line["scheduled"]:
            tokens[kind] += new
    return tokens["prefill"], tokens["decode"]


def timeline(steps: Marks) -> None:
    for i, (_, length, out) in enumerate(REQUESTS):
        line = "".join(step.get(i, " ") for step in steps)
        print(f"  {i}  {length:3d} in {out:3d} out  {line.rstrip()}")


if __name__ == "__main__":
    run_main(main)
