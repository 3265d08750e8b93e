"""What the engine does on an NVIDIA GPU, against the bytes it has to move.

    python -m ch07_sglang_radix.benchmarks.bench_gpu --part small        Qwen2.5-0.5B and Qwen3-0.6B: workloads A, C, D, step gaps
    python -m ch07_sglang_radix.benchmarks.bench_gpu --part large        Qwen2.5-7B: A64, D
    torchrun --nproc_per_node=2 -m ch07_sglang_radix.benchmarks.bench_gpu --part large        the same over two GPUs
    python -m ch07_sglang_radix.benchmarks.bench_gpu --part kv           Qwen3-0.6B: A and D with pages of 16, 8 and 4 bits
    python -m ch07_sglang_radix.benchmarks.bench_gpu --part compile      Qwen2.5-0.5B: start, A, D: graphs, torch.compile, eager
    python -m ch07_sglang_radix.benchmarks.bench_gpu --part layouts      Qwen2.5-7B: D, A64, C, first token of a long prompt
    torchrun --nproc_per_node=2 -m ch07_sglang_radix.benchmarks.bench_gpu --part layouts [--pp-size 2]
    python -m ch07_sglang_radix.benchmarks.bench_gpu --part deterministic    Qwen3-0.6B: A and D with it and without, and E
    python -m ch07_sglang_radix.benchmarks.bench_gpu --part prefill      0.5B, 0.6B, 7B: F and A by cuda_graph_max_bs_prefill
    python -m ch07_sglang_radix.benchmarks.bench_gpu --part first        0.5B, 0.6B, 7B: F of an engine as it is by default
    python -m ch07_sglang_radix.benchmarks.bench_gpu --part products     0.5B, 7B: who multiplies, measured and guessed; D, A, A64
    python -m ch07_sglang_radix.benchmarks.bench_gpu --part busy         0.5B: A and C with half of the CPU's cores busy, and not

Real configs, random bfloat16 weights, token ids in, no detokenisation, end of sequence ignored:

    A     256 requests, random.seed(0), prompts of randint(100, 1024) tokens randint(0, 10000), then answers of
          randint(100, 1024); temperature 0.6.    A64: its first 64; with replicas also these 64 for each
    C     8 groups x 32 requests, 2048 shared + 128 own prompt tokens, 128 out, greedy, interleaved; cold, then
          warm with new suffixes
    D     one request, 128 in, 512 out, greedy
    E     500 prompts of 20 to 300 tokens, 64 out, greedy: all at once and cold, then in another order, in chunks of 512, from
          the tree; how many texts differ, and how many requests' logprobs
    F     200 requests one after the other, 16, 128 or 512 in, 1 out: ms to that token, and of the same prompt once more, from the
          tree; median and the 99th of 100
    32k   one request, 32,000 in, 1 out: seconds to the first token, in chunks of 8192, 4096 and 2048 tokens. Stages compute
          chunks side by side: m chunks take m + N - 1 turns of N stages, so smaller ones fill the pipeline better

Writes figures/bench_gpu_<part>.csv, and layouts_gpu_<layout>.csv. The kernels one by one: python -m common.kernels.bench_kernels.
"""

import argparse
import gc
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch

from ch07_sglang_radix.benchmarks.gpu_workloads import LONG, LONG_CHUNKS, Workloads
from ch07_sglang_radix.engine import Engine
from common.distributed.launch import run_main
from common.kernels import linear_choice
from common.models.published_configs import shared_random_weights
from common.parallel_state import ParallelState
from common.teaching.report import FIGURES, write_csv

PREFILL_GRAPHS = (0, 512, 2048)  # tokens
KV_DTYPES_HERE = ("bfloat16", "fp8_e4m3", "fp8_e5m2", "int8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part",
        required=True,
        choices=("small", "large", "kv", "compile", "layouts", "deterministic", "prefill", "first", "products", "busy"),
    )
    parser.add_argument("--pp-size", type=int, default=1, help="stages; the other ranks share each layer")
    parser.add_argument("--dp-size", type=int, default=1, help="replicas, each of the other ranks")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise ValueError("bench_gpu needs an NVIDIA GPU, and there is none; bench_cpu.py measures a CPU")
    parallel = ParallelState.initialize(None, args.pp_size, args.dp_size, device="cuda")
    names = ["Qwen2.5-0.5B", "Qwen3-0.6B"] if args.part == "small" else ["Qwen2.5-7B"]
    if args.part == "kv":
        rows = measure_kv("Qwen3-0.6B", parallel)
    elif args.part == "compile":
        rows = measure_compile("Qwen2.5-0.5B", parallel)
    elif args.part == "deterministic":
        rows = measure_deterministic("Qwen3-0.6B", parallel)
    elif args.part == "busy":
        rows = measure_busy("Qwen2.5-0.5B", parallel)
    elif args.part == "prefill":
        rows = [row for name in ("Qwen2.5-0.5B", "Qwen3-0.6B", *names) for row in measure_prefill(name, parallel)]
    elif args.part == "first":
        rows = [row for name in ("Qwen2.5-0.5B", "Qwen3-0.6B", *names) for row in measure_first(name, parallel)]
    elif args.part == "products":
        rows = [row for name in ("Qwen2.5-0.5B", *names) for row in measure_products(name, parallel)]
    else:
        rows = [row for name in names for row in measure_model(name, parallel, args.part)]
    if parallel.world.rank == 0:
        layout = "_".join(
            f"{kind}{n}" for kind, n in (("tp", parallel.tp.size), ("pp", args.pp_size), ("dp", args.dp_size)) if n > 1
        )
        part = "layouts_gpu" if args.part == "layouts" else f"bench_gpu_{args.part}"
        write_csv(rows, args.out / f"{part}{f'_{layout}' if layout else ''}.csv")


def measure_model(name: str, parallel: ParallelState, part: str) -> list[dict]:
    """Start the engine, run the workloads of this model, and look at the gaps between decode steps."""
    world, layout = parallel.world, parallel.layout
    folder = shared_random_weights(name, world)
    began = time.perf_counter()
    engine = Engine(str(folder), device="cuda", pp_size=layout.pp, dp_size=layout.dp)
    rows = []

    def note(workload: str, metric: str, value: float) -> None:
        if world.rank == 0:
            rows.append(
                {"model": name, "ranks": world.size, "workload": workload, "metric": metric, "value": round(value, 4)}
            )
            print(f"{name:13s} {layout!s:10s} {workload:20s} {metric:24s} {value:12.3f}", flush=True)

    note("start", "seconds to ready", time.perf_counter() - began)
    work = Workloads(engine)
    work.d(32)
    note("D", "ms per token", min(work.d() for _ in range(2)))
    count = 64 if "7B" in name else 256
    label = "A64" if "7B" in name else "A"
    for i in (1, 2):
        note(label, f"tokens/s run {i}", work.a(count))
        if layout.dp > 1:  # as much work for each as one replica has alone
            note(f"{label} a replica", f"tokens/s run {i}", work.a(count, layout.dp))
    if part == "layouts":
        for chunk in LONG_CHUNKS:
            note(f"32k in chunks of {chunk}", "s to first token", min(work.first_token(LONG, chunk) for _ in range(2)))
    if name == "Qwen2.5-0.5B" or part == "layouts":
        for label in ("cold", "warm"):
            speed, hit_rate = work.c(fresh=label == "cold")
            note(f"C {label}", "tokens/s", speed)
            note(f"C {label}", "hit rate", hit_rate)
    overlaps = () if part == "layouts" else (True, False)
    if overlaps:
        work.gaps(True)  # the first profile of a process is slower
    for overlap in overlaps:
        step, idle = work.gaps(overlap)
        how = "overlap" if overlap else "no overlap"
        note(f"64 running {how}", "us per decode step", step)
        note(f"64 running {how}", "us idle per decode step", idle)
    engine = work.engine = None  # the next model needs the room
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def report(told: dict[str, float], parallel: ParallelState, **who: object) -> list[dict]:
    """{metric: value} of a contender, as rows and on the screen; the ranks but 0, who have measured the same, say nothing."""
    if parallel.world.rank > 0:
        return []
    for metric, value in told.items():
        print(f"{' '.join(f'{key}={one}' for key, one in who.items()):45s} {metric:32s} {value:12.3f}", flush=True)
    return [who | {"metric": metric, "value": round(value, 4)} for metric, value in told.items()]


def measure_kv(name: str, parallel: ParallelState) -> list[dict]:
    """A and D of one model with each dtype of the pages."""
    folder, rows = shared_random_weights(name, parallel.world), []
    for dtype in KV_DTYPES_HERE:
        engine = Engine(str(folder), device="cuda", kv_cache_dtype=dtype)
        work = Workloads(engine)
        work.d(32)
        told = {"tokens in the pool": engine.get_server_info()["max_total_num_tokens"], "D ms per token": work.d()}
        told |= {f"A tokens/s run {i}": work.a(256) for i in (1, 2)}
        rows += report(told, parallel, model=name, kv_cache_dtype=dtype)
        engine = work = None  # the next one needs the room
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def measure_compile(name: str, parallel: ParallelState) -> list[dict]:
    """Seconds to ready, A and D of one model with the Triton kernels of this repository, with inductor's in their place, and
    with ours launched one by one, in turn and twice: the second start finds the caches filled."""
    folder, rows = shared_random_weights(name, parallel.world), []
    ways = {
        "triton": {}, "inductor": {"enable_torch_compile": True, "torch_compile_max_bs": 256},
        "triton, eager": {"disable_cuda_graph": True},
    }  # fmt: skip
    for run in (1, 2):
        for kernels, options in ways.items():
            began = time.perf_counter()
            engine = Engine(str(folder), device="cuda", **options)
            told = {"seconds to ready": time.perf_counter() - began}
            work = Workloads(engine)
            work.d(32)
            told |= {"D ms per token": min(work.d() for _ in range(2)), "A tokens/s": work.a(256)}
            rows += report(told, parallel, model=name, kernels=kernels, run=run)
            engine = work = None  # the next one needs the room
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def measure_deterministic(name: str, parallel: ParallelState) -> list[dict]:
    """A, D and E of one model without enable_deterministic_inference and with it."""
    folder, rows = shared_random_weights(name, parallel.world), []
    for on in (False, True):
        engine = Engine(str(folder), device="cuda", enable_deterministic_inference=on)
        work = Workloads(engine)
        work.d(32)
        told = {"D ms per token": work.d()} | {f"A tokens/s run {i}": work.a(256) for i in (1, 2)}
        told |= work.e()
        rows += report(told, parallel, model=name, deterministic=on)
        engine.shutdown()
        engine = work = None  # the next one needs the room
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def first_tokens(work: Workloads) -> dict[str, float]:
    """F of each length."""
    return {f"F {length} {metric}": value for length in (16, 128, 512) for metric, value in work.f(length).items()}


def measure_prefill(name: str, parallel: ParallelState) -> list[dict]:
    """Seconds to ready, F and A of one model with prefills as CUDA graphs up to so many tokens."""
    folder, rows = shared_random_weights(name, parallel.world), []
    for most in PREFILL_GRAPHS:
        began = time.perf_counter()
        engine = Engine(str(folder), device="cuda", cuda_graph_max_bs_prefill=most)
        told = {"seconds to ready": time.perf_counter() - began}
        work = Workloads(engine)
        told |= first_tokens(work)
        told |= {f"A tokens/s run {i}": work.a(256) for i in (1, 2)}
        rows += report(told, parallel, model=name, cuda_graph_max_bs_prefill=most)
        engine.shutdown()
        engine = work = None  # the next one needs the room
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def measure_first(name: str, parallel: ParallelState) -> list[dict]:
    """F of one model."""
    engine = Engine(str(shared_random_weights(name, parallel.world)), device="cuda")
    work = Workloads(engine)
    told = first_tokens(work)
    engine.shutdown()
    engine = work = None  # the next one needs the room
    gc.collect()
    torch.cuda.empty_cache()
    return report(told, parallel, model=name)


def measure_busy(name: str, parallel: ParallelState) -> list[dict]:
    """A and C of one engine with a process that never waits on half of the cores that this one may use, and without, in turn."""
    if parallel.world.size > 1:
        raise ValueError(
            f"--part busy on {parallel.world.size} ranks: each would keep its own half busy; run it on one"
        )
    work, rows = Workloads(Engine(str(shared_random_weights(name, parallel.world)), device="cuda")), []
    work.a(256)
    work.gaps(True)  # the first profile of a process is slower
    for run in (1, 2, 3):
        for busy in (0, len(psutil.Process().cpu_affinity()) // 2):
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            try:
                told = {
                    "A tokens/s": work.a(256),
                    "C cold tokens/s": work.c(True)[0],
                    "C warm tokens/s": work.c(False)[0],
                }
                step, idle = work.gaps(True)
            finally:
                for other in others:
                    other.kill()
                    other.wait()
            told |= {"64 running us a decode step": step, "of it without a kernel": idle}
            rows += report(told, parallel, model=name, busy_cores=busy, run=run)
    return rows


def measure_products(name: str, parallel: ParallelState) -> list[dict]:
    """What the engine measured at its start of who multiplies (common/kernels/linear_choice.py), and D and A with that and with
    what is guessed without: one engine, whose graphs are recorded anew, in turn and twice."""
    engine = Engine(str(shared_random_weights(name, parallel.world)), device="cuda")
    choices = engine.wrapper.linear_choices
    for choice in choices if parallel.world.rank == 0 else ():
        print(f"{name:13s} {choice}", flush=True)
    told = {
        "seconds to measure": sum(one.seconds for one in choices), "products measured": len(choices),
        "by the library": sum(not one.kernel for one in choices),
        "not as guessed": sum(not one.as_guessed for one in choices),
    }  # fmt: skip
    rows = report(told, parallel, model=name, who="start", run=1)
    work, label, count = Workloads(engine), *(("A64", 64) if "7B" in name else ("A", 256))
    for run in (1, 2):
        for who in ("guessed", "measured"):
            with linear_choice.forgotten() if who == "guessed" else nullcontext():
                for graphs in engine.wrapper.recorded:
                    graphs.forget()
                    graphs.capture()
                work.d(32)
                told = {"D ms per token": min(work.d() for _ in range(2)), f"{label} tokens/s": work.a(count)}
            rows += report(told, parallel, model=name, who=who, run=run)
    engine.shutdown()
    engine = work = None  # the next one needs the room
    gc.collect()
    torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    run_main(main)
