"""nano-vllm's workload on any model, any number of ranks, CPU or GPU.

    python ch06_tp_vllm/bench_throughput.py --scale 0.5 --compare      # a laptop: 128 requests of 50..512 tokens, five minutes
    python ch06_tp_vllm/bench_throughput.py --published Qwen2.5-0.5B   # a GPU: all of it, random weights of that shape
    torchrun --nproc_per_node=2 ch06_tp_vllm/bench_throughput.py --scale 0.25

256 requests, random.seed(0), prompt and answer lengths uniform in 100..1024, temperature 0.6, end of text ignored. --scale
shrinks the number of requests and their lengths alike. --compare: the same requests, greedy, by transformers'
`generate` in batches of 8 (one thread, float32), in the same run and in turn: after each of its batches comes as
large a part of our steps, so that both meet whatever else the machine does. Everything is done three times, and the
round in the middle counts. --csv FILE writes the rows (figures/bench_throughput*.csv):

    tokens/s          answers' tokens over the whole time
    first token s     from the start to a request's first token: median and 99th percentile
    ms per token      of a request, from its first to its last token, median
    KV waste %        slots in held blocks that hold nothing, averaged over the steps
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from ch06_tp_vllm.llm_engine import LLMEngine
from ch06_tp_vllm.sampling_params import SamplingParams
from common.distributed.launch import run_main
from common.models.published_configs import CONFIGS, shared_random_weights
from common.parallel_state import initialize_tensor_parallel
from common.teaching.report import write_csv
from common.teaching.show import table
from common.teaching.transformers_peer import Request, generate_runner
from common.tiny_qwen import TINY_QWEN_PATH

PEER_BATCH = 8  # requests
ROUNDS = 3  # the one in the middle counts


def main() -> None:
    args = parse_args()
    tp = initialize_tensor_parallel(device=args.device)
    folder = shared_random_weights(args.published, tp) if args.published else args.model or TINY_QWEN_PATH
    engine = LLMEngine(str(folder), device=args.device, max_num_batched_tokens=args.max_num_batched_tokens)
    requests = workload(args.scale, engine.runner.config.vocab_size)
    serve(engine, requests[:4], 0.6, quiet=True)  # warm up
    before = engine.num_steps
    rounds = [serve(engine, requests, 0.6) for _ in range(ROUNDS)]
    rows = [{"contender": "this engine"} | sorted(rounds, key=lambda row: row.get("tokens/s", 0))[ROUNDS // 2]]
    if args.compare:
        rows += compare(engine, folder, requests, (engine.num_steps - before) // ROUNDS)
    if tp.rank > 0:
        return
    facts = {
        "model": args.published or Path(folder).name,
        "ranks": tp.size,
        "requests": len(requests),
        "scale": args.scale,
    }
    table(list(rows[0]), [list(row.values()) for row in rows])
    if args.csv:
        write_csv([facts | row for row in rows], args.csv)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local folder or a Hub id; default: the bundled model")
    parser.add_argument("--published", choices=CONFIGS, help="a published shape with random weights")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows")
    args = parser.parse_args()
    if not 0 < args.scale <= 1:
        raise ValueError(f"scale={args.scale} must be in (0, 1]")
    return args


def workload(scale: float, vocab_size: int) -> list[Request]:
    random.seed(0)
    low, high, count = max(1, round(100 * scale)), max(2, round(1024 * scale)), max(4, round(256 * scale))
    prompts = [
        [random.randint(0, min(10_000, vocab_size - 1)) for _ in range(random.randint(low, high))] for _ in range(count)
    ]
    return [Request(prompt, random.randint(low, high)) for prompt in prompts]


def serve(
    engine: LLMEngine, requests: list[Request], temperature: float, quiet: bool = False,
    pause: Callable[[], None] | None = None, forget: bool = True,
) -> dict:  # fmt: skip
    """All requests at once; what the columns say (rank 0), or nothing. `pause` is called before each step, off the clock.
    forget: the prefix cache is empty at first."""
    if engine.tp.rank == 0 and forget:
        engine.blocks.reset_prefix_cache()
    for i, request in enumerate(requests):
        params = SamplingParams(temperature=temperature, max_tokens=request.new_tokens, ignore_eos=True)
        engine.add_request(str(i), request.ids, params)
    if engine.tp.rank > 0:
        engine.runner.follow()
        engine.groups.clear()
        return {}
    silent = {name: group.requests[0] for name, group in engine.groups.items()}  # no token yet
    first, last, waste = {}, {}, []
    began = time.perf_counter()
    with tqdm(total=len(requests), desc="requests", disable=True if quiet else None, leave=False) as bar:
        while engine.has_unfinished_requests():
            if pause:
                stopped = time.perf_counter()
                pause()
                began += time.perf_counter() - stopped
            engine.run_step()
            now = time.perf_counter() - began
            for name in [name for name, request in silent.items() if request.output_token_ids]:
                first[name] = now
                del silent[name]
            for output in engine.outputs.take_outputs(only_finished=True):
                last[output.request_id] = now
                bar.update()
            if engine.num_steps % 8 == 0 and engine.scheduler.running:
                waste.append(kv_waste(engine))
    engine.runner.stop()
    seconds = time.perf_counter() - began
    tokens = sum(request.new_tokens for request in requests)
    between = [(last[str(i)] - first[str(i)]) / (r.new_tokens - 1) for i, r in enumerate(requests) if r.new_tokens > 1]
    return {
        "tokens/s": round(tokens / seconds, 1), "seconds": round(seconds, 2),
        "first token s, median": round(float(np.median(list(first.values()))), 3),
        "first token s, p99": round(float(np.percentile(list(first.values()), 99)), 3),
        "ms per token": round(1e3 * float(np.median(between)), 2), "KV waste %": round(100 * float(np.mean(waste)), 3),
    }  # fmt: skip


def kv_waste(engine: LLMEngine) -> float:
    """Share of the slots in held blocks that hold no token; a block held by several counts once."""
    held = {block for request in engine.scheduler.running for block in request.block_table}
    size = engine.blocks.block_size
    empty = sum(len(r.block_table) * size - r.num_computed_tokens for r in engine.scheduler.running)
    return empty / (len(held) * size) if held else 0.0


def compare(engine: LLMEngine, folder, requests: list[Request], steps: int) -> list[dict]:
    """The rows of this engine and of transformers' generate (one thread, float32, on rank 0 alone), both greedy.

    steps: how many this engine takes for the requests.
    """
    if engine.tp.rank > 0:
        for _ in range(ROUNDS):
            serve(engine, requests, 0.0)
        return []
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False)
    generate = generate_runner(model, PEER_BATCH)
    generate(requests[:1])  # warm up
    rounds = []  # (our row, their seconds)
    for i in range(ROUNDS):
        rounds.append(take_turns(engine, requests, generate, steps))
        faster = rounds[-1][1] / rounds[-1][0]["seconds"]
        print(
            f"round {i + 1} of {ROUNDS}: this engine is {faster:.2f}x as fast as generate in batches of {PEER_BATCH}",
            flush=True,
        )
    ours, seconds = sorted(rounds, key=lambda pair: pair[1] / pair[0]["seconds"])[ROUNDS // 2]
    speed = sum(request.new_tokens for request in requests) / seconds
    peer = dict.fromkeys(ours, "") | {"tokens/s": round(speed, 1), "seconds": round(seconds, 2)}
    return [
        {"contender": "this engine, greedy"} | ours,
        {"contender": "transformers generate, greedy"} | peer,
    ]


def take_turns(engine: LLMEngine, requests: list[Request], generate, steps: int) -> tuple[dict, float]:
    """One round: a batch of theirs whenever they are not ahead. Our row, their seconds."""
    batches = [requests[i : i + PEER_BATCH] for i in range(0, len(requests), PEER_BATCH)]
    theirs, first = [], engine.num_steps

    def their_turn() -> None:
        if len(theirs) < len(batches) and (engine.num_steps - first) * len(batches) >= len(theirs) * steps:
            theirs.append(generate(batches[len(theirs)]))

    ours = serve(engine, requests, 0.0, pause=their_turn)
    theirs += [generate(batch) for batch in batches[len(theirs) :]]
    return ours, sum(theirs)


if __name__ == "__main__":
    run_main(main)
