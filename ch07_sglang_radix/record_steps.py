"""What each rank does at what moment, and every message of every step: one file a rank.

    torchrun --nproc_per_node=2 -m ch07_sglang_radix.record_steps FOLDER

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
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tasks import DecodeTask, StopTask, Task, encode
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from ch07_sglang_radix.workloads import Source
from common.launch import run_main
from common.parallel_state import initialize_tensor_parallel
from common.sampler import SamplingParams

ROUNDS = 6  # of the same scene; the first ones warm up
PROMPTS, SHARED, LATE, LATE_AT = (96, 40, 20), 64, 24, 3  # tokens; a prompt that comes later begins like the first one
CONTEXTS = (16, 128, 1000)  # tokens of a prompt that runs alone
NEW_TOKENS = 6
ALIGN = time.time() - time.perf_counter()  # fine steps within a rank, one zero for all of them


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
    (args.folder / f"rank{tp.rank}.json").write_text(json.dumps(steps), encoding="utf-8")


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
    """Watches the calls of one rank's control plane; they do what they did before."""

    def __init__(self, scheduler: TPScheduler):
        control, wrapper, self._ledger = scheduler.control, scheduler.wrapper, scheduler.tp.ledger
        self._steps: list[dict[str, Any]] = []
        self._task: Task | None = None
        self._begin()
        first = scheduler.tp.rank == 0
        if first:
            self._watch(scheduler, "step", "schedule", None, around=True)
            self._watch(control, "send_task", "task", None)
            self._watch(control, "sample", "sample", None)
        else:
            self._watch(control, "receive_task", "task", None)
        self._watch(control, "_execute", "execute", "sample" if first else "tokens")
        self._watch(wrapper, "execute_prefill_task", "execute", "gather")
        self._watch(wrapper, "execute_decode_task", "execute", "gather")
        self._watch(control, "_share_tokens", "tokens", "account" if first else None, around=not first)
        record, self._ledger.enabled = self._ledger.record, True

        def timed(op: str, label: str, x) -> None:
            record(op, label, x)
            self._at.append(_now())

        self._ledger.record = timed

    def take(self) -> list[dict[str, Any]]:
        """The steps since the last call."""
        steps, self._steps = self._steps, []
        return steps

    def _watch(self, owner: Any, name: str, phase: str, then: str | None, around: bool = False) -> None:
        """While owner.name runs the rank is in `phase`, afterwards in `then`. around: with its end the step ends."""
        call: Callable = getattr(owner, name)

        def watched(*args):
            self._enter(phase)
            result = call(*args)
            for value in (*args, result):
                if isinstance(value, Task):
                    self._task = value
            if then:
                self._enter(then)
            if around:
                self._enter(None)
                self._end()
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
        self._spans: list[list] = []
        self._at: list[float] = []
        self._ledger.entries.clear()

    def _end(self) -> None:
        """Write the step down; what followed the last one (the results, the word to stop) is none."""
        task = self._task
        if task is not None and not isinstance(task, StopTask):
            entries = zip(self._ledger.entries, self._at, strict=True)
            begin = max(i for i, entry in enumerate(self._ledger.entries) if entry.label == "task")
            messages = [asdict(entry) | {"at": at} for entry, at in list(entries)[begin:]]
            self._steps.append(facts(task) | {"spans": self._spans, "messages": messages})
        self._task = None
        self._begin()


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
