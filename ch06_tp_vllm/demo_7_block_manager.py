"""Blocks, printed: growing, sharing, freeing, finding again.

    python ch06_tp_vllm/demo_7_block_manager.py
    python ch06_tp_vllm/demo_7_block_manager.py --csv figures/blocks.csv

A pool of ten blocks of four tokens and requests that begin alike. No model: what a block holds does not matter here, only
who holds the block. Then the two rules that took vLLM longest to get to, each with what happened without it: blocks are named
when they are allocated, and freed blocks without a name are taken first.
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

    heading("Two answers to one prompt: two requests that find each other")
    d = ask("d", c.prompt_token_ids, raw=True)
    found = start(blocks, d)
    show("d asks c's prompt", b, c, d)
    check("they share the full blocks; the one where prompt and answer meet is each one's own", found == 12)

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

    in_one_step()
    nameless_first()

    heading("On two ranks: the same tables, other heads")
    tables = [two_requests_on(rank, size=2) for rank in range(2)]
    check("the block tables of both ranks are equal: nothing in them depends on the rank", tables[0] == tables[1])
    if csv:
        write_csv(moments, csv, measured=False)


def in_one_step() -> None:
    heading("Two that start in the same step: named at allocation, or when the step has run")
    rows = []
    for at_allocation in (False, True):
        blocks = BlockManager(10, 4, name_blocks_at_allocation=at_allocation)
        together = [ask(name, [*SYSTEM, "what", "is", "a", name]) for name in ("page", "rank")]
        found = []
        for request in together:  # as the scheduler does: look up, allocate, next
            computed = blocks.get_computed_blocks(request)
            blocks.allocate_slots(request, request.num_tokens, computed)
            found.append(4 * len(computed))
        when = "at allocation" if at_allocation else "after the step"
        rows.append((when, found[1], *(request.block_table for request in together), blocks.num_free_blocks))
    table(("named", "the second one finds", "first block_table", "second block_table", "free"), rows)
    check("named at allocation, they share in their first step", [row[1] for row in rows] == [0, 8])
    print(
        "  The second one reads what the first one writes in the same step: in every layer all write before anybody reads."
    )


class OneQueue(BlockManager):
    """Before vLLM told them apart: whatever is freed goes to the end of the queue."""

    def free(self, request: Request) -> None:
        tail_first = request.block_table[::-1]
        super().free(request)
        for block in tail_first:  # here no other request holds one of them
            self.free_blocks.move_to_end(block)


def nameless_first() -> None:
    heading("Two blocks of four; 5 tokens, then 1, then another 1, then the first 5 again")
    first, found, rows = [*SYSTEM][:5], {}, []
    for kind, manager in (("one queue", OneQueue), ("nameless first", BlockManager)):
        blocks, queues = manager(2, 4), []
        for words in (first, ["yes"], ["no"]):
            request = ask("r", words)
            start(blocks, request)
            blocks.free(request)
            queues.append(
                " ".join(f"{i}{'' if blocks.blocks[i].block_hash is None else '*'}" for i in blocks.free_blocks)
            )
        found[kind] = 4 * len(blocks.get_computed_blocks(ask("r", first)))
        rows.append((kind, *queues, found[kind]))
    table(("free blocks, next first (* has a name)", "after 5", "after 1", "after 1", "tokens found"), rows)
    check("a block that nobody can find is used up before one that somebody may look for", [*found.values()] == [0, 4])


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
