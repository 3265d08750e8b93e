"""Deflection: the decode engine computes a short prompt itself. Who gains by it, and who pays?

    python ch07_sglang_radix/disaggregation/demo_6_deflection.py

Three answers are being written on the decode engine. On the prefill engine stand no, one or two long prompts, and behind them a
short one comes: computed there, or deflected (--disaggregation-deflect-tokens). Two numbers, in ms: until the short prompt's first
token, and the longest time between two tokens of those who run. Each engine has a clock of its own, of processor time, which runs
while it makes a step: so what is told is what two machines of one core would see, although both are one process here. A wire is not
in it (demo_5). Each number is the least of three tries.

You should see that the first column grows with every prompt before it and the second one does not; and that who runs pays, once,
with the computing of the short prompt, and the more the longer that one is.
"""

import random
import time
from dataclasses import astuple, dataclass, replace

import torch

from ch07_sglang_radix.disaggregation.cost_model import Times
from ch07_sglang_radix.disaggregation.local_pair import Half, Pair
from common.distributed.launch import run_main
from common.teaching.show import check, heading, table

LONG, CHUNK, RUNNING, REPEATS = 512, 128, 3, 3
SHORT = (16, 128)
MODELLED = (128, 512, 2048)
BEFORE = (0, 1, 2)  # long prompts on the prefill engine
NOBODY, EVERYBODY = 0, max(SHORT)  # values of disaggregation_deflect_tokens


@dataclass(frozen=True)
class Seen:
    """steps: that the engine which computes the prompt made until its first token, seconds of it; gap_s: of those who run."""

    steps: int
    first_s: float
    gap_s: float


def main() -> None:
    torch.set_num_threads(1)  # or others would compute what the clock does not see
    chunks = {"chunked_prefill_size": CHUNK, "page_size": 16, "pool": 8192}
    both = Pair(prefill=dict(chunks), decode=chunks | {"reserved": 64})
    for half in both.halves.values():
        half.scheduler.after_step.clear()  # the check of conservation takes its time, too
    draw = random.Random(0)
    heading(
        f"Prompts of {LONG} before it, chunks of {CHUNK}: ms until its first token, and the longest gap of who runs"
    )
    seen, rows = {}, []
    for prompt in SHORT:
        for before in BEFORE:
            for limit in (NOBODY, EVERYBODY):
                tries = [ask_behind(both, draw, prompt, before, limit) for _ in range(REPEATS)]
                seen[prompt, before, limit] = Seen(*map(min, zip(*map(astuple, tries), strict=True)))
            there, here = (seen[prompt, before, limit] for limit in (NOBODY, EVERYBODY))
            rows.append((prompt, before, *(1000 * s for s in (there.first_s, here.first_s, there.gap_s, here.gap_s))))
    table(("prompt", "before it", "first, on prefill", "first, deflected", "gap, on prefill", "gap, deflected"), rows)
    steps = [[seen[SHORT[0], before, limit].steps for before in BEFORE] for limit in (NOBODY, EVERYBODY)]
    print(f"  steps until its first token, on prefill: {steps[0]}, deflected: {steps[1]}")
    check(
        "on the prefill engine it waits for every chunk before it", steps[0] == [1 + n * LONG // CHUNK for n in BEFORE]
    )
    check("deflected it waits for none, and has one step of its own", steps[1] == [1] * len(BEFORE))
    both.at_rest()
    both.close()
    longer_ones(seen[CHUNK, 0, EVERYBODY].first_s, seen[CHUNK, 0, NOBODY].gap_s)


def longer_ones(chunk_s: float, step_s: float) -> None:
    heading("The model, of prompts of several chunks, in ms (cost_model.py)")
    times = Times(CHUNK, chunk_s, step_s)
    rows = [
        (prompt, one.chunks, 1000 * one.gap_s, 1000 * one.chunks * one.gap_s, 1000 * times.least_backlog(prompt))
        for prompt, one in ((prompt, times.together(prompt)) for prompt in MODELLED)
    ]
    table(("prompt", "gaps", "each of", "together", "sooner if deflected, from a backlog of"), rows)
    check("of one chunk it is never later", times.least_backlog(CHUNK) == 0)


def ask_behind(both: Pair, draw: random.Random, prompt: int, before: int, limit: int) -> Seen:
    decode = both.decode.scheduler
    both.decode.side.deflect_tokens = NOBODY
    running = [both.ask(_prompt(draw, 8), max_new_tokens=400) for _ in range(RUNNING)]
    both.until(lambda: len(decode.running) == RUNNING)
    earlier = [both.ask(_prompt(draw, LONG), max_new_tokens=1) for _ in range(before)]
    both.until(lambda: all(_has_pages(both, room) for room, _ in earlier))
    both.decode.side.deflect_tokens = limit
    asked = both.ask(_prompt(draw, prompt), max_new_tokens=2)
    engine = both.decode if limit else both.prefill
    clocks, gaps = {"prefill": 0.0, "decode": 0.0}, [0.0]
    first, counted, computed = None, 0, engine.scheduler.steps["prefill"]
    while first is None or len(gaps) == counted:  # until who runs has a token behind it, too
        for name, half in both.halves.items():
            drawn = decode.steps["decode"]
            took = _seconds(half)
            clocks[name] += took
            if half is both.decode:
                gaps[-1] += took
                gaps += [0.0] * (decode.steps["decode"] > drawn)
        if first is None and _has_first(engine, asked[1][engine.mode]):
            counted = len(gaps)
            first = Seen(engine.scheduler.steps["prefill"] - computed, clocks[engine.mode], 0.0)
    for one in running:
        decode.abort(one[1]["decode"])
    for one in (*earlier, asked):
        both.answer(one)
    both.at_rest()
    return replace(first, gap_s=max(gaps))


def _prompt(draw: random.Random, tokens: int) -> list[int]:
    return [draw.randrange(1000) for _ in range(tokens)]


def _has_pages(both: Pair, room: int) -> bool:
    return both.decode.stage(room) == "transfer"


def _has_first(engine: Half, number: int) -> bool:
    """The prefill engine has drawn it, or the decode engine, whose request it is by then."""
    if engine.mode == "prefill":
        return number in engine.results
    return any(req.rid == number and req.output_ids for req in engine.scheduler.running)


def _seconds(half: Half) -> float:
    began = time.thread_time()
    half.step()
    return time.thread_time() - began


if __name__ == "__main__":
    run_main(main)
