"""Continuous batching as a timeline, drawn from the engine's trace, against static batching of the same requests.

    python ch06_tp_vllm/demo_8_scheduler.py
    python ch06_tp_vllm/demo_8_scheduler.py --csv figures/batching.csv

Eight requests on the bundled model, four rows, a budget of 24 tokens a step. Each column is a step:

    P  tokens of a prompt        d  one token of an answer        .  waits        x  preempted, waits again
    -  a token that nobody asked for: the request has ended, its batch has not

Static batching is run on the same engine: four prompts, padded to the longest, in one step, then decode steps until the
longest answer ends; only then the next four. (Its step may hold 1024 tokens: a step of static batching is whole prompts.)
The pool of 9 blocks is run with and without the gate of admission (scheduler_reserve_full_isl). The last run has the priority
policy, and an abort.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ch06_tp_vllm import LLMEngine, SamplingParams
from common.attention.contract import AttentionMetadata
from common.distributed.launch import run_main
from common.teaching.report import csv_option, write_csv
from common.teaching.show import check, heading, table

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
    kinds = {
        "static": ("Static batching: four at a time, each batch until its longest answer ends",
                   traced(batch_by_batch(), max_num_batched_tokens=1024)),
        "continuous": ("Continuous batching: requests join and leave at every step", traced(as_they_come)),
        "9 blocks, no gate": ("The same with a pool of 9 blocks: the newest is preempted, and computes again what is lost",
                              traced(as_they_come, num_gpu_blocks_override=9, scheduler_reserve_full_isl=False)),
        "9 blocks, gate": ("With a gate: a request enters when there are blocks for its whole prompt",
                           traced(as_they_come, num_gpu_blocks_override=9)),
        "priority and abort": ("By priority: 5 is urgent and goes before 4, which came with it; 3 is aborted before step 13",
                               traced(urgent_and_aborted, scheduling_policy="priority")),
    }  # fmt: skip
    steps, computed = {}, {}
    print(
        "P part of a prompt, d token of an answer, - token that nobody asked for, . waits, x preempted; a column is a step"
    )
    for name, (title, run) in kinds.items():
        heading(title)
        steps[name], computed[name] = marks(run.lines), work(run.lines)
        timeline(steps[name])
    runs = {name: run for name, (_, run) in kinds.items()}

    heading("What was computed, and what was needed")
    ran = {name: len(run.lines) for name, run in runs.items()}
    idle = {name: sum(not line["scheduled"] for line in run.lines) for name, run in runs.items()}
    preempted = {name: sum(len(line["preempted"]) for line in run.lines) for name, run in runs.items()}
    rows = [(name, ran[name], idle[name], *computed[name], preempted[name]) for name in list(kinds)[:4]]
    table(("", "steps", "of them idle", "tokens prefilled", "tokens decoded", "preemptions"), rows)
    needed = sum(length for _, length, _ in REQUESTS), sum(out - 1 for _, _, out in REQUESTS)
    print(f"  needed: {needed[0]} and {needed[1]}; the first token of an answer comes out of its prompt's step")
    print("  what a preempted request computes again, answer included, is prefilled")
    free, no_gate, gate, urgent = (runs[name] for name in list(kinds)[1:])
    check("all requests ended", len(free.answers) == len(REQUESTS))
    check("with the same tokens in every pool", free.answers == no_gate.answers == gate.answers)
    check("continuous batching computes what is needed and nothing else", computed["continuous"] == needed)
    check("it needs fewer steps than static batching", ran["continuous"] < ran["static"])
    check(
        "the small pool preempts, and the gate spares some of it",
        preempted["9 blocks, no gate"] > preempted["9 blocks, gate"],
    )
    check("5 overtook 4", begins(urgent, 5) < begins(urgent, 4) and begins(free, 5) > begins(free, 4))
    check("nobody's answer changed by that", all(free.answers[i] == said for i, said in urgent.answers.items()))
    what_attention_is_told(free)
    if csv:
        rows = [
            {"batching": name, "step": at, "request": i, "arrives": REQUESTS[i][0], "does": letter}
            for name in list(kinds)[:4]
            for at, step in enumerate(steps[name])
            for i, letter in step.items()
        ]
        write_csv(rows, csv, measured=False)


def as_they_come(engine: LLMEngine, step: int) -> bool:
    for i, (arrives, length, out) in enumerate(REQUESTS):
        if arrives == step:
            add(engine, i, length, out)
    return any(arrives > step for arrives, _, _ in REQUESTS)


def urgent_and_aborted(engine: LLMEngine, step: int) -> bool:
    for i, (arrives, length, out) in enumerate(REQUESTS):
        if arrives == step:
            add(engine, i, length, out, priority=0 if i == 5 else 1)
    if step == 13:
        engine.abort_request("3")
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


def add(engine: LLMEngine, i: int, length: int, out: int, priority: int = 0) -> None:
    params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
    engine.add_request(str(i), [100 + i] * length, params, priority=priority)


@dataclass
class Run:
    """What a run left: the engine's trace, a line a step (an empty one where it had nothing to do), and the answers.

    told: what attention was told in each step that computed something.
    """

    lines: list[dict] = field(default_factory=list)
    answers: dict[int, list[int]] = field(default_factory=dict)
    told: list[AttentionMetadata] = field(default_factory=list)


def traced(feed: Feed, max_num_batched_tokens: int = BUDGET, **options) -> Run:
    run, ran = Run(), []
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "steps.jsonl"
        engine = LLMEngine(
            device="cpu", block_size=8, max_num_seqs=ROWS, max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=False, check=True, trace=trace, **options,
        )  # fmt: skip
        attention = engine.runner.attention
        engine.runner.attention = lambda cache, meta: run.told.append(meta) or attention(cache, meta)
        more = True
        while more or engine.has_unfinished_requests():
            more = feed(engine, len(ran))
            ran.append(engine.has_unfinished_requests())
            for output in engine.step():
                if output.finished:
                    run.answers[int(output.request_id)] = output.outputs[0].token_ids
        engine.trace.close()
        lines = map(json.loads, trace.read_text(encoding="utf-8").splitlines())
        run.lines = [next(lines) if did else {"scheduled": [], "preempted": []} for did in ran]
    return run


def begins(run: Run, request: int) -> int:
    """The step in which it runs for the first time."""
    return next(at for at, line in enumerate(run.lines) if any(_number(row[0]) == request for row in line["scheduled"]))


def what_attention_is_told(run: Run) -> None:
    """The metadata of the first step that mixes decodes with parts of prompts."""
    at = next(at for at, line in enumerate(run.lines) if {row[3] for row in line["scheduled"]} == {"prefill", "decode"})
    meta, scheduled = run.told[at], run.lines[at]["scheduled"]
    heading(f"Step {at}, as every rank works it out for attention (blocks of 8)")
    starts, rows = meta.query_start.tolist(), []
    for b, (name, before, new, kind) in enumerate(scheduled):
        positions, slots = list(range(before, before + new)), meta.slot_mapping[starts[b] : starts[b + 1]].tolist()
        blocks = meta.page_table[b, : -(-(before + new) // 8)].tolist()
        rows.append((_number(name), kind, _span(positions), blocks, _span(slots), meta.context_lens[b].item()))
    table(("request", "kind", "positions", "block_table", "slot_mapping", "context_len"), rows)
    print(f"  query_start {starts}: the tokens of all lie end to end, {starts[-1]} in one step")
    check("no more than the budget", starts[-1] <= BUDGET)


def _span(numbers: list[int]) -> str:
    """3 4 5 9 -> 3-5, 9"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


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
