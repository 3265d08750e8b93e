"""What a right answer must do. Each check takes the module of an exercise and raises AssertionError with the reason.

Where it can be, the answer takes the place of the real function: in the tree, or in an engine that runs the bundled
tiny model and counts its pages after every step.
"""

import random
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest.mock import patch

import numpy as np

from ch07_sglang_radix import admission as admission_module
from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.prefill_adder import PrefillAdder
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory
from ch07_sglang_radix.retraction import RETRACT_DECODE_STEPS
from ch07_sglang_radix.schedule_policy import SchedulePolicy
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tasks import HEADER, DecodeTask, PageUpdate, PrefillSequence, PrefillTask, encode
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from ch07_sglang_radix.tree_node import TreeNode
from common.sampling.params import SamplingParams

MAX_STEPS = 400  # a wrong answer may keep an engine busy for ever

# --- 1: a tree of dicts


def _dict_node(key: list[int], slots: list[int], parent: dict | None, lock_ref: int = 0) -> dict:
    node = {"key": key, "slots": slots, "children": {}, "parent": parent, "lock_ref": lock_ref}
    if parent is not None:
        parent["children"][key[0]] = node
    return node


def _dict_tree(sequences: list[list[int]], first_slot: int = 100) -> dict:
    """A tree without needless nodes: every prefix of the sequences has one slot, numbered from first_slot."""
    root = _dict_node([], [], None)
    slot = iter(range(first_slot, 1 << 30))

    def grow(node: dict, tails: list[list[int]]) -> None:
        for first in dict.fromkeys(tail[0] for tail in tails if tail):
            mine = [tail for tail in tails if tail and tail[0] == first]
            n = 1
            while n < min(map(len, mine)) and len({tail[n] for tail in mine}) == 1:
                n += 1
            child = _dict_node(mine[0][:n], [next(slot) for _ in range(n)], node)
            grow(child, [tail[n:] for tail in mine])

    grow(root, sequences)
    return root


def _dict_nodes(node: dict) -> Iterator[dict]:
    for first, child in node["children"].items():
        assert child["key"], "a node other than the root has no tokens"
        assert child["key"][0] == first, f"node {child['key']} is filed under token {first}"
        assert child["parent"] is node, f"node {child['key']} does not know its parent"
        assert len(child["slots"]) == len(child["key"]), f"node {child['key']} has {len(child['slots'])} slots"
        yield child
        yield from _dict_nodes(child)


def _dict_path(node: dict) -> tuple[list[int], list[int]]:
    tokens, slots = [], []
    while node["parent"] is not None:
        tokens, slots, node = node["key"] + tokens, node["slots"] + slots, node["parent"]
    return tokens, slots


def check_1(m: ModuleType) -> None:
    root = _dict_node([], [], None)
    top = _dict_node([1, 2, 3, 4], [40, 41, 42, 43], root, lock_ref=3)
    below = _dict_node([5], [50], top, lock_ref=1)
    upper = m.split(top, 3)
    list(_dict_nodes(root))
    assert (upper["key"], upper["slots"]) == ([1, 2, 3], [40, 41, 42]), "the upper half has the first n tokens"
    assert (top["key"], top["slots"]) == ([4], [43]), "requests that end at the old node must find it below"
    assert upper["lock_ref"] == top["lock_ref"] == 3, "who has locked the lower half has locked the upper one too"
    assert upper["children"].get(4) is top, "the lower half is filed under its first token, 4"
    assert top["children"][5] is below, "the children stay below the lower half"

    root = _dict_tree([[1, 2, 3, 4]])
    slots, node = m.match_prefix(root, [9])
    assert (slots, node is root) == ([], True), "nothing matches: no slots, the root"
    slots, node = m.match_prefix(root, [1, 2, 3, 4, 5])
    assert (slots, node["key"]) == ([100, 101, 102, 103], [1, 2, 3, 4]), "a prompt that goes on behind the tree"
    slots, node = m.match_prefix(root, [1, 2, 9])
    assert slots == [100, 101], f"of 1 2 9 the tree has 1 2, not slots {slots}"
    assert node["key"] == [1, 2], "an edge that matches in part is split, and the match ends at the upper half"
    assert m.match_prefix(root, [])[0] == [], "no tokens, no slots"

    rng = random.Random(0)
    for _ in range(30):
        sequences = [[rng.randrange(3) for _ in range(rng.randint(1, 9))] for _ in range(5)]
        root = _dict_tree(sequences)
        want = {}
        for node in _dict_nodes(root):
            tokens, slots = _dict_path(node)
            want |= {tuple(tokens[:i]): slots[:i] for i in range(1, len(tokens) + 1)}
        leaves = [(node, *_dict_path(node)) for node in _dict_nodes(root)]
        for _ in range(20):
            tokens = [rng.randrange(3) for _ in range(rng.randint(1, 9))]
            given = list(tokens)
            slots, node = m.match_prefix(root, tokens)
            assert tokens == given, "the caller's tokens have changed"
            longest = max((n for n in range(1, len(tokens) + 1) if tuple(tokens[:n]) in want), default=0)
            assert slots == want.get(tuple(tokens[:longest]), []), f"{tokens}: {len(slots)} slots, not {longest}"
            assert _dict_path(node) == (tokens[:longest], slots), f"the node returned for {tokens} is not its end"
            list(_dict_nodes(root))
            for leaf, *path in leaves:
                assert [*_dict_path(leaf)] == path, "a node that a request may hold no longer ends the same path"


# --- 2: the real tree with other keys


def check_2(m: ModuleType) -> None:
    def ids(*tokens: int) -> np.ndarray:
        return np.array(tokens, dtype=np.int64)

    for n, page_size, want in ((7, 4, 4), (8, 4, 8), (3, 4, 0), (5, 1, 5), (0, 2, 0)):
        got = len(m.aligned(np.arange(n), page_size))
        assert got == want, f"of {n} tokens {got} are kept with pages of {page_size}, not {want}"
    assert m.child_key(ids(1, 2, 3, 4), 4) != m.child_key(ids(1, 2, 3, 5), 4), "1 2 3 4 and 1 2 3 5 share no page"
    assert m.child_key(ids(1, 2, 3, 4), 2) == m.child_key(ids(1, 2, 9, 9), 2), "1 2 3 4 and 1 2 9 9 share the page 1 2"
    for a, b, page_size, want in (
        (ids(1, 2, 3, 4), ids(1, 2, 3, 9), 1, 3),
        (ids(1, 2, 3, 4), ids(1, 2, 3, 9), 2, 2),
        (ids(1, 2, 3, 4), ids(1, 9, 3, 4), 2, 0),
        (ids(1, 2, 3, 4, 5, 6), ids(1, 2, 3, 4), 2, 4),
        (ids(1, 2), ids(1, 2), 2, 2),
    ):
        got = m.common_length(a, b, page_size)
        assert got == want, f"{a} and {b} share {want} tokens with pages of {page_size}, not {got}"

    class Tree(RadixCache):
        def key(self, ids):
            return m.aligned(np.asarray(ids, dtype=np.int64), self.page_size)

        def child_key(self, key):
            return m.child_key(key, self.page_size)

        def _common_length(self, a, b):
            n = int(m.common_length(a, b, self.page_size))
            # a length of 0 would be split for ever
            assert n >= self.page_size, f"child_key finds {a.tolist()} for {b.tolist()}, common_length says {n}"
            return n

    rng = random.Random(0)
    for page_size in (1, 2, 4):
        tree, content = Tree(TokenToKVPool(page_size=page_size)), {}
        for i in range(60):
            tokens = [rng.randrange(2) for _ in range(rng.randint(0, 14))]
            pages = [tuple(tokens[:n]) for n in range(page_size, len(tokens) + 1, page_size)]
            known = tree.insert(tokens, 100 * i + np.arange(len(tokens)))
            want = page_size * sum(page in content for page in pages)
            assert known == want, f"pages of {page_size}: {known} tokens of {tokens} were there, not {want}"
            for page in pages:
                start = 100 * i + len(page) - page_size
                content.setdefault(page, list(range(start, start + page_size)))
            slots = tree.match_prefix(tokens).slots.tolist()
            want = [slot for page in pages for slot in content[page]]
            assert slots == want, f"pages of {page_size}: {tokens} lies in the slots {want}, not {slots}"


# --- 3: the real tree with another eviction


def _tree_with(*keys: list[int], tree: RadixCache) -> RadixCache:
    for key in keys:
        slots = tree.pool.alloc(-(-len(key) // tree.page_size))
        tree.pool.free(slots[: tree.insert(key, slots)])
    return tree


def check_3(m: ModuleType) -> None:
    class Tree(RadixCache):
        """Evicts whom `victim` names."""

        def evict(self, num_slots: int) -> int:
            evicted = 0
            while evicted < num_slots and (leaf := m.victim(list(self.nodes()))) is not None:
                who = f"victim names {leaf.key.tolist()}"
                assert leaf.parent is not None, f"{who}, which is the root or evicted already"
                assert leaf.lock_ref == 0, f"{who}, which a request uses"
                assert not leaf.children, f"{who}, which has children: they could never be found again"
                self.pool.free(leaf.value)
                evicted += len(leaf.value)
                del leaf.parent.children[self.child_key(leaf.key)]
                leaf.parent = None
            self.evictable_size -= evicted
            return evicted

    often, seldom = (TreeNode(np.arange(3), np.arange(3), None, now) for now in (1, 2))
    often.hit_count = 5
    assert m.lfu(seldom) < m.lfu(often), "fewer uses go first, however recent they are"
    often.hit_count = 0
    assert m.lfu(often) < m.lfu(seldom), "used equally often: the one that was used longest ago goes first"
    assert m.victim([]) is None

    tree = _tree_with([1, 2, 3], [4, 5, 6], [7, 8, 9], tree=Tree(TokenToKVPool(num_pages=9)))
    for ids in ([1, 2, 3], [1, 2, 3], [7, 8, 9]):
        tree.insert(ids, tree.match_prefix(ids).slots)  # a request comes by, finds all and leaves it again
    tree.match_prefix([4, 5, 6])  # the newest, but no request has come by
    assert tree.evict(1) == 3
    assert len(tree.match_prefix([4, 5, 6]).slots) == 0, "4 5 6 was used least often"
    tree.inc_lock_ref(tree.match_prefix([7, 8, 9]).last_node)
    assert tree.evict(99) == 3, "all goes that is not locked"
    assert len(tree.match_prefix([7, 8, 9]).slots) == 3, "7 8 9 is locked"

    tree = _tree_with([1, 2, 3, 4], tree=Tree(TokenToKVPool(num_pages=9)))
    tree.match_prefix([1, 2])  # two nodes now, and the next request uses both
    tree.insert([1, 2, 3, 4], tree.match_prefix([1, 2, 3, 4]).slots)
    tree.evict(1)
    assert len(tree.match_prefix([1, 2, 3, 4]).slots) == 2, "3 4 is the leaf, 1 2 its beginning"

    rng = random.Random(0)
    mine = Tree(TokenToKVPool(num_pages=40))
    real = RadixCache(TokenToKVPool(num_pages=40), eviction="lfu")
    for _ in range(150):
        ids, evict, hits = [rng.randrange(3) for _ in range(rng.randint(1, 8))], rng.randint(1, 6), rng.randrange(3)
        for tree in (mine, real):
            match = tree.match_prefix(ids)
            for _ in range(hits):
                tree.insert(ids[: len(match.slots)], match.slots)
            tree.inc_lock_ref(match.last_node)
            tree.evict(max(evict, len(ids) - tree.pool.num_free_pages))
            tree.dec_lock_ref(match.last_node)
            if tree.pool.num_free_pages >= len(ids):
                _tree_with(ids, tree=tree)
        assert sorted(mine.pool.free_pages()) == sorted(real.pool.free_pages()), "another leaf had to go"


# --- 4: a queue and a tree


def _req(rid: int, prompt: list[int], max_new_tokens: int = 4, **fields) -> Req:
    return Req(rid, None, prompt, SamplingParams(max_new_tokens=max_new_tokens), 0, **fields)


def check_4(m: ModuleType) -> None:
    def order(prompts: list[list[int]], cached: list[list[int]]) -> list[int]:
        tree = _tree_with(*cached, tree=RadixCache(TokenToKVPool(num_pages=500)))
        waiting = [_req(i, prompt) for i, prompt in enumerate(prompts)]
        ordered = m.lpm(waiting, tree)
        assert [req.rid for req in waiting] == list(range(len(prompts))), "the queue itself must stay as it is"
        return [req.rid for req in ordered]

    a, b, tails = list(range(1000, 1100)), list(range(2000, 2100)), [[i, i] for i in range(9)]
    for prompts, cached, want, why in (
        ([[1, 2], [5, 6], [3, 4]], [], [0, 1, 2], "nothing is cached or shared: as they came"),
        ([b[:5], a[:9], a[:4], b[:5]], [a[:8]], [1, 2, 0, 3], "the longest match first, equals as they came"),
        ([a[:40] + tails[0], a[:40] + tails[1], b[:9]], [], [0, 2, 1], "one computes what two share, one waits"),
        ([a[:31] + tails[0], a[:31] + tails[1], b[:9]], [], [0, 1, 2], "31 shared tokens are not worth a wait"),
        ([a[:32] + tails[0], a[:32] + tails[1], b[:9]], [], [0, 2, 1], "32 shared tokens are"),
        ([a[:60] + tails[0], a[:60] + tails[1], b[:9]], [a[:40]], [0, 1, 2], "with 40 in the tree nobody waits"),
        (
            [a[:60] + tails[0], a[:60] + tails[1], b[:9], a[:60] + tails[2]],
            [a[:20], b[:4]],
            [0, 2, 1, 3],
            "with 20 in the tree they do, even behind those with a shorter match",
        ),
        (
            [a[:60] + tails[0], b[:60] + tails[0], b[:60] + tails[1], a[:60] + tails[1]],
            [a[:20], b[:10]],
            [0, 1, 2, 3],
            "those at the back keep the order of the queue, however much they find",
        ),
        (
            [a[:33], a[:33], a[:33] + tails[0]],
            [a[:40]],
            [2, 0, 1],
            "a prompt that is in the tree as a whole has found one token less: its last is computed",
        ),
        ([a[:32], a[:32], b[:9]], [], [0, 2, 1], "equal prompts of 32 tokens share 32"),
        ([a[:31], a[:31], b[:9]], [], [0, 1, 2], "equal prompts of 31 tokens do not"),
        ([*([n] for n in range(128)), a[:9]], [a[:8]], list(range(129)), "129 requests wait: as they came"),
    ):
        got = order(prompts, cached)
        assert got == want, f"{why}: {want[:9]}, not {got[:9]}"

    rng = random.Random(0)
    for _ in range(30):
        heads = [[1000 * h + i for i in range(80)] for h in range(3)]
        cached = [rng.choice(heads)[: rng.choice((10, 20, 50))] for _ in range(2)]
        prompts = [rng.choice(heads)[: rng.choice((0, 12, 40, 64))] + [rng.randrange(9)] * 3 for _ in range(8)]
        real = _tree_with(*cached, tree=RadixCache(TokenToKVPool(num_pages=500)))
        waiting = [_req(i, prompt) for i, prompt in enumerate(prompts)]
        want = [req.rid for req in SchedulePolicy("lpm", real).order(waiting)]
        got = order(prompts, cached)
        assert got == want, f"a queue of eight: {got}, not {want}"


# --- 5 to 10: the real engine


def _engine(kind: type[TPScheduler] = TPScheduler, *, pool: int = 256, **options) -> TPScheduler:
    """The bundled tiny model, pages of 4; every step is followed by a count of all pages."""
    wrapper = TPRadixAttentionModelWrapper(None, "cpu", 4, max_total_tokens=pool, max_running_requests=8)
    return kind(wrapper, check=True, **options)


def _answers(
    engine: TPScheduler, prompts: list[list[int]], max_new_tokens: int, stop: tuple[int, ...] = ()
) -> list[list[int]]:
    """Greedy answers to prompts that all arrive at once."""
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, stop_token_ids=stop)
    ids = [engine.add_request(input_ids=prompt, sampling_params=params) for prompt in prompts]
    last = engine.step_number + MAX_STEPS

    def nobody_comes(step: int) -> bool:
        assert step < last, f"the engine is still busy after {MAX_STEPS} steps"
        return False

    results = engine.process_requests(arrivals=nobody_comes)
    missing = [i for i in ids if i not in results]
    assert not missing, f"requests {missing} never came to an end"
    return [results[i].output_ids for i in ids]


def _prompts(count: int, shared: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    head = [rng.randrange(300, 3000) for _ in range(shared)]
    return [head + [rng.randrange(300, 3000) for _ in range(3 + i % 4)] for i in range(count)]


def _same(got: list[list[int]], want: list[list[int]]) -> None:
    wrong = [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    assert not wrong, f"in the real engine the answers to requests {wrong} of {len(want)} change"


def _nothing_held(engine: TPScheduler) -> None:
    tree = engine.tree
    assert tree.protected_size == 0, f"all have ended, but {tree.protected_size} slots are still locked"
    left = engine.pool.size - engine.pool.free_slots - tree.evictable_size
    assert left == 0, f"all have ended, but {left} slots are neither free nor in the tree"


def _memory(num_pages: int, *cached: list[int]) -> RequestMemory:
    """Pages of two tokens, four rows, and a tree that holds `cached`."""
    pool, rows = TokenToKVPool(num_pages=num_pages, page_size=2), ReqToTokenPool(4, 64)
    return RequestMemory(pool, rows, _tree_with(*cached, tree=RadixCache(pool, rows)))


def check_5(m: ModuleType) -> None:
    prefix, other = list(range(8)), list(range(100, 106))
    for promised, num_pages in ((0, 6), (5, 9)):
        memory = _memory(num_pages, prefix)
        tree, req = memory.tree, _req(0, [*prefix, 50, 51], max_new_tokens=6)  # 8 slots besides the prefix
        got_in = m.reserve(memory, req, tree.match_prefix(req.all_ids[:-1]), promised)
        assert not got_in, (
            f"8 more slots are needed, {memory.pool.free_slots} are free, {promised} of them promised, and the 8 of "
            "its own prefix cannot be evicted for it: it must not get in"
        )
        assert tree.protected_size == 0, "who does not get in must not leave a lock behind"
        assert (memory.rows.num_free, req.row) == (4, -1), "who does not get in has no row"

    memory = _memory(9, other, prefix)  # two pages are free, three more can be evicted
    tree, req = memory.tree, _req(0, [*prefix, 50, 51], max_new_tokens=6)
    match = tree.match_prefix(req.all_ids[:-1])
    assert m.reserve(memory, req, match, 0), "8 slots are needed, 4 are free and 6 can be evicted: it fits"
    assert (req.prefix_len, req.last_node) == (8, match.last_node), "memory.admit has not been called"
    tree.match_prefix(other)  # somebody else has asked for it: now the prefix is what was used longest ago
    memory.grow(req, 16)
    slots = memory.rows.req_to_token[req.row, :16].tolist()
    assert len(set(slots)) == 16, f"its own prefix was evicted: its row {slots} names slots twice"
    assert tree.protected_size == 8, "its path must stay locked, once"

    class Adder(PrefillAdder):
        def _reserve(self, req, match):
            return m.reserve(self.memory, req, match, self.promised)

    prompts = _prompts(8, 16)
    want = _answers(_engine(), prompts, 12)
    with patch.object(admission_module, "PrefillAdder", Adder):
        engine = _engine(pool=64)
        _same(_answers(engine, prompts[:1], 12), want[:1])  # leaves the shared prefix in the tree
        _same(_answers(engine, prompts, 12), want)
    _nothing_held(engine)


def check_6(m: ModuleType) -> None:
    memory = _memory(16)
    tree, rows, tables = memory.tree, memory.rows.req_to_token, {}
    tree.cache_unfinished_req = lambda req: m.cache_unfinished_req(tree, req)

    def send(req: Req) -> None:
        """What a rank makes of an update."""
        for row, first, pages in memory.page_updates([req]):
            tables.setdefault(row, {}).update({first + i: page for i, page in enumerate(pages)})

    shared = list(range(6))
    reqs = [_req(0, [*shared, 50]), _req(1, [*shared, 60, 61]), _req(2, [*shared, 60, 61, 62])]
    for req in reqs:  # all are computed before one of them is in the tree
        match = tree.match_prefix(req.all_ids[:-1])
        tree.inc_lock_ref(match.last_node)
        memory.admit(req, match)
        memory.grow(req, req.seq_len)
        send(req)
        req.kv_len = req.seq_len
    for req, free in zip(reqs, (3, 6, 10), strict=True):
        own = rows[req.row, : req.allocated_len].copy()
        tree.cache_unfinished_req(req)
        row, whole = rows[req.row], req.seq_len // 2 * 2
        match = tree.match_prefix(req.all_ids)
        assert len(match.slots) == whole, f"{len(match.slots)} tokens of request {req.rid} are in the tree, not {whole}"
        assert row[:whole].tolist() == match.slots.tolist(), f"the row of request {req.rid} must name the tree's slots"
        assert row[whole : req.allocated_len].tolist() == own[whole:].tolist(), "a page that is not full stays its own"
        assert memory.pool.num_free_pages == free, (
            f"{memory.pool.num_free_pages} pages are free after request {req.rid}, not {free}: its duplicates, once"
        )
        assert req.prefix_len == whole, f"prefix_len of request {req.rid} is {req.prefix_len}, not {whole}"
        assert req.last_node is match.last_node, "last_node is not the end of its new path"
        assert tree.protected_size == (6 if req is reqs[0] else 8), "the whole new path is locked"
        send(req)
        pages = (row[: req.allocated_len : 2] // 2).tolist()
        known = [tables[req.row][i] for i in range(len(pages))]
        assert known == pages, f"request {req.rid} lies on pages {pages}, but the ranks go on reading {known}"
    again = reqs[2]
    before = memory.pool.num_free_pages
    tree.cache_unfinished_req(again)
    assert memory.pool.num_free_pages == before, "handed over twice: what is the tree's must not be freed"
    for req in reqs:
        memory.finish(req)
    assert tree.protected_size == 0, "a lock is left: the old one goes when the new one is there"

    prompts = _prompts(6, 20) + _prompts(2, 9, seed=1)
    engine = _engine(disable_radix_cache=True)
    want = _answers(engine, prompts, 12)
    for chunk in (-1, 8):
        engine = _engine(chunked_prefill_size=chunk)
        engine.tree.cache_unfinished_req = lambda req, tree=engine.tree: m.cache_unfinished_req(tree, req)
        for _ in range(2):
            _same(_answers(engine, prompts, 12), want)
        _nothing_held(engine)


def check_7(m: ModuleType) -> None:
    for page_size in (1, 4):
        tree = _tree_with(list(range(12)), tree=RadixCache(TokenToKVPool(num_pages=16, page_size=page_size)))
        for prompt in ([*range(12), 99], list(range(12)), list(range(9)), list(range(4)), [99], [0]):
            slots, tokens = m.split_prompt(tree, list(prompt))
            assert len(tokens) > 0, f"of {len(prompt)} tokens none is computed: there is nothing to take logits from"
            assert len(slots) % page_size == 0, f"{len(slots)} cached tokens are not whole pages of {page_size}"
            cached = 0 if prompt == [99] else min(len(prompt) - 1, 12) // page_size * page_size
            assert len(slots) == cached, (
                f"{len(slots)} of {len(prompt)} tokens come from the cache, not {cached}, with pages of {page_size}"
            )
            assert list(tokens) == prompt[cached:], "what is not cached must be computed, in order"

    prompt, engine = _prompts(1, 20)[0][:20], _engine()
    (want,) = _answers(engine, [prompt], 1)
    slots, tokens = m.split_prompt(engine.tree, prompt)
    row = np.concatenate([slots, engine.pool.alloc(-(-len(tokens) // 4))])
    task = PrefillTask(
        0,
        (PageUpdate(3, 0, tuple((row[::4] // 4).tolist())),),
        (PrefillSequence(3, len(slots), len(tokens), 1),),
        tuple(tokens),
    )
    logits = engine.control.execute(task)
    assert logits.argmax(-1).tolist() == want, "the real model answers a cached prompt differently"


def check_8(m: ModuleType) -> None:
    ended, stops = [], frozenset({7})
    first, second = (_req(i, [1, 2, 3], max_new_tokens=5, stops=stops, kv_len=6) for i in range(2))
    for tokens in ([4, 4], [7, 5], [8, 7]):
        m.settle([first, second], tokens, lambda req: ended.append((req.rid, req.kv_len)))
    assert first.output_ids == [4, 7], f"behind the stop token 7 there is no answer: {first.output_ids}"
    assert second.output_ids == [4, 5, 7], f"the other request goes on: {second.output_ids}"
    assert [rid for rid, _ in ended] == [0, 1], (
        f"finish was called for {[rid for rid, _ in ended]}; once each, in order"
    )
    assert ended == [(0, 4), (1, 5)], f"(request, kv_len) at the end: {ended}; all tokens but the newest"

    class Late(TPScheduler):
        def _settle(self):
            step, self._queued = self._queued, None
            if step is None or step.drawn is None:
                return
            for req in step.requests:
                req.pending -= 1
            m.settle(step.requests, step.drawn.take().tokens, self._finish)
            self.running = [req for req in self.running if req.finish_reason is None]

        def _finish(self, req):
            self.memory.finish(req)
            self.outcome.report(req)

    prompts = _prompts(4, 10)
    free = _answers(_engine(), prompts, 16)
    stop = tuple(sorted({tokens[at] for tokens, at in zip(free, (3, 5, 8, 11), strict=True)}))
    plain, late = _engine(overlap=False), _engine(Late, overlap=True)
    want = _answers(plain, prompts, 16, stop)
    assert len({len(tokens) for tokens in want}) > 1, "the example has lost its point: all end together"
    _same(_answers(late, prompts, 16, stop), want)
    _nothing_held(late)
    assert late.tree.evictable_size == plain.tree.evictable_size, "the tree holds more or less than without overlap"
    _same(_answers(late, prompts, 16, stop), want)


def check_9(m: ModuleType) -> None:
    table = np.zeros((4, 16), dtype=np.int64)
    for row, pages in ((1, [5, 2, 9, 0]), (3, [7, 8, 0, 0])):
        table[row] = (np.array(pages)[:, None] * 4 + np.arange(4)).reshape(-1)
    a, b = _req(0, [1], row=1, allocated_len=12, sent_len=8), _req(1, [1], row=3, allocated_len=8)
    got = m.page_updates([a, b], table, 4)
    want = (PageUpdate(1, 2, (9,)), PageUpdate(3, 0, (7, 8)))
    assert tuple(got) == want, f"{got}, not {want}: row, index of the first new page, page ids"
    assert not m.page_updates([a, b], table, 4), "what was sent once is known"
    a.allocated_len, b.sent_len = 16, 4  # b goes on with other pages from its second one on
    want = (PageUpdate(1, 3, (0,)), PageUpdate(3, 1, (8,)))
    assert tuple(m.page_updates([a, b], table, 4)) == want, (
        "one page more for row 1, other ones for row 3 from page 1 on"
    )

    prompts, sizes, sent = _prompts(3, 0), [], {}
    want = _answers(_engine(), prompts, 40)
    engine = _engine()
    table, execute = engine.req_to_token.req_to_token, engine.control.execute
    engine.memory.page_updates = lambda reqs: tuple(m.page_updates(list(reqs), table, 4))

    def watch(task: PrefillTask | DecodeTask):
        if isinstance(task, DecodeTask):
            for row, first, pages in task.updates:
                for at, page in enumerate(pages, first):
                    assert sent.get((row, at)) != page, f"decode tasks say twice that page {at} of row {row} is {page}"
                    sent[row, at] = page
            sizes.append((len(encode(task)), HEADER + (2 + 4) * len(task.rows)))
        return execute(task)

    engine.control.execute = watch
    _same(_answers(engine, prompts, 40), want)
    assert all(size <= limit for size, limit in sizes), f"a decode task has {max(sizes)[0]} words: one page each is new"


def check_10(m: ModuleType) -> None:
    def req(rid: int, prompt: int, output: int) -> Req:
        return _req(rid, [1] * prompt, 40, output_ids=[2] * output)

    def play(reqs: list[Req], enough: int) -> tuple[list[int], list[int]]:
        """Room is there once `enough` tokens have been given back."""
        running, freed = list(reqs), []
        gone = m.retract(running, lambda: sum(r.seq_len for r in freed) < enough, freed.append)
        assert gone == freed, "those returned are those released, in this order"
        assert {r.rid for r in running}.isdisjoint(r.rid for r in gone), "who goes is no longer in `running`"
        assert len(running) + len(gone) == len(reqs), "nobody is lost"
        return [r.rid for r in gone], [r.rid for r in running]

    reqs = [req(0, 9, 8), req(1, 3, 2), req(2, 6, 5), req(3, 8, 2), req(4, 4, 9)]
    for enough, want, why in (
        (0, [], "there is room: nobody goes"),
        (5, [3], "3 and 1 have the fewest outputs, 3 the longer prompt; then there is room"),
        (11, [3, 1], "then 1"),
        (17, [3, 1, 2], "then 2"),
        (999, [3, 1, 2, 0], "the last one stays"),
    ):
        gone, left = play(reqs, enough)
        assert gone == want, f"{why}: {want}, not {gone}"
        assert left == [i for i in range(5) if i not in want], f"those who stay keep their order: {left}"
    assert play(reqs[:1], 999) == ([], [0]), "one alone stays in any case"

    def make_room():
        room = engine.retraction
        if room.lacks_room(1):
            engine._settle()
        if room.lacks_room(1):
            gone = m.retract(engine.running, lambda: room.lacks_room(RETRACT_DECODE_STEPS), engine.memory.release)
            engine.retractions += len(gone)
            engine.waiting = sorted(gone, key=lambda req: req.rid) + engine.waiting
            engine.new_token_ratio = 1.0

    prompts = _prompts(5, 4)
    want = _answers(_engine(), prompts, 30)
    engine = _engine(pool=72)
    engine.retraction.make_room = make_room
    engine.new_token_ratio = 0.1  # admit too many
    _same(_answers(engine, prompts, 30), want)
    assert engine.retractions > 0, "the pool was too small, but nobody went back to the queue"
    _nothing_held(engine)


CHECKS: dict[int, Callable[[ModuleType], None]] = {n: globals()[f"check_{n}"] for n in range(1, 11)}
