"""What a page of one token costs against a page of 16: the price of finding every token that is alike.

    python -m ch07_sglang_radix.benchmarks.bench_page_size      # about 2 minutes; writes figures/page_size.csv

The bundled model and the shape of Qwen2.5-0.5B cut to 6 layers and 16,384 words, random weights, float32, one thread.
Page sizes take turns in one process, so that whatever else the machine does hits all alike. Printed: tokens a second, the
median of the rounds and the lowest and highest; what of the prompts was found in the tree. Workloads:

    one       1 request, 512 + 64 tokens, nothing cached
    eight     8 requests of 16 to 256 tokens, 64 new ones each
    chat      multi-turn conversations behind one system prompt (workloads.py)
    short     a question of 12 to 30 tokens, asked twice: a large page finds nothing
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from ch07_sglang_radix.benchmarks.clients import Clients
from ch07_sglang_radix.benchmarks.workloads import Source, chat
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.models.published_configs import published_config
from common.parallel_state import initialize_tensor_parallel
from common.sampling.params import SamplingParams
from common.teaching.report import FIGURES, write_csv

SIZES, WORKLOADS, VOCAB, LAYERS = (1, 4, 16), ("one", "eight", "chat", "short"), 16_384, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=FIGURES / "page_size.csv")
    args = parser.parse_args()
    if args.rounds < 1:
        raise ValueError(f"rounds={args.rounds} must be at least 1")
    torch.set_num_threads(1)
    tp, rows = initialize_tensor_parallel(device="cpu"), []
    with tempfile.TemporaryDirectory() as folder:
        config = published_config("Qwen2.5-0.5B", num_hidden_layers=LAYERS, vocab_size=VOCAB)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for name, path in (("tiny_qwen", None), (f"Qwen2.5-0.5B, {LAYERS} layers", folder)):
            wrappers = {
                size: TPRadixAttentionModelWrapper(path, "cpu", size, max_total_tokens=8192, tp=tp) for size in SIZES
            }
            for workload in tqdm(WORKLOADS, desc=name, leave=False, disable=None):
                rows += compare(name, wrappers, workload, args.rounds)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    write_csv(rows, args.out)


def compare(name: str, wrappers: dict[int, TPRadixAttentionModelWrapper], workload: str, rounds: int) -> list[dict]:
    speeds, found = {size: [] for size in wrappers}, {}
    for round_ in range(rounds + 1):
        for size, wrapper in wrappers.items():
            speed, found[size] = run(wrapper, workload)
            if round_:  # the first warms up
                speeds[size].append(speed)
    base = statistics.median(speeds[SIZES[-1]])
    return [
        {
            "model": name, "workload": workload, "page size": size,
            "tokens/s": round(statistics.median(speeds[size])), "lowest": round(min(speeds[size])),
            "highest": round(max(speeds[size])), "against 16": round(statistics.median(speeds[size]) / base, 2),
            "found %": round(100 * found[size], 1),
        }
        for size in wrappers
    ]  # fmt: skip


def run(wrapper: TPRadixAttentionModelWrapper, workload: str) -> tuple[float, float]:
    """(prompt and new tokens a second, share of the prompt tokens that was found), with an empty tree."""
    scheduler, rng = TPScheduler(wrapper), random.Random(0)
    vocab = wrapper.config.vocab_size

    def ids(count: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(count)]

    began = time.perf_counter()
    if workload == "chat":
        outputs = Clients(scheduler, chat(Source(vocab, 0), scale=0.25)).run().values()
    elif workload == "short":
        questions, outputs = [ids(rng.randint(12, 30)) for _ in range(10)], []
        for question in [*questions, *questions]:
            outputs += serve(scheduler, [question], 8)
    else:
        prompts = [ids(512)] if workload == "one" else [ids(rng.randint(16, 256)) for _ in range(8)]
        outputs = serve(scheduler, prompts, 64)
    seconds = time.perf_counter() - began
    prompt, cached = sum(o.prompt_tokens for o in outputs), sum(o.cached_tokens for o in outputs)
    return (prompt + sum(o.completion_tokens for o in outputs)) / seconds, cached / prompt


def serve(scheduler: TPScheduler, prompts: list[list[int]], new_tokens: int) -> list:
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    for prompt in prompts:
        scheduler.add_request(input_ids=prompt, sampling_params=params)
    return list(scheduler.process_requests().values())


if __name__ == "__main__":
    run_main(main)
