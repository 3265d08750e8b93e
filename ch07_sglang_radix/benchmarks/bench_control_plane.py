"""What it costs that the ranks do the same: the control plane's part of a decode step, in both designs.

    torchrun --nproc_per_node=2 ch07_sglang_radix/benchmarks/bench_control_plane.py                             # the bundled model
    torchrun --nproc_per_node=2 ch07_sglang_radix/benchmarks/bench_control_plane.py --published Qwen2.5-0.5B    # random weights
    ... --control-plane rank0          # or replicated; both by default, in turn

1, 8, 64 and 256 running requests, and 8 with contexts up to 8,192 tokens (as far as the model goes). The contexts are not
computed but put into the tree as if they had been: attention reads zeros, as fast as anything else. Medians over decode
steps, in microseconds:

    build      rank 0: who runs, pages for those whose last one is full, the task
    encode     rank 0: the task as integers                              (replicated: nothing is sent)
    broadcast  rank 0: until the words are on their way                  (replicated: new requests, here none)
    decode     rank 1: the integers as a task, checked                   (replicated: nothing arrives)
    step       the whole step: all of that, forward, logits, sampling, tokens; lowest and highest beside it

Writes figures/control_plane.csv.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ch07_sglang_radix import control_plane, replicated
from ch07_sglang_radix.replicated import ReplicatedScheduler
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tasks import DecodeTask
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.distributed.messages import share
from common.models.published_configs import CONFIGS, shared_random_weights
from common.parallel_state import gather, initialize_tensor_parallel
from common.sampling.params import SamplingParams
from common.teaching.report import FIGURES, write_csv

CASES = [(1, 16), (8, 16), (8, 128), (8, 512), (8, 2048), (8, 8192), (64, 16), (256, 16)]  # running requests, context
DESIGNS = ("rank0", "replicated")
PHASES = ("build", "encode", "broadcast", "decode", "step")
STEPS, WARM_UP = 24, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", choices=CONFIGS, help="a published shape with random weights")
    parser.add_argument("--control-plane", choices=(*DESIGNS, "both"), default="both", help="default: both, in turn")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=FIGURES / "control_plane.csv")
    args = parser.parse_args()
    tp = initialize_tensor_parallel(device=args.device)
    if tp.size < 2:
        raise ValueError("one rank has nobody to tell; start with torchrun --nproc_per_node=2")
    folder = shared_random_weights(args.published, tp) if args.published else None
    tokens = max(running * (context + STEPS + WARM_UP + 48) for running, context in CASES)
    wrapper = TPRadixAttentionModelWrapper(folder and str(folder), args.device, 16, max_total_tokens=tokens, tp=tp)
    longest = wrapper.config.max_position_embeddings - STEPS - WARM_UP - 1
    designs = DESIGNS if args.control_plane == "both" else [args.control_plane]
    rows, cases = [], [case for case in CASES if case[1] <= longest]
    for running, context in tqdm([cases[0], *cases], desc="cases", disable=None if tp.rank == 0 else True):
        for design in designs:
            facts = {"model": args.published or "tiny_qwen", "ranks": tp.size, "control plane": design}
            rows.append(facts | measure(wrapper, design, running, context))
    rows = rows[len(designs) :]  # the first case again: it had warmed up the process
    if tp.rank == 0:
        for row in rows:
            print("  ".join(f"{key} {value}" for key, value in row.items()))
        write_csv(rows, args.out)


def measure(wrapper: TPRadixAttentionModelWrapper, design: str, running: int, context: int) -> dict[str, Any]:
    """One row: requests whose prompts are in the tree but for one token, then STEPS decode steps."""
    if design == "replicated":
        scheduler = ReplicatedScheduler(wrapper, overlap=False, compare=False)
    else:
        scheduler = TPScheduler(wrapper, overlap=False)
    new = WARM_UP + STEPS + 1
    for i in range(running):
        ids = [(7 * i + j) % 1000 for j in range(context)]
        if scheduler.tp.rank == 0:
            pretend(scheduler, ids)
        scheduler.add_request(input_ids=ids, sampling_params=SamplingParams(max_new_tokens=new, ignore_eos=True))
    with Stopwatch(scheduler) as clock:
        scheduler.process_requests()
    decoding = clock.of_rank_1(wrapper.tp)  # us, on rank 0
    facts = {"running": running, "context": context, "words": clock.words}
    if wrapper.tp.rank > 0:
        return facts
    times = {phase: some[WARM_UP:] or [0.0] for phase, some in clock.times.items()}
    us = {phase: statistics.median(times[phase]) for phase in PHASES}
    us["decode"] = decoding
    control = us["build"] + us["encode"] + us["broadcast"] + us["decode"]
    return facts | {phase: round(us[phase], 1) for phase in PHASES} | {
        "lowest": round(min(times["step"]), 1), "highest": round(max(times["step"]), 1),
        "control %": round(100 * control / us["step"], 2),
    }  # fmt: skip


def pretend(scheduler: TPScheduler, ids: list[int]) -> None:
    """The whole pages of a prompt lie in the tree, with zeros in them."""
    page_size = scheduler.page_size
    known = len(scheduler.tree.match_prefix(ids).slots)
    pages = len(ids) // page_size - known // page_size
    if pages > 0:
        slots = np.concatenate((scheduler.tree.match_prefix(ids).slots, scheduler.pool.alloc(pages)))
        scheduler.tree.insert(ids, slots)


class Stopwatch:
    """Times of the phases of decode steps, taken by standing in for the functions that do them."""

    def __init__(self, scheduler: TPScheduler):
        self.scheduler = scheduler
        self.times: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.words = 0
        self._began, self._decodes = 0.0, False

    def __enter__(self) -> "Stopwatch":
        self._saved = control_plane.encode, control_plane.send, control_plane.decode, replicated.share_requests
        encode, send, decode, share_requests = self._saved
        step, launch, scheduler = self.scheduler.step, self.scheduler._launch, self.scheduler

        def timed_step() -> bool:
            self._began, before = time.perf_counter(), scheduler.steps["decode"]
            more = step()
            if scheduler.steps["decode"] > before:
                self._note("step", self._began)
            return more

        def timed_launch(plans):
            self._decodes = isinstance(plans[0].task, DecodeTask)
            if self._decodes:
                self._note("build", self._began)
            return launch(plans)

        def timed_encode(task):
            start = time.perf_counter()
            words = encode(task)
            if isinstance(task, DecodeTask):
                self._note("encode", start)
                self.words = max(self.words, len(words))
            return words

        def timed_send(words, tp, label):
            start = time.perf_counter()
            send(words, tp, label)
            if self._decodes:
                self._note("broadcast", start)

        def timed_requests(*args):
            start = time.perf_counter()
            said = share_requests(*args)
            if self._decodes:
                self._note("broadcast", start)
            return said

        def timed_decode(words):
            start = time.perf_counter()
            task = decode(words)
            if isinstance(task, DecodeTask):
                self._note("decode", start)
            return task

        scheduler.step, scheduler._launch = timed_step, timed_launch
        control_plane.encode, control_plane.send, control_plane.decode = timed_encode, timed_send, timed_decode
        replicated.share_requests = timed_requests
        return self

    def __exit__(self, *exc) -> None:
        control_plane.encode, control_plane.send, control_plane.decode, replicated.share_requests = self._saved

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
