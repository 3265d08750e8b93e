"""The time between tokens of those who run while long prompts come in: one engine with chunks, or two that share the work.

    python -m ch07_sglang_radix.benchmarks.bench_disaggregation                      # processes on a CPU, the bundled model
    python -m ch07_sglang_radix.benchmarks.bench_disaggregation --device cuda        # two GPUs, Qwen2.5-7B, random weights
    python -m ch07_sglang_radix.benchmarks.disaggregation_report                     # then: the README's tables, from the CSVs

Contenders, each a server as a reader starts it, all up at once and asked in turn, --rounds times:

    chunked         one engine (on GPUs tp=2, so that all have two cards)
    replicas        two engines, --dp-size 2
    disaggregated   a prefill engine, a decode engine, mini_lb in front; pages by --transfer-backend, between GPUs CUDA IPC

In a round --streams answers are being written, and for --window seconds a prompt comes every --every seconds that nobody has seen;
each rate with each length in --prompts. Told of each contender: milliseconds between two tokens of those who run (median, 99th
percentile, longest), and until a long prompt's first token (median, 99th percentile, longest). Beside them what a model
(disaggregation/cost_model.py) says from two numbers that are measured before, at each contender by itself: the first token of such
a prompt while nobody else is there, and the time between tokens while no prompt comes. Writes disaggregation.csv, or
disaggregation_gpu.csv, and the figure that figures/draw.py draws from it. On two H100 the defaults are to take less than 200 s: no
round begins after --seconds.
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
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ch07_sglang_radix.disaggregation.cost_model import Arrivals, Times
from ch07_sglang_radix.serving.http_client import Client
from common.distributed.launch import run_main
from common.models.published_configs import save_random_weights, weights_folder
from common.teaching.report import FIGURES, write_csv

ROOT = Path(__file__).parents[2]
START_S = 600.0
SERVER, BALANCER = "ch07_sglang_radix.launch_server", "ch07_sglang_radix.disaggregation.mini_lb"
WARM_UP = 4  # tokens
QUIET, QUIET_S = 3, 1.0  # prompts that are alone, and seconds in which none comes: what the model is told
MODEL = "Qwen2.5-7B"  # on GPUs, if no other is named
CONTENDERS = ("chunked", "replicas", "disaggregated")
DEFAULTS = {  # flags that a CPU and two GPUs want different values of
    "cpu": {
        "streams": 4, "tokens": 1900, "prompts": [100, 400, 800], "every": [1.6, 0.8, 0.4], "window": 3.2, "chunk": 256,
        "vocabulary": 1000,
        "pool": None, "transfer_backend": "tcp", "seconds": 3600.0,
    },
    "cuda": {
        "streams": 16, "tokens": 2500, "prompts": [2048, 8192], "every": [0.6], "window": 3.6, "chunk": 2048,
        "vocabulary": 10_000,
        "pool": 120_000, "transfer_backend": "cuda_ipc", "seconds": 170.0,
    },
}  # fmt: skip


def main() -> None:
    args = parse_args()
    began = time.monotonic()
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        raise ValueError(
            f"--device cuda compares what two GPUs can do, and there are {torch.cuda.device_count()}; use --device cpu"
        )
    if args.device == "cuda" and args.model_path is None:
        args.model_path = str(save_random_weights(MODEL, weights_folder(MODEL), "cuda"))
        torch.cuda.empty_cache()  # the servers want the room
        say(began, f"random weights of {MODEL} lie in {args.model_path}")
    with all_of(args) as urls:
        say(began, f"ready: {', '.join(urls)}")
        rows = asyncio.run(in_turn(args, urls, began))
    name = "disaggregation" if args.device == "cpu" else "disaggregation_gpu"
    write_csv(rows, args.out / f"{name}.csv")
    draw_it(name, args.out)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=tuple(DEFAULTS))
    parser.add_argument("--model-path", default=None)
    parser.add_argument("--streams", type=int)
    parser.add_argument("--tokens", type=int, help="of each stream's answer at most")
    parser.add_argument("--prompts", type=int, nargs="+", help="tokens of the long prompts")
    parser.add_argument("--every", type=float, nargs="+", help="seconds from one long prompt to the next")
    parser.add_argument("--window", type=float, help="seconds of a round in which long prompts come")
    parser.add_argument("--chunk", type=int, help="chunked_prefill_size of all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, help="ids of the prompts' tokens are below")
    parser.add_argument("--pool", type=int, help="max_total_tokens of each engine, as several share a card")
    parser.add_argument("--transfer-backend", help="what pages travel by: tcp, shm or cuda_ipc")
    parser.add_argument("--seconds", type=float, help="from the start on, after which no further round begins")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--out", type=Path, default=FIGURES)
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def say(began: float, what: str) -> None:
    print(f"{time.monotonic() - began:6.1f} s  {what}", flush=True)


def draw_it(name: str, folder: Path) -> None:
    try:
        from figures import draw  # noqa: PLC0415, matplotlib is not everywhere where GPUs are
    except ImportError as error:
        print(f"no figure here ({error}); python figures/draw.py draws it from the CSV in figures/")
        return
    figure = draw.two_engines(folder / f"{name}.csv")
    figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    print(f"wrote {folder / f'{name}.svg'}")


# --- servers


@contextmanager
def all_of(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """{contender: where to ask it}"""
    started: list[Server] = []

    def start(module: str, flags: Sequence[str], card: int | None = None) -> Server:
        started.append(Server(module, flags, card if args.device == "cuda" else None))
        return started[-1]

    try:
        asked = {name: start(SERVER, flags_of(args, name)) for name in args.contenders if name != "disaggregated"}
        if "disaggregated" in args.contenders:
            halves = [start(SERVER, flags_of(args, mode), card=card) for card, mode in enumerate(("prefill", "decode"))]
            there = [half.ready() for half in halves]
            asked["disaggregated"] = start(BALANCER, ["--prefill", there[0], "--decode", there[1]])
        yield {name: server.ready() for name, server in asked.items()}
    finally:
        for server in started:
            server.process.terminate()
        for server in started:
            server.end()


def flags_of(args: argparse.Namespace, who: str) -> list[str]:
    """who: a contender with one server, or a half, prefill or decode."""
    flags = ["--device", args.device, "--chunked-prefill-size", str(args.chunk)]
    flags += ["--model-path", args.model_path, "--skip-tokenizer-init"] if args.model_path else []
    flags += ["--max-total-tokens", str(args.pool)] if args.pool else []
    if who in ("prefill", "decode"):
        flags += ["--disaggregation-mode", who, "--disaggregation-transfer-backend", args.transfer_backend]
        return [*flags, "--disaggregation-timeout", "120"]
    if who == "replicas":
        return [*flags, "--dp-size", "2"]
    return [*flags, "--tp-size", "2"] if args.device == "cuda" else flags


class Server:
    """A process. card: the GPU that it sees; None: all. What it logs is kept, and its warnings about pages are printed."""

    def __init__(self, module: str, flags: Sequence[str], card: int | None):
        seen = {} if card is None else {"CUDA_VISIBLE_DEVICES": _visible()[card]}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--port", "0", *flags], cwd=ROOT, env=os.environ | seen, text=True,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        self.lines: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)
            if "CUDA IPC" in line:
                print(line.strip(), flush=True)

    def ready(self) -> str:
        """Its address, once it says that it is ready."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in list(self.lines):
                if found := re.search(r"ready.*(http://\S+:\d+)", line):
                    return found.group(1)
            time.sleep(0.05)
        raise ValueError(f"a server did not start: {''.join(self.lines[-3:]).strip() or 'not a word'}")

    def end(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()


def _visible() -> list[str]:
    """Of the cards that this process sees, by name."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


# --- rounds


async def in_turn(args: argparse.Namespace, urls: dict[str, str], began: float) -> list[dict[str, Any]]:
    draw, rows = random.Random(0), []
    clients = {name: Client(url) for name, url in urls.items()}
    alone: dict[tuple[str, int], Times] = {}
    for name, client in clients.items():
        for _ in range(2):
            first = await _first_token(client, _prompt(args, draw, max(args.prompts)))
            say(began, f"{name}: warmed up, {ms(first)} ms to the first token of {max(args.prompts)}")
        alone |= await quiet_times(args, name, client, draw)
    for every, prompt in product(args.every, args.prompts):
        found: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in urls}
        for i in range(args.rounds):
            where = f"prompts of {prompt} every {every:g} s"
            if time.monotonic() - began > args.seconds:
                say(began, f"--seconds {args.seconds:g} are over: {i} of {args.rounds} rounds, {where}")
                break
            for name, client in clients.items():
                coming = prompts_coming(args, client, prompt, every, draw)
                found[name].append(await gaps_while(args, client, draw, coming))
                say(began, f"round {i + 1} of {args.rounds}, {where}: {name}")
        for name, rounds in found.items():
            if rounds:
                rows.append(row_of(args, name, prompt, every, rounds, alone[name, prompt]))
                print(rows[-1], flush=True)
    for client in clients.values():
        await client.close()
    return rows


async def quiet_times(
    args: argparse.Namespace, name: str, client: Client, draw: random.Random
) -> dict[tuple[str, int], Times]:
    """{(contender, prompt): what it takes there while nothing disturbs it}; pages' travel is in a chunk's share of it."""
    gaps, _ = await gaps_while(args, client, draw, asyncio.sleep(QUIET_S))
    times = {}
    for prompt in args.prompts:
        firsts = [await _first_token(client, _prompt(args, draw, prompt)) for _ in range(QUIET)]
        times[name, prompt] = Times(args.chunk, median(firsts) / -(-prompt // args.chunk), median(gaps))
    return times


def row_of(
    args: argparse.Namespace, name: str, prompt: int, every: float, rounds: Sequence[tuple[list[float], list[float]]],
    alone: Times,
) -> dict[str, Any]:  # fmt: skip
    gaps = sorted(gap for gaps, _ in rounds for gap in gaps)
    firsts = sorted(first for _, firsts in rounds for first in firsts)
    p99s = sorted(quantile(sorted(gaps), 0.99) for gaps, _ in rounds)
    model = Path(args.model_path).name if args.model_path else "bundled model"
    engines = 2 if name == "replicas" else 1  # that prompts go to in turn
    coming = Arrivals(engines * every, -(-prompts_of(args, every) // engines))
    said = alone.apart(prompt) if name == "disaggregated" else alone.together(prompt)
    return {
        "model": model, "contender": name, "prompt_tokens": prompt, "every_s": every, "chunk": args.chunk,
        "streams": args.streams, "rounds": len(rounds), "gaps": len(gaps), "itl_median_ms": ms(median(gaps)),
        "itl_p99_ms": ms(quantile(gaps, 0.99)), "itl_p99_lowest_ms": ms(p99s[0]), "itl_p99_highest_ms": ms(p99s[-1]),
        "itl_longest_ms": ms(gaps[-1]), "ttft_median_ms": ms(median(firsts)), "ttft_p99_ms": ms(quantile(firsts, 0.99)),
        "ttft_longest_ms": ms(firsts[-1]), "itl_alone_ms": ms(alone.step_s),
        "ttft_alone_ms": ms(alone.chunks(prompt) * alone.chunk_s), "itl_p99_model_ms": ms(coming.gap_s(said)),
        "ttft_model_ms": ms(coming.first_s(said)),
    }  # fmt: skip


def prompts_of(args: argparse.Namespace, every: float) -> int:
    """Long prompts of a round."""
    return max(round(args.window / every), 1)


async def prompts_coming(
    args: argparse.Namespace, client: Client, prompt: int, every: float, draw: random.Random
) -> list[float]:
    """Seconds to each one's first token."""
    coming = []
    for _ in range(prompts_of(args, every)):
        coming.append(asyncio.create_task(_first_token(client, _prompt(args, draw, prompt))))
        await asyncio.sleep(every)
    return await asyncio.gather(*coming)


async def gaps_while(
    args: argparse.Namespace, client: Client, draw: random.Random, what: Awaitable[Any]
) -> tuple[list[float], Any]:
    """(seconds between tokens of the streams while that goes on, what it comes to)"""
    times: list[list[float]] = [[] for _ in range(args.streams)]
    streams = [asyncio.create_task(_stream(client, _prompt(args, draw, 8), args.tokens, seen)) for seen in times]
    while not all(len(seen) > WARM_UP for seen in times):
        await asyncio.sleep(0.01)
    began = time.perf_counter()
    result = await what
    over = time.perf_counter()
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    gaps = [b - a for seen in times for a, b in pairwise(seen) if a >= began and b <= over]
    if not gaps:
        raise ValueError(f"no stream was still running; more than --tokens {args.tokens}, or a shorter --window")
    await asyncio.sleep(0.3)  # who was cancelled is aborted
    return gaps, result


def _prompt(args: argparse.Namespace, draw: random.Random, tokens: int) -> list[int]:
    return [draw.randrange(args.vocabulary) for _ in range(tokens)]


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
