"""The time between tokens of those who run while long prompts come in: one engine with chunks, or two that share the work.

    python -m ch07_sglang_radix.benchmarks.bench_disaggregation                      # processes on a CPU, the bundled model
    python -m ch07_sglang_radix.benchmarks.bench_disaggregation --device cuda --model-path MODEL --prompt 8000      # two GPUs

Contenders, each a server as a reader starts it, all up at once and asked in turn, --rounds times:

    chunked         one engine (on GPUs tp=2, so that all have two cards)
    replicas        two engines, --dp-size 2
    disaggregated   a prefill engine, a decode engine, mini_lb in front

In a round --streams answers are being written; every --every seconds a prompt comes that nobody has seen, of each length in
--prompts. Told of each contender: milliseconds between two tokens of those who run (median, 99th percentile, longest), and until
a long prompt's first token. Writes disaggregation.csv, from which figures/draw.py draws.
"""

import argparse
import asyncio
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

from ch07_sglang_radix.serving.http_client import Client
from common.distributed.launch import run_main
from common.teaching.report import FIGURES, write_csv

ROOT = Path(__file__).parents[2]
START_S = 600.0
SERVER, BALANCER = "ch07_sglang_radix.launch_server", "ch07_sglang_radix.disaggregation.mini_lb"
WARM_UP = 4  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model-path", default=None)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=300, help="of each stream's answer at most")
    parser.add_argument("--prompts", type=int, nargs="+", default=[400, 1600], help="tokens of the long prompts")
    parser.add_argument("--every", type=float, default=0.4, help="seconds from one long prompt to the next")
    parser.add_argument("--count", type=int, default=5, help="long prompts a round")
    parser.add_argument("--chunk", type=int, default=256, help="chunked_prefill_size of all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=1000, help="ids of the prompts' tokens are below")
    parser.add_argument("--contenders", nargs="+", default=["chunked", "replicas", "disaggregated"])
    parser.add_argument("--out", type=Path, default=FIGURES)
    args = parser.parse_args()
    with all_of(args) as urls:
        asyncio.run(in_turn(args, urls))


# --- servers


@contextmanager
def all_of(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """{contender: where to ask it}"""
    common = ["--device", args.device, "--chunked-prefill-size", str(args.chunk), "--disaggregation-timeout", "120"]
    common += ["--model-path", args.model_path] if args.model_path else []
    two = ["--tp-size", "2"] if args.device == "cuda" else []
    started: list[subprocess.Popen] = []

    def start(module: str, *flags: str, card: int | None = None) -> tuple[subprocess.Popen, list[str]]:
        seen = {"CUDA_VISIBLE_DEVICES": str(card)} if card is not None and args.device == "cuda" else {}
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--port", "0", *flags], cwd=ROOT, env=os.environ | seen, text=True,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        lines: list[str] = []
        threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")), daemon=True).start()
        return process, lines

    try:
        asked = {}
        if "chunked" in args.contenders:
            asked["chunked"] = start(SERVER, *common, *two)
        if "replicas" in args.contenders:
            asked["replicas"] = start(SERVER, *common, "--dp-size", "2")
        if "disaggregated" in args.contenders:
            halves = [
                start(SERVER, *common, "--disaggregation-mode", mode, card=card)
                for card, mode in enumerate(("prefill", "decode"))
            ]
            there = [_ready(*half) for half in halves]
            asked["disaggregated"] = start(BALANCER, "--prefill", there[0], "--decode", there[1])
        yield {name: _ready(*one) for name, one in asked.items()}
    finally:
        for process in started:
            process.terminate()
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def _ready(process: subprocess.Popen, lines: list[str]) -> str:
    """Its address, once it says that it is ready."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in list(lines):
            if found := re.search(r"ready.*(http://\S+:\d+)", line):
                return found.group(1)
        time.sleep(0.05)
    raise ValueError(f"a server did not start: {''.join(lines[-3:]).strip() or 'not a word'}")


# --- rounds


async def in_turn(args: argparse.Namespace, urls: dict[str, str]) -> None:
    draw, rows = random.Random(0), []
    clients = {name: Client(url) for name, url in urls.items()}
    for client in clients.values():
        await _first_token(client, [draw.randrange(args.vocabulary) for _ in range(max(args.prompts))])
    for prompt in args.prompts:
        found = {name: [] for name in urls}
        for _ in range(args.rounds):
            for name, client in clients.items():
                found[name].append(await one_round(args, client, prompt, draw))
        for name, rounds in found.items():
            gaps = sorted(gap for gaps, _ in rounds for gap in gaps)
            firsts = sorted(first for _, firsts in rounds for first in firsts)
            p99s = sorted(quantile(sorted(gaps), 0.99) for gaps, _ in rounds)
            row = {
                "contender": name, "prompt_tokens": prompt, "chunk": args.chunk, "streams": args.streams,
                "every_s": args.every, "gaps": len(gaps), "itl_median_ms": ms(median(gaps)),
                "itl_p99_ms": ms(quantile(gaps, 0.99)), "itl_p99_lowest_ms": ms(p99s[0]),
                "itl_p99_highest_ms": ms(p99s[-1]), "itl_longest_ms": ms(gaps[-1]),
                "ttft_median_ms": ms(median(firsts)), "ttft_longest_ms": ms(firsts[-1]),
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    for client in clients.values():
        await client.close()
    write_csv(rows, args.out / "disaggregation.csv")


async def one_round(
    args: argparse.Namespace, client: Client, prompt: int, draw: random.Random
) -> tuple[list[float], list[float]]:
    """(seconds between tokens of the streams while long prompts come, seconds to each long prompt's first token)"""
    ids = lambda n: [draw.randrange(args.vocabulary) for _ in range(n)]  # noqa: E731
    times: list[list[float]] = [[] for _ in range(args.streams)]
    streams = [asyncio.create_task(_stream(client, ids(8), args.tokens, seen)) for seen in times]
    while not all(len(seen) > WARM_UP for seen in times):
        await asyncio.sleep(0.01)
    began, coming = time.perf_counter(), []
    for _ in range(args.count):
        coming.append(asyncio.create_task(_first_token(client, ids(prompt))))
        await asyncio.sleep(args.every)
    firsts = await asyncio.gather(*coming)
    over = time.perf_counter()
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    gaps = [b - a for seen in times for a, b in pairwise(seen) if a >= began and b <= over]
    if not gaps:
        raise ValueError(f"no stream was still running; more than --tokens {args.tokens}, or a smaller --count")
    await asyncio.sleep(0.3)  # who was cancelled is aborted
    return gaps, list(firsts)


async def _stream(client: Client, ids: Sequence[int], tokens: int, seen: list[float]) -> None:
    body = {"input_ids": ids, "stream": True, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}}
    async for _ in client.events("/generate", body):
        seen.append(time.perf_counter())


async def _first_token(client: Client, ids: Sequence[int]) -> float:
    began = time.perf_counter()
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1, "ignore_eos": True}}
    status, answer = await client.call("POST", "/generate", body)
    if status != 200:
        raise ValueError(f"status {status}: {answer}")
    return time.perf_counter() - began


def quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


if __name__ == "__main__":
    run_main(main)
