"""Four workloads on a small pool, recorded for the X-ray page from an engine in this process.

    python -m ch07_sglang_radix.serving.xray.demo_record recording.jsonl
    python -m ch07_sglang_radix.serving.xray recording.jsonl

They are the presets of the live page: a shared prefix, one conversation, a tree of thought, and more than the pool holds. All
four are trees of questions: every answer is continued with each question of the next level. Requests come at the same
steps in every run, so a recording differs from the next one in its times only.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ch07_sglang_radix.engine import Engine
from ch07_sglang_radix.serving.xray.recorder import Recorder
from common.distributed.launch import run_main
from common.sampling.params import SamplingParams
from common.teaching.report import output_file
from common.teaching.show import check
from common.tiny_qwen.phrasings import SYSTEM_PROMPT

POOL, PAGE_SIZE, CHUNK = 704, 4, 128
TERMS = [
    "all-gather", "all-reduce", "admission control", "arithmetic intensity", "prefill", "decode", "page table",
    "pipeline bubble", "KV cache", "tensor parallelism", "gather", "broadcast", "sampling", "waiting queue",
]  # fmt: skip


class Workload(NamedTuple):
    """levels: questions, and what each answer is continued with; every: steps between the questions of a level."""

    mark: str
    levels: Sequence[Sequence[str]]
    every: int
    max_new_tokens: int
    system: str = SYSTEM_PROMPT
    to_the_end: bool = False  # of max_new_tokens, whatever the model would say


WORKLOADS = [
    Workload("shared prefix", [[
        "What is a radix cache?", "What is tensor parallelism?", "Explain continuous batching.",
        "What does chunked prefill mean?", "What is the KV cache?", "Define retraction.", "什么是全归约？",
    ]], 4, 36),
    Workload("multi-turn", [
        ["What is a radix cache?"], ["Say that in Chinese."], ["Name two related terms."], ["What is prefill?"],
    ], 1, 32),
    Workload("tree of thought", [
        ["What is a scheduler?"], ["Say that in Chinese.", "Name two related terms.", "What is a waiting queue?"],
        ["What is prefill?", "What is decode?"],
    ], 2, 28),
    Workload("small pool", [[f"What is {term}?" for term in TERMS]], 1, 56, "Answer briefly.", True),
]  # fmt: skip


class Visitors:
    """Everybody who asks in one workload."""

    def __init__(self, engine: Engine, workload: Workload):
        self.engine, self.scheduler, self.workload = engine, engine.scheduler, workload
        self.step = 0
        self.coming: list[tuple[int, list[str], Sequence[Sequence[str]]]] = []  # (step, turns, levels behind them)
        self.asked: dict[int, tuple[list[str], Sequence[Sequence[str]]]] = {}
        self.go_on([], workload.levels)

    def go_on(self, turns: list[str], levels: Sequence[Sequence[str]]) -> None:
        for i, question in enumerate(levels[0] if levels else ()):
            self.coming.append((self.step + i * self.workload.every, [*turns, question], levels[1:]))

    def arrive(self, _: int) -> bool:
        """Before each step: who has an answer goes on, who is due asks; False if nobody will come any more."""
        for rid in [rid for rid in self.asked if rid in self.scheduler.results]:
            turns, levels = self.asked.pop(rid)
            self.go_on([*turns, self.scheduler.results[rid].text], levels)
        for visit in [visit for visit in self.coming if visit[0] <= self.step]:
            self.coming.remove(visit)
            self.ask(*visit[1:])
        self.step += 1
        return bool(self.coming) or any(levels for _, levels in self.asked.values())

    def ask(self, turns: list[str], levels: Sequence[Sequence[str]]) -> None:
        roles = ["system", *("user", "assistant") * len(turns)]
        words = [self.workload.system, *turns]
        messages = [{"role": role, "content": text} for role, text in zip(roles, words, strict=False)]
        params = SamplingParams(max_new_tokens=self.workload.max_new_tokens, ignore_eos=self.workload.to_the_end)
        ids = self.engine.wrapper.tokenizer.encode_chat(messages)
        self.asked[self.scheduler.add_request(input_ids=ids, sampling_params=params)] = turns, levels


def record(path: Path, tp_size: int, workloads: Sequence[Workload] = WORKLOADS) -> dict[str, int]:
    """Returns what is to be seen in it."""
    with output_file(path) as file:
        engine = Engine(
            tp_size=tp_size, device="cpu", page_size=PAGE_SIZE, max_total_tokens=POOL, chunked_prefill_size=CHUNK
        )
        with engine:
            recorder = Recorder(engine.scheduler, lambda line: file.write(line.decode() + "\n"), share=1.0)
            recorder.mark = workloads[0].mark
            recorder.start()
            for workload in workloads:
                recorder.mark = workload.mark
                engine.scheduler.process_requests(arrivals=Visitors(engine, workload).arrive)
                engine.flush_cache()  # the next picture begins with an empty tree
                recorder.record()
            totals = recorder.state["totals"]
            recorder.stop()
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording", type=Path, help="the file to write")
    parser.add_argument("--tp-size", type=int, default=2, help="ranks; with one there is nothing to send")
    args = parser.parse_args()
    seen = record(args.recording, args.tp_size)
    print(f"  {args.recording}: {args.recording.stat().st_size / 1024:.0f} KiB")
    print(f"  {seen['finished']} requests, {100 * seen['hit_rate']:.1f} % of their prompt tokens from the tree")
    check("nodes were split", seen["splits"] > 0)
    check("tokens were evicted", seen["evicted_tokens"] > 0)
    check("requests were sent back to the queue", seen["retractions"] > 0)


if __name__ == "__main__":
    run_main(main)
