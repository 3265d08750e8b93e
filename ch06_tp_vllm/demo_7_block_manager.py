"""Blocks, printed: growing, sharing, freeing, finding again.

    python ch06_tp_vllm/demo_7_block_manager.py
    python ch06_tp_vllm/demo_7_block_manager.py --csv figures/blocks.csv

A pool of ten blocks of four tokens and three requests that begin alike. No model: what a block holds does not matter
here, only who holds the block.
"""

from collections.abc import Iterator, Sequence

from ch06_tp_vllm.block_manager import BlockManager
from ch06_tp_vllm.request import Request
from common.distributed.launch import run_main
from common.sampling.params import SamplingParams
from common.teaching.report import csv_option, write_csv
from common.teaching.show import check, heading, table

SYSTEM = ["you", "are", "a", "terse", "helper", "."]
WORDS: dict[str, int] = {}


def main() -> None:
    csv = csv_option(__doc__)
    moments: list[dict] = []  # what the picture is drawn from

    def show(moment: str, *requests: Request) -> None:
        print_blocks(blocks, requests)
        moments.extend(picture(moment, blocks, requests))

    blocks = BlockManager(num_blocks=10, block_size=4)

    heading("A request takes blocks as it grows")
    a = ask("a", [*SYSTEM, "what", "is", "a", "page"])
    start(blocks, a)
    show("a starts", a)
    check("10 tokens need 3 blocks of 4; 2 slots are empty, no more ever are", len(a.block_table) == 3)
    print(f"  slot_mapping of tokens 8..9: {blocks.slot_mapping(a, 8, 10)}    block_table[i // 4] * 4 + i % 4")
    grow(blocks, a, "a", "fixed", "block")
    show("a grows", a)

    heading("A second one begins alike: it starts with the first one's full blocks")
    b = ask("b", [*SYSTEM, "what", "is", "a", "rank", "?"])
    found = start(blocks, b)
    show("b begins alike", a, b)
    check(
        "8 tokens are alike, so 2 blocks are shared, and held by two",
        found == 8 and blocks.blocks[a.block_table[0]].ref_cnt == 2,
    )

    heading("The first one ends: the shared blocks stay, its own are free, and keep their names")
    blocks.free(a)
    show("a ends", b)
    c = ask("c", [*SYSTEM, "what", "is", "a", "page", "a", "fixed", "block", "?"])
    found = start(blocks, c)
    show("c finds what a left", b, c)
    check("a third request finds what the first one left, answer included", found == 12)

    heading("Two answers to one prompt: fork")
    d = ask("d", c.prompt_token_ids, raw=True)
    shared = blocks.fork(c, d)
    blocks.allocate_slots(d, d.num_tokens)
    show("d is c's fork", b, c, d)
    check("they share the full blocks; the one where prompt and answer meet is each one's own", shared == 12)

    heading("Somebody needs room: free blocks are overwritten, least recently used first")
    for request in (b, c, d):
        blocks.free(request)
    before = len(blocks.get_computed_blocks(ask("c", c.prompt_token_ids, raw=True)))
    stranger = ask("x", [f"word{i}" for i in range(32)])
    start(blocks, stranger)
    show("x needs room", stranger)
    after = len(blocks.get_computed_blocks(ask("c", c.prompt_token_ids, raw=True)))
    print(f"  of c's prompt {4 * before} tokens were to be found before, {4 * after} are now")
    check("the tail of a sequence is overwritten before its head", 0 < after < before)
    blocks.check([stranger])
    check(
        "free + used = all, and every reference is accounted for",
        blocks.num_free_blocks == 10 - len(stranger.block_table),
    )

    heading("On two ranks: the same tables, other heads")
    tables = [two_requests_on(rank, size=2) for rank in range(2)]
    check("the block tables of both ranks are equal: nothing in them depends on the rank", tables[0] == tables[1])
    if csv:
        write_csv(moments, csv, measured=False)


def two_requests_on(rank: int, size: int) -> list[list[int]]:
    """A rank's block manager (14 query and 2 KV heads of 16 numbers) sees the same requests; the block tables."""
    blocks = BlockManager(10, 4, num_heads=14, num_kv_heads=2, tp_rank=rank, tp_size=size)
    print(f"  rank {rank}: block_table as everywhere; K of a block, a layer [4, {blocks.num_kv_heads_local}, 16]")
    a, b = ask("a", SYSTEM), ask("b", [*SYSTEM, "what", "?"])
    start(blocks, a), start(blocks, b)
    grow(blocks, a, "yes", ".", "no")
    return [a.block_table, b.block_table]


def ask(name: str, words: list, raw: bool = False) -> Request:
    ids = words if raw else [WORDS.setdefault(word, len(WORDS)) for word in words]
    return Request(name, 0, list(ids), SamplingParams(), 0)


def start(blocks: BlockManager, request: Request) -> int:
    """Take a request in and "compute" its prompt; returns how many tokens were there already."""
    found = blocks.get_computed_blocks(request)
    blocks.allocate_slots(request, request.num_tokens, found)
    request.num_computed_tokens = request.num_tokens
    blocks.cache_full_blocks(request, request.num_tokens)
    return len(found) * blocks.block_size


def grow(blocks: BlockManager, request: Request, *words: str) -> None:
    for word in words:
        request.output_token_ids.append(WORDS.setdefault(word, len(WORDS)))
        blocks.allocate_slots(request, request.num_tokens)
        request.num_computed_tokens = request.num_tokens
        blocks.cache_full_blocks(request, request.num_tokens)


def picture(moment: str, blocks: BlockManager, requests: Sequence[Request]) -> Iterator[dict]:
    for block in blocks.blocks:
        holders = "".join(r.group for r in requests if block.block_id in r.block_table)
        named = int(block.block_hash is not None)
        yield {"moment": moment, "block": block.block_id, "held by": holders, "findable": named}


def print_blocks(blocks: BlockManager, requests: Sequence[Request]) -> None:
    names, rows = {i: word for word, i in WORDS.items()}, []
    for block in blocks.blocks:
        holders = [r for r in requests if block.block_id in r.block_table]
        if not holders and block.block_hash is None:
            continue
        content = "(as its name says)"
        if holders:
            i = holders[0].block_table.index(block.block_id)
            content = " ".join(names[t] for t in holders[0].all_token_ids[4 * i : 4 * i + 4])
        name = block.block_hash.hex()[:6] if block.block_hash else ""
        rows.append((block.block_id, " ".join(r.group for r in holders) or "free", name, content))
    table(("block", "held by", "hash", "content"), rows)
    for r in requests:
        print(f"  {r.group}: block_table {r.block_table}")


if __name__ == "__main__":
    run_main(main)
