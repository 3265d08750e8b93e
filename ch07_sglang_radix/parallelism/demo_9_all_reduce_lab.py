"""The all-reduce in the laboratory: what one costs, what several cost in one message, and what hides behind a computation.

    torchrun --nproc_per_node=2 ch07_sglang_radix/parallelism/demo_9_all_reduce_lab.py

1. One message, through gloo's sockets and through memory that both ranks have mapped.
2. Eight small sums: one message each, or all in one. That helps where the sums do not need each other.
3. In a layer they do: the MLP reads what the attention's sum gives. Two layers' sums in one message are wrong numbers.
4. Two halves of a step in turn: twice the messages, and each travels while the other half is computed. Same numbers.
5. A decode step of the bundled model, through gloo and through shared memory. Same tokens.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from common.distributed.cost_model import wire_bytes
from common.distributed.launch import run_main
from common.executor import Executor
from common.layers.vocab import gather_logits
from common.parallel_state import TPGroup, all_reduce, all_reduce_together, broadcast, initialize_tensor_parallel
from common.teaching.show import check, heading, table

SIZES = (4, 3_584, 262_144)  # bytes; the second is a row of Qwen2.5-0.5B
SUMS = 8
PAGE, PROMPT, STEPS = 16, 24, 16


def main() -> None:
    shared = initialize_tensor_parallel(device="cpu", all_reduce="shm")
    if shared.size == 1:
        raise ValueError("one rank has nothing to add up: torchrun --nproc_per_node=2 this file")
    ways = {"gloo": replace(shared, fast_all_reduce=None), "shared memory": shared}
    say = Sayer(shared.rank == 0)
    with torch.inference_mode():
        one_message(ways, say)
        many_sums(ways, say)
        sums_that_need_each_other(shared, say)
        two_halves(shared, say)
        decode(ways, say)


class Sayer:
    """Rank 0 speaks."""

    def __init__(self, speaks: bool):
        self.heading, self.table, self.check, self.print = (
            how if speaks else (lambda *_: None) for how in (heading, table, check, print)
        )


def one_message(ways: dict[str, TPGroup], say: Sayer) -> None:
    say.heading("1. One all-reduce, us")
    rows = []
    for size in SIZES:
        x = torch.zeros(size // 4)
        rows.append((size, *(microseconds(lambda tp=tp, x=x: summed(x, tp)) for tp in ways.values())))
    say.table(("bytes", *ways), rows)


def many_sums(ways: dict[str, TPGroup], say: Sayer) -> None:
    say.heading(f"2. {SUMS} sums of 64 numbers that do not need each other, us")
    xs = [torch.full((64,), float(i)) for i in range(SUMS)]

    def apart(tp: TPGroup) -> list[torch.Tensor]:
        return [summed(x.clone(), tp) for x in xs]

    def together(tp: TPGroup) -> list[torch.Tensor]:
        return all_reduce_together(xs, tp, "lab")  # COMM all-reduce [8 * 64]: eight sums, one latency

    rows = [
        (how.__name__, messages(how, tp), *(microseconds(lambda g=g, how=how: how(g)) for g in ways.values()))
        for how, tp in ((apart, ways["gloo"]), (together, ways["gloo"]))
    ]
    say.table(("", "messages", *ways), rows)
    equal = all(map(torch.equal, apart(ways["gloo"]), together(ways["gloo"])))
    say.check("the sums are the same", equal)
    say.check(f"{SUMS} messages became one", [row[1] for row in rows] == [SUMS, 1])


def sums_that_need_each_other(tp: TPGroup, say: Sayer) -> None:
    """Two blocks with a residual: y = x + S(f x); z = y + S(g y). The second partial sum cannot be known before the first sum."""
    say.heading("3. A layer: the second sum is of numbers that the first one makes")
    own = torch.Generator().manual_seed(tp.rank)
    f, g = (torch.randn(4, 4, generator=own) / 2 for _ in range(2))
    x = torch.ones(1, 4)
    y = x + summed(x @ f, tp)
    right = y + summed(y @ g, tp)
    guess = x + x @ f  # all that this rank knows before the message
    pair = all_reduce_together([x @ f, guess @ g], tp, "lab")  # COMM all-reduce [8]: too early for the second
    early = x + pair[0] + pair[1]
    shown = [
        (name, 1 if name == "in one" else 2, *map(float, z[0])) for name, z in (("in turn", right), ("in one", early))
    ]
    say.table(("", "messages", "z0", "z1", "z2", "z3"), shown)
    say.check("in one message the numbers are others: a layer's two sums stay two", not torch.allclose(right, early))


def two_halves(tp: TPGroup, say: Sayer) -> None:
    say.heading("4. A prefill step as a whole, and in two halves that take turns")
    executor = Executor(None, "cpu", PAGE, max_total_tokens=PAGE * 8, tp=tp, enable_two_batch_overlap=True,
                        skip_tokenizer_init=True)  # fmt: skip
    rows, logits = [], []
    for halves in (False, True):
        executor.two_batch_overlap = halves
        with tp.ledger.recording() as ledger:
            logits.append(prefill(executor, 1))
        sums = [entry for entry in ledger.entries if entry.op == "all_reduce"]
        first = " ".join(f"{e.label.removeprefix('layers.')}{list(e.shape)}" for e in sums[:4])
        nbytes = sum(e.bytes for e in sums)
        wire = wire_bytes("all_reduce", nbytes, tp.size)
        rows.append(("two halves" if halves else "whole", len(sums), nbytes, wire, first))
    say.table(("", "sums", "bytes", "on the wire", "the first four"), rows)
    say.print("  on the wire: what a ring sends between all ranks together (common/distributed/cost_model.py)")
    say.check("twice the messages, the same bytes", rows[1][1] == 2 * rows[0][1] and rows[1][2] == rows[0][2])
    say.check("the same logits", torch.allclose(*logits, atol=1e-4))


def decode(ways: dict[str, TPGroup], say: Sayer) -> None:
    say.heading(f"5. A decode step of the bundled model, ms (the median of {STEPS})")
    rows, told = [], []
    for way, tp in ways.items():
        executor = Executor(None, "cpu", PAGE, max_total_tokens=PAGE * 8, tp=tp, skip_tokenizer_init=True)
        tokens, spent = [choose(executor, prefill(executor, 1))], []
        for step in range(STEPS):
            began = time.perf_counter()
            tokens.append(choose(executor, executor.decode(np.zeros(1, dtype=np.int64), np.array([PROMPT + step]))))
            spent.append(1e3 * (time.perf_counter() - began))
        told.append(tokens)
        rows.append((way, 1 + 2 * executor.config.num_layers, statistics.median(spent)))
    say.table(("", "sums a step", "ms"), rows)
    say.check("the same tokens", told[0] == told[1])


# --- small things


def summed(x: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    return all_reduce(x, tp, "lab")  # COMM all-reduce [any]: the subject of the lab


def microseconds(call: Callable[[], object]) -> float:
    """The median of many calls, made by all ranks alike."""
    spent = []
    for _ in range(100):
        began = time.perf_counter()
        call()
        spent.append(1e6 * (time.perf_counter() - began))
    return statistics.median(spent)


def messages(how: Callable[[TPGroup], object], tp: TPGroup) -> int:
    with tp.ledger.recording() as ledger:
        how(tp)
        return len(ledger.entries)


def prefill(executor: Executor, requests: int) -> torch.Tensor:
    """This rank's logits behind a prompt of PROMPT tokens."""
    rows, each = np.arange(requests), (PROMPT + STEPS) // PAGE + 1
    executor.table.set_pages([(row, 0, range(row * each, (row + 1) * each)) for row in rows])
    ones = np.ones_like(rows)
    return executor.ragged(np.arange(3, 3 + PROMPT * requests), rows, 0 * ones, PROMPT * ones, ones)


def choose(executor: Executor, logits_local: torch.Tensor) -> list[int]:
    """Rank 0 takes the best tokens, and tells them."""
    best = torch.zeros(len(logits_local), dtype=torch.int64)
    logits = gather_logits(logits_local, executor.config.vocab_size, executor.tp)
    best = best if logits is None else logits.argmax(dim=-1)
    broadcast(best, executor.tp, "tokens")  # COMM broadcast [B]: what rank 0 chose
    executor.receive_tokens(best)
    return best.tolist()


if __name__ == "__main__":
    run_main(main)
