"""The requests with which an engine is measured on a GPU; bench_gpu.py says what each is."""

import random
import time

import torch

from ch07_sglang_radix.engine import Engine

LONG, LONG_CHUNKS = 32_000, (8192, 4096, 2048)


class Workloads:
    """The requests A, C, D and 32k of bench_gpu.py, on one engine. last_id: of the tokens that prompts are made of."""

    def __init__(self, engine: Engine, last_id: int = 10_000):
        self.engine, self.last_id = engine, last_id
        random.seed(0)
        self.prompts = [[random.randint(0, last_id) for _ in range(random.randint(100, 1024))] for _ in range(256)]
        self.lengths = [random.randint(100, 1024) for _ in range(256)]
        self.shared = [[random.randint(0, last_id) for _ in range(2048)] for _ in range(8)]

    def run(self, prompts: list[list[int]], lengths: list[int], temperature: float = 0.0) -> tuple[float, list[dict]]:
        """Seconds, and the results."""
        params = [{"max_new_tokens": n, "temperature": temperature, "ignore_eos": True} for n in lengths]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        results = self.engine.generate(input_ids=prompts, sampling_params=params)
        return time.perf_counter() - began, results

    def forget(self) -> None:
        if self.engine.scheduler.replica.rank == 0:
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

    def first_token(self, length: int, chunk: int) -> float:
        """Seconds until the first token of a prompt of `length`, `chunk` tokens a step."""
        self.forget()
        scheduler = self.engine.scheduler
        if scheduler.replica.rank == 0:
            before, scheduler.admission.budget = scheduler.admission.budget, chunk
        seconds, _ = self.run([[random.randint(0, self.last_id) for _ in range(length)]], [1])
        if scheduler.replica.rank == 0:
            scheduler.admission.budget = before
        return seconds

    def c(self, fresh: bool) -> tuple[float, float]:
        """Tokens put out a second, and the share of prompt tokens that were cached."""
        if fresh:
            self.forget()
        prompts = [self.shared[i % 8] + [random.randint(0, self.last_id) for _ in range(128)] for i in range(256)]
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
