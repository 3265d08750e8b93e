"""Does the server stay right, whole and small under load? Thousands of clients, of whom some leave and some send rubbish.

    python -m ch07_sglang_radix.serving.load_test --requests 10000 --concurrency 500
    python -m ch07_sglang_radix.serving.load_test --requests 1000 --concurrency 50 --tp-size 2

Of the requests 20 % are left at a random moment and 5 % have bodies that must be refused; every other answer is compared with what
Engine.generate gives for the same call in this process. At the end nothing runs, no page is lost (/server_info: free +
evictable + protected + held = total, and all free after a flush), and no process of the server has more file descriptors than
before or has grown since the first half of the requests (which fills caches and pools). Exit code 1, and what is wrong, if not so.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
from tqdm import tqdm

from ch07_sglang_radix.engine import Engine
from ch07_sglang_radix.serving.ask import COMPLETIONS, GENERATE, Answer, stream
from ch07_sglang_radix.serving.http_client import Client, ServerError
from ch07_sglang_radix.serving.served import served
from common.distributed.launch import run_main

LEAVE, BAD = 0.20, 0.05  # shares of the requests
SETTLED = 0.5  # share of the requests after which a process may grow no more
# a small pool, so that there is eviction and retraction, and so that all of its memory has been touched soon
FLAGS = ("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "8192", "--enable-metrics")
# oneDNN keeps a kernel for each of the last 1,024 shapes that it has seen, about 60 MB of them, and a batch has a shape
SMALL_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
GROWTH_MB = 64.0  # what counts as flat: a leak of 13 KB a request in the whole test
ANSWER_S, IDLE_S = 300.0, 30.0
QUESTIONS = (
    "What is a radix cache?",
    "What is a page?",
    "什么是全归约？",
    "What is chunked prefill?",
    "What is a rank?",
)

BAD_BODIES: tuple[Any, ...] = (
    b"", b"{", b"\xff\xfe", b"[]", b"null", b'"text"', b"[" * 5000, {}, {"text": None}, {"text": 5}, {"text": [1]},
    {"text": "a", "input_ids": [1]}, {"input_ids": [1 << 40]}, {"input_ids": [-1]}, {"input_ids": ["a"]},
    {"text": []}, {"input_ids": []}, {"input_ids": [[]]},
    {"text": ""}, {"text": "a", "colour": "red"}, {"text": "a", "stream": "yes"},
    {"text": "a", "sampling_params": 7}, {"text": "a", "sampling_params": {"temperature": -1}},
    {"text": "a", "sampling_params": {"top_p": 0}}, {"text": "a", "sampling_params": {"max_new_tokens": 1 << 40}},
    {"text": "a", "sampling_params": {"n": 0}}, {"text": "a", "sampling_params": {"n": 100000}},
    {"text": "a", "sampling_params": {"stop": ["x"] * 1000}}, {"text": "a", "sampling_params": {"stop_regex": "("}},
    {"text": ["a"] * 3, "rid": ["x", "x", "x"]}, {"text": "a", "top_logprobs_num": 5},
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A call, and what Engine.generate answers to it: the texts of its n answers, their ids, how they end."""

    text: str
    params: dict[str, Any]
    expected: list[tuple[str, list[int], dict[str, Any]]]


def calls_of(engine: Engine) -> list[Call]:
    """Greedy, so that an answer is the same in whatever batch it is computed."""
    made = []
    for i, question in enumerate(QUESTIONS * 4):
        text = (
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            if i % 2
            else f"{question} Again: {question}"
        )
        params: dict[str, Any] = {"max_new_tokens": 4 + 3 * i, "temperature": 0}
        params |= ({}, {"ignore_eos": True}, {"stop": [" the", "的"]}, {"n": 2, "ignore_eos": True})[i % 4]
        answers = engine.generate(text, params)
        answers = answers if isinstance(answers, list) else [answers]
        made.append(
            Call(text, params, [(a["text"], a["output_ids"], a["meta_info"]["finish_reason"]) for a in answers])
        )
    return made


@dataclass
class Outcome:
    """wrong: one line each. counts: right, left, refused. memory: pid -> [MB] as the load went on."""

    wrong: list[str] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    memory: dict[int, list[float]] = field(default_factory=dict)
    seconds: float = 0.0


class Crowd:
    """The clients, at most `concurrency` at a time."""

    def __init__(self, client: Client, calls: Sequence[Call], seed: int):
        self.client, self.calls, self.random = client, calls, random.Random(seed)
        self.outcome = Outcome()

    async def run(self, requests: int, concurrency: int, look: Callable[[], None], bar: tqdm) -> None:
        """look: called after each hundredth of the requests."""
        numbers = iter(range(requests))

        async def one_after_the_other() -> None:
            for i in numbers:
                await self._one(i)
                bar.update(1)
                if i % max(requests // 100, 1) == 0:
                    look()

        began = time.perf_counter()
        await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))
        self.outcome.seconds = time.perf_counter() - began

    async def _one(self, i: int) -> None:
        dice, call = self.random.random(), self.random.choice(self.calls)
        try:
            if dice < LEAVE:
                await self._leave(call, self.random.random())
            elif dice < LEAVE + BAD:
                await self._refused(self.random.choice(BAD_BODIES))
            elif dice < 0.5:
                await self._whole(call)
            elif dice < 0.8 or call.params.get("n", 1) > 1:
                await self._streamed(call)
            else:
                await self._completion(call)
        except (OSError, ServerError, KeyError, ValueError) as error:
            self.outcome.wrong.append(f"request {i}: {type(error).__name__}: {error}")

    async def _whole(self, call: Call) -> None:
        status, value = await self.client.call("POST", "/generate", {"text": call.text, "sampling_params": call.params})
        if status != 200:
            raise ValueError(f"status {status}: {value}")
        self._check(call, value if isinstance(value, list) else [value])

    async def _streamed(self, call: Call) -> None:
        body = {"text": call.text, "sampling_params": call.params, "stream": True}
        last: dict[int, Any] = {}
        async with aclosing(self.client.events("/generate", body)) as events:
            async for event in events:
                index = event.get("index", 0)
                before = last.get(index)
                if before and not event["text"].startswith(before["text"]):
                    raise ValueError(f"a text that was shown is taken back: {before['text']!r} -> {event['text']!r}")
                last[index] = event
        self._check(call, [last[index] for index in sorted(last)])

    async def _completion(self, call: Call) -> None:
        others = {name: value for name, value in call.params.items() if name != "max_new_tokens"}
        body, answer = COMPLETIONS.body("", call.text, call.params["max_new_tokens"]) | others, Answer()
        body.pop("model")
        async for _ in stream(self.client, COMPLETIONS, body, answer):
            pass
        text, ids, reason = call.expected[0]
        if (answer.text, answer.completion_tokens, answer.finish_reason) != (text, len(ids), reason["type"]):
            raise ValueError(f"completions: {answer} instead of {text!r}, {reason}")
        self.outcome.counts["right"] += 1

    def _check(self, call: Call, answers: list[dict[str, Any]]) -> None:
        got = [(a["text"], a["output_ids"], a["meta_info"]["finish_reason"]) for a in answers]
        if got != call.expected:
            raise ValueError(f"{call.params}: {got} instead of {call.expected}")
        self.outcome.counts["right"] += 1

    async def _leave(self, call: Call, when: float) -> None:
        """After a random part of its tokens, or before the first has come."""
        body = GENERATE.body("", call.text, 200)
        body["sampling_params"]["ignore_eos"] = True
        tokens = int(when * 60) - 10
        if tokens < 0:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.client.call("POST", "/generate", body | {"stream": False}), when * 0.2)
        else:
            async with aclosing(self.client.events("/generate", body)) as events:
                async for event in events:
                    if event["meta_info"]["completion_tokens"] >= tokens:
                        break
        self.outcome.counts["left"] += 1

    async def _refused(self, body: Any) -> None:
        status, value = await self.client.call("POST", "/generate", body)
        if not 400 <= status < 500 or not isinstance(value, dict) or not value.get("error"):
            raise ValueError(f"{str(body)[:200]} is answered with {status}: {value}")
        self.outcome.counts["refused"] += 1


class Footprint:
    """Memory and file descriptors of a process and all it has started."""

    def __init__(self, pid: int):
        root = psutil.Process(pid)
        self.processes = [root, *root.children(recursive=True)]

    def name(self, pid: int) -> str:
        return next(f"{' '.join(p.cmdline()[1:4])[:60]} ({pid})" for p in self.processes if p.pid == pid)

    def megabytes(self) -> dict[int, float]:
        return {process.pid: process.memory_info().rss / 2**20 for process in self.processes}

    def descriptors(self) -> dict[int, int]:
        count = "num_handles" if sys.platform == "win32" else "num_fds"
        return {process.pid: getattr(process, count)() for process in self.processes}


async def load(url: str, pid: int, calls: Sequence[Call], requests: int, concurrency: int, seed: int = 0) -> Outcome:
    """The whole test against a server that runs; what is wrong is in Outcome.wrong."""
    feet = Footprint(pid)
    async with Client(url, timeout=ANSWER_S) as client:
        await Crowd(client, calls, seed)._whole(calls[0])  # the first message opens pipes
        await _until_idle(client)
    before = await _descriptors(url, feet)
    async with Client(url, timeout=ANSWER_S) as client:
        crowd = Crowd(client, calls, seed)
        outcome = crowd.outcome

        def look() -> None:
            for process, now in feet.megabytes().items():
                outcome.memory.setdefault(process, []).append(now)

        with tqdm(total=requests, unit="req", disable=None, leave=False) as bar:
            await crowd.run(requests, concurrency, look, bar)
        info = await _until_idle(client)
        outcome.wrong += conservation(info)
        status, said = await client.call("POST", "/flush_cache")
        info = await _until_idle(client)
        if status != 200 or info["free_tokens"] != info["max_total_num_tokens"]:
            outcome.wrong.append(
                f"after a flush ({status}: {said}) {info['free_tokens']} of {info['max_total_num_tokens']} are free"
            )
    after = await _descriptors(url, feet)
    outcome.wrong += [
        f"{feet.name(p)}: {before[p]} file descriptors before, {n} after" for p, n in after.items() if n > before[p]
    ]
    outcome.wrong += [f"{feet.name(p)}: {words}" for p, values in outcome.memory.items() for words in grown(values)]
    return outcome


def conservation(info: dict[str, Any]) -> list[str]:
    """Of /server_info: each page has one owner, and after the load nobody holds any."""
    parts = {name: info[f"{name}_tokens"] for name in ("free", "evictable", "protected", "held")}
    said = " + ".join(f"{number} {name}" for name, number in parts.items())
    wrong = (
        [] if sum(parts.values()) == info["max_total_num_tokens"] else [f"{said} is not {info['max_total_num_tokens']}"]
    )
    return wrong + ([f"nothing runs, and yet {said}"] if parts["protected"] or parts["held"] else [])


def grown(megabytes: Sequence[float]) -> Iterator[str]:
    """Has a process grown since it had settled? Peaks are compared: memory comes and goes."""
    at = max(int(len(megabytes) * SETTLED), 1)
    settled, last = max(megabytes[:at]), megabytes[-1]
    if last > settled + GROWTH_MB:
        yield f"{settled:.0f} MB after {SETTLED:.0%} of the requests, {last:.0f} MB at the end"


async def _until_idle(client: Client) -> dict[str, Any]:
    """/server_info once nothing waits or runs."""
    deadline = time.monotonic() + IDLE_S
    while True:
        status, info = await client.call("GET", "/server_info")
        if status != 200:
            raise ValueError(f"/server_info answers {status}: {info}")
        if not info["waiting"] and not info["running"]:
            return info
        if time.monotonic() > deadline:
            raise ValueError(
                f"{IDLE_S:g} s after the last answer {info['running']} still run and {info['waiting']} wait"
            )
        await asyncio.sleep(0.1)


async def _descriptors(url: str, feet: Footprint) -> dict[int, int]:
    """The fewest of some looks: connections that are closed take a moment to go."""
    least = feet.descriptors()
    for _ in range(20):
        await asyncio.sleep(0.1)
        least = {pid: min(least[pid], count) for pid, count in feet.descriptors().items()}
    return least


def report(outcome: Outcome, feet: dict[int, str]) -> None:
    counts = ", ".join(f"{number} {name}" for name, number in sorted(outcome.counts.items()))
    print(f"{counts} in {outcome.seconds:.1f} s, {sum(outcome.counts.values()) / outcome.seconds:.0f} requests/s")
    for pid, values in outcome.memory.items():
        print(
            f"  {feet[pid]:<60} {values[0]:6.0f} MB at first, {max(values):6.0f} at most, {values[-1]:6.0f} at the end"
        )
    for line in outcome.wrong[:20]:
        print(f"WRONG {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=50)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with Engine(device="cpu", dtype="float32") as engine:
        calls = calls_of(engine)
    with served(*FLAGS, "--tp-size", str(args.tp_size), environment=SMALL_CACHE) as (url, pid):
        names = {process: Footprint(pid).name(process) for process in Footprint(pid).megabytes()}
        outcome = asyncio.run(load(url, pid, calls, args.requests, args.concurrency, args.seed))
    report(outcome, names)
    if outcome.wrong:
        raise ValueError(f"{len(outcome.wrong)} things are wrong")


if __name__ == "__main__":
    run_main(main)
