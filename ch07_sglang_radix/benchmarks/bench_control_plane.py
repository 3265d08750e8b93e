"""What it costs that rank 0 decides and the others are told: the control plane's part of a decode step.

    torchrun --nproc_per_node=2 ch07_sglang_radix/benchmarks/bench_control_plane.py                             # the bundled model
    torchrun --nproc_per_node=2 ch07_sglang_radix/benchmarks/bench_control_plane.py --published Qwen2.5-0.5B    # random weights

1, 8, 64 and 256 running requests, and 8 with longer contexts. Medians over decode steps, in microseconds:

    build      rank 0: who runs, pages for those whose last one is full, the task
    encode     rank 0: the task as integers
    broadcast  rank 0: until the words are on their way to the other ranks
    decode     rank 1: the integers as a task, checked
    step       the whole step: all of that, forward, gather, sampling, tokens

Writes figures/control_plane.csv.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ch07_sglang_radix import control_plane
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.distributed.messages import share
from common.models.published_configs import CONFIGS, shared_random_weights
from common.parallel_state import gather, initialize_tensor_parallel
from common.sampling.params import SamplingParams
from common.teaching.report import FIGURES, write_csv

CASES = [(1, 16), (8, 16), (8, 128), (8, 512), (64, 16), (256, 16)]  # running requests, context
STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", choices=CONFIGS, help="a published shape with random weights")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=FIGURES / "control_plane.csv")
    args = parser.parse_args()
    tp = initialize_tensor_parallel(device=args.device)
    if tp.size < 2:
        raise ValueError("one rank has nobody to tell; start with torchrun --nproc_per_node=2")
    folder = shared_random_weights(args.published, tp) if args.published else None
    tokens = max(running * (context + STEPS + 32) for running, context in CASES)
    wrapper = TPRadixAttentionModelWrapper(folder and str(folder), args.device, 16, max_total_tokens=tokens, tp=tp)
    rows = []
    for running, context in tqdm(CASES, desc="cases", disable=None if tp.rank == 0 else True):
        rows.append({"model": args.published or "tiny_qwen", "ranks": tp.size} | measure(wrapper, running, context))
    if tp.rank == 0:
        for row in rows:
            print("  ".join(f"{key} {value}" for key, value in row.items()))
        write_csv(rows, args.out)


def measure(wrapper: TPRadixAttentionModelWrapper, running: int, context: int) -> dict:
    """One row: the requests are prefilled, then STEPS decode steps are timed."""
    clock = Stopwatch()
    scheduler = TPScheduler(wrapper, overlap=False)
    for i in range(running):
        params = SamplingParams(max_new_tokens=STEPS + 1, ignore_eos=True)
        scheduler.add_request(input_ids=[(7 * i + j) % 1000 for j in range(context)], sampling_params=params)
    with clock.around(scheduler):
        scheduler.process_requests()
    decoding = clock.of_rank_1(wrapper.tp)  # us, on rank 0
    facts = {"running": running, "context": context, "words": clock.words}
    if wrapper.tp.rank > 0:
        return facts
    us = {phase: statistics.median(clock.times[phase]) for phase in ("build", "encode", "broadcast", "step")}
    us["decode"] = decoding
    control = us["build"] + us["encode"] + us["broadcast"] + us["decode"]
    return facts | {key: round(us[key], 1) for key in ("build", "encode", "broadcast", "decode", "step")} | {
        "control %": round(100 * control / us["step"], 2)
    }  # fmt: skip


class Stopwatch:
    """Times of the phases of decode steps, taken by standing in for the functions that do them."""

    def __init__(self):
        self.times: dict[str, list[float]] = {phase: [] for phase in ("build", "encode", "broadcast", "decode", "step")}
        self.words = 0

    def around(self, scheduler: TPScheduler) -> "Stopwatch":
        self._saved = control_plane.encode, control_plane.send, control_plane.decode
        encode, send, decode = self._saved
        step, queue = scheduler.step, scheduler._queue
        began, is_decode = [0.0], [False]

        def timed_step() -> bool:
            began[0], before = time.perf_counter(), scheduler.steps["decode"]
            more = step()
            if scheduler.steps["decode"] > before:
                self._note("step", began[0])
            return more

        def timed_queue(task, emitting):
            is_decode[0] = isinstance(task, control_plane.DecodeTask)
            if is_decode[0]:
                self._note("build", began[0])
            return queue(task, emitting)

        def timed_encode(task):
            start = time.perf_counter()
            words = encode(task)
            if is_decode[0] and isinstance(task, control_plane.DecodeTask):
                self._note("encode", start)
                self.words = max(self.words, len(words))
            return words

        def timed_send(words, tp, label):
            start = time.perf_counter()
            send(words, tp, label)
            if is_decode[0]:
                self._note("broadcast", start)

        def timed_decode(words):
            start = time.perf_counter()
            task = decode(words)
            if isinstance(task, control_plane.DecodeTask):
                self._note("decode", start)
            return task

        scheduler.step, scheduler._queue = timed_step, timed_queue
        control_plane.encode, control_plane.send, control_plane.decode = timed_encode, timed_send, timed_decode
        return self

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *exc) -> None:
        control_plane.encode, control_plane.send, control_plane.decode = self._saved

    def of_rank_1(self, tp) -> float:
        """Median of what decoding took there."""
        mine = torch.tensor([statistics.median(self.times["decode"] or [0.0])], dtype=torch.float64)
        everyone = gather(mine, tp, "times")  # COMM gather [1]: how long rank 1 took to read a task
        self.words = share(self.words, tp)
        return float(everyone[1]) if everyone else 0.0

    def _note(self, phase: str, start: float) -> None:
        self.times[phase].append(1e6 * (time.perf_counter() - start))


if __name__ == "__main__":
    run_main(main)
