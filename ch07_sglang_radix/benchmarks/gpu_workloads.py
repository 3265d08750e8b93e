"""The requests with which an engine is measured on a GPU; bench_gpu.py says what each is."""

import random
import time

import numpy as np
import torch

from ch07_sglang_radix.engine import Engine

LONG, LONG_CHUNKS = 32_000, (8192, 4096, 2048)


class Workloads:
    """The requests A, C, D, E, F and 32k of bench_gpu.py, on one engine. last_id: of the tokens that prompts are made of."""

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

    def a(self, count: int, replicas: int = 1) -> float:
        """Tokens put out a second. Each replica gets the same `count` requests: with others its longest would decide."""
        self.forget()
        prompts, lengths = (
            [each for each in some[:count] for _ in range(replicas)] for some in (self.prompts, self.lengths)
        )
        seconds, _ = self.run(prompts, lengths, temperature=0.6)
        return sum(lengths) / seconds

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

    def f(self, length: int, count: int = 200) -> dict[str, float]:
        """ms to the only token of a prompt of `length` that nobody has asked yet, and of the same one asked again."""
        self.forget()
        times: dict[str, list[float]] = {"new": [], "again": []}
        for _ in range(count):
            prompt = [random.randint(0, self.last_id) for _ in range(length)]
            for which in times.values():
                seconds, _ = self.run([prompt], [1])
                which.append(1000 * seconds)
        return {
            f"{which}, {name}": float(np.percentile(each, q))
            for which, each in times.items()
            for name, q in (("median ms", 50), ("p99 ms", 99))
        }

    def c(self, fresh: bool) -> tuple[float, float]:
        """Tokens put out a second, and the share of prompt tokens that were cached."""
        if fresh:
            self.forget()
        prompts = [self.shared[i % 8] + [random.randint(0, self.last_id) for _ in range(128)] for i in range(256)]
        seconds, results = self.run(prompts, [128] * 256)
        cached = sum(result["meta_info"]["cached_tokens"] for result in results)
        return 256 * 128 / seconds, cached / sum(map(len, prompts))

    def e(self, count: int = 500, length: int = 64, chunk: int = 512) -> dict[str, int]:
        """Of `count` prompts, how many get another text, and other logprobs, in another order, in chunks, from the tree."""
        draw = random.Random(1)
        prompts = [[draw.randint(0, self.last_id) for _ in range(draw.randint(20, 300))] for _ in range(count)]
        params = {"max_new_tokens": length, "temperature": 0.0, "ignore_eos": True}
        self.forget()
        first = self.engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)
        order, scheduler = draw.sample(range(count), count), self.engine.scheduler
        before, scheduler.admission.budget = scheduler.admission.budget, chunk
        again = [prompts[i] for i in order]
        told = self.engine.generate(input_ids=again, sampling_params=params, return_logprob=True)
        scheduler.admission.budget = before
        pairs = [(first[i], answer) for i, answer in zip(order, told, strict=True)]
        return {
            "E texts that differ": sum(a["output_ids"] != b["output_ids"] for a, b in pairs),
            "E requests with other logprobs": sum(_logprobs(a) != _logprobs(b) for a, b in pairs),
        }

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


def _logprobs(answer: dict) -> list[float]:
    return [one[0] for one in answer["meta_info"]["output_token_logprobs"]]
