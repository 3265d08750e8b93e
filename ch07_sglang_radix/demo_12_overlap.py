"""Overlap scheduling: the next step is queued before the last one's tokens are seen.

    python ch07_sglang_radix/demo_12_overlap.py

Two requests: one ends with a stop token, which nobody can foresee, the other after a fixed number of tokens. Each
box is one step; on a GPU the device works through them while rank 0 is already at the next. On a CPU queueing a
step is doing it, so nothing is gained here: shown is the order of events, which is real, and what it costs. The device in
the picture is drawn, not measured: boxes of one length, where a GPU could put them in that order of events.

    Q2  rank 0 queues step 2        T2  it takes the tokens of step 2        ....  the device has nothing to do
"""

from typing import NamedTuple

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.sampling.params import SamplingParams
from common.teaching.show import check, heading, table

PROMPT, NEW, SLOTS = [100, 200, 300, 400], 8, 256


class Run(NamedTuple):
    events: list[tuple[str, int]]  # ("queue" or "take", step), in order
    answers: list[list[int]]
    sampled: int
    steps: int
    cached: int  # slots that the tree holds afterwards
    free: int  # slots


def main() -> None:
    wrapper = TPRadixAttentionModelWrapper(device="cpu", page_size=1, max_total_tokens=SLOTS)
    whole = run(wrapper, False, None).answers[0]
    stop = next(i for i in range(3, NEW) if whole[i] not in whole[:i])
    runs = {overlap: run(wrapper, overlap, whole[stop]) for overlap in (False, True)}
    for overlap, name in ((False, "look after every step"), (True, "overlap")):
        heading(f"{name} (overlap={overlap}): the order of events")
        events = runs[overlap].events
        print(f"  {' '.join(f'{what[0].upper()}{step}' for what, step in events)}")
        timeline(events)
    print(
        "  (the device is drawn from this order, each step as long as the others: there is no GPU here, and nothing is timed)"
    )

    heading(f"The first request stops at its token {stop + 1}; the second has {NEW} tokens")
    rows = [(str(ahead), one.sampled, given(one), one.sampled - given(one), one.steps) for ahead, one in runs.items()]
    table(("overlap", "tokens drawn", "tokens given", "wasted", "steps"), rows)
    plain, ahead = runs[False], runs[True]
    check("with overlap step N+1 is queued before the tokens of N are taken", queued_first(ahead) == [True] * (NEW - 1))
    check("without, it is the other way round", queued_first(plain) == [False] * (NEW - 1))
    check("never more than one step ahead", most_ahead(ahead.events) == 2)
    check("the stop token is seen one step late: one token is wasted", ahead.sampled == plain.sampled + 1)
    check("an end that its length tells costs nothing", ahead.steps == plain.steps == NEW)
    check(f"the token too many is not in the tree: {ahead.cached} slots, and {plain.cached} without overlap",
          ahead.cached == plain.cached)  # fmt: skip
    check(
        f"every page went back once: {ahead.free} + {ahead.cached} = {SLOTS} slots", ahead.free + ahead.cached == SLOTS
    )
    check("the answers are the same", ahead.answers == plain.answers)


def run(wrapper: TPRadixAttentionModelWrapper, overlap: bool, stop: int | None) -> Run:
    scheduler = TPScheduler(wrapper, overlap=overlap, check=True)
    events = watch(scheduler)
    stops = () if stop is None else (stop,)
    first = SamplingParams(max_new_tokens=2 * NEW, ignore_eos=True, stop_token_ids=stops)
    scheduler.add_request(input_ids=PROMPT, sampling_params=first)
    scheduler.add_request(input_ids=PROMPT[::-1], sampling_params=SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    results = scheduler.process_requests()
    answers = [results[rid].output_ids for rid in sorted(results)]
    cached, free = scheduler.tree.evictable_size, scheduler.pool.free_slots
    return Run(events, answers, scheduler.work["sampled"], scheduler.step_number, cached, free)


def watch(scheduler: TPScheduler) -> list[tuple[str, int]]:
    """Write down when a step is queued and when its tokens are taken, as it happens."""
    events, execute, sample = [], scheduler.control.execute, scheduler.control.sample
    number = 0

    def queue(task):
        nonlocal number
        number = task.step
        events.append(("queue", number))
        return execute(task)

    def draw(logits, batch):
        drawn, step = sample(logits, batch), number
        take = drawn.take

        def taken():
            events.append(("take", step))
            return take()

        drawn.take = taken
        return drawn

    scheduler.control.execute, scheduler.control.sample = queue, draw
    return events


def timeline(events: list[tuple[str, int]]) -> None:
    """What a GPU and rank 0 would do at the same time: a step begins once it is queued and the last one has ended,
    and its tokens can be taken once it has ended itself."""
    device, rank_0 = "", ""
    for what, step in events:
        box = f"[{step:^6}]"
        if what == "queue":
            rank_0 += f"Q{step} "
            start = max(len(device), len(rank_0))
            device = device.ljust(start, "." if device else " ") + box
        else:
            rank_0 = rank_0.ljust(device.index(box) + len(box)) + f"T{step} "
    print(f"  drawn   {device}")
    print(f"  rank 0  {rank_0.rstrip()}")


def queued_first(one: Run) -> list[bool]:
    """Of each step but the last: was the next one queued before its tokens were taken?"""
    at = {event: i for i, event in enumerate(one.events)}
    return [at["queue", n + 1] < at["take", n] for n in range(one.steps - 1)]


def most_ahead(events: list[tuple[str, int]]) -> int:
    """The most steps that were queued and not looked at."""
    open_steps, most = 0, 0
    for what, _ in events:
        open_steps += 1 if what == "queue" else -1
        most = max(most, open_steps)
    return most


def given(one: Run) -> int:
    return sum(len(answer) for answer in one.answers)


if __name__ == "__main__":
    run_main(main)
