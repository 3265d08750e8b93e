"""Why there is a KV cache, and why it is paged: the same requests with each kind of cache.

    python ch06_tp_vllm/demo_6_kv_cache.py         # half a minute
    python ch06_tp_vllm/demo_6_kv_cache.py --csv figures/kv_cache.csv

    none         every step computes the whole sequence again
    contiguous   K and V are appended to a tensor a request, as long as its longest possible answer
    paged        K and V lie in blocks, taken when needed

First of all, what attention does with a block table, written out for one new token. Last, the memory side of 2000 simulated
requests of a chat service, counted and not timed (the vLLM paper reports 60-80 % waste before, under 4 % after).
"""

import math
import random
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from ch06_tp_vllm import LLM, SamplingParams
from ch06_tp_vllm.block_manager import BlockManager
from ch06_tp_vllm.request import Request
from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.torch_native import TorchNativeAttention
from common.distributed.launch import run_main
from common.executor import Executor
from common.parallel_state import initialize_tensor_parallel
from common.sampling.params import SamplingParams as RowParams
from common.teaching.report import csv_option, write_csv
from common.teaching.show import check, heading, mistake, table

Answers = list[list[int]]
MAX_LEN = 512  # what a contiguous cache reserves for each request: it may become as long as that
REQUESTS = [(24, 96), (40, 32), (8, 64), (120, 48)]  # tokens in, tokens out
BLOCK_SIZES = (256, 64, 16)
POOL = 65536  # slots
ROUNDS = 3  # all ways in turn, behind a request that warms them up: the median counts, and how far the rounds lie apart is said


def main() -> None:
    csv = csv_option(__doc__)
    initialize_tensor_parallel(device="cpu")
    attention_through_a_block_table()
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

    def one_by_one(generate: Callable, executor: Executor, requests: slice) -> Answers:
        with torch.inference_mode():
            some = zip(prompts[requests], wanted[requests], strict=True)
            return [generate(executor, prompt, new) for prompt, new in some]

    def together(llm: LLM, requests: slice) -> Answers:
        params = [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True) for new in wanted[requests]]
        return [output.outputs[0].token_ids for output in llm.generate(prompts[requests], params, use_tqdm=False)]

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

    for answer, _ in ways.values():
        answer(slice(1))
    answers, seconds = [], {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (answer, _) in ways.items():
            began = time.perf_counter()
            answers.append(answer(slice(None)))
            seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, (_, size) in ways.items():
        share = 1 - reserved(1, REQUESTS) / reserved(size, REQUESTS) if size else 0.0
        slowest, *_, fastest = speeds = sorted(round(sum(wanted) / s) for s in seconds[name])
        rows.append(
            {
                "cache": name,
                "waste %": round(100 * share, 2),
                "tokens/s": speeds[ROUNDS // 2],
                "slowest": slowest,
                "fastest": fastest,
            }
        )
    table(list(rows[0]), [list(row.values()) for row in rows])
    print("  waste: of the slots reserved for a request, those that hold nothing yet, on average over its steps")
    check("all of them say the same", all(said == answers[0] for said in answers))
    held = slots_that_a_block_manager_gives(16, REQUESTS)
    check("a BlockManager gives the slots that were counted", held == reserved(16, REQUESTS))
    return rows


def memory_of_a_chat_service() -> list[dict]:
    """Counted, not timed: {cache, waste %, how many requests run at once}."""
    chat = chat_lengths()
    means = [sum(lengths) / len(chat) for lengths in zip(*chat, strict=True)]
    print(f"  {means[0]:.0f} tokens in, {means[1]:.0f} out on average")
    sizes = {"contiguous, 2048 each": 2048} | {f"blocks of {p}": p for p in BLOCK_SIZES}
    rows = []
    for name, size in sizes.items():
        held = reserved(size, chat)
        share = round(100 * (1 - reserved(1, chat) / held), 2)
        rows.append({"cache": name, "waste %": share, f"run at once in {POOL} slots": int(POOL / held)})
    table(list(rows[0]), [list(row.values()) for row in rows])
    check("contiguous reservation wastes most of the memory", rows[0]["waste %"] > 60)
    check("blocks of 16 waste less than 4 %", rows[-1]["waste %"] < 4)
    return rows


def attention_through_a_block_table() -> None:
    """What every backend computes for a decode step, and nothing else in this file needs: it is here to be read."""
    heading("Paged attention, written out: the tenth token of a sequence in blocks of four")
    torch.manual_seed(0)
    heads, kv_heads, d, size, context = 14, 2, 16, 4, 10
    cache = PagedKVCache(1, 8, size, kv_heads, d)
    block_table = [6, 1, 4]  # three blocks of four slots, anywhere in the pool
    slots = torch.tensor([block_table[i // size] * size + i % size for i in range(context)])
    q, k, v = torch.randn(heads, d), torch.randn(context, kv_heads, d), torch.randn(context, kv_heads, d)
    cache.write(0, slots[:-1], k[:-1], v[:-1])  # nine tokens were there, the tenth is new

    meta = AttentionMetadata(
        slots[-1:], torch.tensor([block_table]), torch.tensor([0, 1]), torch.tensor([context]), size, max_query_len=1
    )
    fast = TorchNativeAttention(cache, meta)(0, q[None], k[-1:], v[-1:])[0]  # writes the new token, then attends

    keys, values = cache.read(0, slots)  # [S, Hkv, d], through the table
    keys, values = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (keys, values))  # [S, Hq, d]
    weights = torch.einsum("hd,shd->hs", q, keys).div(d**0.5).softmax(dim=-1)  # [Hq, S]
    by_hand = torch.einsum("hs,shd->hd", weights, values)  # [Hq, d]

    print(f"  block_table {block_table}: token i lies in slot block_table[i // 4] * 4 + i % 4")
    rows = [("token", *map(str, range(context))), ("slot", *slots.tolist())]
    rows += [(f"weight, head {h}", *(f"{x:.2f}" for x in weights[h].tolist())) for h in (0, 13)]
    table(rows[0], rows[1:])
    print("  softmax(q k / sqrt(d)), then the values weighed by it; head 0's first numbers:")
    for name, o in (("written out", by_hand), ("executor", fast)):
        print(f"    {name:12s}" + " ".join(f"{x:+.3f}" for x in o[0, :5].tolist()))
    check("the executor's attention gives the same in all heads", torch.allclose(fast, by_hand, atol=1e-5))
    in_order = torch.arange(context)  # slots, as if the sequence lay at the beginning of the pool
    elsewhere = cache.read(0, in_order)[0][:, 0]
    mistake(
        "K read at slots 0..9 instead of through the table: how head 0 attends (blocks 0 and 2 hold nothing, 1 does)",
        (elsewhere @ q[0]).div(d**0.5).softmax(dim=0), weights[0],
    )  # fmt: skip


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
    needed = -(-(len(prompt) + new) // executor.page_size)
    blocks = random.sample(range(executor.num_pages), needed)
    row = np.array([0])  # of the executor's tables
    executor.table.set_pages([(0, 0, blocks)])
    cached, emits = np.array([0]), np.array([1])
    logits = executor.ragged(np.array(prompt), row, cached, np.array([len(prompt)]), emits)
    out = []
    for i in range(new):
        token = logits[:, : executor.config.vocab_size].argmax(dim=-1)
        out.append(int(token))
        executor.receive_tokens(token)
        if i + 1 < new:
            logits = executor.decode(row, positions=np.array([len(prompt) + i]))
    return out


def chat_lengths() -> list[tuple[int, int]]:
    """(prompt, answer) of 2000 requests, at most 1024 each: about 160 and 340 on average, as in the vLLM paper's ShareGPT.

    (Kwon et al. 2023, section 6.1. The shape, log-normal, is assumed.)
    """
    rng = random.Random(0)

    def draw(mean: float, spread: float) -> int:
        length = rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)
        return min(1024, max(8, round(length)))

    return [(draw(165, 0.9), draw(360, 0.8)) for _ in range(2000)]


def slots_that_a_block_manager_gives(size: int, requests: list[tuple[int, int]]) -> float:
    """`reserved`, asked of the chapter's block manager, token by token."""
    manager, held = BlockManager(64, size), []
    for i, (prompt, out) in enumerate(requests):
        request = Request(str(i), 0, [1] * prompt, RowParams(), 0)
        for n in range(prompt, prompt + out):
            manager.allocate_slots(request, n)
            held.append(len(request.block_table) * size)
        manager.free(request)
    return sum(held) / len(held)


def reserved(size: int, requests: list[tuple[int, int]]) -> float:
    """Slots that a request holds, on average over all steps of all requests, if it gets them in pieces of `size`."""
    lengths = [n for prompt, out in requests for n in range(prompt, prompt + out)]
    return sum(-(-n // size) * size for n in lengths) / len(lengths)


if __name__ == "__main__":
    run_main(main)
