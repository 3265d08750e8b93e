"""Who gets into a prefill step, and with how many tokens: the adder alone, without a model."""

import pytest

from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.prefill_adder import CLIP_MAX_NEW_TOKENS, Answer, InBatchPrefix, PrefillAdder
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req
from ch07_sglang_radix.request_memory import RequestMemory
from common.sampling.params import SamplingParams


def memory(pages=100, page_size=4, rows=8):
    pool, rows = TokenToKVPool(num_pages=pages, page_size=page_size), ReqToTokenPool(rows, 10_000)
    return RequestMemory(pool, rows, RadixCache(pool, rows))


def req(rid, length, new=4, first=None):
    """A prompt that no other one begins like, or that begins with `first`."""
    ids = [*(first or ()), *(1000 * (rid + 1) + i for i in range(length))][:length]
    return Req(rid, None, ids, SamplingParams(max_new_tokens=new), 0)


def adder(memory, budget=64, promised=0.0, gates=()):
    return PrefillAdder(memory, budget, promised, [], 0.0, gates)


@pytest.mark.parametrize(("length", "computed", "chunked"), [(15, 15, False), (16, 16, False), (17, 16, True)])
def test_a_prompt_as_long_as_the_budget_is_no_chunk(length, computed, chunked):
    one, step = req(0, length), adder(memory(), budget=16)
    assert step.add(one) is Answer.ADDED
    assert step.batch == [(one, computed)]
    assert (step.chunked is one) == chunked
    assert step.budget == 16 - computed


@pytest.mark.parametrize("length", [16, 17], ids=["a whole prompt", "a chunk"])
def test_after_the_budget_is_spent_nobody_enters_and_nobody_is_asked(length):
    step = adder(memory(), budget=16)
    step.add(req(0, length))
    assert step.add(req(1, 1)) is Answer.FULL


def test_the_last_token_of_the_budget_is_one_too():
    step = adder(memory(page_size=1), budget=16)
    step.add(req(0, 15))
    assert step.add(req(1, 1)) is Answer.ADDED
    assert step.budget == 0


def test_what_is_left_of_the_budget_goes_to_the_next():
    one, two, step = req(0, 13), req(1, 40), adder(memory(), budget=24)
    step.add(one)
    assert step.add(two) is Answer.ADDED
    assert step.batch == [(one, 13), (two, 8)], "whole pages of the 11 that are left"
    assert step.budget == 3


@pytest.mark.parametrize(("left", "answer"), [(3, Answer.FULL), (4, Answer.ADDED), (5, Answer.ADDED)])
def test_a_chunk_is_a_page_at_least(left, answer):
    step = adder(memory(), budget=20 + left)
    step.add(req(0, 20))
    assert step.add(req(1, 30)) is answer


def test_what_fits_as_a_whole_may_be_less_than_a_page():
    step = adder(memory(), budget=20 + 3)
    step.add(req(0, 20))
    assert step.add(req(1, 3)) is Answer.ADDED
    assert step.chunked is None


@pytest.mark.parametrize(("length", "answer"), [(11, Answer.ADDED), (12, Answer.ADDED), (13, Answer.LATER)])
def test_beside_a_chunk_only_what_fits_as_a_whole(length, answer):
    long, step = req(0, 100), adder(memory(), budget=32)
    match = step.tree.match_prefix(long.matchable_ids)
    step.tree.inc_lock_ref(match.last_node)
    step.memory.admit(long, match)
    step.add_chunk(long, limit=20)
    assert (step.batch, step.chunked) == ([(long, 20)], long)
    assert step.add(req(1, length)) is answer


@pytest.mark.parametrize(("pages", "answer"), [(6, Answer.ADDED), (5, Answer.FULL)])
def test_the_whole_answer_must_find_room(pages, answer):
    """18 + 4 tokens are 6 pages of 4."""
    assert adder(memory(pages)).add(req(0, 18)) is answer


@pytest.mark.parametrize(("promised", "answer"), [(8, Answer.ADDED), (8.5, Answer.FULL)])
def test_what_the_running_ones_will_need_is_not_there_for_others(promised, answer):
    step = adder(memory(8), promised=promised)
    assert step.add(req(0, 18)) is answer
    assert step.memory.pool.num_free_pages == (3 if answer is Answer.ADDED else 8)
    assert step.memory.rows.num_free == (7 if answer is Answer.ADDED else 8)


def test_what_this_step_has_promised_counts_too():
    step = adder(memory(10))
    assert step.add(req(0, 8, new=12)) is Answer.ADDED  # takes two pages, and will need three more
    assert step.promised == 12
    assert step.add(req(1, 16, new=4)) is Answer.ADDED
    assert step.add(req(2, 3, new=1)) is Answer.FULL, "4 pages are free and all are promised"


def test_no_more_than_4096_tokens_are_reserved_for_an_answer():
    most = CLIP_MAX_NEW_TOKENS // 4
    assert adder(memory(most + 1)).add(req(0, 4, new=5000)) is Answer.ADDED
    assert adder(memory(most)).add(req(0, 4, new=5000)) is Answer.FULL


def test_without_a_row_nobody_enters():
    step = adder(memory(rows=1))
    assert [step.add(req(i, 4)) for i in range(2)] == [Answer.ADDED, Answer.FULL]


def test_who_is_refused_leaves_no_lock_behind():
    one = memory(8, page_size=1)
    one.tree.insert(list(range(6)), one.pool.alloc(6))
    assert adder(one).add(req(0, 9, new=4, first=range(6))) is Answer.FULL
    assert one.tree.evictable_size == 6


def test_locking_what_it_found_leaves_less_to_evict():
    """6 slots in the tree and 4 free: 6 found + 5 more do not fit, although 10 could be had before."""
    one = memory(10, page_size=1)
    one.tree.insert(list(range(6)), one.pool.alloc(6))
    assert adder(one).add(req(0, 8, new=3, first=range(6))) is Answer.FULL
    assert adder(one).add(req(0, 8, new=2, first=range(6))) is Answer.ADDED


@pytest.mark.parametrize(("shared", "answer"), [(31, Answer.ADDED), (32, Answer.LATER)])
def test_32_tokens_that_this_step_computes_are_worth_a_step(shared, answer):
    step, first = adder(memory(200, page_size=1), budget=200), list(range(shared))
    step.add(req(0, 50, first=first))
    assert step.add(req(1, 50, first=first)) is answer


def test_what_the_tree_has_already_is_not_waited_for():
    one, first = memory(200, page_size=1), list(range(40))
    one.tree.insert(first[:9], one.pool.alloc(9))
    step = adder(one, budget=200)
    step.add(req(0, 50, first=first))
    assert step.add(req(1, 50, first=first)) is Answer.ADDED, "40 - 9 = 31 tokens are to be had"
    gate = InBatchPrefix(1, disable=False)
    gate.computes(req(0, 40, first=first), 40)
    assert not gate(req(1, 50, first=first), 8)
    assert gate(req(1, 50, first=first), 9)


def test_cached_tokens_are_those_of_the_first_time():
    one = memory(page_size=1)
    again = req(0, 9)
    step = adder(one)
    step.add(again)
    assert again.cached_tokens == 0
    one.tree.insert(again.prompt_ids[:5], one.pool.alloc(5))
    one.release(again)
    adder(one).add(again)
    assert (again.cached_tokens, again.prefix_len) == (0, 5)


@pytest.mark.parametrize(("share", "left"), [(0.0, 32), (0.25, 24)])
def test_a_chunk_leaves_room_for_small_requests(share, left):
    """As much as they need, a quarter of the step at most."""
    small, long = req(1, 8), req(0, 100)
    step = PrefillAdder(memory(), 32, 0.0, [long, small], share)
    step.add(long)
    assert step.batch == [(long, left)]
    alone = PrefillAdder(memory(), 32, 0.0, [long], share)
    alone.add(req(2, 100))
    assert alone.batch[0][1] == 32, "nobody small waits"


def test_another_namespace_shares_nothing():
    gate, first = InBatchPrefix(1, disable=False), list(range(40))
    gate.computes(req(0, 50, first=first), 50)
    other = Req(1, None, [*first, 7], SamplingParams(max_new_tokens=1), 0, extra_key="adapter")
    assert gate(other, 0)


def test_what_a_step_computes_in_part_is_shared_in_part():
    gate, head = InBatchPrefix(1, disable=False), list(range(60))
    gate.computes(req(0, 60, first=head), 20)
    assert gate(req(1, 61, first=head), 0)
    gate.computes(req(0, 60, first=head), 33)
    assert not gate(req(1, 61, first=head), 0)


def test_a_chunk_ends_at_a_page_s_end_and_leaves_the_rest_to_others():
    one, long = memory(), req(0, 40)
    adder(one, budget=10).add(long)
    long.kv_len += 8
    step = adder(one, budget=20)
    step.add_chunk(long, limit=13)
    assert (step.batch, step.budget) == ([(long, 12)], 8)
    long.kv_len += 12
    step = adder(one, budget=20)
    step.add_chunk(long, limit=None)
    assert (step.batch, step.chunked) == ([(long, 20)], None)


def test_a_closed_gate_holds_its_request_and_the_next_one_is_asked():
    asked = []
    step = adder(memory(), gates=[lambda one, matched: asked.append((one.rid, matched)) or one.rid != 0])
    assert [step.add(req(0, 9)), step.add(req(1, 9))] == [Answer.HELD, Answer.ADDED]
    assert asked == [(0, 0), (1, 0)]
    assert [one.rid for one, _ in step.batch] == [1]
