"""Why there is a KV cache, and why it is paged: the same requests three times.

    python ch06_tp_vllm/demo_6_kv_cache.py         # about half a minute

    none         every step computes the whole sequence again
    contiguous   K and V are appended to a tensor a request, as long as its longest possible answer
    paged        K and V lie in blocks, taken when needed

Then the memory side, counted and not timed: how many reserved slots hold nothing, for 2000 requests with lengths drawn
like those of a chat service, as requests run (the vLLM paper reports 60-80 % waste before, under 4 % after).
"""

import random
import time

import numpy as np
import torch

from ch06_tp_vllm import LLM, SamplingParams
from common.executor import Executor
from common.kv_cache import PagedKVCache
from common.launch import run_main
from common.paged_attention import AttentionMetadata, TorchNativeAttention
from common.parallel_state import initialize_tensor_parallel
from common.show import check, heading, table

MAX_LEN = 160  # what a contiguous cache reserves for each request
PROMPTS = [[100 + i] * 24 for i in range(4)]
NEW = 96


def main() -> None:
    initialize_tensor_parallel(device="cpu")
    executor = Executor(device="cpu", max_total_tokens=1024)
    heading(f"{len(PROMPTS)} requests, 24 tokens in, {NEW} out, one after the other on one thread")
    answers, rows = {}, []
    for name, generate in (("none", without_cache), ("contiguous", contiguous), ("paged", paged)):
        began = time.perf_counter()
        with torch.inference_mode():
            answers[name] = [generate(executor, prompt) for prompt in PROMPTS]
        rows.append((name, round(len(PROMPTS) * NEW / (time.perf_counter() - began))))
    llm = LLM(device="cpu", num_gpu_blocks_override=64)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    began = time.perf_counter()
    answers["batched"] = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    rows.append(("paged, all four at once", round(len(PROMPTS) * NEW / (time.perf_counter() - began))))
    table(("cache", "tokens/s"), rows)
    check("all four say the same", len({str(said) for said in answers.values()}) == 1)
    speed = dict(rows)
    print(f"  a cache is worth {speed['contiguous'] / speed['none']:.1f}x here, and more the longer the answer")

    heading("Reserved slots that hold nothing, 2000 requests, on average over their lives")
    waste = {"contiguous, 2048 each": contiguous_waste(2048)} | {
        f"blocks of {p}": block_waste(p) for p in (256, 64, 16)
    }
    table(("", "waste %"), [(name, 100 * share) for name, share in waste.items()])
    check("contiguous reservation wastes most of the memory", waste["contiguous, 2048 each"] > 0.6)
    check("blocks of 16 waste less than 4 %", waste["blocks of 16"] < 0.04)


class _Cache:
    """Attention over one request's own contiguous stretch: one page as long as the longest answer."""

    def __init__(self, executor: Executor, length: int):
        config, heads = executor.config, executor.model.heads
        self.executor, self.length = executor, length
        self.pages = PagedKVCache(config.num_layers, 1, length, heads.num_kv, config.head_dim, executor.dtype, "cpu")

    def step(self, tokens: list[int], start: int) -> int:
        """Compute `tokens` at positions start.. and return the best next one."""
        positions = torch.arange(start, start + len(tokens))
        starts, context = torch.tensor([0, len(tokens)]), torch.tensor([start + len(tokens)])
        meta = AttentionMetadata(positions, torch.zeros(1, 1, dtype=torch.int64), starts, context, self.length)
        model = self.executor.model
        hidden = model(torch.tensor(tokens), positions, TorchNativeAttention(self.pages, meta))
        return int(model.compute_logits(hidden[-1:])[0, : self.executor.config.vocab_size].argmax())


def without_cache(executor: Executor, prompt: list[int]) -> list[int]:
    """Every step begins at position 0."""
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(_Cache(executor, MAX_LEN).step(tokens, 0))
    return tokens[len(prompt) :]


def contiguous(executor: Executor, prompt: list[int]) -> list[int]:
    """The prompt once, then one token a step."""
    cache, out = _Cache(executor, MAX_LEN), []
    token = cache.step(prompt, 0)
    for i in range(NEW):
        out.append(token)
        if i + 1 < NEW:
            token = cache.step([token], len(prompt) + i)
    return out


def paged(executor: Executor, prompt: list[int]) -> list[int]:
    """The same in blocks of 16, through the executor's own page table."""
    one, size = np.ones(1, dtype=np.int64), executor.page_size
    blocks = random.sample(range(executor.kv_cache.num_pages), -(-(len(prompt) + NEW) // size))
    executor.table.set_pages([(0, 0, blocks)])
    logits = executor.ragged(np.array(prompt), 0 * one, 0 * one, len(prompt) * one, one)
    out = []
    for i in range(NEW):
        token = logits[:, : executor.config.vocab_size].argmax(dim=-1)
        out.append(int(token))
        executor.receive_tokens(token)
        if i + 1 < NEW:
            logits = executor.decode(0 * one, (len(prompt) + i) * one)
    return out


def lengths() -> list[tuple[int, int]]:
    """(prompt, answer) of 2000 requests: log-normal, like the logs of chat services; at most 1024 each."""
    rng = random.Random(0)
    draw = lambda median, spread: min(1024, max(8, round(rng.lognormvariate(0, spread) * median)))  # noqa: E731
    return [(draw(160, 0.9), draw(220, 0.7)) for _ in range(2000)]


def contiguous_waste(reserved: int) -> float:
    """A slot is wasted in each step in which it is reserved and empty."""
    used = sum(sum(range(prompt, prompt + out)) for prompt, out in lengths())
    held = sum(reserved * out for _, out in lengths())
    return 1 - used / held


def block_waste(size: int) -> float:
    used = sum(sum(range(prompt, prompt + out)) for prompt, out in lengths())
    held = sum(sum(-(-n // size) * size for n in range(prompt, prompt + out)) for prompt, out in lengths())
    return 1 - used / held


if __name__ == "__main__":
    run_main(main)
