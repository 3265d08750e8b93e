"""Communication beside computation: the all-reduce of one half of the tokens while the other half is computed.

    torchrun --nproc_per_node=2 ch06_tp_vllm/demo_10_overlap.py     # on GPUs if every rank has one

A stack of MLPs, each column-parallel, then row-parallel, then one all-reduce: nothing of the next layer can start before the
sum is there. Two halves of the tokens (micro-batches) do not depend on each other:

    one after the other   compute A   sum A   compute B   sum B   compute A   sum A  ...
    overlapped            compute A   compute B   compute A   compute B  ...
                                      sum A       sum B       sum A

What can be gained is the time of the sums; what it costs is that every product has half as many rows. The same numbers come
out. Last, what the cost model (common/distributed/cost_model.py) makes of two measured messages.
"""

import statistics
import time
from collections.abc import Callable

import torch

from common.distributed.cost_model import Link, rounds, wire_bytes
from common.distributed.launch import run_main
from common.parallel_state import TPGroup, all_reduce, initialize_tensor_parallel, start_all_reduce
from common.teaching.show import check, heading, table

HIDDEN, WIDTH, LAYERS = 896, 4864, 2  # of Qwen2.5-0.5B, two layers of it
TOKENS = {"cpu": 64, "cuda": 4096}
ROUNDS = 50  # all ways in turn; the median of each counts


def main() -> None:
    tp = initialize_tensor_parallel()
    if tp.size == 1:
        raise ValueError("one rank has nobody to talk to: torchrun --nproc_per_node=2 ch06_tp_vllm/demo_10_overlap.py")
    torch.manual_seed(0)
    dtype = torch.float32 if tp.device.type == "cpu" else torch.bfloat16
    share = -(-WIDTH // tp.size)
    weights = [
        (torch.randn(share, HIDDEN) / HIDDEN**0.5, torch.randn(HIDDEN, share) / WIDTH**0.5) for _ in range(LAYERS)
    ]
    weights = [(up.to(tp.device, dtype), down.to(tp.device, dtype)) for up, down in weights]
    x = torch.randn(TOKENS[tp.device.type], HIDDEN).to(tp.device, dtype)
    ways = {
        "computation alone": lambda: layer_by_layer([x], weights, lambda y: y),
        "communication alone": lambda: only_the_sums(x, tp),
        "one after the other": lambda: layer_by_layer([x], weights, lambda y: summed(y, tp)),
        "the same in two halves": lambda: layer_by_layer(x.chunk(2), weights, lambda y: summed(y, tp)),
        "two halves, overlapped": lambda: overlapped(x.chunk(2), weights, tp),
    }
    with torch.inference_mode():
        spent, results = measure(ways, tp)
        small, large = (fastest_sum(torch.zeros(n, device=tp.device), tp) for n in (2, 1 << 20))
        between = fastest_sum(torch.zeros(len(x), HIDDEN, device=tp.device, dtype=dtype), tp)
    if tp.rank > 0:
        return
    where = "CPU, gloo" if tp.device.type == "cpu" else f"{torch.cuda.get_device_name()}, NCCL"
    heading(f"{LAYERS} MLPs of {HIDDEN} x {WIDTH} on {tp.size} ranks, {len(x)} tokens, {where}")
    table(("", "ms a layer"), [(way, 1e3 * s / LAYERS) for way, s in spent.items()])
    whole, halves, together = list(spent.values())[2:]
    in_two, overlap = (1e3 * (seconds - whole) / LAYERS for seconds in (halves, together))
    print(
        f"  against one after the other: in two halves {in_two:+.2f} ms a layer, overlapped {overlap:+.2f} (minus: gained)"
    )
    same = torch.allclose(results["one after the other"], results["two halves, overlapped"], rtol=1e-2, atol=1e-2)
    check("overlapped or not, the numbers are the same", same)
    heading("The cost model: latency and bandwidth from an all-reduce of 8 bytes and one of 4 MB")
    latency = small / rounds("all_reduce", tp.size)
    bandwidth = (4 << 20) * 2 * (tp.size - 1) / tp.size / max(large - small, 1e-9)
    print(f"  {1e6 * latency:.0f} us a message, {bandwidth / 1e9:.2f} GB/s")
    nbytes = len(x) * HIDDEN * dtype.itemsize
    modelled = Link(latency, bandwidth).seconds("all_reduce", nbytes, tp.size)
    table(
        ("message", "bytes", "on the wire", "model, ms", "measured, ms"),
        [(f"[{len(x)}, {HIDDEN}]", nbytes, wire_bytes("all_reduce", nbytes, tp.size), 1e3 * modelled, 1e3 * between)],
    )


def mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x [T, D] -> this rank's partial sum [T, D]."""
    return torch.nn.functional.linear(torch.nn.functional.silu(torch.nn.functional.linear(x, up)), down)


def layer_by_layer(parts, weights, finish: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Each part through a layer, and its sum, before the next part."""
    parts = list(parts)
    for up, down in weights:
        parts = [part + finish(mlp(part, up, down)) for part in parts]
    return torch.cat(parts)


def overlapped(parts, weights, tp: TPGroup) -> torch.Tensor:
    """The sum of a part runs until its next layer needs it; meanwhile the other part is computed."""
    parts, waiting = list(parts), [lambda: 0 for _ in parts]
    for up, down in weights:
        for i in range(len(parts)):
            parts[i] = parts[i] + waiting[i]()
            y = mlp(parts[i], up, down)
            waiting[i] = start_all_reduce(y, tp, "down_proj")  # COMM all-reduce [T/2, D]: while the other half computes
    return torch.cat([part + wait() for part, wait in zip(parts, waiting, strict=True)])


def summed(y: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    return all_reduce(y, tp, "down_proj")  # COMM all-reduce [T, D]: partial sums -> full sum


def only_the_sums(x: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    y = x.clone()
    for _ in range(LAYERS):
        y = summed(y, tp)
    return y


def measure(ways: dict[str, Callable], tp: TPGroup) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Seconds of each way, in turn, the median. And what came out."""
    spent, results = {way: [] for way in ways}, {}
    for _ in range(ROUNDS):
        for way, run in ways.items():
            wait_for_all(tp)
            began = time.perf_counter()
            results[way] = run()
            wait_for_all(tp)
            spent[way].append(time.perf_counter() - began)
    return {way: statistics.median(seconds) for way, seconds in spent.items()}, results


def fastest_sum(x: torch.Tensor, tp: TPGroup) -> float:
    times = []
    for _ in range(20):
        wait_for_all(tp)
        began = time.perf_counter()
        summed(x, tp)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def wait_for_all(tp: TPGroup) -> None:
    if tp.device.type == "cuda":
        torch.cuda.synchronize()
    all_reduce(torch.zeros(1, device=tp.device), tp, "ready")  # COMM all-reduce [1]: start and stop together
    if tp.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_main(main)
