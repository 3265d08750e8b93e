"""Rows, slots and pages: the two pools of rank 0, and what the size of a page decides.

    python ch07_sglang_radix/demo_2_pages_and_pools.py

A slot is one token's place, a page is P slots side by side, slot = page * P + offset. No model: requests are admitted,
grow and end, and the pools and the tree keep the books. First two rows and their slots, then the same three requests
with pages of 1, 4 and 16 tokens: what is shared, what is lost to alignment, how many page ids a rank must be told.
"""

from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory
from common.distributed.launch import run_main
from common.sampling.params import SamplingParams
from common.teaching.show import check, heading, table

COMMON = list(range(100, 123))  # 23 tokens that all three prompts begin with
PROMPTS = {"a": COMMON + [1] * 6, "b": COMMON + [2] * 4, "c": COMMON + [3] * 11}
ANSWER = 5


def main() -> None:
    the_free_list()
    one_row()
    rows = [(f"P = {p}", *share_with(p)) for p in (1, 4, 16)]
    heading(f"Three requests that begin with the same {len(COMMON)} tokens, by page size")
    table(("", "computed", "found in the tree", "lost to alignment", "empty slots", "page ids sent"), rows)
    _, computed, found, lost, empty, sent = zip(*rows, strict=True)
    asked = sum(len(prompt) for prompt in PROMPTS.values())
    sums = {c + f for c, f in zip(computed, found, strict=True)}
    check("computed + found = all prompt tokens, at every size", sums == {asked})
    check("P = 1 shares every token that is alike, and leaves no slot empty", lost[0] == 0 and empty[0] == 0)
    check("larger pages share less", found[0] > found[1] > found[2])
    check("and have fewer ids to send", sent[0] > sent[1] > sent[2])


def the_free_list() -> None:
    heading("TokenToKVPool: 6 pages of 4 slots")
    pool = TokenToKVPool(num_pages=6, page_size=4)
    slots = pool.alloc(2)
    print(f"  alloc(2 pages) -> slots {slots.tolist()}, {pool.num_free_pages} pages free")
    refused = pool.alloc(5)
    check("alloc(5) with 4 pages free gives None and takes nothing", refused is None and pool.num_free_pages == 4)
    pool.free(slots[:4])
    print(f"  free(slots 0..3) -> {pool.num_free_pages} pages free, page {pool.free_pages()[-1]} on top of the stack")
    try:
        pool.free(slots[:4])
    except ValueError as error:
        print(f"  free(slots 0..3) once more: {error}")
    check("a page that is free already is refused, and nothing changes", pool.num_free_pages == 5)


def one_row() -> None:
    heading("ReqToTokenPool: a row of slots for each running request, P = 4")
    memory = pools(page_size=4)
    a, b = start(memory, "a"), start(memory, "b")
    for req in (a, b):
        print(f"  row {req.row}, request {req.prompt}: {layout(memory, req)}")
    where = memory.rows.req_to_token
    print(f"  token 22 of a lies in slot {where[a.row, 22]}, token 22 of b in slot {where[b.row, 22]}")
    check("20 tokens are shared: the same slots stand in both rows", (where[a.row, :20] == where[b.row, :20]).all())
    check("tokens 20 to 22 are alike too, but their page ends with something else: each has its own",
          not set(where[a.row, 20:23]) & set(where[b.row, 20:23]))  # fmt: skip
    for req in (a, b):
        answer(memory, req)
        memory.finish(req)
    pool, tree = memory.pool, memory.tree
    print(f"  both have ended: {pool.free_slots} free + {tree.evictable_size} in the tree = {pool.size} slots")
    check("the tree keeps whole pages; a page that is not full goes back", tree.evictable_size % 4 == 0)
    check(f"{memory.rows.num_free} of 8 rows are free again", memory.rows.num_free == 8)


def share_with(page_size: int) -> tuple[int, int, int, int, int]:
    """Run the three requests side by side; (computed, found, lost to alignment, empty slots, page ids sent)."""
    memory = pools(page_size)
    reqs = [start(memory, name) for name in PROMPTS]
    for req in reqs:
        answer(memory, req)
    found = sum(req.cached_tokens for req in reqs)
    alike = len(COMMON) * (len(reqs) - 1)  # what a perfect cache would have found
    computed = sum(len(req.prompt_ids) for req in reqs) - found
    empty = sum(req.allocated_len - req.kv_len for req in reqs)
    return computed, found, alike - found, empty, sum(req.allocated_len // page_size for req in reqs)


def pools(page_size: int) -> RequestMemory:
    pool, rows = TokenToKVPool(num_pages=192 // page_size, page_size=page_size), ReqToTokenPool(8, 64)
    return RequestMemory(pool, rows, RadixCache(pool, rows))


def start(memory: RequestMemory, name: str) -> Req:
    """What a prefill step does with a request: match, lock, admit, take pages, compute, share."""
    req = Req(ord(name), name, PROMPTS[name], SamplingParams(max_new_tokens=ANSWER), seed=0)
    match = memory.tree.match_prefix(req.all_ids[:-1])  # one token at least is computed, to get logits
    memory.tree.inc_lock_ref(match.last_node)
    memory.admit(req, match)
    req.cached_tokens = len(match.slots)
    memory.grow(req, req.seq_len)
    req.kv_len = req.seq_len
    memory.tree.cache_unfinished_req(req)
    return req


def answer(memory: RequestMemory, req: Req) -> None:
    """What decode steps do with it. The last token is never fed in: it has no K and V."""
    for token in range(ANSWER):
        req.take_token(token, None)
        if req.kv_len < req.seq_len - 1:
            memory.grow(req, req.kv_len + 1)
            req.kv_len += 1


def layout(memory: RequestMemory, req: Req) -> str:
    row, own = memory.rows.req_to_token[req.row], slice(req.prefix_len, req.allocated_len)
    pages = (row[: req.prefix_len : 4] // 4).tolist(), (row[own][::4] // 4).tolist()
    return (
        f"pages {pages[0]} in the tree, {pages[1]} its own; {req.kv_len} tokens computed, "
        f"{req.allocated_len - req.kv_len} slots empty"
    )


if __name__ == "__main__":
    run_main(main)
