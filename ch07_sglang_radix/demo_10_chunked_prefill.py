"""A long prompt arrives while others write: how long does their next token wait?

    python ch07_sglang_radix/demo_10_chunked_prefill.py

Four requests are decoding when a prompt of 1,500 tokens comes. Each letter of a timeline is a step:

    d  decode: a token for each that runs    P  prefill, those that run wait    M  mixed: prefill, and a token for each

The wait is counted in steps and in tokens computed in between; the milliseconds are measured, and differ from run to
run. At the end three short prompts come behind the long one: `small_request_share` lets them in.
"""

import time
from typing import NamedTuple

from ch07_sglang_radix.policy_names import NO_CHUNKS
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.sampling.params import SamplingParams
from common.teaching.show import check, heading, table

WRITERS, WRITES, LONG, CHUNK = 4, 24, 1500, 256
SHORT, SHARE = 40, 0.5
COMES_AFTER = 5  # steps


class Run(NamedTuple):
    timeline: str
    prefill_sizes: list[int]
    steps: int  # longest run of steps in which nobody who was decoding got a token
    tokens: int  # most tokens computed between two tokens of a writer
    ms: float  # longest time between them
    first_token: int  # steps from the long prompt's arrival to its first token
    answers: list[list[int]]


def main() -> None:
    wrapper = TPRadixAttentionModelWrapper(device="cpu", max_total_tokens=2560)
    long_prompt(wrapper, chunked_prefill_size=NO_CHUNKS)  # warm up
    runs = {
        "no chunks": long_prompt(wrapper, chunked_prefill_size=NO_CHUNKS),
        f"chunks of {CHUNK}": long_prompt(wrapper, chunked_prefill_size=CHUNK),
        f"chunks of {CHUNK}, mixed": long_prompt(wrapper, chunked_prefill_size=CHUNK, enable_mixed_chunk=True),
    }
    heading(f"{WRITERS} requests decode, a prompt of {LONG:,} tokens comes at step {COMES_AFTER}")
    for name, run in runs.items():
        print(f"  {name:22}  {run.timeline}")
    print()
    table(("", "steps waited", "tokens between two tokens", "steps to its first token", "ms between two tokens"),
          [(name, run.steps, run.tokens, run.first_token, round(run.ms)) for name, run in runs.items()])  # fmt: skip
    none, chunks, mixed = runs.values()
    print(f"  chunks: {chunks.prefill_sizes}")
    print(f"  mixed:  {mixed.prefill_sizes}, and {WRITERS} of those that run in each; whole pages, so 240 and not 252")
    check("without chunks the others wait for the whole prompt", none.tokens == LONG + WRITERS)
    check("with chunks they wait for one chunk, and then it is their turn", chunks.tokens == CHUNK + WRITERS)
    check("in mixed steps they never wait for a step", (mixed.steps, none.steps, chunks.steps) == (0, 1, 1))
    check("and a step computes no more than the chunk size, theirs included", mixed.tokens <= CHUNK)
    check("the price: the long prompt takes more steps", none.first_token < mixed.first_token < chunks.first_token)
    check("nobody's answer changes", none.answers == chunks.answers == mixed.answers)

    heading(f"Three prompts of {SHORT} tokens come behind it, chunks of {CHUNK}")
    rows = {share: behind(wrapper, share) for share in (0.0, SHARE)}
    table(("small_request_share", "steps to the short ones' first token", "to the long one's", "prefill steps"),
          [(share, short, long, " ".join(map(str, s))) for share, (short, long, s) in rows.items()])  # fmt: skip
    check("with nothing reserved they wait until the long prompt is through", rows[0.0][0] >= rows[0.0][1])
    check("with a share they are through together with its next chunk", rows[SHARE][0] == 1)
    later = rows[SHARE][1] - rows[0.0][1]
    check(f"it costs the long one {later} steps: a smaller chunk, and the decode step they are owed", later <= 2)


def long_prompt(wrapper: TPRadixAttentionModelWrapper, **options) -> Run:
    scheduler = TPScheduler(wrapper, overlap=False, check=True, **options)
    for i in range(WRITERS):
        ask(scheduler, [100 + i] * 32, WRITES)
    timeline, sizes, waited, tokens, ms, first = "", [], [0], [0], [0.0], 0
    steps = computed = 0  # since the writers' last tokens
    began, since = time.perf_counter(), None
    while scheduler.waiting or scheduler.running or scheduler.chunked:
        if scheduler.step_number == COMES_AFTER:
            ask(scheduler, list(range(500, 500 + LONG)), 1)
        prefills, before = scheduler.steps["prefill"], scheduler.work["tokens"]
        scheduler.grown.clear()
        scheduler.step()
        is_prefill, now = scheduler.steps["prefill"] > prefills, time.perf_counter()
        served = any(rid < WRITERS for rid in scheduler.grown)
        timeline += ("M" if served and since else "P") if is_prefill else "d"
        if is_prefill and since:
            sizes.append(sum(n for _, n in scheduler.last_prefill))
        if WRITERS in scheduler.grown:
            first = scheduler.step_number - COMES_AFTER
        steps, computed = steps + 1, computed + scheduler.work["tokens"] - before
        if served:
            if since:
                waited.append(steps - 1)
                tokens.append(computed)
                ms.append(1e3 * (now - began))
            steps, computed, began, since = 0, 0, now, now
    answers = [scheduler.results[rid].output_ids for rid in range(WRITERS + 1)]
    return Run(timeline, sizes, max(waited), max(tokens), max(ms), first, answers)


def behind(wrapper: TPRadixAttentionModelWrapper, share: float) -> tuple[int, int, list[int]]:
    """(steps to the last short one's first token, to the long one's, prefill sizes)."""
    scheduler = TPScheduler(wrapper, chunked_prefill_size=CHUNK, small_request_share=share, overlap=False, check=True)
    ask(scheduler, list(range(500, 500 + LONG)), 2)
    scheduler.step()
    for i in range(3):
        ask(scheduler, [100 + i] * SHORT, 2)
    first, sizes = {}, [sum(n for _, n in scheduler.last_prefill)]
    while scheduler.waiting or scheduler.running or scheduler.chunked:
        prefills = scheduler.steps["prefill"]
        scheduler.step()
        if scheduler.steps["prefill"] > prefills:
            sizes.append(sum(n for _, n in scheduler.last_prefill))
        for rid in scheduler.grown:
            first.setdefault(rid, scheduler.step_number - 1)  # since the short ones came
    return max(at for rid, at in first.items() if rid > 0), first[0], sizes


def ask(scheduler: TPScheduler, ids: list[int], new: int) -> None:
    scheduler.add_request(input_ids=ids, sampling_params=SamplingParams(max_new_tokens=new, ignore_eos=True))


if __name__ == "__main__":
    run_main(main)
