"""What messages cost on this machine, by operation, size and number of ranks; and how fast its memory and arithmetic are.

    python -m common.distributed.measure_links --nproc 2 3 4
    torchrun --nproc_per_node=2 -m common.distributed.measure_links     # on GPUs if every rank has one

Writes figures/links.csv (make figures draws it, with the model beside it) and figures/machine.json, which
`python -m common.distributed.plan --machine figures/machine.json` plans with. A minute.

Each operation and size in turn, TURNS times; of a turn the lower quartile of its repetitions, of the turns the fastest:
others that use the machine make some of them slow (whoever waits for a message must get a core back first) and none fast.
Ranks of one host read one clock: an operation lasts from when its last sender is there until its last receiver has it.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.distributed.cost_model import Link, Sample
from common.distributed.launch import run_main
from common.distributed.machines import Machine, Speed
from common.distributed.messages import receive
from common.distributed.processes import refuse_too_many_ranks
from common.distributed.spawn import Follower
from common.layers.cpu_linear import column_major, packed, row_major
from common.layers.linear import multiply
from common.parallel_state import (
    TPGroup,
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    gather,
    initialize_tensor_parallel,
    receive_from,
    reduce_scatter,
    send_to,
    shutdown_tensor_parallel,
    start_exchange,
)
from common.teaching.report import FIGURES, write_csv, write_json
from common.values import new_file

SIZES = tuple(4**k for k in range(4, 12))  # bytes: 256 ... 4 MiB
TURNS = 4
MOVED = 1 << 22  # bytes a turn and size at least: small messages are repeated more often
MEMORY = tuple(1 << k for k in (20, 22, 24, 26, 28))  # bytes that a rank reads again and again
ROUNDS = 12  # of memory and arithmetic
ROWS, COLUMNS = 512, 1024  # of the product that measures arithmetic
OPS = ("all_reduce", "all_gather", "gather", "broadcast", "reduce_scatter", "all_to_all", "exchange", "send")
ONE_SENDS = ("broadcast", "send")  # rank 0: nobody else's start matters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, nargs="+", default=[2, 3, 4], help="numbers of ranks (not under torchrun)")
    parser.add_argument("--out", type=Path, default=FIGURES / "links.csv")
    parser.add_argument("--machine", type=Path, default=FIGURES / "machine.json")
    args = parser.parse_args()
    for name, path in (("--out", args.out), ("--machine", args.machine)):
        new_file(name, str(path))  # now, and not behind a minute of measuring
    if "WORLD_SIZE" in os.environ:
        tp = initialize_tensor_parallel()
        samples, speeds = measure(tp), at_once(tp)
        if tp.rank > 0:
            return
    else:
        if min(args.nproc) < 2:
            raise ValueError(f"--nproc {min(args.nproc)}: one rank has nobody to talk to; use 2 or more")
        refuse_too_many_ranks(f"--nproc {max(args.nproc)}", max(args.nproc), started=max(args.nproc) - 1)
        samples, speeds = measure_here(args.nproc)
    link = link_between(samples)
    report(samples, link)
    write_csv(
        [{"op": s.op, "ranks": s.ranks, "bytes": s.nbytes, "us": round(1e6 * s.seconds, 2)} for s in samples], args.out
    )
    write_json(this_machine(speeds, link).to_json(), args.machine)
    print(f"wrote {args.machine}")


def measure_here(
    nproc: Sequence[int], turns: int = TURNS, sizes: Sequence[int] = SIZES, memory: Sequence[int] = MEMORY
) -> tuple[list[Sample], dict[str, list[Speed]]]:
    """What is measured on this CPU with each number of ranks, this process and others that it starts; one rank too.

    sizes: bytes of messages. memory: bytes that a rank reads; none, for whoever asks about links alone.
    """
    samples: list[Sample] = []
    speeds = at_once(TPGroup(), memory)
    for ranks in nproc:
        arguments = {"ranks": ranks, "turns": turns, "sizes": list(sizes), "memory": list(memory)}
        follower = Follower("common.distributed.measure_links:answer", arguments)
        tp = initialize_tensor_parallel(ranks, "cpu", follower=follower)
        try:
            samples += measure(tp, turns, sizes)
            for kind, found in at_once(tp, memory).items():
                speeds[kind] += found
        finally:
            shutdown_tensor_parallel()
    return samples, speeds


def answer(ranks: int, turns: int, sizes: list[int], memory: list[int]) -> None:
    """The other processes: the same calls as rank 0's, then wait to be told to leave."""
    tp = initialize_tensor_parallel(ranks, "cpu")
    measure(tp, turns, sizes)
    at_once(tp, memory)
    receive(tp, "task")


def measure(tp: TPGroup, turns: int = TURNS, sizes: Sequence[int] = SIZES) -> list[Sample]:
    """On every rank: all operations of all sizes, in turn."""
    fastest: dict[tuple[str, int], float] = {}
    for _ in range(turns):
        for op in OPS:
            for nbytes in sizes:
                took = _turn(op, nbytes, tp)
                fastest[op, nbytes] = min(took, fastest.get((op, nbytes), took))
    return [Sample(op, tp.size, nbytes, seconds) for (op, nbytes), seconds in fastest.items()]


def behind_a_product(nbytes: int, product: int, turns: int = TURNS) -> tuple[float, float]:
    """Seconds of an all-reduce between two ranks of this CPU that come from another message, and of two that come from a product
    with a matrix of `product` bytes.

    A layer's sum is of the second kind, and the link's latency of the first: a core that has computed, and lost its caches to a
    matrix, takes longer to hand a message over.
    """
    follower = Follower(
        "common.distributed.measure_links:answer_behind", {"nbytes": nbytes, "product": product, "turns": turns}
    )
    tp = initialize_tensor_parallel(2, "cpu", follower=follower)
    try:
        return _behind(nbytes, product, turns, tp)
    finally:
        shutdown_tensor_parallel()


def answer_behind(nbytes: int, product: int, turns: int) -> None:
    tp = initialize_tensor_parallel(2, "cpu")
    _behind(nbytes, product, turns, tp)
    receive(tp, "task")


def _behind(nbytes: int, product: int, turns: int, tp: TPGroup) -> tuple[float, float]:
    matrix, row = torch.ones(max(product // 4 // COLUMNS, 1), COLUMNS), torch.ones(1, COLUMNS)
    both = (None, lambda: multiply(row, matrix))
    took = [[_turn("all_reduce", nbytes, tp, before) for before in both] for _ in range(turns)]
    return min(alone for alone, _ in took), min(behind for _, behind in took)


def _turn(op: str, nbytes: int, tp: TPGroup, before: Callable[[], Any] | None = None) -> float:
    """The lower quartile of some repetitions. before: what each rank does between their meeting and the operation."""
    x = torch.zeros(nbytes // 4, device=tp.device)
    times = torch.empty(2, max(4, min(32, MOVED // nbytes)), dtype=torch.float64)  # when each began and ended here
    for i in range(times.shape[1]):
        _meet(tp)
        if before:
            before()
        times[0, i] = time.perf_counter()
        _operate(op, x, tp)
        _finish(tp)
        times[1, i] = time.perf_counter()
    everyone = torch.stack(all_gather(times, tp, "times"))  # COMM all-gather [2, n]: when each rank began and ended
    began = everyone[0, 0] if op in ONE_SENDS else everyone[:, 0].max(dim=0).values
    return statistics.quantiles((everyone[:, 1].max(dim=0).values - began).tolist())[0]


def _operate(op: str, x: torch.Tensor, tp: TPGroup) -> None:
    """Once, with x [n] on each rank."""
    rows, one_each = x[: len(x) // tp.size * tp.size].view(tp.size, -1), [1] * tp.size
    if op == "all_reduce":
        all_reduce(x, tp, "probe")  # COMM all-reduce [n]: how long it takes
    elif op == "all_gather":
        all_gather(x, tp, "probe")  # COMM all-gather [n]: how long it takes
    elif op == "gather":
        gather(x, tp, "probe")  # COMM gather [n]: how long it takes
    elif op == "broadcast":
        broadcast(x, tp, "probe")  # COMM broadcast [n]: how long it takes
    elif op == "reduce_scatter":
        reduce_scatter(rows, tp, "probe")  # COMM reduce-scatter [R, n/R]: how long it takes
    elif op == "all_to_all":
        all_to_all(rows, tp, "probe", one_each, one_each)  # COMM all-to-all [R, n/R]: how long it takes
    elif op == "exchange":
        around = ((tp.rank + 1) % tp.size, torch.empty_like(x), (tp.rank - 1) % tp.size)
        start_exchange(x, *around, tp, "probe")()  # COMM exchange [n]: how long it takes
    elif tp.rank == 0:
        send_to(x, 1, tp, "probe").wait()  # COMM send [n]: how long it takes; ranks 2, 3, ... look on
    elif tp.rank == 1:
        receive_from(x, 0, tp, "probe")  # COMM receive [n]: how long it takes


def at_once(tp: TPGroup, memory: Sequence[int] = MEMORY) -> dict[str, list[Speed]]:
    """Bytes a second that each of the ranks reads, by how many, and float32 operations a second, while all do the same.

    What reads is a product of one row with a matrix, in the quickest of the forms in which a model's may lie.
    """
    row = torch.ones(1, COLUMNS, device=tp.device)
    reading = []
    for nbytes in memory:
        matrix, took = torch.ones(nbytes // 4 // COLUMNS, COLUMNS, device=tp.device), float("inf")
        for form in (row_major, column_major, packed) if tp.device.type == "cpu" else (row_major,):
            laid = form(matrix)
            took = min(took, _each_of(lambda m=laid: multiply(row, m), max(1, min(16, MEMORY[-2] // nbytes)), tp))
        reading.append(Speed(tp.size, nbytes, nbytes / took))
    a, b = torch.ones(ROWS, COLUMNS, device=tp.device), torch.ones(COLUMNS, COLUMNS, device=tp.device)
    flops = 2 * ROWS * COLUMNS**2 / _each_of(lambda: a @ b, 1, tp)
    return {"reading": reading, "float32": [Speed(tp.size, 0, flops)]}


def _each_of(call: Callable[[], Any], times: int, tp: TPGroup) -> float:
    """Seconds of one call among `times`, of the slowest rank; the fastest of ROUNDS rounds."""
    fastest = float("inf")
    call()
    for _ in range(ROUNDS):
        _meet(tp)
        began = time.perf_counter()
        for _ in range(times):
            call()
        _finish(tp)
        mine = torch.tensor([(time.perf_counter() - began) / times])
        slowest = max(float(took) for took in all_gather(mine, tp, "times"))  # COMM all-gather [1]: who was slowest
        fastest = min(fastest, slowest)
    return fastest


def _meet(tp: TPGroup) -> None:
    all_reduce(torch.zeros(1, device=tp.device), tp, "ready")  # COMM all-reduce [1]: start together
    _finish(tp)


def _finish(tp: TPGroup) -> None:
    if tp.device.type == "cuda":
        torch.cuda.synchronize()


def link_between(samples: Sequence[Sample]) -> Link:
    """One link for all operations, from the numbers of ranks that have a core each, or the fewest there are."""
    fewest = min(sample.ranks for sample in samples)
    here = [sample for sample in samples if sample.ranks <= max(fewest, os.cpu_count() or 1)]
    return Link.fit(here)


def this_machine(speeds: dict[str, list[Speed]], link: Link) -> Machine:
    """For the planner: all ranks on one host, whose memory they share."""
    import psutil  # noqa: PLC0415, only here

    reading, flops = tuple(speeds["reading"]), {"float32": tuple(speeds["float32"])}
    memory, date = psutil.virtual_memory().total, time.strftime("%Y-%m-%d")
    return Machine(f"this machine, {os.cpu_count()} cores", memory, True, reading, flops, link, link, 1 << 20, date)


def report(samples: Sequence[Sample], link: Link) -> None:
    """A line for each operation and number of ranks: a link of its own, and how far off it and the common one are."""
    print(f"one link for all: {1e6 * link.latency_s:.0f} us a message, {link.bytes_per_s / 1e9:.2f} GB/s")
    for op, ranks in dict.fromkeys((s.op, s.ranks) for s in samples):
        mine = [s for s in samples if (s.op, s.ranks) == (op, ranks)]
        own = Link.fit(mine)
        first, last = mine[0], mine[-1]
        print(
            f"  {op:14s} R = {ranks}: {1e6 * first.seconds:7.0f} us ({first.nbytes} bytes) ... {1e3 * last.seconds:6.2f} ms "
            f"({last.nbytes >> 10} KiB); own fit {1e6 * own.latency_s:5.0f} us {own.bytes_per_s / 1e9:5.2f} GB/s, "
            f"off by {100 * own.error(mine):3.0f} %; the common one by {100 * link.error(mine):3.0f} %"
        )


if __name__ == "__main__":
    run_main(main)
