"""Continuous batching as a timeline: who runs in which step, and what static batching would do with the same requests.

    python ch06_tp_vllm/demo_8_scheduler.py

Eight requests on the bundled model, four rows, a budget of 24 tokens a step. Each column is a step:

    P  tokens of a prompt        d  one token of an answer        .  waits        x  preempted
"""

import math

from ch06_tp_vllm import LLMEngine, SamplingParams
from common.launch import run_main
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


def main() -> None:
    heading("Continuous batching: requests join and leave at every step")
    steps, engine = continuous(num_blocks=None)
    timeline(steps)
    heading("The same with a pool of 9 blocks: the newest is preempted, and computes again what is lost")
    tight, tight_engine = continuous(num_blocks=9)
    timeline(tight)
    heading("Static batching: four at a time, each batch until its longest answer ends")
    static = static_batches()
    useful = sum(out for _, _, out in REQUESTS)
    rows = [("static", static, useful, ROWS * static), ("continuous", len(steps), useful, sum(len(s) for s in steps))]
    table(("", "steps", "tokens asked for", "rows computed"), rows)
    check("all requests ended", len(engine.done) == len(REQUESTS))
    check("with the same tokens in both pools", engine.done == tight_engine.done)
    check("continuous batching needs fewer steps", len(steps) < static)
    check("the small pool did preempt", tight_engine.scheduler.num_preemptions > 0)


def continuous(num_blocks: int | None):
    """[{request: what it did}] by step, and the engine."""
    engine = LLMEngine(
        device="cpu", block_size=8, max_num_seqs=ROWS, max_num_batched_tokens=BUDGET, enable_prefix_caching=False,
        num_gpu_blocks_override=num_blocks, check=True,
    )  # fmt: skip
    steps, engine.done = [], {}
    schedule = engine.scheduler.schedule

    def watched():
        output = schedule()
        steps.append(
            {s.request.group: ("d" if s.num_new == 1 and s.request.drawn_here else "P") for s in output.scheduled}
        )
        return output

    engine.scheduler.schedule = watched
    coming = [(step, str(i), 100 + i, length, out) for i, (step, length, out) in enumerate(REQUESTS)]
    while coming or engine.has_unfinished_requests():
        while coming and coming[0][0] <= len(steps):
            _, name, token, length, out = coming.pop(0)
            engine.add_request(name, [token] * length, SamplingParams(temperature=0, max_tokens=out, ignore_eos=True))
        for output in engine.step():
            if output.finished:
                engine.done[output.request_id] = output.outputs[0].token_ids
    return steps, engine


def timeline(steps: list[dict[str, str]]) -> None:
    for i, (arrives, length, out) in enumerate(REQUESTS):
        ran = [step.get(str(i)) for step in steps]
        last = max(at for at, what in enumerate(ran) if what)
        line, seen = "", False
        for at, what in enumerate(ran):
            seen = seen or bool(what)
            line += what or (" " if at < arrives or at > last else "x" if seen else ".")
        print(f"  {i}  {length:3d} in {out:3d} out  {line.rstrip()}")


def static_batches() -> int:
    """Steps: for each batch of ROWS a padded prefill in chunks of the budget, then its longest answer."""
    steps = 0
    for first in range(0, len(REQUESTS), ROWS):
        batch = REQUESTS[first : first + ROWS]
        steps = max(steps, *(arrives for arrives, _, _ in batch))  # the batch waits for its last member
        prompts = ROWS * max(length for _, length, _ in batch)
        steps += math.ceil(prompts / BUDGET) + max(out for _, _, out in batch) - 1
    return steps


if __name__ == "__main__":
    run_main(main)
