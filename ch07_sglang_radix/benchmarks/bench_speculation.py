"""A verify step of real shapes against its forwards: what the machinery around them costs.

    python -m ch07_sglang_radix.benchmarks.bench_speculation                     a GPU: Qwen2.5-7B, two drafters; minutes
    python -m ch07_sglang_radix.benchmarks.bench_speculation --part small        anywhere: two layers of Qwen2.5-0.5B

The drafters are a model of Qwen2.5-0.5B's shape, with the target's vocabulary, and an EAGLE head of the target's. All weights are
random, and random weights accept nothing: so acceptance is imposed. Guess i of a chain is taken to be right with the probability
RATES[i] if those before it were, drawn once for all steps; the walk is told so, everything else is what an engine does. The rates:

    EAGLE        0.79, 0.74, 0.72, 0.73, 0.67    Li et al. 2024, Vicuna-7B on MT-bench at temperature 0, the n-alpha of a chain
    draft model  0.75                            Leviathan et al. 2023, T5-XXL with T5-small on English-German at temperature 0

For one request and more: ms a token; of a step the verify forward and the drafter's forwards, each timed alone with the same
rows; the bound, both together over the tokens that a step brings; and the overhead, how much longer a step takes. The bundled
model on a CPU, with trained drafters: speculative/demo_5_who_guesses.py.

Writes figures/bench_speculation_<part>.csv.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ch07_sglang_radix.engine import Engine
from common.distributed.launch import run_main
from common.models.published_configs import published_config, shared_random_weights
from common.parallel_state import TPGroup
from common.teaching.report import FIGURES, write_csv

RATES = {"EAGLE": (0.79, 0.74, 0.72, 0.73, 0.67), "STANDALONE": (0.75,)}
STEPS = 4  # guesses of a chain
PARTS: dict[str, tuple[tuple[str, dict], tuple[str, dict], int, int]] = {  # target, draft model, tokens of prompt and answer
    "large": (("Qwen2.5-7B", {}), ("Qwen2.5-0.5B", {"vocab_size": 152064}), 128, 512),
    "small": (
        ("Qwen2.5-0.5B", {"num_hidden_layers": 2, "vocab_size": 4096}),
        ("Qwen2.5-0.5B", {"num_hidden_layers": 1, "vocab_size": 4096, "hidden_size": 448, "intermediate_size": 1024}),
        16, 48,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="large")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    if args.part == "large" and not torch.cuda.is_available():
        raise ValueError("the shapes of --part large need an NVIDIA GPU, and there is none; use --part small")
    (target, changes), (draft, draft_changes), prompt, new = PARTS[args.part]
    one = TPGroup(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    folder = shared_random_weights(target, one, **changes)
    paths = {
        "STANDALONE": shared_random_weights(draft, one, **draft_changes),
        "EAGLE": random_eagle(
            target, changes, Path(tempfile.gettempdir()) / "bench_checkpoints" / f"eagle-{args.part}"
        ),
    }
    common = {"model_path": str(folder), "device": args.device, "disable_radix_cache": True, "random_seed": 0}
    rows = []
    with Engine(**common) as engine:
        plain = {batch: measure_plain(engine, batch, prompt, new) for batch in args.batches}
    for algorithm, path in paths.items():
        with Engine(
            **common, speculative_algorithm=algorithm, speculative_draft_model_path=str(path), speculative_num_steps=STEPS,
            speculative_stand_down=False,
        ) as engine:  # fmt: skip
            for batch in args.batches:
                row = {
                    "target": target,
                    "drafter": algorithm,
                    "batch": batch,
                    "plain ms a token": round(plain[batch], 4),
                }
                rows.append(row | measure(engine, algorithm, batch, prompt, new))
                print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    write_csv(rows, args.out / f"bench_speculation_{args.part}.csv")


def random_eagle(target: str, changes: dict[str, Any], folder: Path) -> Path:
    """An EAGLE-1 head of the target's shape, in the published layout, with random weights."""
    config = published_config(target, **changes)
    d, width, dim = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    kv = config.num_key_value_heads * dim
    shapes = {
        "fc.weight": (d, 2 * d), "fc.bias": (d,), "layers.0.post_attention_layernorm.weight": (d,),
        "layers.0.self_attn.q_proj.weight": (d, d), "layers.0.self_attn.k_proj.weight": (kv, d),
        "layers.0.self_attn.v_proj.weight": (kv, d), "layers.0.self_attn.o_proj.weight": (d, d),
        "layers.0.mlp.gate_proj.weight": (width, d), "layers.0.mlp.up_proj.weight": (width, d),
        "layers.0.mlp.down_proj.weight": (d, width),
    }  # fmt: skip
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: (torch.randn(shape) * d**-0.5).to(torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
             "max_position_embeddings", "rms_norm_eps")  # fmt: skip
    raw = {name: getattr(config, name) for name in names} | {
        "architectures": ["LlamaForCausalLMEagle"], "model_type": "llama", "num_hidden_layers": 1, "hidden_act": "silu",
        "bias": True, "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


class Imposed:
    """The tokens that were drawn, changed such that so many guesses of each chain are right as the rates say.

    Between the draw and the walk: rank 0's text is what was drawn, lengths and pages are what the walk says. One rank.
    """

    def __init__(self, engine: Engine, rates: tuple[float, ...]):
        self.verifier = engine.wrapper.verifier
        self._receive, self.verifier.receive = self.verifier.receive, self
        self.rates, self.rng = rates, np.random.default_rng(0)

    def __call__(self, step, drawn: torch.Tensor) -> None:
        tokens = step.tree.tokens  # [B, N]
        batch, nodes = tokens.shape
        if nodes > 1:
            rates = [self.rates[min(i, len(self.rates) - 1)] for i in range(nodes - 1)]
            right = (self.rng.random((batch, nodes - 1)) < rates).cumprod(axis=1)
            right = torch.from_numpy(right.astype(bool)).to(tokens.device, non_blocking=True)
            wrong = (tokens[:, 1:] + 1) % self.verifier.vocab_size
            drawn = drawn.clone().view(batch, nodes)
            drawn[:, :-1] = torch.where(right, tokens[:, 1:], wrong)
            drawn = drawn.flatten()
        self._receive(step, drawn)


def expected_tokens(rates: tuple[float, ...], guesses: int) -> float:
    total, chance = 1.0, 1.0
    for i in range(guesses):
        chance *= rates[min(i, len(rates) - 1)]
        total += chance
    return total


def measure_plain(engine: Engine, batch: int, prompt: int, new: int) -> float:
    """ms a token of one request, among `batch`."""
    generate(engine, batch, prompt, 8)
    return min(generate(engine, batch, prompt, new) for _ in range(2)) / (new - 1) * 1e3


def generate(engine: Engine, batch: int, prompt: int, new: int) -> float:
    """Seconds from the first token to the last: the same once more with one token is what the prompt took."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 4000, (batch, prompt)).tolist()
    times = []
    for tokens in (1, new):
        synchronize(engine)
        start = time.perf_counter()
        engine.generate(input_ids=ids, sampling_params={"max_new_tokens": tokens, "ignore_eos": True})
        synchronize(engine)
        times.append(time.perf_counter() - start)
    return times[1] - times[0]


def measure(engine: Engine, algorithm: str, batch: int, prompt: int, new: int) -> dict[str, float]:
    imposed = Imposed(engine, RATES[algorithm])
    try:
        speculation = engine.scheduler.speculation
        generate(engine, batch, prompt, 16)
        runs = []
        for _ in range(2):
            before = speculation.launched
            runs.append((generate(engine, batch, prompt, new), speculation.launched - before))
        seconds, steps = min(runs)
        step = seconds / steps * 1e3
        verify, draft = forwards(engine, batch, prompt)
    finally:
        imposed.verifier.receive = imposed._receive
    tokens = batch * (new - 1) / steps / batch
    return {
        "ms a token": round(step / tokens, 4), "tokens a step": round(tokens, 3),
        "expected": round(expected_tokens(RATES[algorithm], STEPS), 3), "ms a step": round(step, 4),
        "verify forward ms": round(verify, 4), "draft forwards ms": round(draft, 4),
        "bound ms a token": round((verify + draft) / tokens, 4), "overhead": round(step / (verify + draft) - 1, 4),
    }  # fmt: skip


@torch.inference_mode()
def forwards(engine: Engine, batch: int, at: int) -> tuple[float, float]:
    """ms of the target's forward over all nodes, and of the drafter's, on rows whose last token stands at `at`."""
    executor, rng = engine.wrapper, np.random.default_rng(0)
    nodes, size = executor.verifier.options.nodes, executor.page_size
    pages = -(-(at + 2 * nodes) // size)
    rows, positions = np.arange(batch), np.full(batch, at)
    executor.table.set_pages([(row, 0, list(range(row * pages, (row + 1) * pages))) for row in range(batch)])
    guesses = rng.integers(0, 4000, batch * (nodes - 1)).tolist()
    parents = list(range(nodes - 1)) * batch

    def verify() -> None:
        executor.verify(rows, positions, nodes, guesses, parents)
        executor._emitting.clear()  # nobody draws

    def draft() -> None:
        executor.verifier.guess(rows, positions, nodes)

    return timed(engine, verify), timed(engine, draft)


def timed(engine: Engine, call: Callable[[], None], calls: int = 10) -> float:
    """ms a call, of several that queue up: the median of five."""
    times = []
    for _ in range(6):
        synchronize(engine)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(engine)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times[1:])


def synchronize(engine: Engine) -> None:
    if engine.wrapper.tp.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_main(main)
