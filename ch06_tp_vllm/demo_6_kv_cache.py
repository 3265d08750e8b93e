"""Why there is a KV cache, and why it is paged: the same requests with each kind of cache.

    python ch06_tp_vllm/demo_6_kv_cache.py         # about half a minute
    python ch06_tp_vllm/demo_6_kv_cache.py --csv figures/kv_cache.csv

    none         every step computes the whole sequence again
    contiguous   K and V are appended to a tensor a request, as long as its longest possible answer
    paged        K and V lie in blocks, taken when needed

Then the memory side, counted and not timed: how many reserved slots hold nothing, for 2000 requests with lengths drawn
like those of a chat service, as requests run (the vLLM paper reports 60-80 % waste before, under 4 % after).
"""

import random
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from ch06_tp_vllm import LLM, SamplingParams
from common.executor import Executor
from common.kv_cache import PagedKVCache
from common.launch import run_main
from common.paged_attention import AttentionMetadata, TorchNativeAttention
from common.parallel_state import initialize_tensor_parallel
from common.report import csv_option, write_csv
from common.show import check, heading, table

Answers = list[list[int]]
MAX_LEN = 512  # what a contiguous cache reserves for each request: it may become as long as that
REQUESTS = [(24, 96), (40, 32), (8, 64), (120, 48)]  # tokens in, tokens out
BLOCK_SIZES = (256, 64, 16)
POOL = 65536  # slots
ROUNDS = 3  # the fastest counts: the first warms up, and a laptop does other things beside


def main() -> None:
    csv = csv_option(__doc__)
    initialize_tensor_parallel(device="cpu")
    heading(f"{len(REQUESTS)} requests (tokens in, out: {str(REQUESTS)[1:-1]}), one after the other, one thread")
    rows = speed_and_waste()
    heading("The memory side of 2000 requests with lengths like those of a chat service")
    chats = memory_of_a_chat_service()
    if csv:
        columns = dict.fromkeys(("requests", *rows[0], *chats[0]), "")
        rows = [columns | {"requests": "these four"} | row for row in rows]
        write_csv(rows + [columns | {"requests": "chat"} | row for row in chats], csv)


def speed_and_waste() -> list[dict]:
    """The same requests with each kind of cache: {cache, tokens/s, waste %}."""
    prompts = [[100 + i] * length for i, (length, _) in enumerate(REQUESTS)]
    wanted = [out for _, out in REQUESTS]

    def one_by_one(generate: Callable, executor: Executor) -> Answers:
        with torch.inference_mode():
            return [generate(executor, prompt, new) for prompt, new in zip(prompts, wanted, strict=True)]

    def together(llm: LLM) -> Answers:
        params = [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True) for new in wanted]
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    executor = Executor(device="cpu", max_total_tokens=1024)
    ways = {  # how to answer, and the size of the pieces that slots come in
        "none": (partial(one_by_one, without_cache, executor), None),
        f"contiguous, {MAX_LEN} each": (partial(one_by_one, contiguous, executor), MAX_LEN),
    }
    for size in BLOCK_SIZES:
        blocks = Executor(device="cpu", page_size=size, max_total_tokens=1024)
        ways[f"blocks of {size}"] = (partial(one_by_one, paged, blocks), size)
    llm = LLM(device="cpu", num_gpu_blocks_override=64, enable_prefix_caching=False)
    ways["blocks of 16, all four at once"] = (partial(together, llm), 16)

    answers, seconds = [], {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (answer, _) in ways.items():
            began = time.perf_counter()
            answers.append(answer())
            seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, (_, size) in ways.items():
        share = 1 - reserved(1, REQUESTS) / reserved(size, REQUESTS) if size else 0.0
        speed = round(sum(wanted) / min(seconds[name]))
        rows.append({"cache": name, "tokens/s": speed, "waste %": round(100 * share, 2)})
    table(list(rows[0]), [list(row.values()) for row in rows])
    print("  waste: of the slots reserved for a request, those that hold nothing yet, on average over its steps")
    check("all of them say the same", all(said == answers[0] for said in answers))
    return rows


def memory_of_a_chat_service() -> list[dict]:
    """Counted, not timed: {cache, waste %, how many requests run at once}."""
    chat, sizes = chat_lengths(), {"contiguous, 2048 each": 2048} | {f"blocks of {p}": p for p in BLOCK_SIZES}
    rows = []
    for name, size in sizes.items():
        held = reserved(size, chat)
        share = round(100 * (1 - reserved(1, chat) / held), 2)
        rows.append({"cache": name, "waste %": share, f"run at once in {POOL} slots": int(POOL / held)})
    table(list(rows[0]), [list(row.values()) for row in rows])
    check("contiguous reservation wastes most of the memory", rows[0]["waste %"] > 60)
    check("blocks of 16 waste less than 4 %", rows[-1]["waste %"] < 4)
    return rows


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


def without_cache(executor: Executor, prompt: list[int], new: int) -> list[int]:
    """Every step begins at position 0."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(_Cache(executor, MAX_LEN).step(tokens, 0))
    return tokens[len(prompt) :]


def contiguous(executor: Executor, prompt: list[int], new: int) -> list[int]:
    """The prompt once, then one token a step."""
    cache, out = _Cache(executor, MAX_LEN), []
    token = cache.step(prompt, 0)
    for i in range(new):
        out.append(token)
        if i + 1 < new:
            token = cache.step([token], len(prompt) + i)
    return out


def paged(executor: Executor, prompt: list[int], new: int) -> list[int]:
    """The same in blocks from anywhere in the pool, through the executor's own page table."""
    one, size = np.ones(1, dtype=np.int64), executor.page_size
    blocks = random.sample(range(executor.kv_cache.num_pages), -(-(len(prompt) + new) // size))
    executor.table.set_pages([(0, 0, blocks)])
    logits = executor.ragged(np.array(prompt), 0 * one, 0 * one, len(prompt) * one, one)
    out = []
    for i in range(new):
        token = logits[:, : executor.config.vocab_size].argmax(dim=-1)
        out.append(int(token))
        executor.receive_tokens(token)
        if i + 1 < new:
            logits = executor.decode(0 * one, (len(prompt) + i) * one)
    return out


def chat_lengths() -> list[tuple[int, int]]:
    """(prompt, answer) of 2000 requests: log-normal, like the logs of chat services; at most 1024 each."""
    rng = random.Random(0)
    draw = lambda median, spread: min(1024, max(8, round(rng.lognormvariate(0, spread) * median)))  # noqa: E731
    return [(draw(160, 0.9), draw(220, 0.7)) for _ in range(2000)]


def reserved(size: int, requests: list[tuple[int, int]]) -> float:
    """Slots that a request holds, on average over all steps of all requests, if it gets them in pieces of `size`."""
    lengths = [n for prompt, out in requests for n in range(prompt, prompt + out)]
    return sum(-(-n // size) * size for n in lengths) / len(lengths)


if __name__ == "__main__":
    run_main(main)
