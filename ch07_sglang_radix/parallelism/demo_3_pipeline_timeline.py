"""When did each stage compute what? Four prompts as 1, 2 and 4 micro-batches, with the clock of every rank.

    torchrun --nproc_per_node=2 ch07_sglang_radix/parallelism/demo_3_pipeline_timeline.py
    torchrun --nproc_per_node=2 ch07_sglang_radix/parallelism/demo_3_pipeline_timeline.py --csv figures/pipeline.csv

Each stage notes when it began and ended the layers of each step (Executor.spans). What of the time between the first beginning
and the last end a stage was not computing is its bubble: (N-1)/(m+N-1) of it for m equal micro-batches over N stages, if
messages took no time and all stages were equally fast. Of 15 rounds the one with the smallest bubble is drawn: on a busy machine
stages wait for a core, too. Where none of them shows two stages at work at once, more are played until one does, up to 150. The
tokens are the same, however the prompts are cut.

The schedules at the end are COMPUTED, not measured: training needs a backward pass, which nothing here has.
"""

import os
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.distributed.messages import share_all
from common.parallel_state import ParallelState
from common.teaching.report import csv_option, write_csv
from common.teaching.show import check, heading, table

PROMPTS, TOKENS, ROUNDS = 4, 256, 15
MOST_ROUNDS = 10 * ROUNDS  # a machine that never gives two ranks a core at once shows no pipeline
WIDTH = 60  # characters of a drawn timeline


class Span(NamedTuple):
    """A stage computes a micro-batch; in any unit, from the timeline's beginning."""

    stage: int
    micro_batch: int
    start: float
    end: float
    what: str = "forward"


def main() -> None:
    csv = csv_option(__doc__)
    stages = int(os.environ.get("WORLD_SIZE", "1"))
    if stages < 2:
        raise ValueError("a pipeline has two stages or more; start with torchrun --nproc_per_node=2")
    parallel = ParallelState.initialize(1, stages, device="cpu")
    wrapper = TPRadixAttentionModelWrapper(device="cpu", page_size=16, max_total_tokens=4096, parallel=parallel)
    measured: dict[int, list[Span]] = {}
    answers = {}
    for m in (1, 2, 4):
        run(wrapper, m)  # warm up
        timelines: list[list[Span]] = []
        while len(timelines) < ROUNDS or (m > 1 and not any(map(overlap, timelines)) and len(timelines) < MOST_ROUNDS):
            spans, answers[m] = run(wrapper, m)
            timelines.append(together(share_all(spans, parallel.world)))  # the same on all, who so decide alike
        seen = list(filter(overlap, timelines)) or timelines
        measured[m] = min(seen, key=bubble)  # the one that other programs have disturbed least
        if parallel.world.rank == 0:
            show(m, stages, measured[m], timelines)
    if parallel.world.rank > 0:
        return
    heading("What came of it")
    check("1, 2 and 4 micro-batches give the same tokens", answers[1] == answers[2] == answers[4])
    order = [sorted(s.micro_batch for s in measured[4] if s.stage == stage) for stage in range(stages)]
    check("every stage computes every micro-batch once", order == [list(range(4))] * stages)
    check("a micro-batch enters stage 0 before the one before it has left stage 1", overlap(measured[4]))
    computed = {"gpipe": gpipe(2, 4), "interleaved": interleaved(2, 4)}
    heading("COMPUTED, with a backward pass of twice the time: what training does about its bubble")
    for name, spans in computed.items():
        draw(spans, 2)
        print(f"  {name}: {bubble(spans):.0%} of the time nothing is computed")
    print(
        "  Serving has no backward pass: the next requests fill the pipeline, and a bubble is there only if they lack."
    )
    if csv:
        rows = [row("measured", m, span) for m, spans in measured.items() for span in spans]
        rows += [row(f"computed, {name}", 4, span) for name, spans in computed.items() for span in spans]
        write_csv(rows, csv)


def run(wrapper: TPRadixAttentionModelWrapper, m: int) -> tuple[list[tuple[float, float]], list[list[int]]]:
    """This stage's spans of m micro-batches of PROMPTS / m prompts, and the first token of each prompt."""
    scheduler = TPScheduler(
        wrapper, chunked_prefill_size=PROMPTS * TOKENS // m, num_lanes=m, max_lane_size=PROMPTS // m,
        disable_radix_cache=True,
    )  # fmt: skip
    wrapper.spans = []
    for i in range(PROMPTS):
        scheduler.add_request(input_ids=[(7 * i + j) % 1000 for j in range(TOKENS)], max_new_tokens=1)
    tokens = [output.output_ids for output in scheduler.process_requests().values()]
    spans, wrapper.spans = wrapper.spans, None
    return spans, tokens


def together(by_rank: Sequence[Sequence[tuple[float, float]]]) -> list[Span]:
    """Spans of all stages, in ms since the first one. The ranks' clock is the machine's, so they may be compared."""
    begin = min(start for spans in by_rank for start, _ in spans)
    return [
        Span(stage, i, (start - begin) * 1e3, (end - begin) * 1e3)
        for stage, spans in enumerate(by_rank)
        for i, (start, end) in enumerate(spans)
    ]


def bubble(spans: Sequence[Span]) -> float:
    """The share of all stages' time, from the first beginning to the last end, in which they do not compute."""
    stages = 1 + max(span.stage for span in spans)
    length = max(span.end for span in spans) - min(span.start for span in spans)
    return 1 - sum(span.end - span.start for span in spans) / (stages * length)


def overlap(spans: Sequence[Span]) -> bool:
    """Has stage 0 begun with a micro-batch while stage 1 was not done with the one before?"""
    first, second = ([span for span in spans if span.stage == stage] for stage in (0, 1))
    return any(later.start < earlier.end for later, earlier in zip(first[1:], second, strict=False))


def gpipe(stages: int, m: int) -> list[Span]:
    """All forwards, then all backwards (Huang et al. 2019), in forward passes of a stage: 1 forward, 2 backward."""
    forward = [Span(s, i, s + i, s + i + 1) for s in range(stages) for i in range(m)]
    turn = stages + m - 1
    backward = [
        Span(s, i, at := turn + 2 * (stages - 1 - s + i), at + 2, "backward") for s in range(stages) for i in range(m)
    ]
    return forward + backward


def interleaved(stages: int, m: int, pieces: int = 2) -> list[Span]:
    """Every device has `pieces` thin stages, far apart (Narayanan et al. 2021): the same work in smaller turns."""
    forward, size = [], 1 / pieces
    for piece in range(pieces):
        for s in range(stages):
            for i in range(m):
                at = (piece * max(m, stages) + s + i) * size
                forward.append(Span(s, i, at, at + size))
    turn = max(span.end for span in forward)
    backward = [
        Span(s.stage, s.micro_batch, turn + 2 * (turn - s.end), turn + 2 * (turn - s.start), "backward")
        for s in forward
    ]
    return forward + backward


def show(m: int, stages: int, spans: list[Span], rounds: Sequence[list[Span]]) -> None:
    heading(f"{m} micro-batch(es) of {PROMPTS // m} prompt(s) of {TOKENS} tokens, {stages} stages: measured")
    draw(spans, stages)
    formula = (stages - 1) / (m + stages - 1)
    median = statistics.median(map(bubble, rounds))
    said = (m, f"{bubble(spans):.0%}", f"{median:.0%}", f"{formula:.0%}", max(span.end for span in spans))
    table(("m", "bubble of this round", f"median of {len(rounds)}", "(N-1)/(m+N-1)", "ms of this round"), [said])


def draw(spans: Sequence[Span], stages: int) -> None:
    """A line a stage; the digits are micro-batches, in a backward pass letters, and dots are bubbles."""
    length = max(span.end for span in spans)
    for stage in range(stages):
        line = ["."] * WIDTH
        for span in (span for span in spans if span.stage == stage):
            first, last = round(span.start / length * WIDTH), round(span.end / length * WIDTH)
            name = str(span.micro_batch) if span.what == "forward" else "abcd"[span.micro_batch]
            line[first:last] = name * (last - first)
        print(f"  stage {stage}  {''.join(line)}")


def row(kind: str, m: int, span: Span) -> dict:
    named = span._asdict() | {"start": round(span.start, 3), "end": round(span.end, 3)}
    return {"kind": kind, "micro-batches": m, **named}


if __name__ == "__main__":
    run_main(main)
