from types import ModuleType

from ch07_sglang_radix.exercises.checks.engines import an_engine, answers, nothing_held, same, some_prompts
from ch07_sglang_radix.exercises.checks.trees import a_req, memory_of
from ch07_sglang_radix.request import Req
from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    _check_by_hand(m)
    prompts = some_prompts(6, 20) + some_prompts(2, 9, seed=1)
    engine = an_engine(disable_radix_cache=True)
    want = answers(engine, prompts, 12)
    for chunk in (-1, 8):
        engine = an_engine(chunked_prefill_size=chunk)
        engine.tree.cache_unfinished_req = lambda req, tree=engine.tree: m.cache_unfinished_req(tree, req)
        for _ in range(2):
            same(answers(engine, prompts, 12), want)
        nothing_held(engine)


def _check_by_hand(m: ModuleType) -> None:
    """Three requests that begin alike, computed in one step; the ranks' page tables are played by dicts."""
    memory = memory_of(16)
    tree, rows, tables = memory.tree, memory.rows.req_to_token, {}

    def send(req: Req) -> None:
        """What a rank makes of an update."""
        for row, first, pages in memory.page_updates([req]):
            tables.setdefault(row, {}).update({first + i: page for i, page in enumerate(pages)})

    shared = list(range(6))
    reqs = [a_req(0, [*shared, 50]), a_req(1, [*shared, 60, 61]), a_req(2, [*shared, 60, 61, 62])]
    for req in reqs:  # all are computed before one of them is in the tree
        match = tree.match_prefix(req.all_ids[:-1])
        tree.inc_lock_ref(match.last_node)
        memory.admit(req, match)
        memory.grow(req, req.seq_len)
        send(req)
        req.kv_len = req.seq_len
    for req, free in zip(reqs, (3, 6, 10), strict=True):
        who, own = f"request {req.rid}", rows[req.row, : req.allocated_len].copy()
        ask(m.cache_unfinished_req, tree, req)
        row, whole = rows[req.row], req.seq_len // 2 * 2
        match = tree.match_prefix(req.all_ids)
        expect(f"tokens of {who} that are in the tree", len(match.slots), whole)
        expect(f"the row of {who}: the tree's slots", row[:whole], match.slots)
        expect(f"the row of {who}: a page that is not full stays its own", row[whole : req.allocated_len], own[whole:])
        expect(f"free pages after {who}: its duplicates are given back, once", memory.pool.num_free_pages, free)
        expect(f"prefix_len of {who}", req.prefix_len, whole)
        expect(f"is last_node of {who} the end of its new path", req.last_node is match.last_node, True)
        expect("slots that are locked: the whole new path", tree.protected_size, 6 if req is reqs[0] else 8)
        send(req)
        pages = (row[: req.allocated_len : 2] // 2).tolist()
        known = [tables[req.row].get(i) for i in range(len(pages))]
        expect(f"pages that the ranks go on reading for {who} (told from sent_len on)", known, pages)
    before = memory.pool.num_free_pages
    ask(m.cache_unfinished_req, tree, reqs[2])
    expect(
        "free pages after the last one is handed over twice: what is the tree's is not freed",
        memory.pool.num_free_pages,
        before,
    )
    for req in reqs:
        memory.finish(req)
    expect("slots that are locked at the end: the old lock goes when the new one is there", tree.protected_size, 0)
