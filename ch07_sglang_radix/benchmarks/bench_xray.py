"""What an open X-ray page costs the engine: the same requests with and without a recorder, in turn, in one process.

    python -m ch07_sglang_radix.benchmarks.bench_xray

32 requests at a time, 48 tokens in of which 32 are shared, 64 out, on the bundled model: its steps are short, so that whatever is
done in between weighs more than with any real model. Beside the throughputs, which vary by more than the cost, the processor
time that recording took of the time that went by.
"""

import argparse
import statistics
import time

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.serving.xray.recorder import SHARE, Recorder
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.sampling.params import SamplingParams
from common.teaching.show import table

AT_ONCE, SHARED, OWN, OUT = 32, 32, 16, 64
SHARES = {"closed": None, "open": SHARE, "every step": 1.0}


class Clocked(Recorder):
    """Knows what it took."""

    seconds = 0.0
    told = 0

    def record(self) -> None:
        began = time.thread_time()
        super().record()
        self.seconds += time.thread_time() - began
        self.told += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each")
    parser.add_argument("--requests", type=int, default=256, help="in a round")
    args = parser.parse_args()
    wrapper = TPRadixAttentionModelWrapper(
        device="cpu", page_size=4, max_total_tokens=16384, max_running_requests=AT_ONCE
    )
    scheduler = TPScheduler(wrapper)
    recorders = {
        name: Clocked(scheduler, lambda line: None, share=share) if share else None for name, share in SHARES.items()
    }
    run(scheduler, AT_ONCE)  # warm
    speeds: dict[str, list[float]] = {name: [] for name in SHARES}
    went_by, steps = dict.fromkeys(SHARES, 0.0), dict.fromkeys(SHARES, 0)
    for _ in range(args.rounds):
        for name, recorder in recorders.items():
            if recorder:
                recorder.start()
                recorder.credit = 0.0  # the burst that it begins with is spent
            first, began = scheduler.step_number, time.perf_counter()
            run(scheduler, args.requests)
            seconds = time.perf_counter() - began
            went_by[name] += seconds
            steps[name] += scheduler.step_number - first
            speeds[name].append(args.requests * OUT / seconds)
            if recorder:
                recorder.stop()
    table(("page", "tokens/s", "lowest", "highest", "of the time %", "steps", "told"), [
        (
            name, round(statistics.median(speeds[name])), round(min(speeds[name])), round(max(speeds[name])),
            100 * recorder.seconds / went_by[name] if recorder else 0.0, steps[name], recorder.told if recorder else 0,
        )
        for name, recorder in recorders.items()
    ])  # fmt: skip


def run(scheduler: TPScheduler, requests: int) -> None:
    params = SamplingParams(max_new_tokens=OUT, ignore_eos=True)
    for i in range(requests):
        own = [100 + (scheduler.num_requests * 31 + j * 7) % 700 for j in range(OWN)]
        scheduler.enqueue(None, [50 + i % 8] * SHARED + own, params)
    scheduler.process_requests()


if __name__ == "__main__":
    run_main(main)
