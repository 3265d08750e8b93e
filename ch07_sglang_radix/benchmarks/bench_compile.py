"""torch.compile against the same layers without it, on a CPU: what a decode step takes, and what the start takes.

    python -m ch07_sglang_radix.benchmarks.bench_compile --model SmolLM2-135M
    python -m ch07_sglang_radix.benchmarks.bench_compile --model Qwen2.5-0.5B --layers 6 --vocab 16384

Random weights, float32, one thread; each step reads all weights from memory, as a real one does. One engine, whose small layers are
compiled (common/layers/compiled.py) in every other step and not in the ones between, so that whatever else the machine does hits
both alike. Printed: milliseconds of CPU time a step, the median and the lowest; seconds until everything is compiled, with
inductor's cache empty and with what the first time left there. On a GPU: bench_gpu.py --part compile.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.layers.compiled import MAX_ROWS, CompiledPieces
from common.models.published_configs import save_random_weights

BATCHES, CONTEXT, PAGE = (1, 8, 32), 128, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="SmolLM2-135M", help="a name of common/models/published_configs.py")
    parser.add_argument("--layers", type=int, help="cut it to so many")
    parser.add_argument("--vocab", type=int, help="cut its vocabulary to so many")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each kind (default 30)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    changes = {"num_hidden_layers": args.layers, "vocab_size": args.vocab}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        checkpoint = save_random_weights(
            args.model, Path(folder) / "weights", **{name: value for name, value in changes.items() if value}
        )
        began = time.process_time()
        wrapper = TPRadixAttentionModelWrapper(str(checkpoint), "cpu", PAGE, max_total_tokens=MAX_ROWS * 2 * CONTEXT)
        print(
            f"{args.model}, {len(wrapper.model.stage)} layers: ready after {time.process_time() - began:.1f} s without"
        )
        pieces = compiled(wrapper)
        for batch in BATCHES:
            plain, quick = steps(wrapper, pieces, batch, args.rounds)
            ratio = statistics.median(plain) / statistics.median(quick)
            print(f"{batch:3} rows   plain {shown(plain)}   compiled {shown(quick)}   x {ratio:.3f}", flush=True)


def compiled(wrapper: TPRadixAttentionModelWrapper):
    """The pieces, given to the model; says what compiling them took."""
    for cache in ("empty", "filled"):
        torch._dynamo.reset()
        pieces = CompiledPieces(wrapper.tp.device)
        pieces.give_to(wrapper.model.model)
        began = time.perf_counter(), sum(os.times()[:4])
        pieces.warm_up(wrapper.model, wrapper.dtype)
        spent, cpu = time.perf_counter() - began[0], sum(os.times()[:4]) - began[1]
        print(f"compiling with the cache {cache}: {cpu:.1f} s of CPU time, {spent:.1f} s", flush=True)
    return pieces


def steps(wrapper: TPRadixAttentionModelWrapper, pieces, batch: int, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of CPU time of decode steps of so many rows, without and with."""
    pages = 2 * CONTEXT // PAGE
    wrapper.table.set_pages([(row, 0, range(row * pages, (row + 1) * pages)) for row in range(batch)])
    rows, taken = np.arange(batch), {0: [], MAX_ROWS: []}
    for number in range(rounds + 2):
        for most, noted in taken.items():
            pieces.max_rows = most
            began = time.process_time()
            logits = wrapper.decode(rows, np.full(batch, CONTEXT))
            wrapper.receive_tokens(logits.argmax(-1))
            if number >= 2:  # the first ones find their caches and allocate
                noted.append(1e3 * (time.process_time() - began))
    return taken[0], taken[MAX_ROWS]


def shown(taken: list[float]) -> str:
    return f"{statistics.median(taken):7.2f} ms (lowest {min(taken):7.2f})"


if __name__ == "__main__":
    run_main(main)
