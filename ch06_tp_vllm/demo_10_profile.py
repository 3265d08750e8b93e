"""Where the time of a step goes: this engine under torch's profiler, with the names that vLLM gives to the same things.

    python ch06_tp_vllm/demo_10_profile.py                    # a prefill step and eight decode steps, as tables
    python ch06_tp_vllm/demo_10_profile.py --out trace.json   # and the decode steps as a trace, for ui.perfetto.dev
    torchrun --nproc_per_node=2 ch06_tp_vllm/demo_10_profile.py

The ranges are put around the engine's own methods here, from outside. A step is called as vLLM's workers call it:
execute_context_4(160)_generation_0(0) is four requests with 160 prompt tokens, and nobody who decodes.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ch06_tp_vllm import LLMEngine, SamplingParams
from ch06_tp_vllm.scheduler import SchedulerOutput
from common.distributed.launch import run_main
from common.teaching.show import check, heading, table

REQUESTS, PROMPT, DECODE_STEPS = 4, 40, 8
RANGES = ("schedule", "sample", "process_outputs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a trace of the decode steps (rank 0)")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler says "USDT: profiler_start" on stderr
    engine = LLMEngine(num_gpu_blocks_override=64, async_scheduling=False, enforce_eager=True)
    put_ranges_around(engine)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if engine.tp.device.type == "cuda" else [])]
    for _ in range(2):  # the first time warms up
        add_requests(engine)
        with profile(activities=activities) as prefill:
            engine.step()
        with profile(activities=activities) as decode:
            for _ in range(DECODE_STEPS):
                engine.step()
        engine.abort_request([str(i) for i in range(REQUESTS)])
        engine.reset_prefix_cache()
    if engine.tp.rank > 0:
        return
    for kind, profiler in (("A prefill step", prefill), (f"{DECODE_STEPS} decode steps", decode)):
        events = profiler.key_averages()
        heading(f"{kind} of {REQUESTS} requests, {engine.tp.size} rank(s), {engine.tp.device.type}")
        ranges = {event.key: event for event in events if event.key in RANGES or event.key.startswith("execute_")}
        table(("range", "times", "ms each"),
              [(name, e.count, 1e-3 * e.cpu_time_total / e.count) for name, e in sorted(ranges.items())])  # fmt: skip
        ops = sorted((e for e in events if e.key not in ranges), key=lambda e: -e.self_cpu_time_total)
        whole = sum(e.self_cpu_time_total for e in ops)
        table(("most of the time", "times", "%"),
              [(e.key, e.count, round(100 * e.self_cpu_time_total / whole)) for e in ops[:4]])  # fmt: skip
    called = f"execute_context_{REQUESTS}({REQUESTS * PROMPT})_generation_0(0)"
    check(f"the step is called {called}", called in {event.key for event in prefill.key_averages()})
    if args.out:
        decode.export_chrome_trace(str(args.out))
        print(f"wrote {args.out}: open it in ui.perfetto.dev")


def add_requests(engine: LLMEngine) -> None:
    for i in range(REQUESTS):
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        engine.add_request(str(i), [100 + 7 * i + j % 5 for j in range(PROMPT)], params)


def put_ranges_around(engine: LLMEngine) -> None:
    planned: list[SchedulerOutput] = []

    def ranged(name: str, method: Callable) -> Callable:
        def call(*args):
            with record_function(name):
                return method(*args)

        return call

    schedule, run = ranged("schedule", engine.scheduler.schedule), engine.runner.run

    def remembered(*args):
        planned.append(schedule(*args))
        return planned[-1]

    def named(step):
        with record_function(as_vllm_calls_it(planned[-1])):
            return run(step)

    engine.scheduler.schedule, engine.runner.run = remembered, named
    engine.runner.sample = ranged("sample", engine.runner.sample)
    engine.outputs.take = ranged("process_outputs", engine.outputs.take)


def as_vllm_calls_it(output: SchedulerOutput) -> str:
    """vLLM 0.33, v1/worker/gpu_worker.py, annotate_profile."""
    decoding = [s for s in output.scheduled if s.request.output_token_ids]
    prompts = [s for s in output.scheduled if not s.request.output_token_ids]
    context, generation = (f"{len(some)}({sum(s.num_new for s in some)})" for some in (prompts, decoding))
    return f"execute_context_{context}_generation_{generation}"


if __name__ == "__main__":
    with torch.inference_mode():
        run_main(main)
