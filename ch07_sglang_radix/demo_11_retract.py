"""A pool that is too small: requests are sent back to the queue with their outputs, and come again.

    python ch07_sglang_radix/demo_11_retract.py

Ten requests, 16 tokens in and 48 out, one every second step. Admission does not reserve the whole answer of those that
run, only the share `new_token_ratio` of it, since most answers end early. Here none does. A new engine is careful
(0.7); with every decode step that goes well it becomes bolder, down to 0.1. Then, in a small pool, a decode step finds
no slot: the requests with the fewest outputs are retracted, until 20 more steps fit for the others. Outputs are kept; K
and V of prompt and outputs are computed again later, if they are no longer in the tree.
"""

from typing import NamedTuple

from ch07_sglang_radix.retraction import RETRACT_DECODE_STEPS
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.sampling.params import SamplingParams
from common.teaching.show import check, heading, table

REQUESTS, IN, OUT, EVERY = 10, 16, 48, 2
SMALL, LARGE, PAGE_SIZE = 320, 1024, 4
INIT, CALM = 0.7, 0.1  # new_token_ratio of a new engine, and after 600 decode steps without a retraction


class Run(NamedTuple):
    answers: list[list[int]]
    retractions: int
    steps: int
    tokens: int  # rows computed
    most: int  # requests that ran at once
    ratio: float


def main() -> None:
    heading(f"{SMALL} slots for {REQUESTS} requests of {IN + OUT}, new_token_ratio {CALM}: who is retracted")
    calm = run(SMALL, CALM, tell=True)
    large, small, reserved = run(LARGE, INIT), run(SMALL, INIT), run(SMALL, 1.0)
    heading("The same requests with another pool and other ratios")
    rows = [
        (f"{LARGE} slots", *large[1:]), (f"{SMALL} slots, ratio {CALM}: bold", *calm[1:]),
        (f"{SMALL} slots, ratio {INIT}: careful", *small[1:]), (f"{SMALL} slots, ratio 1: all reserved", *reserved[1:]),
    ]  # fmt: skip
    table(("", "retracted", "steps", "rows computed", "most at once", "ratio at the end"), rows)
    check("the large pool retracts nobody", large.retractions == 0)
    check("the small one does, once the ratio is low", calm.retractions > 0)
    check("and the ratio is higher afterwards", calm.ratio > CALM)
    check("the lower the ratio, the more run at once and the fewer steps it takes",
          calm.most > small.most >= reserved.most and calm.steps < small.steps < reserved.steps)  # fmt: skip
    check("the price: what is retracted is computed again", calm.tokens > large.tokens)
    check("the tokens are the same in all four", small.answers == calm.answers == large.answers == reserved.answers)


def run(slots: int, ratio: float, tell: bool = False) -> Run:
    wrapper = TPRadixAttentionModelWrapper(device="cpu", page_size=PAGE_SIZE, max_total_tokens=slots)
    scheduler = TPScheduler(wrapper, overlap=False, check=True)
    scheduler.new_token_ratio = ratio
    params = SamplingParams(max_new_tokens=OUT, ignore_eos=True)
    most, asked, before = 0, 0, {}
    while asked < REQUESTS or scheduler.waiting or scheduler.running:
        while asked < REQUESTS and EVERY * asked <= scheduler.step_number:
            scheduler.add_request(input_ids=[100 + asked] * IN, sampling_params=params)
            asked += 1
        retractions, ratio = scheduler.retractions, scheduler.new_token_ratio
        before = {req: list(req.output_ids) for req in scheduler.running}
        scheduler.step()
        most = max(most, len(scheduler.running))
        if scheduler.retractions > retractions:
            back = [req for req in scheduler.waiting if req in before]
            kept = all(req.output_ids == before[req] for req in back)
            if not kept:
                raise SystemExit("check failed: a retracted request has lost outputs")
            if tell:
                report(scheduler, back, ratio)
    answers = [scheduler.results[rid].output_ids for rid in range(REQUESTS)]
    if scheduler.pool.free_slots + scheduler.tree.evictable_size != slots:
        raise SystemExit("check failed: a slot is lost")
    steps = scheduler.step_number
    return Run(answers, scheduler.retractions, steps, scheduler.work["tokens"], most, scheduler.new_token_ratio)


def report(scheduler: TPScheduler, back: list, ratio: float) -> None:
    left = [req for req in scheduler.running if req not in back]
    who = ", ".join(f"#{req.rid} ({len(req.output_ids)})" for req in back)
    print(
        f"  step {scheduler.step_number - 1}: back in the queue, with the outputs they keep: {who}; {len(left)} run on"
    )
    # the step that made room has decoded one token more since, and let the ratio sink by one step's part
    decoded, total = sum(len(req.output_ids) - 1 for req in left), sum(req.params.max_new_tokens for req in left)
    said = f"({decoded} + {RETRACT_DECODE_STEPS} * {len(left)}) / {total}"
    print(f"     new_token_ratio {ratio:.2f} -> {scheduler.new_token_ratio:.2f}   {said}")


if __name__ == "__main__":
    run_main(main)
