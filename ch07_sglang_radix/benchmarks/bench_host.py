"""What rank 0's CPU does for a decode step, with the model's forward taken out: on a fast GPU this is what a step waits for.

    python -m ch07_sglang_radix.benchmarks.bench_host                                       # 1, 64 and 256 running, a minute
    python -m ch07_sglang_radix.benchmarks.bench_host --label e6a1 --add --running 256      # further rows of the same file
    python -m ch07_sglang_radix.benchmarks.bench_host --label "e6a1, come and go" --add --come-and-go --running 64 256

The bundled model reads the prompts; then `decode` of the executor is replaced by a function that returns the same random logits
[B, 8] again and again, and all else is what an engine does: overlap as on a GPU, pages of 16 tokens, requests that end by their
length. Times are those that rank 0's thread had a CPU (time.thread_time), so other work on the machine counts little; the
median of the rounds. Calls are those that cProfile counts, of Python functions and of C ones, a step. By group:

    plan      who runs, room for all, pages for those whose last one is full, the task           (step_loop: _plan_next)
    launch    send the task, execute it (here nothing), move every length on                     (_launch)
    sample    parameters as arrays, logits -> tokens                                             (_collect)
    take      the last step's tokens: append them, see who ends                                  (_settle)
    rest      the loop around them

With --come-and-go one request ends in every decode step and one joins before it: what is told is of such a pair, the prefill step
of the one that joins included, whose forward is left out too.

Prints a table and writes figures/host_step.csv: one row a number of running requests; `--label` says of which code.
"""

import argparse
import cProfile
import csv
import pstats
import statistics
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.parallel_state import initialize_tensor_parallel
from common.sampling.params import SamplingParams
from common.teaching.report import FIGURES, write_csv
from common.teaching.show import heading, table

PROMPT, COLUMNS = 20, 8  # tokens of a prompt; columns of the logits that nobody computed
WARM_UP, STEPS, COUNTED = 8, 64, 32  # decode steps: before any count, of a round, under cProfile (two pages)
GROUPS = {"plan": "_plan_next", "launch": "_launch", "sample": "_collect", "take": "_settle"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256], help="requests (default 1 64 256)")
    parser.add_argument("--rounds", type=int, default=5, help=f"of {STEPS} steps each (default 5)")
    parser.add_argument("--label", default="now", help="which code this is, such as its commit")
    parser.add_argument("--add", action="store_true", help="keep the rows of other labels that the file has")
    parser.add_argument("--out", type=Path, default=FIGURES / "host_step.csv")
    parser.add_argument("--num-continuous-decode-steps", type=int, default=1, help="looked at together (default 1)")
    parser.add_argument("--come-and-go", action="store_true", help="each step one request ends and one joins")
    args = parser.parse_args()
    if min(*args.running, args.rounds, args.num_continuous_decode_steps) < 1:
        raise ValueError(
            f"running={args.running}, rounds={args.rounds} and num_continuous_decode_steps={args.num_continuous_decode_steps} "
            "must be at least 1"
        )
    if args.come_and_go and min(args.running) < 2:
        raise ValueError(
            f"running={args.running} with --come-and-go: who has one token to get never decodes; use 2 or more"
        )
    torch.set_num_threads(1)
    tp = initialize_tensor_parallel(device="cpu")
    per_request = PROMPT + WARM_UP + COUNTED + 2 * args.rounds * STEPS + 32
    wrapper = TPRadixAttentionModelWrapper(
        None, "cpu", 16, max_total_tokens=max(args.running) * per_request, max_running_requests=max(args.running), tp=tp
    )
    more = (
        {"num_continuous_decode_steps": args.num_continuous_decode_steps}
        if args.num_continuous_decode_steps > 1
        else {}
    )
    rows = [
        {"label": args.label, "running": n} | measure(wrapper, n, args.rounds, args.come_and_go, **more)
        for n in args.running
    ]
    heading("A decode step without its forward, microseconds of rank 0's thread")
    table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    write_csv([*(_others(args.out, args.label) if args.add else ()), *rows], args.out)


def measure(
    wrapper: TPRadixAttentionModelWrapper, running: int, rounds: int, come_and_go: bool = False, **options: int
) -> dict[str, Any]:
    """Calls and microseconds of a step with so many requests. options: TPScheduler's."""
    scheduler = TPScheduler(wrapper, chunked_prefill_size=-1, overlap=True, **options)
    ends = range(2, 2 + running) if come_and_go else [WARM_UP + COUNTED + 2 * rounds * STEPS + 8] * running
    for i, end in enumerate(ends):
        _add(scheduler, i, end)
    while scheduler.steps["decode"] < 1:
        scheduler.step()
    wrapper.decode, wrapper.ragged = _without_forward(wrapper, running)
    numbers = count(running)

    def turn() -> None:
        _add(scheduler, next(numbers), running)  # it ends when all who run now have
        scheduler.step()  # its prefill
        scheduler.step()

    try:
        return _measured(scheduler, turn if come_and_go else scheduler.step, rounds)
    finally:
        del wrapper.decode, wrapper.ragged  # the class has them
        scheduler.drop_all()


def _add(scheduler: TPScheduler, i: int, max_new_tokens: int) -> None:
    ids = [(7 * i + j) % 1000 for j in range(PROMPT)]
    scheduler.add_request(input_ids=ids, sampling_params=SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True))


def _measured(scheduler: TPScheduler, step: Callable[[], Any], rounds: int) -> dict[str, Any]:
    for _ in range(WARM_UP):
        step()
    totals = [_us(step) for _ in range(rounds)]
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(COUNTED):
        step()
    profile.disable()
    calls = pstats.Stats(profile).total_calls / COUNTED
    with Stopwatch(scheduler) as clock:
        parts = []
        for _ in range(rounds):
            clock.us = dict.fromkeys(GROUPS, 0.0)
            total = _us(step)
            parts.append({name: us / STEPS for name, us in clock.us.items()})
            parts[-1]["rest"] = total - sum(parts[-1].values())
    medians = {name: round(statistics.median(part[name] for part in parts), 1) for name in parts[0]}
    us = [round(f(totals), 1) for f in (statistics.median, min, max)]
    return {"calls": round(calls), "us": us[0], "lowest": us[1], "highest": us[2]} | medians


def _us(step: Callable[[], Any]) -> float:
    """Microseconds of this thread for one of STEPS steps."""
    began = time.thread_time()
    for _ in range(STEPS):
        step()
    return 1e6 * (time.thread_time() - began) / STEPS


def _without_forward(wrapper: TPRadixAttentionModelWrapper, running: int) -> tuple[Callable[..., torch.Tensor], ...]:
    """In place of Executor.decode and Executor.ragged: the same random logits for any rows that emit."""
    logits = torch.rand(running, COLUMNS)

    def decode(rows: np.ndarray, positions: np.ndarray, *_, **__) -> torch.Tensor:
        wrapper._emitting.append((torch.from_numpy(rows), None))
        return logits[: len(rows)]

    def ragged(
        ids: np.ndarray, rows: np.ndarray, cached: np.ndarray, new: np.ndarray, emits: np.ndarray, *_, **__
    ) -> torch.Tensor:
        return decode(rows[emits > 0], cached)

    return decode, ragged


class Stopwatch:
    """Stands in for the functions of GROUPS and adds up what each takes, without what it calls of the others."""

    def __init__(self, scheduler: TPScheduler):
        self.scheduler = scheduler
        self.us: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
        self._open: list[str] = []
        self._since = 0.0

    def __enter__(self) -> "Stopwatch":
        for group, name in GROUPS.items():
            setattr(self.scheduler, name, self._timed(group, getattr(self.scheduler, name)))
        return self

    def __exit__(self, *exc) -> None:
        for name in GROUPS.values():
            delattr(self.scheduler, name)  # the class has it

    def _timed(self, group: str, work: Callable) -> Callable:
        def timed(*args):
            self._turn()
            self._open.append(group)
            try:
                return work(*args)
            finally:
                self._turn()
                self._open.pop()

        return timed

    def _turn(self) -> None:
        now = time.thread_time()
        if self._open:
            self.us[self._open[-1]] += 1e6 * (now - self._since)
        self._since = now


def _others(path: Path, label: str) -> list[dict[str, str]]:
    """The rows of other labels, as they stand in the file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["label"] != label]


if __name__ == "__main__":
    run_main(main)
