"""What a server costs beside the engine inside it: the same requests to Engine and over HTTP, in turn.

    python -m ch07_sglang_radix.benchmarks.bench_server_overhead                 # tiny model, 32 at once; about a minute
    python -m ch07_sglang_radix.benchmarks.bench_server_overhead --no-stream
    python -m ch07_sglang_radix.benchmarks.bench_server_overhead --model-path Qwen/Qwen2.5-0.5B --device cuda --concurrency 256

Adds a row to figures/server_overhead.csv, in place of an earlier one of the same model and load.
Prints, for each of both, output tokens a second, time to the first token and between tokens (medians), and the CPU seconds of every
process. Rounds alternate, so that a slow minute of the machine hits both; medians over rounds are compared.
The client is another process's worth of work: on two cores, it takes its share of what it measures.
"""

import argparse
import asyncio
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from ch07_sglang_radix.engine import Engine
from common.distributed.launch import run_main
from common.teaching.report import FIGURES, write_csv
from common.teaching.show import table

ROOT = Path(__file__).parents[2]
WARM_UP = 8  # requests
LAST_LINES = 20  # of a server that did not start
LOAD = ("model", "on", "ranks", "streams", "at once", "requests", "prompt tokens", "new tokens")  # what a row is about


@dataclass
class Run:
    """What one round gave. Seconds."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)  # to the first token
    between: list[float] = field(default_factory=list)  # mean between tokens, of each request
    cpu: dict[str, float] = field(default_factory=dict)

    def took(self, stamps: list[float], tokens: int) -> None:
        """stamps: when it was sent, then when each piece came."""
        self.tokens += tokens
        if len(stamps) > 1:
            self.first.append(stamps[1] - stamps[0])
            self.between.append((stamps[-1] - stamps[1]) / max(1, tokens - 1))


def prompts(number: int, length: int, vocab_size: int) -> list[list[int]]:
    """Half of each prompt is the same for all, as a system prompt is."""
    shared = [7 + i % (vocab_size - 8) for i in range(length // 2)]
    return [
        shared + [7 + (31 * i + j * j) % (vocab_size - 8) for j in range(length - len(shared))] for i in range(number)
    ]


async def at_once(jobs: list[Callable], limit: int) -> None:
    """Each of `limit` workers takes the next job when it is done with one."""
    waiting = iter(jobs)

    async def worker() -> None:
        for job in waiting:
            await job()

    await asyncio.gather(*(worker() for _ in range(limit)))


class EngineSide:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.engine = Engine(**engine_arguments(args))

    async def one(self, run: Run, ids: list[int]) -> None:
        params = {"max_new_tokens": self.args.new_tokens, "ignore_eos": True}
        stamps = [time.perf_counter()]
        if self.args.stream:
            async for answer in await self.engine.async_generate(input_ids=ids, sampling_params=params, stream=True):
                stamps.append(time.perf_counter())
                tokens = answer["meta_info"]["completion_tokens"]
        else:
            answer = await self.engine.async_generate(input_ids=ids, sampling_params=params)
            tokens = answer["meta_info"]["completion_tokens"]
        run.took(stamps, tokens)

    def processes(self) -> dict[str, psutil.Process]:
        return {"engine, client": psutil.Process()}

    def flush(self) -> None:
        self.engine.flush_cache()

    def end(self) -> None:
        self.engine.shutdown()


class ServerSide:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        flags = ["--port", "0", "--max-running-requests", str(args.concurrency), "--log-level", "info"]
        given = engine_arguments(args)
        if args.mem_fraction_static:  # it counts what is in use, and the engine beside it uses its part
            given["mem_fraction_static"] = 2 * args.mem_fraction_static
        for name, value in given.items():
            if value is not None and name != "max_running_requests":
                flags += [f"--{name.replace('_', '-')}", str(value)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ch07_sglang_radix.launch_server", *flags],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        last = deque(maxlen=LAST_LINES)
        for line in self.process.stderr:
            last.append(line)
            if found := re.search(r"ready after .*http://(\S+:\d+)", line):
                self.host, _, port = found.group(1).rpartition(":")
                self.port = int(port)
                break
        else:
            print(*last, sep="", end="", file=sys.stderr)
            raise ValueError(
                f"the server ended before it was ready, exit code {self.process.wait()}: it says why above"
            )
        threading.Thread(target=lambda: list(self.process.stderr), daemon=True).start()  # or it would wait for a reader

    async def one(self, run: Run, ids: list[int]) -> None:
        params = {"max_new_tokens": self.args.new_tokens, "ignore_eos": True}
        stamps = [time.perf_counter()]
        body = json.dumps({"input_ids": ids, "sampling_params": params, "stream": self.args.stream}).encode()
        last = b""
        async for piece in self._post("/generate", body):
            if self.args.stream and b"data: {" in piece:
                stamps.append(time.perf_counter())
            last = piece if b"completion_tokens" in piece else last
        run.took(stamps, int(re.findall(rb'"completion_tokens":(\d+)', last)[-1]))

    async def _post(self, path: str, body: bytes):
        """The chunks of the answer. By hand: an HTTP library costs more than the server."""
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 24)
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.splitlines()[0]:
            raise ValueError(f"the server said {status.splitlines()[0].decode()}")
        while piece := await reader.read(1 << 20):
            yield piece
        writer.close()

    def processes(self) -> dict[str, psutil.Process]:
        main = psutil.Process(self.process.pid)
        commands = {child: child.cmdline() for child in main.children()}
        children = {said[-1]: child for child, said in commands.items() if "ch07_sglang_radix.serving.child" in said}
        return {"main": main, **dict(sorted(children.items())), "client": psutil.Process()}

    def flush(self) -> None:
        async def post() -> None:
            async for _ in self._post("/flush_cache", b""):
                pass

        asyncio.run(post())

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def engine_arguments(args: argparse.Namespace) -> dict:
    return {
        "model_path": args.model_path, "device": args.device, "tp_size": args.tp_size, "max_running_requests": args.concurrency,
        "mem_fraction_static": args.mem_fraction_static,
    }  # fmt: skip


def measure(side: EngineSide | ServerSide, ids: list[list[int]], concurrency: int) -> Run:
    run = Run()
    before = {name: sum(process.cpu_times()[:2]) for name, process in side.processes().items()}
    began = time.perf_counter()
    asyncio.run(at_once([lambda one=one: side.one(run, one) for one in ids], concurrency))
    run.seconds = time.perf_counter() - began
    run.cpu = {name: sum(process.cpu_times()[:2]) - before[name] for name, process in side.processes().items()}
    side.flush()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="default: the bundled model")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mem-fraction-static", type=float, help="of a GPU, for each of the two; default there: 0.4")
    parser.add_argument("--no-stream", dest="stream", action="store_false")
    parser.add_argument("--csv", type=Path, default=FIGURES / "server_overhead.csv")
    args = parser.parse_args()
    if args.mem_fraction_static is None and args.device != "cpu" and torch.cuda.is_available():
        args.mem_fraction_static = 0.4  # both are there at once
    sides = {"Engine": EngineSide(args), "server": ServerSide(args)}
    ids = prompts(args.requests, args.prompt_tokens, sides["Engine"].engine.wrapper.config.vocab_size)
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    try:
        for side in sides.values():
            measure(side, ids[:WARM_UP], args.concurrency)
        for _ in range(args.rounds):
            for name, side in sides.items():
                runs[name].append(measure(side, ids, args.concurrency))
    finally:
        for side in sides.values():
            side.end()
    load = load_of(args)
    print(", ".join(f"{name} {value}" for name, value in load.items()) + f"; {args.rounds} rounds in turn")
    report(runs)
    record(load | measured(runs), args.csv)


def load_of(args: argparse.Namespace) -> dict[str, Any]:
    """What LOAD names."""
    model = Path(args.model_path).name if args.model_path else "tiny-qwen"
    lengths = args.requests, args.prompt_tokens, args.new_tokens
    on = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    return dict(zip(LOAD, (model, on, args.tp_size, args.stream, args.concurrency, *lengths), strict=True))


def tokens_a_second(run: Run) -> float:
    return run.tokens / run.seconds


def to_first_token(run: Run) -> float:
    """Milliseconds."""
    return 1e3 * statistics.median(run.first)


def between_tokens(run: Run) -> float:
    """Milliseconds."""
    return 1e3 * statistics.median(run.between)


def measured(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """The other columns: medians over rounds, the spread, and the seconds of CPU of each process of the server."""
    columns = {"rounds": len(runs["server"]), "cores": os.cpu_count()}
    for name, some in runs.items():
        for what, of in (("tokens/s", tokens_a_second), ("first ms", to_first_token), ("between ms", between_tokens)):
            there = what == "tokens/s" or some[0].first
            columns[f"{name} {what}"] = round(statistics.median(map(of, some)), 2) if there else ""
        speeds = sorted(map(tokens_a_second, some))
        columns |= {f"{name} lowest": round(speeds[0], 2), f"{name} highest": round(speeds[-1], 2)}
    for who in ("main", "scheduler", "detokenizer", "client"):
        columns[f"{who} CPU s"] = round(statistics.median(run.cpu.get(who, 0) for run in runs["server"]), 2)
    columns["wall s"] = round(statistics.median(run.seconds for run in runs["server"]), 2)
    return columns


def record(row: dict[str, Any], path: Path) -> None:
    """Into the CSV; what was measured before keeps its machine and date."""
    earlier = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            earlier = list(csv.DictReader(file))
    if any(name not in old for old in earlier for name in row):
        raise ValueError(f"{path} holds other columns than these rows have; give another --csv")
    write_csv([row, *(old for old in earlier if any(old[name] != str(row[name]) for name in LOAD))], path)


def report(runs: dict[str, list[Run]]) -> None:
    def median(name: str, what: Callable[[Run], float]) -> float:
        return statistics.median(map(what, runs[name]))

    def row(said: str, what: Callable[[Run], float], form: str, compare: Callable[[float, float], str]) -> list[str]:
        engine, server = median("Engine", what), median("server", what)
        return [said, format(engine, form), format(server, form), compare(engine, server)]

    rows = [
        row("output tokens/s", tokens_a_second, ",.0f", lambda e, s: f"{s / e:.1%} of the engine's"),
    ]
    if runs["Engine"][0].first:
        added = lambda e, s: f"{s - e:+.2f}"  # noqa: E731
        rows += [
            row("time to first token, ms", to_first_token, ".2f", added),
            row("time between tokens, ms", between_tokens, ".2f", added),
        ]
    table(["median of the rounds", "Engine", "server", "difference"], rows)
    spread = {name: sorted(map(tokens_a_second, some)) for name, some in runs.items()}
    print("spread, tokens/s: " + "; ".join(f"{n} {s[0]:,.0f} to {s[-1]:,.0f}" for n, s in spread.items()))
    for name, some in runs.items():
        seconds = statistics.median(run.seconds for run in some)
        shares = {who: statistics.median(run.cpu[who] for run in some) for who in some[0].cpu}
        print(f"CPU seconds of {name}'s {seconds:.1f} s: " + ", ".join(f"{who} {s:.2f}" for who, s in shares.items()))


if __name__ == "__main__":
    run_main(main)
