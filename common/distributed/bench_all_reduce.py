"""What an all-reduce between CPU ranks of one host costs through gloo and through shared memory, and what decode makes of it.

    python -m common.distributed.bench_all_reduce               # a minute; figures/all_reduce_cpu.csv, all_reduce_decode.csv
    python -m common.distributed.bench_all_reduce --ranks 3 --models --out /tmp/three      # messages alone

The ranks are the same processes for both ways, and the ways take turns: gloo, shm, gloo, shm. Messages are sent one behind the
other, as in a decode step, after a few to warm up; a round's value is the median of its messages, and the median of the rounds
counts, beside the lowest and the highest. Decode: B requests of 32 prompt tokens, 32 steps, greedy, with the gathering of
logits and the broadcast of tokens that an engine has, without its scheduler; random weights in the shape of the model; again
the median of the steps, and of the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.distributed.launch import run_main
from common.distributed.messages import receive
from common.distributed.spawn import Follower
from common.executor import Executor
from common.layers.vocab import gather_logits
from common.models.published_configs import CONFIGS, shared_random_weights
from common.parallel_state import TPGroup, all_reduce, broadcast, initialize_tensor_parallel
from common.teaching.report import FIGURES, write_csv
from common.teaching.show import check, heading, table

SIZES = tuple(4**i for i in range(1, 12))  # bytes: 4 .. 4 MiB
TINY = "tiny-qwen"
BATCHES = (1, 8)
PROMPT, STEPS = 32, 32
PAGE = 16


def main() -> None:
    args = parse_args()
    given = {"ranks": args.ranks, "rounds": args.rounds, "models": args.models}
    tp = start(args.ranks, Follower("common.distributed.bench_all_reduce:follow", given))
    messages, decode = measure(tp, args.rounds, args.models)
    heading(f"An all-reduce between {args.ranks} ranks of this host, us")
    show(messages, "bytes", "us")
    write_csv(messages, args.out / "all_reduce_cpu.csv")
    if decode:
        heading(f"A decode step on {args.ranks} ranks, ms")
        show(decode, "step", "ms")
        write_csv(decode, args.out / "all_reduce_decode.csv")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="*", choices=(TINY, *CONFIGS), default=[TINY, "SmolLM2-135M"])
    parser.add_argument("--out", type=Path, default=FIGURES, help="a folder")
    args = parser.parse_args()
    if args.ranks < 2 or args.rounds < 1:
        raise ValueError(f"ranks={args.ranks} must be at least 2, rounds={args.rounds} at least 1")
    return args


def start(ranks: int, follower: Follower | None = None) -> TPGroup:
    return initialize_tensor_parallel(ranks, "cpu", all_reduce="shm", follower=follower)


def follow(ranks: int, rounds: int, models: list[str]) -> None:
    tp = start(ranks)
    measure(tp, rounds, models)
    receive(tp, "task")  # that there is no more


def measure(tp: TPGroup, rounds: int, models: list[str]) -> tuple[list[dict], list[dict]]:
    """Rows of the two files; every rank makes the same calls."""
    ways = {"gloo": replace(tp, fast_all_reduce=None), "shm": tp}
    messages = []
    for size in SIZES:
        runs = {way: partial(one_message, group, size) for way, group in ways.items()}
        messages += [{"ranks": tp.size, "bytes": size} | row for row in in_turn(runs, rounds, "us", 1e6)]
    decode = []
    for name in models:
        folder = None if name == TINY else shared_random_weights(name, tp)
        engines = {way: Executor(folder, "cpu", PAGE, dtype="float32", max_total_tokens=PAGE * 64, tp=group,
                                 skip_tokenizer_init=True) for way, group in ways.items()}  # fmt: skip
        for batch in BATCHES:
            tokens = {way: [] for way in ways}
            runs = {way: partial(decode_steps, engine, batch, tokens[way]) for way, engine in engines.items()}
            rows = in_turn(runs, rounds, "ms", 1e3)
            sums = 2 * engines["gloo"].config.num_layers + 1
            step = f"{name}, {batch} running"
            decode += [{"ranks": tp.size, "step": step, "sums a step": sums} | row for row in rows]
            if tp.rank == 0:
                check(f"{step}: the same tokens either way", tokens["gloo"] == tokens["shm"])
    return messages, decode


def in_turn(runs: dict[str, Callable[[], float]], rounds: int, unit: str, scale: float) -> list[dict]:
    """A row a way: the median of its rounds, and their ends. A run returns seconds."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(rounds):
        for way, run in runs.items():
            seconds[way].append(scale * run())
    return [
        {"way": way, unit: round(statistics.median(s), 2), "lowest": round(min(s), 2), "highest": round(max(s), 2)}
        for way, s in seconds.items()
    ]


def one_message(tp: TPGroup, size: int) -> float:
    """Seconds of an all-reduce of so many bytes, the median of many."""
    x, spent = torch.zeros(size // 4), []
    for _ in range(200 if size <= 1 << 18 else 20):
        began = time.perf_counter()
        all_reduce(x, tp, "bench")  # COMM all-reduce [size / 4]: how long it takes
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def decode_steps(executor: Executor, batch: int, tokens: list) -> float:
    """Seconds of a decode step, the median of STEPS; the tokens are added to `tokens`."""
    rows, each = np.arange(batch), -(-(PROMPT + STEPS + 1) // PAGE)
    executor.table.set_pages([(row, 0, range(row * each, (row + 1) * each)) for row in rows])
    prompt = np.random.default_rng(0).integers(3, 200, size=batch * PROMPT)
    ones = np.ones(batch, dtype=np.int64)
    choose(executor, executor.ragged(prompt, rows, 0 * ones, PROMPT * ones, ones))
    spent = []
    for step in range(STEPS):
        began = time.perf_counter()
        tokens.append(choose(executor, executor.decode(rows, PROMPT + step + 0 * ones)))
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def choose(executor: Executor, logits_local: torch.Tensor) -> list[int]:
    """The best token of each row, as rank 0 sees it."""
    tp, best = executor.tp, torch.zeros(len(logits_local), dtype=torch.int64)
    logits = gather_logits(logits_local, executor.config.vocab_size, tp)
    if logits is not None:
        best = logits.argmax(dim=-1)
    broadcast(best, tp, "tokens")  # COMM broadcast [B]: what rank 0 chose
    executor.receive_tokens(best)
    return best.tolist()


def show(rows: list[dict], what: str, unit: str) -> None:
    """gloo and shm side by side."""
    pairs = zip(rows[::2], rows[1::2], strict=True)
    lines = [(g[what], g[unit], f"{g['lowest']}..{g['highest']}", s[unit], f"{s['lowest']}..{s['highest']}",
              f"{g[unit] / s[unit]:.1f}x") for g, s in pairs]  # fmt: skip
    table((what, "gloo", "from..to", "shm", "from..to", "gained"), lines)


if __name__ == "__main__":
    run_main(main)
