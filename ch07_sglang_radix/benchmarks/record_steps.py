"""What each rank does at what moment, and every message of every step: one file a rank.

    torchrun --nproc_per_node=2 -m ch07_sglang_radix.benchmarks.record_steps FOLDER

Writes FOLDER/rank0.json and FOLDER/rank1.json: {"scene": [steps of each of ROUNDS rounds], "contexts": [steps]}.
A step: kind, step, new (tokens fed in), emitting, context (of its longest sequence), words (of its task), spans and messages.
Spans are [phase, start, end] in seconds, on a clock that is the same on both ranks; at any moment a rank is in one
phase:

    rank 0    schedule  task  execute  gather  sample  tokens  account
    others              task  execute  gather          tokens

A message is a line of the ledger, and `at`, the moment at which this rank came to it. The notebook on the control plane
draws it.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ch07_sglang_radix.benchmarks.workloads import Source
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tasks import DecodeTask, StopTask, Task, encode
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.parallel_state import initialize_tensor_parallel
from common.sampling.params import SamplingParams
from common.teaching.report import write_json

ROUNDS = 6  # of the same scene; the first ones warm up
PROMPTS, SHARED, LATE, LATE_AT = (96, 40, 20), 64, 24, 3  # tokens; a prompt that comes later begins like the first one
CONTEXTS = (16, 128, 1000)  # tokens of a prompt that runs alone
NEW_TOKENS = 6
# one zero for all ranks; the largest difference is the one with the least time between the two looks
ALIGN = max(time.time() - time.perf_counter() for _ in range(100))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    tp = initialize_tensor_parallel(device="cpu")
    scheduler = TPScheduler(TPRadixAttentionModelWrapper(max_total_tokens=2048, tp=tp))
    recorder, source = Recorder(scheduler), Source(scheduler.wrapper.config.vocab_size)
    scene = []
    for _ in range(ROUNDS):
        play_scene(scheduler, source)
        scene.append(recorder.take())
    for context in CONTEXTS:
        ask(scheduler, source.text(context))
        scheduler.process_requests()
    args.folder.mkdir(parents=True, exist_ok=True)
    steps = {"scene": scene, "contexts": recorder.take()}
    write_json(steps, args.folder / f"rank{tp.rank}.json")


def play_scene(scheduler: TPScheduler, source: Source) -> None:
    """Three prompts at once, and while they are answered a fourth, whose beginning is in the tree."""
    prompts, late = [source.text(n) for n in PROMPTS], source.text(LATE)
    for prompt in prompts:
        ask(scheduler, prompt)
    begin = scheduler.step_number

    def arrivals(step: int) -> bool:
        if step == begin + LATE_AT:
            ask(scheduler, prompts[0][:SHARED] + late)
        return step < begin + LATE_AT

    scheduler.process_requests(arrivals)


def ask(scheduler: TPScheduler, ids: list[int]) -> None:
    scheduler.enqueue(None, ids, SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))


class Recorder:
    """Watches the calls of one rank; they do what they did before. A step begins with a call, and ends when the next begins."""

    def __init__(self, scheduler: TPScheduler):
        control, wrapper, self._ledger = scheduler.control, scheduler.wrapper, scheduler.tp.ledger
        self._steps: list[dict[str, Any]] = []
        self._task: Task | None = None
        self._begin()
        first = scheduler.tp.rank == 0
        if first:
            self._watch(scheduler, "step", "schedule", begins=True)
            self._watch(control, "send_task", "task")
            self._watch(control, "sample", "sample")
        else:
            self._watch(control, "receive_task", "task", begins=True)
        self._watch(control, "_execute", "execute", then="sample" if first else None)
        self._watch(wrapper, "execute_prefill_task", "execute", then="gather")
        self._watch(wrapper, "execute_decode_task", "execute", then="gather")
        self._watch(control, "_share_tokens", "tokens", then="account" if first else None)
        record, self._ledger.enabled = self._ledger.record, True

        def timed(*message) -> None:
            record(*message)
            self._at.append(_now())

        self._ledger.record = timed

    def take(self) -> list[dict[str, Any]]:
        """The steps since the last call."""
        self._begin()
        steps, self._steps = self._steps, []
        return steps

    def _watch(self, owner: Any, name: str, phase: str, then: str | None = None, begins: bool = False) -> None:
        """While owner.name runs the rank is in `phase`, or in one that a call inside names; afterwards in `then`."""
        call: Callable = getattr(owner, name)

        def watched(*args):
            if begins:
                self._begin()
            self._enter(phase)
            result = call(*args)
            self._enter(then)
            self._task = next((value for value in (*args, result) if isinstance(value, Task)), self._task)
            return result

        setattr(owner, name, watched)

    def _enter(self, phase: str | None) -> None:
        now = _now()
        if self._spans and self._spans[-1][2] is None:
            if self._spans[-1][0] == phase:
                return
            self._spans[-1][2] = now
        if phase:
            self._spans.append([phase, now, None])

    def _begin(self) -> None:
        """Write down the step that has ended, if it was one: the word to stop is none."""
        if self._task is not None and not isinstance(self._task, StopTask):
            self._enter(None)
            messages = [asdict(entry) | {"at": at} for entry, at in zip(self._ledger.entries, self._at, strict=True)]
            self._steps.append(facts(self._task) | {"spans": self._spans, "messages": messages})
        self._task, self._spans, self._at = None, [], []
        self._ledger.entries.clear()


def facts(task: Task) -> dict[str, Any]:
    if isinstance(task, DecodeTask):
        kind, new, context = "decode", len(task.rows), 1 + max(task.positions)
    else:
        kind, new, context = "prefill", len(task.token_ids), max(s.cached + s.new for s in task.sequences)
    return {
        "kind": kind, "step": task.step, "new": new, "emitting": task.num_emitting, "context": context,
        "words": len(encode(task)),
    }  # fmt: skip


def _now() -> float:
    return ALIGN + time.perf_counter()


if __name__ == "__main__":
    run_main(main)
