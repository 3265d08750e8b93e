"""A decode task on the wire, word by word: why it does not grow with the context, and what damage does to it.

    python ch07_sglang_radix/demo_5_decode_task.py

A task is a flat int64 tensor (tasks.py). First one is printed whole, then every bit of it is damaged once, then one
request is decoded from 10 to 10,000 tokens of context and every task is measured, and compared with two others: one
that sends the whole page table in every step, and the book's map from layer to page ids.
"""

import numpy as np

from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory
from ch07_sglang_radix.schedule_batch import ScheduleBatch
from ch07_sglang_radix.tasks import DecodeTask, PageUpdate, decode, encode
from common.distributed.launch import run_main
from common.sampling.params import SamplingParams
from common.teaching.show import check, heading, table

HEADER = (
    "magic and version", "kind: decode", "step", "words in all", "CRC-32 of the others", "sequences", "page updates",
    "token ids: none, every rank has them", "best: all logits", "groups that begin alike",
)  # fmt: skip
PAGE_SIZE, SHORT, LONG = 16, 10, 10_000
LAYERS = 24  # of Qwen2.5-0.5B


def main() -> None:
    words = on_the_wire()
    damage(words)
    grow()


def on_the_wire() -> np.ndarray:
    heading("Three sequences, one of which has just begun its fourth page")
    task = DecodeTask(step=7, updates=(PageUpdate(row=1, first=3, pages=(42,)),), rows=(0, 1, 2), positions=(17, 48, 5))
    words = encode(task)
    meaning = [
        *HEADER, "update: row", "update: from its page 3 on", "update: one page id follows", "update: the page id",
        *[f"sequence {i}: row" for i in range(3)], *[f"sequence {i}: position" for i in range(3)],
    ]  # fmt: skip
    for i, (word, what) in enumerate(zip(words.tolist(), meaning, strict=True)):
        print(f"  {i:2d}  {hex(word) if i in (0, 4) else word:>10}  {what}")
    check("decoding gives the task back", decode(words) == task)
    check("10 words of header, 2 a sequence, 3 and the ids for an update", len(words) == 10 + 2 * 3 + 3 + 1)
    return words


def damage(words: np.ndarray) -> None:
    heading("Damage: one word, then every single bit")
    changed = words.copy()
    changed[13] = 43  # another page: valid in form, and another request's K and V
    print(f"  page id 42 becomes 43: {refused(changed)}")
    print(f"  the last word is lost: {refused(words[:-1])}")
    changed = words.copy()
    changed[0] += 1
    print(f"  another version: {refused(changed)}")
    bits = 0
    for i in range(len(words)):
        for bit in range(64):
            changed = words.copy()
            changed[i : i + 1].view(np.uint64)[0] ^= np.uint64(1 << bit)
            bits += refused(changed) is not None
    check(f"all {bits} of {64 * len(words)} single-bit errors are refused with ValueError", bits == 64 * len(words))


def refused(words: np.ndarray) -> str | None:
    try:
        decode(words)
    except ValueError as error:
        return str(error)
    return None


def grow() -> None:
    heading(f"One request from {SHORT} to {LONG:,} tokens of context, {PAGE_SIZE} tokens a page")
    sizes = words_by_context()
    at = [10, 100, 1_000, 9_999]
    rows = []
    for context in at:
        pages = -(-(context + 1) // PAGE_SIZE)
        rows.append((context, int(sizes[context]), 10 + 3 + pages, 10 + 3 + LAYERS * (1 + pages)))
    table(("context", "this task", "whole page table", f"layer -> pages, {LAYERS} layers"), rows)
    steps = np.arange(SHORT, LONG)
    in_all = int(sizes[steps].sum()), int((13 + -(-(steps + 1) // PAGE_SIZE)).sum())
    print(f"  words in all {len(steps):,} steps: {in_all[0]:,}, with the whole page table {in_all[1]:,}")
    print(f"  a step that begins a page needs {sizes.max()} words, the {PAGE_SIZE - 1} behind it {sizes[SHORT]}")
    check("as many words after 9,999 tokens as after 10", sizes[9_999] == sizes[10])
    check("two sizes in all: a new page or none", set(sizes[steps].tolist()) == {12, 16})
    check("all layers number their pages alike, so one list says what the map says", rows[-1][3] > 20 * rows[-1][2])


def words_by_context() -> np.ndarray:
    """Decode without a model: the words of the task that feeds in the token at each position."""
    pool, table_of_rows = TokenToKVPool(num_pages=LONG // PAGE_SIZE, page_size=PAGE_SIZE), ReqToTokenPool(1, LONG)
    memory = RequestMemory(pool, table_of_rows, RadixCache(pool, table_of_rows))
    req = Req(0, None, [1] * SHORT, SamplingParams(max_new_tokens=LONG - SHORT), seed=0)
    memory.admit(req, memory.tree.match_prefix([]))
    memory.grow(req, SHORT)
    memory.page_updates([req])  # the prefill task has sent these
    req.kv_len = SHORT
    batch, sizes = ScheduleBatch(memory, group=False), np.zeros(LONG, dtype=np.int64)
    batch.become([req])
    for step in range(SHORT, LONG):
        if req.kv_len == req.allocated_len:
            memory.grow_by_a_page([req])
        rows, positions = tuple(batch.rows.tolist()), tuple(batch.positions.tolist())
        sizes[req.kv_len] = len(encode(DecodeTask(step, memory.page_updates([req]), rows, positions)))
        batch.advance()
    return sizes


if __name__ == "__main__":
    run_main(main)
