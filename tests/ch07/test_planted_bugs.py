"""Bugs planted on purpose: each must be caught, by the invariant check or by the pools themselves.

The same run without a bug is clean. Each bug is one that somebody could write: a line forgotten, a number off by one.
"""

import numpy as np
import pytest

from ch07_sglang_radix.invariants import InvariantError
from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request_memory import RequestMemory
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.test_scheduler import make

SHARED = list(range(40, 64))


def run() -> None:
    """Shared and equal prompts, chunks, eviction, retraction, an abort, all in a pool of 28 pages."""
    scheduler = make(TINY_QWEN_PATH, page_size=4, pool=112, chunked_prefill_size=16, overlap=True)
    scheduler.new_token_ratio = 0.1
    prompts = [SHARED + [i] * 9 for i in (1, 2, 1)] + [[7] * 20, SHARED[:12] + [8] * 7, SHARED, SHARED]

    def arrivals(step: int) -> bool:
        if step % 3 == 0 and prompts:
            for _ in range(2):
                if prompts:
                    params = SamplingParams(max_new_tokens=14, ignore_eos=True)
                    scheduler.add_request(input_ids=prompts.pop(0), sampling_params=params)
        if step == 9:
            scheduler.abort(scheduler.running[-1].rid)
        return bool(prompts)

    scheduler.process_requests(arrivals)
    assert scheduler.retractions > 0
    assert scheduler.tree.evicted > 0


def test_without_a_bug_it_runs():
    run()


def leaked_page(patch):
    """Who is retracted or aborted keeps its pages."""

    def release(self, req):
        self.tree.dec_lock_ref(req.last_node)
        self.rows.free(req.row)
        req.row, req.last_node = -1, None
        req.prefix_len = req.kv_len = req.allocated_len = req.sent_len = 0

    patch(RequestMemory, "release", release)


def double_free(patch):
    """The tail of a finished request goes back twice."""
    finish = RadixCache.cache_finished_req

    def twice(self, req):
        tail = self.req_to_token.req_to_token[req.row, req.allocated_len - self.page_size : req.allocated_len].copy()
        finish(self, req)
        self.pool.free(tail)

    patch(RadixCache, "cache_finished_req", twice)


def missing_lock(patch):
    """A request goes on with the tree's slots and forgets to lock them."""
    unfinished, lock = RadixCache.cache_unfinished_req, RadixCache.inc_lock_ref

    def without(self, req):
        self.inc_lock_ref = lambda node: None
        unfinished(self, req)
        self.inc_lock_ref = lock.__get__(self)

    patch(RadixCache, "cache_unfinished_req", without)


def lock_kept(patch):
    """Nobody ever unlocks."""
    patch(RadixCache, "dec_lock_ref", lambda self, node: None)


def split_without_lock(patch):
    """The upper half of a split node does not inherit the lock."""
    split = RadixCache._split

    def loses(self, node, n):
        upper = split(self, node, n)
        upper.lock_ref = 0
        return upper

    patch(RadixCache, "_split", loses)


def split_in_the_wrong_place(patch):
    """The slots are cut one page behind the tokens."""
    split = RadixCache._split

    def wrong(self, node, n):
        upper, lower = node.value[: n + self.page_size].copy(), node.value[n:].copy()
        top = split(self, node, n)
        top.value, node.value = upper, lower
        return top

    patch(RadixCache, "_split", wrong)


def duplicates_kept(patch):
    """Pages that the tree had already are not given back."""
    patch(RadixCache, "_free_duplicates", lambda self, req, row, known: None)


def stale_row(patch):
    """The duplicates are freed, and the row still points at them."""
    unfinished = RadixCache.cache_unfinished_req

    def stale(self, req):
        row = self.req_to_token.req_to_token[req.row]
        before = row[: req.kv_len].copy()
        unfinished(self, req)
        row[: len(before)] = before

    patch(RadixCache, "cache_unfinished_req", stale)


def stale_page_table(patch):
    """The row is right, but the ranks are not told."""
    free = RadixCache._free_duplicates

    def silent(self, req, row, known):
        sent = req.sent_len
        free(self, req, row, known)
        req.sent_len = sent

    patch(RadixCache, "_free_duplicates", silent)


def eviction_of_what_is_locked(patch):
    """A locked leaf is taken for a free one."""
    patch(RadixCache, "_evictable", lambda self, node: node.parent is not None and not node.children)


def wrong_count(patch):
    """A new node is not counted as evictable."""
    insert = RadixCache.insert

    def uncounted(self, *args, **kwargs):
        before = self.evictable_size
        known = insert(self, *args, **kwargs)
        self.evictable_size = before
        return known

    patch(RadixCache, "insert", uncounted)


def page_given_twice(patch):
    """The stack of free pages forgets to move its top."""
    alloc = TokenToKVPool.alloc

    def twice(self, num_pages):
        slots = alloc(self, num_pages)
        if slots is not None and num_pages == 2:
            self._num_free += 1
        return slots

    patch(TokenToKVPool, "alloc", twice)


def row_kept(patch):
    """A finished request keeps its row of req_to_token."""
    patch(ReqToTokenPool, "free", lambda self, row: None)


BUGS = [
    leaked_page, double_free, missing_lock, lock_kept, split_without_lock, split_in_the_wrong_place, duplicates_kept,
    stale_row, stale_page_table, eviction_of_what_is_locked, wrong_count, page_given_twice, row_kept,
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(bug, monkeypatch):
    bug(monkeypatch.setattr)
    with pytest.raises((InvariantError, ValueError)) as caught:
        run()
    assert any(word in str(caught.value) for word in ("page", "node", "request", "row", "slot", "tree"))
    assert any(character.isdigit() for character in str(caught.value)), "it says which"


def test_the_check_looks_at_slots_too(checkpoint):
    """Slots that are not whole pages, in a node nobody has touched."""
    scheduler = make(checkpoint("qwen2"), page_size=4, pool=112)
    scheduler.add_request(input_ids=list(range(9)), max_new_tokens=1)
    scheduler.process_requests()
    (node,) = scheduler.tree.nodes()
    node.value = np.roll(node.value, 1)
    scheduler.add_request(input_ids=[500] * 9, max_new_tokens=1)
    with pytest.raises(InvariantError, match="its slots are not whole pages"):
        scheduler.process_requests()
