"""What the engine does on an NVIDIA GPU, against the bytes it has to move.

    python -m ch07_sglang_radix.benchmarks.bench_gpu --part small        Qwen2.5-0.5B and Qwen3-0.6B: workloads A, C, D, step gaps
    python -m ch07_sglang_radix.benchmarks.bench_gpu --part large        Qwen2.5-7B: A64, D
    torchrun --nproc_per_node=2 -m ch07_sglang_radix.benchmarks.bench_gpu --part large        the same over two GPUs

Real configs, random bfloat16 weights, token ids in, no detokenisation, end of sequence ignored:

    A     256 requests, random.seed(0), prompts of randint(100, 1024) tokens randint(0, 10000), then answers of
          randint(100, 1024); temperature 0.6.    A64: its first 64
    C     8 groups x 32 requests, 2048 shared + 128 own prompt tokens, 128 out, greedy, interleaved; cold, then
          warm with new suffixes
    D     one request, 128 in, 512 out, greedy

Writes figures/bench_gpu_<part>.csv. The kernels one by one: python -m common.kernels.bench_kernels.
"""

import argparse
import gc
import random
import time
from pathlib import Path

import torch

from ch07_sglang_radix.engine import Engine
from common.distributed.launch import run_main
from common.models.published_configs import shared_random_weights
from common.parallel_state import TPGroup, initialize_tensor_parallel
from common.teaching.report import FIGURES, write_csv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", required=True, choices=("small", "large"))
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise ValueError("bench_gpu needs an NVIDIA GPU, and there is none; bench_cpu.py measures a CPU")
    tp = initialize_tensor_parallel(device="cuda")
    names = ["Qwen2.5-0.5B", "Qwen3-0.6B"] if args.part == "small" else ["Qwen2.5-7B"]
    rows = [row for name in names for row in measure_model(name, tp)]
    if tp.rank == 0:
        write_csv(rows, args.out / f"bench_gpu_{args.part}{f'_tp{tp.size}' if tp.size > 1 else ''}.csv")


def measure_model(name: str, tp: TPGroup) -> list[dict]:
    """Start the engine, run the workloads of this model, and look at the gaps between decode steps."""
    folder = shared_random_weights(name, tp)
    began = time.perf_counter()
    engine = Engine(str(folder), device="cuda")
    rows = []

    def note(workload: str, metric: str, value: float) -> None:
        if tp.rank == 0:
            rows.append(
                {"model": name, "ranks": tp.size, "workload": workload, "metric": metric, "value": round(value, 4)}
            )
            print(f"{name:13s} R={tp.size} {workload:20s} {metric:24s} {value:12.3f}", flush=True)

    note("start", "seconds to ready", time.perf_counter() - began)
    work = Workloads(engine)
    work.d(32)
    note("D", "ms per token", min(work.d() for _ in range(2)))
    count = 64 if "7B" in name else 256
    label = "A64" if "7B" in name else "A"
    for i in (1, 2):
        note(label, f"tokens/s run {i}", work.a(count))
    if name == "Qwen2.5-0.5B":
        for label in ("cold", "warm"):
            speed, hit_rate = work.c(fresh=label == "cold")
            note(f"C {label}", "tokens/s", speed)
            note(f"C {label}", "hit rate", hit_rate)
    work.gaps(True)  # the first profile of a process is slower
    for overlap in (True, False):
        step, idle = work.gaps(overlap)
        how = "overlap" if overlap else "no overlap"
        note(f"64 running {how}", "us per decode step", step)
        note(f"64 running {how}", "us idle per decode step", idle)
    engine = work.engine = None  # the next model needs the room
    gc.collect()
    torch.cuda.empty_cache()
    return rows


class Workloads:
    """The requests of the header, on one engine."""

    def __init__(self, engine: Engine):
        self.engine = engine
        random.seed(0)
        self.prompts = [[random.randint(0, 10_000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
        self.lengths = [random.randint(100, 1024) for _ in range(256)]
        self.shared = [[random.randint(0, 10_000) for _ in range(2048)] for _ in range(8)]

    def run(self, prompts: list[list[int]], lengths: list[int], temperature: float = 0.0) -> tuple[float, list[dict]]:
        """Seconds, and the results."""
        params = [{"max_new_tokens": n, "temperature": temperature, "ignore_eos": True} for n in lengths]
        torch.cuda.synchronize()
        began = time.perf_counter()
        results = self.engine.generate(input_ids=prompts, sampling_params=params)
        return time.perf_counter() - began, results

    def forget(self) -> None:
        if self.engine.scheduler.tp.rank == 0:
            self.engine.scheduler.tree.evict(self.engine.scheduler.pool.size)

    def d(self, length: int = 512) -> float:
        """ms per token of one request."""
        self.forget()
        return self.run([self.prompts[0][:128]], [length])[0] / length * 1e3

    def a(self, count: int) -> float:
        """Tokens put out a second."""
        self.forget()
        seconds, _ = self.run(self.prompts[:count], self.lengths[:count], temperature=0.6)
        return sum(self.lengths[:count]) / seconds

    def c(self, fresh: bool) -> tuple[float, float]:
        """Tokens put out a second, and the share of prompt tokens that were cached."""
        if fresh:
            self.forget()
        prompts = [self.shared[i % 8] + [random.randint(0, 10_000) for _ in range(128)] for i in range(256)]
        seconds, results = self.run(prompts, [128] * 256)
        cached = sum(result["meta_info"]["cached_tokens"] for result in results)
        return 256 * 128 / seconds, cached / sum(map(len, prompts))

    def gaps(self, overlap: bool) -> tuple[float, float]:
        """(us a decode step, us of it in which no kernel ran on this GPU): 64 requests, from a profile."""
        scheduler = self.engine.scheduler
        before, scheduler.overlap = scheduler.overlap, overlap
        self.forget()
        steps = 40
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.run([prompt[:100] for prompt in self.prompts[:64]], [steps] * 64, temperature=0.6)
        scheduler.overlap = before
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        # the last three quarters are decode steps only
        spans = spans[len(spans) // 4 :]
        busy, end = 0.0, spans[0][0]
        for start, stop in spans:
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        total = end - spans[0][0]
        steps *= 0.75
        return total / steps, (total - busy) / steps


if __name__ == "__main__":
    run_main(main)
