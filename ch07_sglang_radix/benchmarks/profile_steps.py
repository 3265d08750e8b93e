"""A profiler trace of decode steps, with the scheduler's parts under SGLang's names for them.

    torchrun --nproc_per_node=2 ch07_sglang_radix/benchmarks/profile_steps.py steps.json      # or python, on one rank
    ... --running 32 --steps 20 --prompt 140
    ... --published SmolLM2-135M --dtype bfloat16                                             # its shape, random weights
    ... --published Qwen3-30B-A3B --layers 24 --running 1            --published Qwen2.5-7B --quantization w8a8_fp8 --running 64

Writes a Chrome trace of rank 0's steps (open it in https://ui.perfetto.dev) and prints how long each part took, and which of
torch's operators, on a GPU also which kernels, took longest. The chapter's last page says how to read it beside one of SGLang.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.models.published_configs import CONFIGS, MIXTURES, shared_random_weights
from common.parallel_state import initialize_tensor_parallel
from common.sampling.params import SamplingParams
from common.teaching.show import heading, table

WARM_UP = 5
LONGEST = 6
KERNELS = 14
PARTS = {  # (where it is, its name here): SGLang's name for what does the same
    ("admission", "next_prefill"): "get_new_batch_prefill",
    ("step_tasks", "decode"): "prepare_for_decode",
    ("control", "execute"): "run_batch: forward",
    ("control", "sample"): "run_batch: sample",
    ("outcome", "take"): "process_batch_result",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the trace, as JSON")
    parser.add_argument("--model-name", help="folder in Hugging Face layout or Hub id; default: the bundled tiny model")
    parser.add_argument("--published", choices=(*CONFIGS, *MIXTURES), help="a published shape with random weights")
    parser.add_argument("--layers", type=int, help="of a published shape, so many layers")
    parser.add_argument("--dtype", help="of the weights; default: the device's own")
    parser.add_argument("--quantization", help="a scheme that the weights are rounded to at load")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (default 64)")
    parser.add_argument("--running", type=int, default=8, help="requests that decode (default 8)")
    parser.add_argument("--steps", type=int, default=10, help="decode steps in the trace (default 10)")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler says "USDT: profiler_start" on stderr
    if min(args.running, args.steps, args.prompt) < 1:
        raise ValueError(f"running={args.running}, steps={args.steps} and prompt={args.prompt} must be at least 1")
    if args.layers is not None and (args.layers < 1 or not args.published):
        raise ValueError(f"layers={args.layers}: at least 1, of a shape that --published names")
    tp = initialize_tensor_parallel()
    changes = {"num_hidden_layers": args.layers} if args.layers else {}
    folder = str(shared_random_weights(args.published, tp, **changes)) if args.published else args.model_name
    wrapper = TPRadixAttentionModelWrapper(
        folder, page_size=16, dtype=args.dtype, tp=tp, quantization=args.quantization
    )
    scheduler = TPScheduler(wrapper, chunked_prefill_size=-1)
    params = SamplingParams(max_new_tokens=WARM_UP + args.steps + 1, ignore_eos=True)
    for i in range(args.running):
        scheduler.add_request(input_ids=[(7 * i + j) % 1000 for j in range(args.prompt)], sampling_params=params)
    if tp.rank > 0:
        scheduler.process_requests()
        return
    args.out.touch()  # find out now, not after the work
    for (owner, name), label in PARTS.items():
        _label(getattr(scheduler, owner), name, label)
    _label(scheduler, "step", "step")
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if tp.device.type == "cuda" else [])
    profiler = profile(activities=activities)

    waiting = {WARM_UP: profiler.start, WARM_UP + args.steps: profiler.stop}

    def watch(step: int) -> bool:
        waiting.pop(scheduler.steps["decode"], lambda: None)()  # a call may find no new step: once each
        return False

    scheduler.process_requests(watch)
    profiler.export_chrome_trace(str(args.out))
    heading(f"{args.steps} decode steps of {args.running} requests, rank 0 of {tp.size} on {tp.device.type}")
    events = profiler.key_averages()
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]  # a label stands on the GPU's side, too
    times = {event.key: event.cpu_time_total / 1e3 / args.steps for event in on_cpu}
    rows = [(f"{owner}.{name}", label, times.get(label, 0.0)) for (owner, name), label in PARTS.items()]
    table(("here", "in SGLang", "ms a step"), [*rows, ("step", "event_loop_*", times.get("step", 0.0))])
    _show_operators([event for event in on_cpu if "::" in event.key], args.steps)
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    _show_kernels([event for event in on_gpu if not event.is_user_annotation], args.steps)
    print(f"wrote {args.out}; open it in https://ui.perfetto.dev")


def _show_operators(events: list[Any], steps: int) -> None:
    """Where the CPU was, without what an operator calls in its turn."""
    total = sum(event.self_cpu_time_total for event in events)
    longest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:LONGEST]
    heading(f"The {LONGEST} operators that took longest, of {len(events)}")
    table(
        ("operator", "calls a step", "ms a step", "% of all"),
        [
            (e.key, e.count // steps, e.self_cpu_time_total / 1e3 / steps, 100 * e.self_cpu_time_total / total)
            for e in longest
        ],
    )


def _show_kernels(events: list[Any], steps: int) -> None:
    """Where the GPU was. Kernels that start before the one in front has ended are counted twice for that time."""
    if not events:
        return
    events = sorted(events, key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    heading(f"The {KERNELS} kernels that took longest, of {len(events)}; all: {total / steps:,.0f} us a step")
    table(
        ("kernel", "calls a step", "us a call", "us a step", "% of all"),
        [
            (
                e.key[:60], round(e.count / steps, 1), e.self_device_time_total / e.count, e.self_device_time_total / steps,
                100 * e.self_device_time_total / total,
            )
            for e in events[:KERNELS]
        ],
    )  # fmt: skip


def _label(owner: Any, name: str, label: str) -> None:
    """Its calls stand in the trace under `label` from now on."""
    work: Callable = getattr(owner, name)

    def labelled(*args):
        with record_function(label):
            return work(*args)

    setattr(owner, name, labelled)


if __name__ == "__main__":
    run_main(main)
