"""What the planner says of this machine, beside what is measured on it.

    python -m common.distributed.check_plan                       # measures links, memory and arithmetic first; a minute
    python -m common.distributed.check_plan --machine figures/machine.json

Decode steps of a published shape with random weights, float32, ranks over gloo: rank 0 sends a task, all compute, rank 0
gathers the logits, chooses and sends the tokens, as an engine does without its scheduler. The planner's time is a bound (of
experts what is to be expected); measured / bound is what kernels, their calls from Python and everything else take on top:
between 1 and FACTOR for a model that does not fit into a cache; more for the bundled one, whose products are over before Python
has called the next.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from common.attention.kv_cache import PagedKVCache
from common.distributed.launch import run_main
from common.distributed.layout import Layout
from common.distributed.machines import Machine
from common.distributed.measure_links import behind_a_product, link_between, measure_here, this_machine
from common.distributed.messages import receive, send, start_send
from common.distributed.spawn import Follower
from common.executor import Executor
from common.models.config import ModelConfig
from common.models.links import Logits
from common.models.published_configs import model_shape, save_random_weights
from common.parallel_state import ParallelState, TPGroup, all_reduce, broadcast, shutdown_tensor_parallel
from common.planner.bounds import bound
from common.planner.choice import room_of
from common.planner.holdings import of_stage, stages
from common.planner.plan import Load, Way
from common.teaching.show import check, table
from common.tiny_qwen import TINY_QWEN_PATH

FACTOR = 4.0  # two ranks that cut the layers over gloo come to 3.7; all else stays below 2.7
PAGE_SIZE = 16
STEPS, WARM_UP = 24, 4
LOADS = ((512, 1), (512, 8))  # context, requests
LAYOUTS = {str(layout): layout for layout in (Layout(), Layout(2), Layout(1, 2), Layout(1, 1, 2))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["bundled", "SmolLM2-135M"], help="bundled, or published shapes")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument(
        "--machine", type=Path, metavar="FILE", help="what measure_links.py has written; default: measure now"
    )
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        raise ValueError(
            "check_plan starts the ranks of each layout itself: python -m common.distributed.check_plan, without torchrun"
        )
    for name in args.model:
        if name != "bundled":
            model_shape(name)  # refuses what there is not, before anything is measured
    if args.machine:
        machine = Machine.from_file(args.machine)
    else:
        samples, speeds = measure_here([2], turns=2)
        machine = this_machine(speeds, link_between(samples))
    shapes = Path(tempfile.gettempdir()) / "bench_checkpoints"
    folders = {
        name: TINY_QWEN_PATH if name == "bundled" else save_random_weights(name, shapes / name) for name in args.model
    }
    rows = [
        row
        for name, folder in folders.items()
        for layout in map(LAYOUTS.__getitem__, args.layouts)
        for row in compare(name, folder, layout, machine)
    ]
    table(
        ("model", "layout", "requests", "context", "bound, ms", "measured, ms", "measured / bound", "the bound, ms"),
        rows,
    )
    check("weights and pages of rank 0 are those of the planner, to the byte", True)
    for name in args.model:
        ratios = [row[6] for row in rows if row[0] == name]
        far = sum(ratio > FACTOR for ratio in ratios)
        print(
            f"  {name}: measured / bound is {min(ratios):.2f} to {max(ratios):.2f}; {far} of {len(ratios)} above {FACTOR}"
            + ("; below 1, the machine was busy when it was measured" if min(ratios) < 1 else "")
        )
        for row in rows:
            if row[:3] == (name, str(Layout(2)), 1):
                explain(ModelConfig.from_folder(folders[name]), (row[5] - row[4]) / 1e3)


def explain(config: ModelConfig, seconds: float) -> None:
    """What one request's step on two ranks pays for its sums beyond the bound. seconds: measured less bound."""
    sums, load = 1 + 2 * config.num_layers, Load(1, 1, torch.float32, torch.float32)
    weights = of_stage(config, Way(Layout(2)), load, stages(config, 1)[0]).weights
    alone, after = behind_a_product(4 * config.hidden_size, weights // sums)
    print(
        f"  tp2: an all-reduce takes {1e3 * alone:.2f} ms between ranks that come from a message, as the bound has it, and "
        f"{1e3 * after:.2f} ms\n  between ranks that come from a product, as in a layer: for {sums} of them "
        f"{1e3 * sums * (after - alone):.0f} ms of the {1e3 * seconds:.0f} ms beyond the bound"
    )


def compare(name: str, folder: Path, layout: Layout, machine: Machine) -> list[tuple]:
    """A row a load. Ends the script if the planner's bytes are not those of rank 0."""
    config, rows = ModelConfig.from_folder(folder), []
    for (context, batch), (seconds, held) in zip(LOADS, measure(folder, layout), strict=True):
        load = Load(context, batch, torch.float32, torch.float32, PAGE_SIZE)
        least = bound(config, Way(layout), load, machine, room_of(machine, layout.world, None, 1.0))
        planned = of_stage(config, Way(layout), load, stages(config, layout.pp)[0])
        if (planned.weights, planned.kv) != held:
            check(f"{name}, {layout}: {planned.weights} and {planned.kv} bytes planned, {held} there", False)
        parts = ", ".join(f"{1e3 * s:.2f} {part}" for part, s in least.parts.items() if s > 0.005 * least.seconds)
        ratio = seconds / least.seconds
        rows.append((name, str(layout), batch, context, 1e3 * least.seconds, 1e3 * seconds, ratio, parts))
    return rows


def measure(folder: Path, layout: Layout) -> list[tuple[float, tuple[int, int]]]:
    """By load: seconds from one token of a request to its next, the lower quartile of STEPS; and the bytes of rank 0's weights
    and pages in use."""
    if layout.world == 1:
        return _serve(_executor(folder, ParallelState.of(TPGroup())))
    arguments = {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp}
    follower = Follower("common.distributed.check_plan:answer", arguments | {"folder": folder})
    parallel = ParallelState.initialize(layout.tp, layout.pp, layout.dp, device="cpu", follower=follower)
    try:
        return _serve(_executor(folder, parallel))
    finally:
        shutdown_tensor_parallel()


def answer(tp: int, pp: int, dp: int, folder: str) -> None:
    """The other ranks: what rank 0 of their replica sends; or they are that, and then wait to be told to leave."""
    executor = _executor(folder, ParallelState.initialize(tp, pp, dp, device="cpu"))
    if executor.parallel.replica.rank == 0:
        _serve(executor)
        receive(executor.parallel.world, "task")
    while True:
        task = receive(executor.parallel.replica, "task", direct=executor.parallel.pp.size > 1)
        context, first, rows, has_tokens = map(int, task)
        if has_tokens:
            _take_tokens(executor, torch.empty(rows, dtype=torch.int64))
        _launch(executor, context, first, rows)


def _executor(folder: str | Path, parallel: ParallelState) -> Executor:
    """With pages for the largest load, handed out to all rows."""
    pages, rows = (max(n) for n in zip(*((-(-context // PAGE_SIZE), batch) for context, batch in LOADS), strict=True))
    executor = Executor(
        str(folder), "cpu", PAGE_SIZE, dtype="float32", max_total_tokens=rows * pages * PAGE_SIZE,
        max_running_requests=rows, skip_tokenizer_init=True, parallel=parallel,
    )  # fmt: skip
    executor.table.set_pages([(row, 0, range(row * pages, (row + 1) * pages)) for row in range(rows)])
    return executor


def _serve(executor: Executor) -> list[tuple[float, tuple[int, int]]]:
    """On rank 0 of every replica, all replicas at once: each lane's tokens are taken before its next step is sent."""
    parallel, found = executor.parallel, []
    for context, batch in LOADS:
        mine = -(-batch // parallel.dp.size)
        lanes = min(parallel.pp.size, mine)
        executor.set_steps_in_flight(lanes)
        groups = np.array_split(np.arange(mine), lanes)
        waiting: list[Logits | None] = [None] * lanes
        times, sent = [], []
        ready = torch.zeros(1)
        all_reduce(ready, parallel.dp, "ready")  # COMM all-reduce [1]: the replicas begin together
        for _ in range(WARM_UP + STEPS):
            began = time.perf_counter()
            for lane, rows in enumerate(groups):
                logits = waiting[lane]
                tokens = logits().argmax(dim=-1) if logits else None
                task = np.array([context, rows[0], len(rows), tokens is not None])
                if parallel.pp.size > 1:  # as an engine does it: a stage is sent a task before it asks for one
                    sent += start_send(task, range(1, parallel.replica.size), parallel.replica, "task")
                else:
                    send(task, parallel.replica, "task")
                if tokens is not None:
                    _take_tokens(executor, tokens)
                waiting[lane] = _launch(executor, context, int(rows[0]), len(rows))
            times.append(time.perf_counter() - began)
        for logits in waiting:
            logits()
        for one in sent:
            one.wait()
        weights = sum(p.numel() for p in executor.model.parameters()) * executor.dtype.itemsize
        a_page = PagedKVCache.bytes_per_page(
            len(executor.model.stage),
            PAGE_SIZE,
            executor.model.heads.num_kv,
            dtype=executor.kv_dtype,
            **executor.config.kv_row,
        )
        found.append((statistics.quantiles(times[WARM_UP:])[0], (weights, mine * -(-context // PAGE_SIZE) * a_page)))
    return found


def _take_tokens(executor: Executor, tokens: torch.Tensor) -> None:
    broadcast(tokens, executor.parallel.replica, "tokens")  # COMM broadcast [B]: the tokens rank 0 chose
    executor.receive_tokens(tokens)


@torch.inference_mode()
def _launch(executor: Executor, context: int, first: int, rows: int) -> Logits | None:
    """One token for each of `rows` sequences, behind context - 1 others whose K and V are zeros."""
    local = executor.decode(np.arange(first, first + rows), np.full(rows, context - 1))
    return executor.links.bring_logits(local, rows)


if __name__ == "__main__":
    run_main(main)
