"""What a request holds while it is admitted."""

import pytest

from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory
from ch07_sglang_radix.tasks import PageUpdate
from common.sampling.params import SamplingParams


def memory_of(pages, page_size):
    pool, rows = TokenToKVPool(num_pages=pages, page_size=page_size), ReqToTokenPool(8, 1024)
    return RequestMemory(pool, rows, RadixCache(pool, rows))


def admitted(memory, rid, prompt, new=8):
    req = Req(rid, None, list(prompt), SamplingParams(max_new_tokens=new), 0)
    match = memory.tree.match_prefix(req.matchable_ids)
    memory.tree.inc_lock_ref(match.last_node)
    memory.admit(req, match)
    return req


def test_a_request_holds_a_row_a_locked_path_and_pages_and_gives_all_of_it_back():
    memory = memory_of(pages=10, page_size=4)
    memory.tree.insert(list(range(8)), memory.pool.alloc(2))
    req = admitted(memory, 0, range(13))
    memory.grow(req, 13)
    assert (req.prefix_len, req.kv_len, req.allocated_len) == (8, 8, 16)
    assert memory.page_updates([req]) == (PageUpdate(req.row, 0, (0, 1, 2, 3)),)
    assert memory.page_updates([req]) == (), "the ranks know them"
    assert (memory.tree.protected_size, memory.rows.num_free, memory.pool.num_free_pages) == (8, 7, 6)
    memory.release(req)
    assert (memory.tree.protected_size, memory.rows.num_free, memory.pool.num_free_pages) == (0, 8, 8)
    assert (req.row, req.last_node, req.prefix_len, req.kv_len, req.allocated_len, req.sent_len) == (
        -1,
        None,
        0,
        0,
        0,
        0,
    )


def test_a_reserve_is_given_back_but_for_the_page_that_is_begun_and_is_told_again_when_it_is_taken():
    memory = memory_of(pages=10, page_size=4)
    req = admitted(memory, 0, range(6))
    memory.grow(req, 17)
    req.kv_len = 6
    assert memory.page_updates([req]) == (PageUpdate(req.row, 0, (0, 1, 2, 3, 4)),)
    memory.give_back([req])
    assert (req.allocated_len, memory.pool.num_free_pages) == (8, 8)
    memory.give_back([req])
    assert memory.pool.num_free_pages == 8
    assert len(memory.take(1)) == 4  # somebody else's now
    memory.grow(req, 9)
    (update,) = memory.page_updates([req])
    assert (update.first, len(update.pages)) == (2, 1)


def test_a_page_more_for_each_is_one_page_for_each():
    memory = memory_of(pages=10, page_size=4)
    reqs = [admitted(memory, rid, [100 * rid + i for i in range(4)]) for rid in range(3)]
    for req in reqs:
        memory.grow(req, 4)
    memory.grow_by_a_page([])
    memory.grow_by_a_page(reqs)
    assert [req.allocated_len for req in reqs] == [8, 8, 8]
    pages = [update.pages for update in memory.page_updates(reqs)]
    assert pages == [(0, 3), (1, 4), (2, 5)]


@pytest.mark.parametrize(("kv_len", "steps", "slots"), [(5, 1, 0), (8, 1, 4), (8, 4, 4), (8, 5, 4), (11, 20, 4)])
def test_slots_are_lacked_by_whole_pages_and_only_to_the_end_of_the_answer(kv_len, steps, slots):
    """A prompt of 4 and 8 more tokens, pages of 4, two of them there."""
    memory = memory_of(pages=10, page_size=4)
    req = admitted(memory, 0, range(4), new=8)
    memory.grow(req, 8)
    req.kv_len = kv_len
    assert memory.slots_needed([req], steps) == slots
